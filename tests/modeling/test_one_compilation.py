"""Other lengths, batches and cache sizes launch the kernels that are compiled already, in all that a model does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from foxlm import FoxConfig, FoxForCausalLM, FoxPagedCache
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from foxlm.modeling.cache.page_pool import PagePool
from kernel_device import INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from ahead_of_time import specializations

CONFIG = FoxConfig.preset("pro-125m", num_hidden_layers=1, vocab_size=512)


def tokens(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % CONFIG.vocab_size


def train(batch: int, length: int) -> None:
    ids = tokens(batch, length)
    FoxForCausalLM(CONFIG).bfloat16().train()(ids, labels=ids, use_cache=False).loss.backward()


def decoding(cache: str, padded: bool) -> Callable[[int, int], None]:
    def decode(batch: int, length: int) -> None:
        ids = tokens(batch, length)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :5] = 0
        room = length + 37 if length % 2 else 2 * length
        made: dict[str, Callable[[], Any]] = {
            "dynamic": lambda: None,
            "static": lambda: StaticCache(config=CONFIG, max_cache_len=room),
            "paged": lambda: FoxPagedCache(CONFIG, max_cache_len=room),
        }
        # A new model each time: for one that has seen a step, `generate` captures the next of its kind.
        options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "disable_compile": True}
        FoxForCausalLM(CONFIG).bfloat16().eval().generate(ids, attention_mask=mask, cache=made[cache](), **options)

    return decode


CASES = {"train": train} | {
    f"{cache}{', padded' if padded else ''}": decoding(cache, padded)
    for cache in ("dynamic", "static", "paged")
    for padded in (False, True)
}


@pytest.mark.parametrize("what", CASES)
def test_other_sizes_compile_nothing(what, monkeypatch):
    # Nothing runs, so that whatever was in memory would be read as numbers of pages.
    take_counts = PagePool.take_counts
    monkeypatch.setattr(PagePool, "take_counts", lambda pool, free, missing: take_counts(pool, 0, 0))
    run, (first, *others) = CASES[what], [(2, 128), (3, 201), (2, 1040), (16, 100)]
    with assume_gpu(GPU((9, 0), 132)), specializations(90) as found:
        run(*first)
        if "padded" not in what:
            # A token of one sequence is multiplied by a kernel of its own.
            run(1, 128)
            others.append((1, 67))
        compiled = set(found)
        for batch, length in others:
            run(batch, length)
    assert len(compiled) >= 14
    assert sorted(name for name, _ in found - compiled) == []
