"""Random operations on every cache, each step compared with a run without one (see `cached_run`)."""

import copy
import functools
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from cached_run import CachedRun
from foxlm import FoxPagedCache
from fuzz import fuzz
from models import VARIANTS, tiny_model

# Of the attention weight of a row; logits move by no more than ten times that.
EPS = 1e-4
ROOM = 60
LONG = 700


@functools.cache
def model_of(variant: str, forgetful: bool) -> Any:
    model = tiny_model(variant, acp_eps=EPS if forgetful else None, max_position_embeddings=1024)
    for name, parameter in model.named_parameters():
        if forgetful and name.endswith("forget_gate.bias"):
            parameter.data.fill_(-0.5)
    return model


def make(kind: str, rng: random.Random) -> tuple[CachedRun, int]:
    """A new cache of two sequences, and how many tokens it may take."""
    model = model_of(rng.choice(sorted(VARIANTS)), kind == "freeing")
    batch, config = rng.randint(1, 3), model.config
    if kind == "dynamic":
        return CachedRun(model, DynamicCache(config=config) if rng.random() < 0.8 else DynamicCache(), batch), ROOM
    if kind == "static":
        return CachedRun(model, StaticCache(config=config, max_cache_len=ROOM), batch), ROOM
    room = LONG if kind == "freeing" else ROOM
    run = CachedRun(model, FoxPagedCache(config, room), batch)
    if kind == "freeing":
        run.tolerance = max(run.tolerance, 10 * EPS)
    return run, room


def extend(run: CachedRun, room: int, rng: random.Random) -> None:
    batch, length = run.ids.shape
    count = 1 if rng.random() < 0.4 else rng.randint(1, room // 5)
    if length + count > room:
        if isinstance(run.cache, DynamicCache):
            return
        with pytest.raises(ValueError, match=f"has room for {room}"):
            copy.copy(run).extend(count)
        return
    padding = (torch.rand(batch, count) < 0.3).long() if rng.random() < 0.3 else None
    run.extend(count, padding)


def operate(run: CachedRun, kind: str, rng: random.Random) -> None:
    """One operation that is not feeding tokens."""
    batch, length = run.ids.shape
    rows = [rng.randrange(batch) for _ in range(batch)]
    names = ["reorder", "offload", "reset", "copy"]
    if kind != "static":
        names += ["select", "repeat", "crop", "crop"]
    name = rng.choice(names)
    if name == "reorder":
        run.reorder(rows)
    elif name == "select":
        run.select(rows[: rng.randint(1, batch)])
    elif name == "repeat":
        if batch <= 3:
            run.repeat(2)
    elif name == "copy":
        run.cache = copy.deepcopy(run.cache)
    elif name == "crop":
        count = rng.choice([0, 1, rng.randint(0, length), length])
        try:
            run.crop(count)
        except RuntimeError as error:
            # More than can be rolled back: refused, and nothing is changed.
            assert "can be cropped now" in str(error) or "activate_past_recording" in str(error)
            assert int(run.cache.get_seq_length()) == length
    else:
        getattr(run, name)()


def one_case(kind: str, rng: random.Random) -> None:
    run, room = make(kind, rng)
    for _ in range(rng.randint(3, 10)):
        if run.ids.shape[1] == 0 or rng.random() < 0.6:
            extend(run, room, rng)
        else:
            operate(run, kind, rng)
    extend(run, room, rng)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["dynamic", "static", "paged", "freeing"])
def test_any_operations(kind: str) -> None:
    fuzz(functools.partial(one_case, kind))
