"""A kernel is compiled once: not again for another length, batch or cache."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_inputs import attention, draw_inputs, output_and_gradients
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.decay import Decay
from foxlm.kernels.devices import GPU, assume_gpu
from foxlm.kernels.pruning.key_stats import KeySummary
from kernel_device import INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from ahead_of_time import specializations
from foxlm.kernels.portable.decode import decode_attention
from foxlm.kernels.triton_common import HAS_GLUON

# Batch, keys and queries: even and odd, multiples of 16 and of a block and not, one chunk and several.
SHAPES = [
    (1, 1000, 1000),
    (1, 1024, 1024),
    (2, 1025, 1025),
    (3, 130, 130),
    (1, 4096, 4096),
    (16, 47, 47),
    (1, 1025, 37),
]


@pytest.mark.parametrize("rule", ["measured", "paper"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("hopper", [True, False])
def test_other_lengths_and_batches_compile_nothing(hopper, head_dim, rule):
    if hopper and not HAS_GLUON:
        pytest.skip("needs Gluon's compiler")
    capability = (9, 0) if hopper else (10, 0)
    with assume_gpu(GPU(capability, 132)), specializations(10 * capability[0]) as found:
        for batch, keys, queries in SHAPES:
            inputs = draw_inputs(keys, queries, batch=batch, heads=(4, 2, 4), head_dim=head_dim, dtype=torch.bfloat16)
            output_and_gradients(attention, inputs, eps=1e-3, rule=rule)
    kernels = Counter(name for name, _ in found)
    assert ("hopper_forward_kernel" in kernels) == hopper
    # But for Hopper with heads of 64, blocks have other sizes forward and backward.
    several = set() if hopper and head_dim == 64 else {"_describe_blocks_kernel"}
    assert {name for name, count in kernels.items() if count > 1} <= several
    assert kernels["_describe_blocks_kernel"] <= 2


def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def decode(batch: int, keys: int, paged: bool) -> None:
    (heads, kv_heads, gates), blocks = (4, 2, 4), -(-keys // 64)
    largest = empty(batch, kv_heads, blocks, dtype=torch.float32)
    summary = KeySummary(empty(batch, gates, blocks), empty(batch, gates, blocks), largest)
    q = empty(batch, 1, heads, 64, dtype=torch.bfloat16)
    options: dict[str, Any]
    if paged:
        k, c = empty(batch * kv_heads * blocks, 64, 64, dtype=q.dtype), empty(batch * kv_heads * blocks, 2, 64)
        options = {"pages": empty(batch, kv_heads, blocks, dtype=torch.int32)}
        options["start"] = empty(batch, kv_heads, dtype=torch.int32)
    else:
        k, c = empty(batch, keys, kv_heads, 64, dtype=q.dtype), empty(batch, gates, keys)
        options = {"real": empty(batch, keys, dtype=torch.bool)}
    decay = Decay(empty(batch, gates, 1), c, empty(batch, gates, 1, dtype=torch.int64), torch.tensor([keys - 1]))
    decode_attention(q, k, k, decay, scale=0.125, summary=summary, eps=1e-3, **options)


@pytest.mark.parametrize("paged", [False, True])
def test_other_caches_compile_nothing(paged):
    with specializations(90) as found:
        for batch, keys in ((1, 64), (1, 1024), (1, 1025), (2, 1000), (8, 4096), (64, 70)):
            decode(batch, keys, paged)
    assert Counter(name for name, _ in found) == {"_decode_search_kernel": 1, "_decode_attend_kernel": 1}
