"""The activation of a gated MLP in Triton: one kernel forward and one backward, inside in float32.

    s = sigmoid(g)          y = g s u
    dg = dy u s (1 + g (1 - s))          du = dy g s

A program has ``BLOCK`` values of one row. Only inputs are saved, and they are left as they are: a graph may be walked
through again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..launches.replay import replayed
from ..operators import gradients_by_torch, may_launch, maybe_contiguous
from ..tiles import cdiv
from .activations import activate
from .silu_product import silu_product as silu_product_in_pytorch

_BLOCK = 1024


@launched
@triton.jit
def _silu_product_kernel(GATE, gate_n, UP, up_n, OUT, SIZE, BLOCK: tl.constexpr):
    blocks = tl.cdiv(SIZE, BLOCK)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    b_g = tl.load(GATE + i_n * gate_n + o_d, mask=o_d < SIZE, other=0.0).to(tl.float32)
    b_u = tl.load(UP + i_n * up_n + o_d, mask=o_d < SIZE, other=0.0).to(tl.float32)
    b_a, _ = activate(b_g, "silu")
    tl.store(OUT + i_n * SIZE + o_d, (b_a * b_u).to(OUT.dtype.element_ty), mask=o_d < SIZE)


@launched
@triton.jit
def _silu_product_backward_kernel(D_OUT, GATE, gate_n, UP, up_n, D_GATE, D_UP, SIZE, BLOCK: tl.constexpr):
    blocks = tl.cdiv(SIZE, BLOCK)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    b_g = tl.load(GATE + i_n * gate_n + o_d, mask=o_d < SIZE, other=0.0).to(tl.float32)
    b_u = tl.load(UP + i_n * up_n + o_d, mask=o_d < SIZE, other=0.0).to(tl.float32)
    b_dy = tl.load(D_OUT + i_n * SIZE + o_d, mask=o_d < SIZE, other=0.0).to(tl.float32)
    b_a, b_da = activate(b_g, "silu")
    tl.store(D_GATE + i_n * SIZE + o_d, (b_dy * b_u * b_da).to(D_GATE.dtype.element_ty), mask=o_d < SIZE)
    tl.store(D_UP + i_n * SIZE + o_d, (b_dy * b_a).to(D_UP.dtype.element_ty), mask=o_d < SIZE)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_product` of the module of that name, with one rounding, at the end.

    Where torch must see every operation, for second derivatives and two dtypes, that itself.
    """
    if not may_launch(gate, up) or gate.dtype != up.dtype or gate.shape != up.shape:
        return silu_product_in_pytorch(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SiLUProduct.apply(gate, up)
    return _silu_forward(gate, up)


class _SiLUProduct(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return _silu_forward(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _silu_backward(grads[0], gate, up)
        return gradients_by_torch(ctx, silu_product_in_pytorch, (gate, up), grads[0])


def _silu_arguments(gate: Tensor, up: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and what both kernels take."""
    size = gate.shape[-1]
    # Views, unless the batch does not lie in memory token after token.
    gate, up = maybe_contiguous(gate.reshape(-1, size)), maybe_contiguous(up.reshape(-1, size))
    arguments = dict(
        GATE=gate, gate_n=gate.stride(0),
        UP=up, up_n=up.stride(0),
        SIZE=size,
        BLOCK=_BLOCK,
    )  # fmt: skip
    return (gate.shape[0] * cdiv(size, _BLOCK),), arguments


@replayed
def _silu_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if gate.numel() > 0:
        grid, arguments = _silu_arguments(gate, up)
        with on_device_of(gate):
            _silu_product_kernel[grid](**arguments, OUT=out)
    return out


@replayed
def _silu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    if gate.numel() > 0:
        grid, arguments = _silu_arguments(gate, up)
        with on_device_of(gate):
            _silu_product_backward_kernel[grid](**arguments, D_OUT=d_out.contiguous(), D_GATE=d_gate, D_UP=d_up)
    return d_gate, d_up
