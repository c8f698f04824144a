"""lm-eval's scores of a FoX do not depend on pruning, batches and their padding, or the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foxlm.evaluation.lm_eval.model import as_lm_eval
from foxlm.evaluation.loading import load_model, load_tokenizer
from foxlm.kernels import backends
from foxlm.kernels.decay import Decay
from foxlm.kernels.reference import reference_attention
from foxlm.modeling import attention_implementations as attention_fox
from foxlm.modeling.cache.paged import PagedForgettingLayer
from lm_eval_models import generated, likelihoods, save_fox

pytest.importorskip("lm_eval")
TOLERANCE = 1e-4
NO_CACHE = {"use_cache": False}


def harness(folder: Path, batch_size: int = 3, **options: Any) -> Any:
    model = load_model(str(folder), device="cpu", **options)
    return as_lm_eval(model, load_tokenizer(str(folder)), batch_size=batch_size, max_length=512)


def differ(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fox(tmp_path_factory.mktemp("fox"))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose gates forget within a few tokens, so that much can be pruned."""
    return save_fox(tmp_path_factory.mktemp("forgetful"), decay_time_min=0.3, decay_time_max=0.5, acp_eps=1e-6)


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Keys that pruning skips in each call of attention, which the model takes for a GPU's kernels."""
    seen: list[int] = []
    prune = attention_fox.prune

    def counting(decay: Decay, *args: Any, **kwargs: Any) -> Decay:
        pruned = prune(decay, *args, **kwargs)
        seen.append(int((pruned.kv_start - decay.kv_start).sum()))
        return pruned

    def attend(*args: Any, **kwargs: Any) -> Any:
        return reference_attention(*args, **kwargs)

    monkeypatch.setattr(attention_fox, "prune", counting)
    monkeypatch.setattr(backends, "backend_of", lambda q: backends.PYTORCH._replace(attention=attend))
    return seen


@pytest.mark.parametrize("rule", ["paper", "tight"])
def test_scores_are_the_same_with_pruning_and_without(forgetful: Path, rule: str, skipped: list[int]) -> None:
    exact = harness(forgetful, eps=0)
    expected, text = likelihoods(exact), generated(exact)
    assert not skipped
    pruned = harness(forgetful, eps="model", rule=rule)
    assert differ(likelihoods(pruned), expected) < TOLERANCE
    assert any(skipped), "nothing was pruned"
    skipped.clear()
    assert generated(pruned) == text
    assert any(skipped), "nothing was pruned"


def test_pruning_too_much_shows(forgetful: Path, skipped: list[int]) -> None:
    """Negative control of the test above."""
    assert differ(likelihoods(harness(forgetful, eps=0.9)), likelihoods(harness(forgetful, eps=0))) > TOLERANCE


def test_generation_is_the_same_when_keys_are_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evicted: list[int] = []
    first_needed = PagedForgettingLayer.first_needed

    def counting(layer: PagedForgettingLayer, length: int, c: torch.Tensor | None = None) -> torch.Tensor | None:
        start = first_needed(layer, length, c)
        evicted.append(0 if start is None else int(start.sum()))
        return start

    monkeypatch.setattr(PagedForgettingLayer, "first_needed", counting)
    fields = {"decay_time_min": 0.3, "decay_time_max": 0.5, "acp_eps": 1e-6}
    prompts = ["import os\n" * 20, "a"]
    plain = generated(harness(save_fox(tmp_path / "plain", **fields)), prompts=prompts)
    assert not evicted
    assert generated(harness(save_fox(tmp_path / "freeing", free_dead_cache=True, **fields)), prompts=prompts) == plain
    assert any(evicted), "nothing was evicted"


def test_scores_are_the_same_in_batches_and_one_by_one(folder: Path) -> None:
    alone, together = harness(folder, 1), harness(folder, 4)
    assert differ(likelihoods(together), likelihoods(alone)) < TOLERANCE
    assert generated(together) == generated(alone)


def test_padding_that_is_not_masked_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: prompts that are padded on the left without a mask."""
    alone, together = generated(harness(folder, 1)), harness(folder, 4)
    encode, padded = together.tok_batch_encode, []

    def unmasked(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = encode(*args, **kwargs)
        padded.append(not mask[:, 0].all())
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(together, "tok_batch_encode", unmasked)
    assert generated(together) != alone
    assert any(padded)


def test_padding_on_the_wrong_side_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: likelihoods are padded on the right because nothing masks them."""
    from lm_eval.models import huggingface

    pad, sides = huggingface.pad_and_concat, []
    expected = likelihoods(harness(folder, 1))

    def left(length: int, tensors: list, padding_side: str = "right") -> torch.Tensor:
        sides.append(padding_side)
        return pad(length, tensors, padding_side="left")

    monkeypatch.setattr(huggingface, "pad_and_concat", left)
    assert differ(likelihoods(harness(folder, 4)), expected) > TOLERANCE
    assert set(sides) == {"right"}


def test_generation_is_the_same_with_a_cache_and_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: dict[bool, list[int]] = {True: [], False: []}
    texts = {}
    for cache, seen in lengths.items():
        lm = harness(folder)
        if not cache:
            # lm-eval always asks for one.
            generate = lm.model.generate
            monkeypatch.setattr(lm.model, "generate", lambda *x, generate=generate, **y: generate(*x, **y | NO_CACHE))
        lm.model.model.embed_tokens.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
        texts[cache] = generated(lm)
    assert texts[True] == texts[False]
    assert min(lengths[True]) == 1, "there was no cache"
    assert min(lengths[False]) > 1, "there was a cache"


@pytest.mark.gpu
def test_scores_are_the_same_with_pruning_on_a_gpu(forgetful: Path) -> None:
    scores, texts = [], []
    for eps in (0, 1e-6):
        model = load_model(str(forgetful), device="cuda", dtype="float32", eps=eps)
        lm = as_lm_eval(model, load_tokenizer(str(forgetful)), batch_size=3, max_length=512)
        scores.append(likelihoods(lm))
        texts.append(generated(lm))
    assert differ(*scores) < 1e-3
    assert texts[0] == texts[1]
