"""An attention sink in Triton: one kernel forward and one backward, everything inside in float32.

With ``s`` and ``r = 1 - s`` the shares of the sink and of the keys, and the names of `attention_sink`:

    ds = dout' . (v_sink - out)     dl = s r ds + s dlse'     dlse = -s r ds + r dlse'     dout = r dout'
    dq = scale dl k_sink            dk_sink = scale sum over rows of dl q                  dv_sink = sum of s dout'

(names: `triton_common`). A program has ``BLOCK_N`` tokens of one query head; backward, several times as many, whose
part of the sink's gradient it sums: sums of programs are added up afterwards, in an order that does not depend on the
device.
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
from ..operators import gradients_by_torch, may_launch
from ..tiles import cdiv, padded_head_dim
from ..triton_common import load_rows
from .attention_sink import add_sink as add_sink_in_pytorch

# Elements of a program's tile, and programs of a backward pass.
_SINK_TILE = 2048
_PROGRAMS = 1024
_SINK_SIZES = ["N", "T", "ROWS", "l_b", "l_h"]


@triton.jit
def _shares(b_q, b_k, b_lse, scale):
    """Logits with the sink, and the shares of the sink and of the keys, ``[BLOCK_N]``."""
    b_l = tl.sum(b_q * b_k[None, :], 1) * scale
    return b_l, tl.sigmoid(b_l - b_lse), tl.sigmoid(b_lse - b_l)


@launched
@triton.jit(do_not_specialize=_SINK_SIZES)
def _sink_kernel(
    OUT, o_n, o_h,
    LSE, l_b, l_h,
    Q, q_n, q_h,
    SINK_K,
    SINK_V,
    MERGED,
    MERGED_LSE,
    scale,
    N,
    T,
    H,
    KV_GROUP,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_n = (tl.program_id(0) // H) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = i_n < N, o_d < D
    b_k = tl.load(SINK_K + (i_h // KV_GROUP) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_v = tl.load(SINK_V + (i_h // KV_GROUP) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_q = load_rows(Q + i_h.to(tl.int64) * q_h, i_n, q_n, m_n, D, BLOCK_D, True).to(tl.float32)
    b_o = load_rows(OUT + i_h.to(tl.int64) * o_h, i_n, o_n, m_n, D, BLOCK_D, True).to(tl.float32)
    b_lse = tl.load(LSE + (i_n // T).to(tl.int64) * l_b + i_h.to(tl.int64) * l_h + i_n % T, mask=m_n, other=0.0)
    b_l, b_s, b_r = _shares(b_q, b_k, b_lse, scale)
    p_merged = MERGED + (i_n.to(tl.int64) * H + i_h)[:, None] * D + o_d[None, :]
    b_o = b_r[:, None] * b_o + b_s[:, None] * b_v[None, :]
    tl.store(p_merged, b_o.to(MERGED.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    b_lse = tl.maximum(b_l, b_lse) + tl.log(1.0 + tl.exp(-tl.abs(b_l - b_lse)))
    tl.store(MERGED_LSE + ((i_n // T).to(tl.int64) * H + i_h) * T + i_n % T, b_lse, mask=m_n)


@launched
@triton.jit(do_not_specialize=_SINK_SIZES)
def _sink_backward_kernel(
    OUT, o_n, o_h,
    LSE, l_b, l_h,
    Q, q_n, q_h,
    SINK_K,
    SINK_V,
    D_MERGED,
    D_MERGED_LSE,
    D_OUT,
    D_LSE,
    DQ,
    D_SINK,
    scale,
    N,
    T,
    ROWS,
    H,
    KV_GROUP,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``D_SINK`` is ``[2, parts, H, D]``: of the key, then of the value."""
    i_h, i_part = tl.program_id(0) % H, tl.program_id(0) // H
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_k = tl.load(SINK_K + (i_h // KV_GROUP) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_v = tl.load(SINK_V + (i_h // KV_GROUP) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(i_part * ROWS, tl.minimum((i_part + 1) * ROWS, N), BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        m_n = i_n < N
        b_q = load_rows(Q + i_h.to(tl.int64) * q_h, i_n, q_n, m_n, D, BLOCK_D, True).to(tl.float32)
        b_o = load_rows(OUT + i_h.to(tl.int64) * o_h, i_n, o_n, m_n, D, BLOCK_D, True).to(tl.float32)
        b_do = load_rows(D_MERGED + i_h * D, i_n, H * D, m_n, D, BLOCK_D, True).to(tl.float32)
        b_lse = tl.load(LSE + (i_n // T).to(tl.int64) * l_b + i_h.to(tl.int64) * l_h + i_n % T, mask=m_n, other=0.0)
        _, b_s, b_r = _shares(b_q, b_k, b_lse, scale)
        o_lse = ((i_n // T).to(tl.int64) * H + i_h) * T + i_n % T
        b_dl = b_s * b_r * tl.sum(b_do * (b_v[None, :] - b_o), 1)
        b_dlse = -b_dl
        if D_MERGED_LSE is not None:
            b_d = tl.load(D_MERGED_LSE + o_lse, mask=m_n, other=0.0)
            b_dl += b_s * b_d
            b_dlse += b_r * b_d
        tl.store(D_LSE + o_lse, b_dlse, mask=m_n)
        o_out = (i_n.to(tl.int64) * H + i_h)[:, None] * D + o_d[None, :]
        m_out = m_n[:, None] & m_d[None, :]
        tl.store(D_OUT + o_out, (b_r[:, None] * b_do).to(D_OUT.dtype.element_ty), mask=m_out)
        b_dl *= scale
        tl.store(DQ + o_out, (b_dl[:, None] * b_k[None, :]).to(DQ.dtype.element_ty), mask=m_out)
        b_dk += b_dl[:, None] * b_q
        b_dv += b_s[:, None] * b_do
    p_sink = D_SINK + tl.program_id(0).to(tl.int64) * D + o_d
    tl.store(p_sink, tl.sum(b_dk, 0), mask=m_d)
    tl.store(p_sink + tl.num_programs(0).to(tl.int64) * D, tl.sum(b_dv, 0), mask=m_d)


def add_sink(
    out: Tensor, lse: Tensor, q: Tensor, sink_k: Tensor, sink_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`add_sink` of the module `attention_sink`, by kernels; that itself where torch must see every operation."""
    tensors = out, lse, q, sink_k, sink_v
    if lse.dtype != torch.float32 or not may_launch(*tensors):
        return add_sink_in_pytorch(*tensors, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _AddSink.apply(*tensors, scale)
    return _sink_forward(*tensors, scale)


class _AddSink(torch.autograd.Function):
    @staticmethod
    def forward(out: Tensor, lse: Tensor, q: Tensor, sink_k: Tensor, sink_v: Tensor, scale: float) -> Any:
        return _sink_forward(out, lse, q, sink_k, sink_v, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        # The log-sum-exp seldom has a gradient.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, sink_k, sink_v = tensors = ctx.saved_tensors
        d_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        if not torch.is_grad_enabled():
            return *_sink_backward(d_out, grads[1], out, lse, q, sink_k, sink_v, ctx.scale), None
        d_lse = torch.zeros_like(lse) if grads[1] is None else grads[1]
        again = functools.partial(add_sink_in_pytorch, scale=ctx.scale)
        return *gradients_by_torch(ctx, again, tensors, (d_out, d_lse)), None


def _sink_arguments(
    out: Tensor, lse: Tensor, q: Tensor, sink_k: Tensor, sink_v: Tensor, scale: float
) -> tuple[int, int, dict[str, Any]]:
    """Tokens, those of a tile, and what both kernels take."""
    heads, size = q.shape[2:]
    block_d = padded_head_dim(size)
    block_n = max(1, _SINK_TILE // block_d)
    # Views, unless the batch does not lie in memory token after token.
    q, out = (x.reshape(-1, heads, size) for x in (q, out))
    q, out, lse = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, out, lse))
    arguments = dict(
        OUT=out, o_n=out.stride(0), o_h=out.stride(1),
        LSE=lse, l_b=lse.stride(0), l_h=lse.stride(1),
        Q=q, q_n=q.stride(0), q_h=q.stride(1),
        SINK_K=sink_k.contiguous(),
        SINK_V=sink_v.contiguous(),
        scale=scale,
        N=len(q),
        T=lse.shape[2],
        H=heads,
        KV_GROUP=heads // len(sink_k),
        D=size,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=8,
    )  # fmt: skip
    return len(q), block_n, arguments


@replayed
def _sink_forward(
    out: Tensor, lse: Tensor, q: Tensor, sink_k: Tensor, sink_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    merged = torch.empty_like(out, memory_format=torch.contiguous_format)
    merged_lse = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return merged, merged_lse
    tokens, block_n, arguments = _sink_arguments(out, lse, q, sink_k, sink_v, scale)
    with on_device_of(q):
        _sink_kernel[(cdiv(tokens, block_n) * q.shape[2],)](**arguments, MERGED=merged, MERGED_LSE=merged_lse)
    return merged, merged_lse


def _sink_backward(
    d_merged: Tensor,
    d_merged_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_out, d_lse, dq = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out, lse, q))
    if out.numel() == 0:
        return d_out, d_lse, dq, torch.zeros_like(sink_k), torch.zeros_like(sink_v)
    tokens, block_n, arguments = _sink_arguments(out, lse, q, sink_k, sink_v, scale)
    heads, size = q.shape[2:]
    blocks = cdiv(tokens, block_n)
    rows = cdiv(blocks, min(blocks, cdiv(_PROGRAMS, heads))) * block_n
    parts = cdiv(tokens, rows)
    d_sink = torch.empty(2, parts, heads, size, dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _sink_backward_kernel[(parts * heads,)](
            **arguments,
            D_MERGED=d_merged.contiguous(),
            D_MERGED_LSE=None if d_merged_lse is None else d_merged_lse.contiguous(),
            D_OUT=d_out,
            D_LSE=d_lse,
            DQ=dq,
            D_SINK=d_sink,
            ROWS=rows,
        )
    d_sink_k, d_sink_v = d_sink.unflatten(2, (len(sink_k), -1)).sum((1, 3)).unbind()
    return d_out, d_lse, dq, d_sink_k.to(sink_k.dtype), d_sink_v.to(sink_v.dtype)
