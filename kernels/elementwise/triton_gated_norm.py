"""RMSNorm and the output gate after it in Triton: one kernel forward and one backward, everything inside in float32.
And, for inference, RMSNorm and the residual connection before it.

    n = x / sqrt(mean(x^2) + eps)          y = w n a,  a = act(g)
    dn = dy a w                            dx = (dn - n mean(dn n)) / sqrt(mean(x^2) + eps)
    dg = dy w n act'(g)                    dw = sum over tokens of dy a n

(names: `triton_common`). A program has ``BLOCK_N`` tokens of one head; backward, several times as many, whose part of
the weight's gradient it sums: sums of programs are added up afterwards, in an order that does not depend on the device.
Backward reads whole heads, so that it computes the norm again: only inputs are saved. Launched without the dispatcher,
which costs the host more than the kernel takes.
"""

import functools
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
from ..triton_common import load_rows, overlapping, wait_for_inputs
from .activations import activate
from .gated_norm import add_and_norm as add_and_norm_in_pytorch
from .gated_norm import gated_norm as gated_norm_in_pytorch

# Elements and tokens of a program's tile, and programs of a backward pass: what keeps a large GPU busy.
_TILE = 2048
_TOKENS = 32
_PROGRAMS = 1024
# The largest size of a row, which a program holds as a whole.
_LARGEST = 16384


@triton.jit
def _reciprocal_norm(b_x, eps, D: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_x * b_x, 1) / D + eps))


