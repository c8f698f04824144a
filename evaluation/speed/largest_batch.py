"""`foxlm bench decode --largest-batch`: how many sequences fit the device, by cache."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .bars import largest_batch_bars
from .decode import DecodeRecipe, Models, kv_bytes, rounded_up
from .runner import Record, failure
from .sessions import DECODERS, Decoder, Session, greedy_step
from .timing import release_memory, synchronize

_MOST = {"cuda": 256, "cpu": 2}
_STEPS = 8


def run_largest_batch(models: Models, recipe: DecodeRecipe) -> Record:
    """The largest batches, up to 256 and to within 1/16, that fit the device with a static and with a paged cache.

    Returns:
        ``tokens`` of each sequence; ``most``, where the search stops; ``static`` and ``paged``, each with ``status``
        and where it was measured ``batch``; ``bars``.
    """
    # Only pages that pruning frees can save memory: both prune alike.
    static, paged = (one for one in DECODERS if one.cache in ("static", "paged") and one.rule == "tight")
    record: Record = {"tokens": recipe.tokens, "most": _MOST[recipe.device]}
    guess = _static_batch(models["foxlm"].config, recipe)
    for decoder in (static, paged):
        record[decoder.cache] = _largest_batch(decoder, models["foxlm"], recipe, record["most"], guess)
        guess = 2 * record[decoder.cache].get("batch", guess)
    return record | {"bars": largest_batch_bars(*(record[one.cache].get("batch", 0) for one in (paged, static)))}


def _static_batch(config: Any, recipe: DecodeRecipe) -> int:
    """How many sequences' keys and values would fill what is free of the device."""
    if recipe.device == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info()
    return max(1, free // kv_bytes(config, recipe.tokens))


def _largest_batch(decoder: Decoder, model: PreTrainedModel, recipe: DecodeRecipe, most: int, guess: int) -> Record:
    record: Record = {"name": decoder.name}

    def fits(batch: int) -> bool:
        done = _survives(decoder, model, batch, recipe)
        release_memory(recipe.device)
        return done

    try:
        record |= {"status": "measured", "batch": largest(fits, most, guess)}
    except Exception as error:
        record |= failure(error)
    release_memory(recipe.device)
    return record


def largest(fits: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest number up to ``most`` that ``fits``, to within 1/16, searched for from ``guess``; 0 for none."""
    low, high = 0, min(guess, most)
    while fits(high):
        low = high
        if low == most:
            return low
        high = min(2 * low, most)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _survives(decoder: Decoder, model: PreTrainedModel, batch: int, recipe: DecodeRecipe) -> bool:
    """Whether a context and some steps fit into memory; not compiled, which would take longer and needs no less."""
    try:
        length = rounded_up(recipe.tokens + _STEPS)
        session = Session(decoder, model, greedy_step, batch, length)
        session.fill(recipe.workload.ids(model.config.vocab_size, batch, recipe.tokens))
        session.advance(_STEPS)
        synchronize(recipe.device)
    except torch.OutOfMemoryError:
        return False
    return True
