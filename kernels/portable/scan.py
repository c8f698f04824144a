"""Triton kernels of the running sums of log gates: float64, parallel along the sequence, the same bits every time.

Each sequence and gate is cut in chunks. One kernel sums every chunk; the other adds up the chunks before its own and
scans within it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import NAMESPACE
from ..triton_common import larger

_CHUNK = 1024


@triton.jit
def _gate_totals_kernel(
    LOG_F,
    STARTS,
    TOTALS,
    RESETS,
    f_b,
    f_t,
    f_h,
    s_b,
    s_t,
    T,
    HF,
    NC,
    LOG_ZERO,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    log_f, resets, _ = _gates(LOG_F, STARTS, chunk, row, f_b, f_t, f_h, s_b, s_t, T, HF, LOG_ZERO, PACKED, CHUNK)
    tl.store(TOTALS + row * NC + chunk, tl.sum(log_f, 0))
    tl.store(RESETS + row * NC + chunk, tl.max(resets, 0))


@triton.jit
def _gate_scan_kernel(
    LOG_F,
    STARTS,
    TOTALS,
    RESETS,
    C,
    FIRST,
    f_b,
    f_t,
    f_h,
    s_b,
    s_t,
    T,
    HF,
    NC,
    LOG_ZERO,
    NO_RESET,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    log_f, resets, tokens = _gates(LOG_F, STARTS, chunk, row, f_b, f_t, f_h, s_b, s_t, T, HF, LOG_ZERO, PACKED, CHUNK)
    before, reset = _sum_before(TOTALS + row * NC, chunk, CHUNK), -1
    for start in range(0, chunk, CHUNK):
        chunks = start + tl.arange(0, CHUNK)
        reset = tl.maximum(reset, tl.max(tl.load(RESETS + row * NC + chunks, mask=chunks < chunk, other=-1), 0))
    p = row.to(tl.int64) * T + tokens
    tl.store(C + p, tl.cumsum(log_f, 0) + before, mask=tokens < T)
    first = tl.maximum(tl.associative_scan(resets, 0, larger), reset)
    tl.store(FIRST + p, tl.where(first < 0, NO_RESET, first).to(tl.int64), mask=tokens < T)


@triton.jit
def _gates(
    LOG_F, STARTS, chunk, row, f_b, f_t, f_h, s_b, s_t, T, HF, LOG_ZERO, PACKED: tl.constexpr, CHUNK: tl.constexpr
):
    """Log gates of a chunk in float64, zero at resets, and the index of each token that is a reset, -1 elsewhere."""
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    b, h = (row // HF).to(tl.int64), (row % HF).to(tl.int64)
    log_f = tl.load(LOG_F + b * f_b + h * f_h + tokens.to(tl.int64) * f_t, mask=tokens < T, other=0.0).to(tl.float64)
    is_zero = log_f < LOG_ZERO
    is_reset = is_zero
    if PACKED:
        is_reset = is_reset | (tl.load(STARTS + b * s_b + tokens * s_t, mask=tokens < T, other=0) != 0)
    return tl.where(is_zero, 0.0, log_f), tl.where(is_reset, tokens, -1), tokens


@triton.jit
def _sum_before(TOTALS, chunk, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, chunk, CHUNK):
        chunks = start + tl.arange(0, CHUNK)
        total += tl.load(TOTALS + chunks, mask=chunks < chunk, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _gradient_totals_kernel(DC, TOTALS, c_b, c_h, c_t, T, HF, NC, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0), tl.program_id(1)
    dc, _ = _reversed_gradients(DC, chunk, row, c_b, c_h, c_t, T, HF, CHUNK)
    tl.store(TOTALS + row * NC + chunk, tl.sum(dc, 0))


@triton.jit
def _gradient_scan_kernel(
    DC, LOG_F, TOTALS, D_LOG_F, c_b, c_h, c_t, f_b, f_t, f_h, T, HF, NC, LOG_ZERO, CHUNK: tl.constexpr
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    dc, tokens = _reversed_gradients(DC, chunk, row, c_b, c_h, c_t, T, HF, CHUNK)
    sums = tl.cumsum(dc, 0) + _sum_before(TOTALS + row * NC, chunk, CHUNK)
    b, h = (row // HF).to(tl.int64), (row % HF).to(tl.int64)
    log_f = tl.load(LOG_F + b * f_b + h * f_h + tokens.to(tl.int64) * f_t, mask=tokens >= 0, other=0.0)
    sums = tl.where(log_f < LOG_ZERO, 0.0, sums)
    p = D_LOG_F + (b * T + tokens) * HF + h
    tl.store(p, sums.to(D_LOG_F.dtype.element_ty), mask=tokens >= 0)


@triton.jit
def _reversed_gradients(DC, chunk, row, c_b, c_h, c_t, T, HF, CHUNK: tl.constexpr):
    """Gradients of running sums of a chunk counted from the end, and the tokens they belong to."""
    tokens = T - 1 - chunk * CHUNK - tl.arange(0, CHUNK)
    b, h = (row // HF).to(tl.int64), (row % HF).to(tl.int64)
    return tl.load(DC + b * c_b + h * c_h + tokens.to(tl.int64) * c_t, mask=tokens >= 0, other=0.0), tokens


def sum_gates(log_f: Tensor, starts: Tensor | None, log_zero: float, no_reset: int) -> tuple[Tensor, Tensor]:
    """Running sums of log gates, and the last reset up to each token. Differentiable in ``log_f``, twice too.

    Args:
        log_f: ``[B, T, Hf]`` float32 or float64.
        starts: ``[B, T]`` bool, more resets; None for none.
        log_zero: gates below are resets, and not summed.
        no_reset: what a token without a reset gets, at most 0; 32 bits.

    Returns:
        ``[B, Hf, T]`` float64 and int64.
    """
    return _sum_gates(log_f, starts, log_zero, no_reset)


@torch.library.custom_op(f"{NAMESPACE}::sum_gates", mutates_args=())
def _sum_gates(log_f: Tensor, starts: Tensor | None, log_zero: float, no_reset: int) -> tuple[Tensor, Tensor]:
    batch, length, gates = log_f.shape
    c, first = _sum_gates_fake(log_f, starts, log_zero, no_reset)
    if log_f.numel() == 0:
        return c, first
    chunks = triton.cdiv(length, _CHUNK)
    totals = torch.empty(batch, gates, chunks, dtype=torch.float64, device=log_f.device)
    resets = torch.empty(batch, gates, chunks, dtype=torch.int32, device=log_f.device)
    marks = None if starts is None else starts.view(torch.uint8)
    strides = (*log_f.stride(), *((0, 0) if marks is None else marks.stride()), length, gates, chunks, log_zero)
    grid, options = (batch * gates, chunks), {"PACKED": marks is not None, "CHUNK": _CHUNK}
    with torch.cuda.device_of(log_f):
        _gate_totals_kernel[grid](log_f, marks, totals, resets, *strides, **options)
        _gate_scan_kernel[grid](log_f, marks, totals, resets, c, first, *strides, no_reset, **options)
    return c, first


@_sum_gates.register_fake
def _sum_gates_fake(log_f, starts, log_zero, no_reset):
    shape = log_f.shape[0], log_f.shape[2], log_f.shape[1]
    return log_f.new_empty(shape, dtype=torch.float64), log_f.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::sum_gates_backward", mutates_args=())
def _sum_gates_backward(dc: Tensor, log_f: Tensor, log_zero: float) -> Tensor:
    """Each gate gets the sum over its own and all later tokens; resets get zero."""
    batch, length, gates = log_f.shape
    d_log_f = _sum_gates_backward_fake(dc, log_f, log_zero)
    if log_f.numel() == 0:
        return d_log_f
    chunks = triton.cdiv(length, _CHUNK)
    totals = torch.empty(batch, gates, chunks, dtype=torch.float64, device=log_f.device)
    grid, shape = (batch * gates, chunks), (length, gates, chunks)
    with torch.cuda.device_of(log_f):
        _gradient_totals_kernel[grid](dc, totals, *dc.stride(), *shape, CHUNK=_CHUNK)
        _gradient_scan_kernel[grid](
            dc, log_f, totals, d_log_f, *dc.stride(), *log_f.stride(), *shape, log_zero, CHUNK=_CHUNK
        )
    return d_log_f


@_sum_gates_backward.register_fake
def _sum_gates_backward_fake(dc, log_f, log_zero):
    return torch.empty_like(log_f, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output) -> None:
    log_f, _, ctx.log_zero, _ = inputs
    ctx.save_for_backward(log_f)


def _autograd(ctx, dc: Tensor, _):
    return _sum_gates_backward(dc, *ctx.saved_tensors, ctx.log_zero), None, None, None


_sum_gates.register_autograd(_autograd, setup_context=_save_for_backward)


def _save_for_second_derivative(ctx, inputs, output) -> None:
    _, log_f, ctx.log_zero = inputs
    ctx.save_for_backward(log_f)


def _second_derivative(ctx, d: Tensor):
    # A gradient is linear in ``dc``; and no number below a gate of minus infinity is a reset.
    (log_f,) = ctx.saved_tensors
    ddc, _ = _sum_gates(d.masked_fill(log_f < ctx.log_zero, 0.0), None, float("-inf"), 0)
    return ddc, None, None


_sum_gates_backward.register_autograd(_second_derivative, setup_context=_save_for_second_derivative)
