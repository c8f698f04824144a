"""Kernels over block tables compile for every supported architecture, once for all batches and lengths, and fit it."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.decay import Decay
from foxlm.kernels.pruning.key_stats import KeySummary
from kernel_device import INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from ahead_of_time import compiling_only, specializations
from foxlm.kernels.block_tables.append import PagePools, append_step
from foxlm.kernels.block_tables.requests import Requests, find_writers
from foxlm.kernels.block_tables.shift import previous_states
from foxlm.kernels.portable.decode import decode_attention

HEADS, KV_HEADS, GATES = 8, 4, 8
# `make test` compiles for Hopper, `make test-slow` for the others.
ARCHITECTURES = [pytest.param(x, marks=[] if x == 90 else pytest.mark.slow) for x in (80, 86, 89, 90, 100)]


def step(requests: int, single: int, longest: int, table: int, head_dim: int, dtype: torch.dtype) -> None:
    """A step of so many requests, of which ``single`` have one token, over pages that are parts of larger ones."""

    def pool(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(3, 32 + int(torch.Size(shape).numel()), dtype=dtype)[:, 16:-16].unflatten(1, shape)

    tokens = single + longest * (requests - single)
    rows, lengths = torch.empty(requests + 1, dtype=torch.int32), torch.empty(requests, dtype=torch.int32)
    pages = torch.empty(requests, table, dtype=torch.int32)
    keys, sums = pool(KV_HEADS, 64, head_dim, dtype=dtype), pool(GATES, 64, dtype=torch.float64)
    firsts, decays = pool(GATES, dtype=torch.int64), pool(GATES, dtype=torch.float64)
    pools = PagePools(keys, keys, sums, firsts, decays, pool(KV_HEADS, dtype=torch.float32))
    of_step = Requests(rows, lengths, pages, single, longest, find_writers(rows, lengths, pages))
    k = torch.empty(tokens, KV_HEADS, head_dim, dtype=dtype)
    previous_states(k, pool(KV_HEADS, head_dim, dtype=dtype), of_step)
    stands_for = torch.empty(tokens, dtype=torch.bool)
    c, first = append_step(k, k, torch.empty(tokens, GATES), of_step, pools, stands_for)
    if single:
        q, last = torch.empty(single, 1, HEADS, head_dim, dtype=dtype), torch.empty(single, 1, dtype=torch.int64)
        decay = Decay(c[:, :single].T[..., None], sums, first[:, :single].T[..., None], last)
        summary = KeySummary(sums[:, :, -1:], pools.log_decays[..., None], pools.largest[..., None])
        options: dict[str, Any] = {"pages": pages[:single], "summary": summary, "eps": 1e-3}
        decode_attention(q, keys, keys, decay, scale=0.125, **options)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (256, torch.float32)])
def test_kernels_compile(head_dim: int, dtype: torch.dtype, capability: int) -> None:
    with compiling_only(capability) as kernels:
        step(3, 2, 100, 40, head_dim, dtype)
    names = {kernel.metadata.name for kernel in kernels}
    assert names == {
        "_find_writers_kernel",
        "_previous_states_kernel",
        "_append_keys_kernel",
        "_append_gates_kernel",
        "_decode_search_kernel",
        "_decode_attend_kernel",
    }
    assert all(kernel.metadata.target.arch == capability for kernel in kernels)


def test_other_steps_compile_nothing() -> None:
    """One kernel for a request's one token and one for many, whatever the batch, the lengths and the table."""
    with specializations(90) as found:
        for requests, single, longest, table in ((1, 1, 1, 16), (2, 0, 100, 16), (7, 3, 33, 17), (64, 64, 1, 256)):
            step(requests, single, longest, table, 64, torch.bfloat16)
    assert Counter(name for name, _ in found) == {
        "_find_writers_kernel": 1,
        "_previous_states_kernel": 2,
        "_append_keys_kernel": 2,
        "_append_gates_kernel": 2,
        "_decode_search_kernel": 1,
        "_decode_attend_kernel": 1,
    }