@launched
@triton.jit(do_not_specialize=["N"])
def _gated_norm_kernel(
    X, x_n, x_h,
    GATE, g_n,
    WEIGHT,
    OUT,
    eps,
    N,
    H,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    i_h = tl.program_id(0) % H
    o_n = (tl.program_id(0) // H) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    b_w = tl.load(WEIGHT + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_x = load_rows(X + i_h.to(tl.int64) * x_h, o_n, x_n, m_n, D, BLOCK_D, True).to(tl.float32)
    b_out = b_x * _reciprocal_norm(b_x, eps, D)[:, None] * b_w[None, :]
    if GATE is not None:
        b_g = load_rows(GATE + i_h * D, o_n, g_n, m_n, D, BLOCK_D, True).to(tl.float32)
        b_a, _ = activate(b_g, ACTIVATION)
        b_out *= b_a
    p_out = OUT + (o_n.to(tl.int64) * H + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(OUT.dtype.element_ty), mask=m_n[:, None] & (o_d[None, :] < D))


@launched
@triton.jit(do_not_specialize=["N", "ROWS"])
def _gated_norm_backward_kernel(
    D_OUT,
    X, x_n, x_h,
    GATE, g_n,
    WEIGHT,
    DX,
    D_GATE,
    D_WEIGHT,
    eps,
    N,
    ROWS,
    H,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    i_h, i_part = tl.program_id(0) % H, tl.program_id(0) // H
    o_d = tl.arange(0, BLOCK_D)
    b_w = tl.load(WEIGHT + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_n in range(i_part * ROWS, tl.minimum((i_part + 1) * ROWS, N), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_x = load_rows(X + i_h.to(tl.int64) * x_h, o_n, x_n, m_n, D, BLOCK_D, True).to(tl.float32)
        b_dy = load_rows(D_OUT + i_h * D, o_n, H * D, m_n, D, BLOCK_D, True).to(tl.float32)
        b_r = _reciprocal_norm(b_x, eps, D)[:, None]
        b_norm = b_x * b_r
        o_out = (o_n.to(tl.int64) * H + i_h)[:, None] * D + o_d[None, :]
        m_out = m_n[:, None] & (o_d[None, :] < D)
        if GATE is not None:
            b_g = load_rows(GATE + i_h * D, o_n, g_n, m_n, D, BLOCK_D, True).to(tl.float32)
            b_a, b_da = activate(b_g, ACTIVATION)
            b_dg = b_dy * b_norm * b_w[None, :] * b_da
            tl.store(D_GATE + o_out, b_dg.to(D_GATE.dtype.element_ty), mask=m_out)
            b_dy *= b_a
        b_dw += b_dy * b_norm
        b_dn = b_dy * b_w[None, :]
        b_dx = b_r * (b_dn - b_norm * (tl.sum(b_dn * b_norm, 1) / D)[:, None])
        tl.store(DX + o_out, b_dx.to(DX.dtype.element_ty), mask=m_out)
    tl.store(D_WEIGHT + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_dw, 0), mask=o_d < D)


def gated_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, activation: str = "sigmoid"
) -> Tensor:
    """`gated_norm` of the module of that name, with one rounding, at the end.

    That itself where torch must see every operation, for second derivatives, a gate of another dtype and huge rows.
    """
    tensors = (x, weight) if gate is None else (x, weight, gate)
    other_gate = gate is not None and gate.dtype != x.dtype
    if other_gate or x.shape[-1] > _LARGEST or not may_launch(*tensors):
        return gated_norm_in_pytorch(x, weight, eps, gate, activation)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _GatedNorm.apply(x, weight, gate, eps, activation)
    return _norm_forward(x, weight, gate, eps, activation)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, activation: str) -> Tensor:
        return _norm_forward(x, weight, gate, eps, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, gate, ctx.eps, ctx.activation = inputs
        ctx.save_for_backward(x, weight, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_norm_backward(grads[0], x, weight, gate, ctx.eps, ctx.activation), None, None

        def again(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
            return gated_norm_in_pytorch(x, weight, ctx.eps, gate, ctx.activation)

        return *gradients_by_torch(ctx, again, (x, weight, gate), grads[0]), None, None


@functools.cache
def _tile(size: int) -> tuple[int, int, int]:
    """Tokens and, padded, values of a head that a program takes at once, and its warps."""
    block_d = triton.next_power_of_2(size)
    return min(_TOKENS, max(1, _TILE // block_d)), block_d, min(16, max(4, block_d // 512))


def _norm_arguments(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, activation: str
) -> tuple[int, int, int, dict[str, Any]]:
    """Tokens, heads, tokens of a tile, and what both kernels take."""
    size = x.shape[-1]
    heads = weight.numel() // size
    # Views, unless the batch does not lie in memory token after token.
    x = x.reshape(-1, heads, size)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if gate is not None:
        gate = gate.reshape(-1, heads * size)
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    tokens, (block_n, block_d, warps) = x.shape[0], _tile(size)
    arguments = dict(
        X=x, x_n=x.stride(0), x_h=x.stride(1),
        GATE=gate, g_n=0 if gate is None else gate.stride(0),
        WEIGHT=weight.contiguous(),
        eps=eps,
        N=tokens,
        H=heads,
        D=size,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        ACTIVATION=activation,
        num_warps=warps,
    )  # fmt: skip
    return tokens, heads, block_n, arguments


@replayed
def _norm_forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, activation: str) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    tokens, heads, block_n, arguments = _norm_arguments(x, weight, gate, eps, activation)
    with on_device_of(x):
        _gated_norm_kernel[(cdiv(tokens, block_n) * heads,)](**arguments, OUT=out, **overlapping(x))
    return out


def _norm_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_gate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight), d_gate
    tokens, heads, block_n, arguments = _norm_arguments(x, weight, gate, eps, activation)
    blocks = cdiv(tokens, block_n)
    rows = cdiv(blocks, min(blocks, cdiv(_PROGRAMS, heads))) * block_n
    parts = cdiv(tokens, rows)
    d_weight = torch.empty(parts, weight.numel(), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _gated_norm_backward_kernel[(parts * heads,)](
            **arguments, D_OUT=d_out.contiguous(), DX=dx, D_GATE=d_gate, D_WEIGHT=d_weight, ROWS=rows
        )
    return dx, d_weight.sum(0).to(weight.dtype), d_gate


@launched
@triton.jit
def _add_and_norm_kernel(
    X, x_n, RESIDUAL, r_n, WEIGHT, TOTAL, OUT, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    """A token for each program."""
    wait_for_inputs(OVERLAPS)
    i_n, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(X + i_n * x_n + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x += tl.load(RESIDUAL + i_n * r_n + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_total = b_x.to(TOTAL.dtype.element_ty)
    tl.store(TOTAL + i_n * D + o_d, b_total, mask=m_d)
    # Of what is stored, as a norm that reads it would see it.
    b_x = b_total.to(tl.float32)
    b_r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_x * b_x, 0) / D + eps))
    b_w = tl.load(WEIGHT + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(OUT + i_n * D + o_d, (b_x * b_r * b_w).to(OUT.dtype.element_ty), mask=m_d)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_and_norm` of the module `gated_norm`; that itself with gradients, and for torch's tracers."""
    size = x.shape[-1]
    fits = x.shape == residual.shape and x.dtype == residual.dtype and weight.shape == (size,) and size <= _LARGEST
    if not fits or torch.is_grad_enabled() or x.numel() == 0 or not may_launch(x, residual, weight):
        return add_and_norm_in_pytorch(x, residual, weight, eps)
    return _launch_add_and_norm(x, residual, weight, eps)


@replayed
def _launch_add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    x, residual = maybe_contiguous(x.reshape(-1, size)), maybe_contiguous(residual.reshape(-1, size))
    block_d = triton.next_power_of_2(size)
    with on_device_of(x):
        _add_and_norm_kernel[(x.shape[0],)](
            X=x, x_n=x.stride(0),
            RESIDUAL=residual, r_n=residual.stride(0),
            WEIGHT=weight.contiguous(),
            TOTAL=total,
            OUT=out,
            eps=eps,
            D=size,
            BLOCK_D=block_d,
            num_warps=min(16, max(4, block_d // 512)),
            **overlapping(x),
        )  # fmt: skip
    return total, out
