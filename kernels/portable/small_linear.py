"""Linear layers of one row, as decoding of one sequence has them, in Triton: they take the time of reading weights.

    y = W x + b          y = silu(G x + b_g) (U x + b_u),   W = [G; U]

A program has ``BLOCK_N`` rows of the weights and reads them in blocks of ``BLOCK_K``: so few that every multiprocessor
has several, where a matmul for any shape has tiles of 64 rows, or a second launch to add up parts. Sums are float32, in
one order, rounded once. For more rows torch's matmul is as fast (docs/results/tuning.md).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..devices import on_device_of
from ..elementwise.activations import activate
from ..elementwise.silu_product import gated_linear as gated_linear_in_pytorch
from ..launches.launch import launched
from ..launches.replay import replayed
from ..operators import may_launch
from ..tiles import cdiv
from ..triton_common import overlapping, wait_for_inputs

# Of the weights: rows of a program, values of each at once, warps, stages; and where there are two of them.
_TILES = dict(BLOCK_N=2, BLOCK_K=1024, num_warps=4, num_stages=3)
_GATED_TILES = dict(BLOCK_N=4, BLOCK_K=1024, num_warps=4, num_stages=2)


@triton.jit
def _product(X, W, BIAS, o_n, m_n, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[BLOCK_N]`` float32."""
    p_w = W + o_n[:, None].to(tl.int64) * K
    parts = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, K, BLOCK_K):
        o_k = begin + tl.arange(0, BLOCK_K)
        b_x = tl.load(X + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)
        parts += b_w * b_x[None, :]
    acc = tl.sum(parts, 1)
    if BIAS is not None:
        acc += tl.load(BIAS + o_n, mask=m_n, other=0.0).to(tl.float32)
    return acc


@launched
@triton.jit
def _linear_kernel(
    X, W, BIAS, OUT, N, K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    acc = _product(X, W, BIAS, o_n, m_n, K, BLOCK_N, BLOCK_K)
    if GATED:
        activated, _ = activate(acc, "silu")
        acc = activated * _product(X, W, BIAS, N + o_n, m_n, K, BLOCK_N, BLOCK_K)
    tl.store(OUT + o_n, acc.to(OUT.dtype.element_ty), mask=m_n)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, which itself runs for gradients, other than one row, and other than 16 bits."""
    if not _takes(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    return _launch_linear(x, weight, bias, False)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `silu_product.gated_linear`, which itself runs where `torch.nn.functional.linear` does."""
    if not _takes(x, weight, bias):
        return gated_linear_in_pytorch(x, weight, bias)
    return _launch_linear(x, weight, bias, True)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.shape[:-1].numel() != 1 or x.dtype not in (torch.float16, torch.bfloat16) or torch.is_grad_enabled():
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # Else torch's own error names the shapes.
    fits = weight.ndim == 2 and weight.shape[1] == x.shape[-1] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or torch.is_autocast_enabled(x.device.type) or not all(one.is_contiguous() for one in tensors):
        return False
    return all(one.dtype == x.dtype and one.device == x.device for one in tensors) and may_launch(*tensors)


@replayed
def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    features, size = weight.shape
    features //= 1 + gated
    out = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    tiles: Any = _GATED_TILES if gated else _TILES
    with on_device_of(x):
        _linear_kernel[(cdiv(features, tiles["BLOCK_N"]),)](
            X=x, W=weight, BIAS=bias, OUT=out, N=features, K=size, GATED=gated, **tiles, **overlapping(x)
        )
    return out
