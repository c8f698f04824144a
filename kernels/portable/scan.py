"""Running sums of log forget gates in Triton: float64, parallel along the sequence, bitwise deterministic.

    c_t = sum_{s <= t, s no reset} log f_s,   kv_start_t = the last reset at or before t
    dlog f_t = sum_{s >= t} dc_s, zero at resets

(names: `triton_common`). Each sequence and gate is cut in ``NC`` chunks of ``BLOCK_T`` tokens. One kernel sums every
chunk; the other adds up the chunks before its own and scans within it. ``i_row`` is ``i_b * HF + i_gate``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import LOG_ZERO_GATE, continued
from ..decay import sum_gates as sum_gates_in_pytorch
from ..devices import on_device_of
from ..launches.replay import replayed
from ..operators import NAMESPACE, may_launch
from ..tiles import cdiv
from ..triton_common import kernel, larger
from ..validation import is_transformed

_CHUNK = 1024
# Up to so many tokens PyTorch is as fast as kernels, and torch.compile fuses it with what is around.
_FEW = 16


class _Gates(NamedTuple):
    """Log gates ``[B, T, HF]``, and which tokens start a packed sequence, ``[B, T]``, or None."""

    LOG_F: Any
    f_b: Any
    f_t: Any
    f_h: Any
    STARTS: Any
    starts_b: Any
    starts_t: Any
    T: Any
    HF: Any
    LOG_ZERO: Any


@triton.jit
def _load_gates(gates: _Gates, i_chunk, i_row, HAS_STARTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of a chunk: log gates in float64, zero at resets; the index of a token that is a reset, else -1; the tokens."""
    o_t = i_chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b, i_gate = (i_row // gates.HF).to(tl.int64), (i_row % gates.HF).to(tl.int64)
    m_t = o_t < gates.T
    p_f = gates.LOG_F + i_b * gates.f_b + i_gate * gates.f_h + o_t.to(tl.int64) * gates.f_t
    log_f = tl.load(p_f, mask=m_t, other=0.0).to(tl.float64)
    is_zero = log_f < gates.LOG_ZERO
    is_reset = is_zero
    if HAS_STARTS:
        p_starts = gates.STARTS + i_b * gates.starts_b + o_t * gates.starts_t
        is_reset = is_reset | (tl.load(p_starts, mask=m_t, other=0) != 0)
    return tl.where(is_zero, 0.0, log_f), tl.where(is_reset, o_t, -1), o_t


@triton.jit
def _sum_before(TOTALS, i_chunk, BLOCK: tl.constexpr):
    """Sum of a row's chunks before ``i_chunk``."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, i_chunk, BLOCK):
        o_chunk = begin + tl.arange(0, BLOCK)
        total += tl.load(TOTALS + o_chunk, mask=o_chunk < i_chunk, other=0.0)
    return tl.sum(total, 0)


@kernel
def _gate_totals_kernel(
    LOG_F, STARTS, TOTALS, RESETS,
    f_b, f_t, f_h, starts_b, starts_t,
    T, HF, NC, LOG_ZERO,
    HAS_STARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum and last reset (-1 for none) of a chunk, ``[B * Hf, NC]`` float64 and int32."""
    i_row, i_chunk = tl.program_id(0), tl.program_id(1)
    gates = _Gates(LOG_F, f_b, f_t, f_h, STARTS, starts_b, starts_t, T, HF, LOG_ZERO)
    log_f, resets, _ = _load_gates(gates, i_chunk, i_row, HAS_STARTS, BLOCK_T)
    tl.store(TOTALS + i_row * NC + i_chunk, tl.sum(log_f, 0))
    tl.store(RESETS + i_row * NC + i_chunk, tl.max(resets, 0))


@kernel
def _gate_scan_kernel(
    LOG_F, STARTS, TOTALS, RESETS, C, KV_START,
    CARRY_C, carry_b, carry_h,
    CARRY_FIRST, first_b, first_h,
    f_b, f_t, f_h, starts_b, starts_t,
    T, HF, NC, LOG_ZERO, NO_RESET, OFFSET, HAS_CARRY,
    HAS_STARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Running sums and last resets of a chunk, from `_gate_totals_kernel`: the results of `sum_gates`."""
    i_row, i_chunk = tl.program_id(0), tl.program_id(1)
    gates = _Gates(LOG_F, f_b, f_t, f_h, STARTS, starts_b, starts_t, T, HF, LOG_ZERO)
    log_f, resets, o_t = _load_gates(gates, i_chunk, i_row, HAS_STARTS, BLOCK_T)
    before, reset = _sum_before(TOTALS + i_row * NC, i_chunk, BLOCK_T), -1
    i_b, i_gate = (i_row // HF).to(tl.int64), (i_row % HF).to(tl.int64)
    for begin in range(0, i_chunk, BLOCK_T):
        o_chunk = begin + tl.arange(0, BLOCK_T)
        m_chunk = o_chunk < i_chunk
        reset = tl.maximum(reset, tl.max(tl.load(RESETS + i_row * NC + o_chunk, mask=m_chunk, other=-1), 0))
    o_row = i_row.to(tl.int64) * T + o_t
    c = tl.cumsum(log_f, 0) + before
    kv_start = tl.maximum(tl.associative_scan(resets, 0, larger), reset)
    kv_start = tl.where(kv_start < 0, NO_RESET, kv_start).to(tl.int64)
    # Not a constant: the kernel that takes a prompt takes the chunks after it.
    if HAS_CARRY:
        c += tl.load(CARRY_C + i_b * carry_b + i_gate * carry_h)
        first = tl.load(CARRY_FIRST + i_b * first_b + i_gate * first_h).to(tl.int64)
        kv_start = tl.maximum(kv_start + OFFSET, first)
    tl.store(C + o_row, c, mask=o_t < T)
    tl.store(KV_START + o_row, kv_start, mask=o_t < T)


@triton.jit
def _load_reversed(DC, i_chunk, i_row, c_b, c_h, c_t, T, HF, BLOCK_T: tl.constexpr):
    """Gradients of running sums of a chunk counted from the end, and the tokens they belong to."""
    o_t = T - 1 - i_chunk * BLOCK_T - tl.arange(0, BLOCK_T)
    i_b, i_gate = (i_row // HF).to(tl.int64), (i_row % HF).to(tl.int64)
    return tl.load(DC + i_b * c_b + i_gate * c_h + o_t.to(tl.int64) * c_t, mask=o_t >= 0, other=0.0), o_t


@kernel
def _gradient_totals_kernel(DC, TOTALS, c_b, c_h, c_t, T, HF, NC, BLOCK_T: tl.constexpr):
    """Sum of ``dc`` over a chunk counted from the end, ``[B * Hf, NC]`` float64."""
    i_row, i_chunk = tl.program_id(0), tl.program_id(1)
    dc, _ = _load_reversed(DC, i_chunk, i_row, c_b, c_h, c_t, T, HF, BLOCK_T)
    tl.store(TOTALS + i_row * NC + i_chunk, tl.sum(dc, 0))


@kernel
def _gradient_scan_kernel(
    DC, LOG_F, TOTALS, D_LOG_F,
    c_b, c_h, c_t, f_b, f_t, f_h,
    T, HF, NC, LOG_ZERO,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradients of the log gates of a chunk counted from the end, ``[B, T, Hf]``."""
    i_row, i_chunk = tl.program_id(0), tl.program_id(1)
    dc, o_t = _load_reversed(DC, i_chunk, i_row, c_b, c_h, c_t, T, HF, BLOCK_T)
    sums = tl.cumsum(dc, 0) + _sum_before(TOTALS + i_row * NC, i_chunk, BLOCK_T)
    i_b, i_gate = (i_row // HF).to(tl.int64), (i_row % HF).to(tl.int64)
    log_f = tl.load(LOG_F + i_b * f_b + i_gate * f_h + o_t.to(tl.int64) * f_t, mask=o_t >= 0, other=0.0)
    sums = tl.where(log_f < LOG_ZERO, 0.0, sums)
    p_df = D_LOG_F + (i_b * T + o_t) * HF + i_gate
    tl.store(p_df, sums.to(D_LOG_F.dtype.element_ty), mask=o_t >= 0)


def sum_gates(
    log_f: Tensor,
    starts: Tensor | None,
    no_reset: int,
    offset: int | Tensor = 0,
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `decay.sum_gates`, differentiable in ``log_f`` twice too. For few tokens, and for what torch.func's transforms
    and forward mode make of gates, that itself."""
    if log_f.shape[1] <= _FEW:
        return sum_gates_in_pytorch(log_f, starts, no_reset, offset, carry)
    if not may_launch(log_f):
        if is_transformed(log_f):
            return sum_gates_in_pytorch(log_f, starts, no_reset, offset, carry)
        c, last_reset = _sum_gates(log_f, starts, LOG_ZERO_GATE, no_reset)
    elif torch.is_grad_enabled() and log_f.requires_grad:
        c, last_reset = _SumGates.apply(log_f, starts, no_reset)
    elif carry is not None and isinstance(offset, int) and not torch.is_grad_enabled():
        return _launch_sums(log_f, starts, LOG_ZERO_GATE, no_reset, offset, *carry)
    else:
        c, last_reset = _launch_sums(log_f, starts, LOG_ZERO_GATE, no_reset)
    return continued(c, last_reset, offset, carry)


class _SumGates(torch.autograd.Function):
    """`_sum_gates` without the dispatcher, where the host takes longer for an operator than the GPU for its kernels."""

    @staticmethod
    def forward(ctx: Any, log_f: Tensor, starts: Tensor | None, no_reset: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(log_f)
        return _launch_sums(log_f, starts, LOG_ZERO_GATE, no_reset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # The operator, where the gradient is to be differentiated again.
        (log_f,), dc = ctx.saved_tensors, grads[0]
        if torch.is_grad_enabled():
            return _sum_gates_backward(dc, log_f, LOG_ZERO_GATE), None, None
        return _launch_gradients(dc, log_f, LOG_ZERO_GATE), None, None


@torch.library.custom_op(f"{NAMESPACE}::sum_gates", mutates_args=())
def _sum_gates(log_f: Tensor, starts: Tensor | None, log_zero: float, no_reset: int) -> tuple[Tensor, Tensor]:
    return _launch_sums(log_f, starts, log_zero, no_reset)


@replayed
def _launch_sums(
    log_f: Tensor,
    starts: Tensor | None,
    log_zero: float,
    no_reset: int,
    offset: int = 0,
    carry_c: Tensor | None = None,
    carry_first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, gates = log_f.shape
    c, kv_start = _sum_gates_fake(log_f, starts, log_zero, no_reset)
    if log_f.numel() == 0:
        return c, kv_start
    chunks = cdiv(length, _CHUNK)
    totals = torch.empty(batch, gates, chunks, dtype=torch.float64, device=log_f.device)
    resets = torch.empty(batch, gates, chunks, dtype=torch.int32, device=log_f.device)
    has_carry = carry_c is not None and carry_first is not None
    if carry_c is None or carry_first is None:
        carry_c, carry_first = totals[..., 0], resets[..., 0]
    marks = None if starts is None else starts.view(torch.uint8)
    starts_b, starts_t = (0, 0) if marks is None else marks.stride()
    grid = (batch * gates, chunks)
    arguments = dict(
        LOG_F=log_f, f_b=log_f.stride(0), f_t=log_f.stride(1), f_h=log_f.stride(2),
        STARTS=marks, starts_b=starts_b, starts_t=starts_t,
        TOTALS=totals,
        RESETS=resets,
        T=length,
        HF=gates,
        NC=chunks,
        LOG_ZERO=log_zero,
        HAS_STARTS=marks is not None,
        BLOCK_T=_CHUNK,
    )  # fmt: skip
    with on_device_of(log_f):
        _gate_totals_kernel[grid](**arguments)
        _gate_scan_kernel[grid](
            **arguments,
            C=c,
            KV_START=kv_start,
            CARRY_C=carry_c, carry_b=carry_c.stride(0), carry_h=carry_c.stride(1),
            CARRY_FIRST=carry_first, first_b=carry_first.stride(0), first_h=carry_first.stride(1),
            NO_RESET=no_reset,
            OFFSET=offset,
            HAS_CARRY=int(has_carry),
        )  # fmt: skip
    return c, kv_start


@_sum_gates.register_fake
def _sum_gates_fake(log_f, starts, log_zero, no_reset):
    shape = log_f.shape[0], log_f.shape[2], log_f.shape[1]
    return log_f.new_empty(shape, dtype=torch.float64), log_f.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::sum_gates_backward", mutates_args=())
def _sum_gates_backward(dc: Tensor, log_f: Tensor, log_zero: float) -> Tensor:
    return _launch_gradients(dc, log_f, log_zero)


@replayed
def _launch_gradients(dc: Tensor, log_f: Tensor, log_zero: float) -> Tensor:
    """Each gate gets the sum over its own and all later tokens; resets get zero."""
    batch, length, gates = log_f.shape
    d_log_f = _sum_gates_backward_fake(dc, log_f, log_zero)
    if log_f.numel() == 0:
        return d_log_f
    chunks = cdiv(length, _CHUNK)
    totals = torch.empty(batch, gates, chunks, dtype=torch.float64, device=log_f.device)
    grid = (batch * gates, chunks)
    arguments = dict(
        DC=dc, c_b=dc.stride(0), c_h=dc.stride(1), c_t=dc.stride(2),
        TOTALS=totals,
        T=length,
        HF=gates,
        NC=chunks,
        BLOCK_T=_CHUNK,
    )  # fmt: skip
    with on_device_of(log_f):
        _gradient_totals_kernel[grid](**arguments)
        _gradient_scan_kernel[grid](
            **arguments,
            LOG_F=log_f, f_b=log_f.stride(0), f_t=log_f.stride(1), f_h=log_f.stride(2),
            D_LOG_F=d_log_f,
            LOG_ZERO=log_zero,
        )  # fmt: skip
    return d_log_f


@_sum_gates_backward.register_fake
def _sum_gates_backward_fake(dc, log_f, log_zero):
    return torch.empty_like(log_f, memory_format=torch.contiguous_format)


def _save_gates(ctx, inputs, output) -> None:
    log_f, _, ctx.log_zero, _ = inputs
    ctx.save_for_backward(log_f)


def _sum_gates_autograd(ctx, dc: Tensor, _):
    return _sum_gates_backward(dc, *ctx.saved_tensors, ctx.log_zero), None, None, None


_sum_gates.register_autograd(_sum_gates_autograd, setup_context=_save_gates)


def _save_gates_again(ctx, inputs, output) -> None:
    _, log_f, ctx.log_zero = inputs
    ctx.save_for_backward(log_f)


def _sum_gates_again(ctx, d: Tensor):
    # A gradient is linear in ``dc``; and no value below a gate of minus infinity is a reset.
    (log_f,) = ctx.saved_tensors
    ddc, _ = _sum_gates(d.masked_fill(log_f < ctx.log_zero, 0.0), None, float("-inf"), 0)
    return ddc, None, None


_sum_gates_backward.register_autograd(_sum_gates_again, setup_context=_save_gates_again)
