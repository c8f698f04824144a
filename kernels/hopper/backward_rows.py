"""What the backward pass for Hopper prepares and finishes, in Triton (names: `triton_common`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..portable.backward_rows import MAXIMA_KEYS, row_norms, running_maxima
from ..tiles import cdiv
from ..triton_common import INF, LOG2_E, kernel
from .backward_common import ROW_SUM_SCALE

# Room for the rounding of bounds, and of the matmuls that they bound.
_ROOM = tl.constexpr(1.03)
# Keeps bounds of dQ from vanishing with the keys.
_LEAST_KEY = tl.constexpr(2.0**-12)
# A larger bound has no fixed-point scale: gradients are NaN.
_LARGEST_BOUND = tl.constexpr(1e18)


@triton.jit
def _exponent(x):
    """Biased exponent of the least power of two that is not below ``x``."""
    return (tl.minimum(tl.maximum(x, 1e-17), 1e18).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23


@kernel
def _tile_rows_kernel(
    D_OUT, OUT, C_Q, LSE, D_LSE, KV_START, MAXIMA, ROWS, SUMS, ROW_SUMS,
    do_b, do_t, do_h, o_b, o_t, o_h, cq_b, cq_h, dl_b, dl_h, s_b, s_h,
    TQ, TK, H, KV_GROUP, GATE_GROUP, START_GROUP, NM, NG,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAXIMA_KEYS: tl.constexpr,
):  # fmt: skip
    """The fields of a tile of queries (`backward_common`) to ``ROWS``, and zeros to its ``SUMS`` and ``ROW_SUMS``."""
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    tile = (i_bh * NM + i_m).to(tl.int64)
    tl.store(SUMS + tile * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D), 0)
    tl.store(ROW_SUMS + tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M], tl.int64))
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_m < TQ
    tokens = o_m[:, None].to(tl.int64)
    o_d = tl.arange(0, D)[None, :]
    mask = m_q[:, None]
    b_do = tl.load(D_OUT + i_b * do_b + i_h * do_h + tokens * do_t + o_d, mask=mask, other=0.0).to(tl.float32)
    b_o = tl.load(OUT + i_b * o_b + i_h * o_h + tokens * o_t + o_d, mask=mask, other=0.0).to(tl.float32)
    d_lse = tl.load(D_LSE + i_b * dl_b + i_h * dl_h + o_m, mask=m_q, other=0.0)
    delta = tl.sum(b_do * b_o, 1) - d_lse

    # The largest of the keys that a row may attend to, and of a few after it.
    p_maxima = MAXIMA + (i_bh // KV_GROUP) * NG + tl.minimum((TK - TQ + o_m) // MAXIMA_KEYS, NG - 1)
    largest_k, largest_v = tl.load(p_maxima), tl.load(p_maxima + tl.num_programs(0) // KV_GROUP * NG)
    # A delta that is NaN or infinite makes the bounds NaN, and with them the gradients.
    bound = (2.0 * row_norms(b_do) * largest_v + tl.abs(d_lse)) * _ROOM + delta * 0.0
    # A power of two: the largest dQ of a row is 2^30 at most, and so is, but for `ROW_SUM_SCALE`, its sum of dS.
    bound *= tl.maximum(largest_k, _LEAST_KEY)
    dq_scale = ((284 - _exponent(bound)) << 23).to(tl.float32, bitcast=True)
    dq_scale = tl.where((bound != bound) | (bound > _LARGEST_BOUND), float("nan"), dq_scale)

    p_cq = C_Q + i_b * cq_b + (i_h // GATE_GROUP) * cq_h
    base = tl.load(p_cq + i_m * BLOCK_M) * LOG2_E
    relative = tl.load(p_cq + o_m, mask=m_q, other=0.0) * LOG2_E - base
    lse = tl.load(LSE + i_bh.to(tl.int64) * TQ + o_m, mask=m_q, other=0.0)
    # exp(-inf - 0) = 0 for a fully masked row, where exp(-inf + inf) would be NaN.
    shift = tl.where(lse == -INF, 0.0, lse).to(tl.float64) * LOG2_E
    high = relative.to(tl.float32)
    low = ((relative - high.to(tl.float64)) - shift).to(tl.float32)
    p_start = KV_START + i_b * s_b + (i_h // START_GROUP) * s_h
    kv_start = tl.load(p_start + o_m, mask=m_q, other=0).to(tl.float32)
    base_high = base.to(tl.float32)
    base_low = (base - base_high.to(tl.float64)).to(tl.float32)
    o = tl.arange(0, BLOCK_M)
    of_tile = tl.where(o == 0, base_high, tl.where(o == 1, base_low, 0.0))
    of_tile = tl.where(o == 2, tl.max(kv_start, 0), of_tile)
    p = ROWS + tile * (8 * BLOCK_M) + o
    tl.store(p, tl.where(m_q, (relative - shift).to(tl.float32), -INF))
    tl.store(p + BLOCK_M, tl.where(m_q, delta, 0.0))
    tl.store(p + 2 * BLOCK_M, tl.where(m_q, dq_scale, 0.0))
    tl.store(p + 3 * BLOCK_M, of_tile)
    tl.store(p + 4 * BLOCK_M, tl.where(m_q, high, 0.0))
    tl.store(p + 5 * BLOCK_M, tl.where(m_q, low, -INF))
    tl.store(p + 6 * BLOCK_M, kv_start)


@kernel
def _hopper_backward_finish_kernel(
    SUMS,
    ROWS,
    ROW_SUMS,
    DQ,
    DC,
    scale,
    TQ,
    H,
    NM,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_PAIRED: tl.constexpr,
):
    """Fixed-point sums of a tile to ``DQ``, ``[B, TQ, H, D]``, and ``DC``, ``[B, H, TQ]`` float64.

    ``SUMS`` holds int32 values as accumulators have them (see `backward`); if ``IS_PAIRED`` two in an int64.
    """
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    tile = (i_bh * NM + i_m).to(tl.int64)
    PARTS: tl.constexpr = D // 64
    part = tl.arange(0, PARTS)[:, None]
    word = tl.arange(0, 2048)[None, :]
    if IS_PAIRED:
        pair = tl.load(SUMS + tile * (BLOCK_M * D // 2) + part * 2048 + word)
        even = (pair << 32) >> 32
        x = tl.join(even.to(tl.float32), ((pair - even) >> 32).to(tl.float32))
    else:
        p_even = SUMS + tile * (BLOCK_M * D) + part * 4096 + word
        x = tl.join(tl.load(p_even).to(tl.float32), tl.load(p_even + 2048).to(tl.float32))
    # From [64 columns, half, 8 columns, warp, row, pair of columns, column].
    x = tl.reshape(x, [PARTS, 2, 8, 4, 8, 4, 2])
    x = tl.reshape(tl.permute(x, (3, 1, 4, 0, 2, 5, 6)), [BLOCK_M, D])
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_m < TQ
    p_rows = ROWS + tile * (8 * BLOCK_M)
    dq_scale = tl.load(p_rows + 2 * BLOCK_M + tl.arange(0, BLOCK_M), mask=m_q, other=1.0)
    dq = x * (scale / dq_scale)[:, None]
    p = ((i_b * TQ + o_m[:, None]) * H + i_h) * D + tl.arange(0, D)[None, :]
    tl.store(DQ + p, dq.to(DQ.dtype.element_ty), mask=m_q[:, None])

    row_sums = tl.load(ROW_SUMS + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.float64)
    row_sums = row_sums / (dq_scale.to(tl.float64) * ROW_SUM_SCALE)
    tl.store(DC + i_bh.to(tl.int64) * TQ + o_m, row_sums, mask=m_q)


def prepare_rows(
    d_out: Tensor, d_lse: Tensor, k: Tensor, v: Tensor, decay: Decay, out: Tensor, lse: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fields of the rows of all tiles, and zeros for their sums. Arguments as for `hopper_backward`.

    Returns:
        ``[2 * tiles, 4 * block]`` float32, a tile's eight fields of ``block`` rows in two halves; ``[tiles * block *
        D]`` int32 for ``dQ``; ``[tiles * block]`` int64 for row sums. There are ``B * H * ceil(Tq / block)`` tiles.
    """
    batch, queries, heads, head_dim = out.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    blocks = cdiv(queries, block)
    tiles = batch * heads * blocks
    rows = torch.empty(tiles * 2, 4 * block, dtype=torch.float32, device=k.device)
    sums = torch.empty(tiles * block * head_dim, dtype=torch.int32, device=k.device)
    row_sums = torch.empty(tiles * block, dtype=torch.int64, device=k.device)
    maxima = running_maxima(k, v)
    _tile_rows_kernel[(batch * heads, blocks)](
        D_OUT=d_out, do_b=d_out.stride(0), do_t=d_out.stride(1), do_h=d_out.stride(2),
        OUT=out, o_b=out.stride(0), o_t=out.stride(1), o_h=out.stride(2),
        C_Q=decay.query, cq_b=decay.query.stride(0), cq_h=decay.query.stride(1),
        LSE=lse,
        D_LSE=d_lse, dl_b=d_lse.stride(0), dl_h=d_lse.stride(1),
        KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
        MAXIMA=maxima,
        ROWS=rows,
        SUMS=sums,
        ROW_SUMS=row_sums,
        TQ=queries,
        TK=keys,
        H=heads,
        KV_GROUP=heads // kv_heads,
        GATE_GROUP=heads // decay.query.shape[1],
        START_GROUP=heads // decay.kv_start.shape[1],
        NM=blocks,
        NG=maxima.shape[-1],
        D=head_dim,
        BLOCK_M=block,
        MAXIMA_KEYS=MAXIMA_KEYS,
        num_warps=4,
    )  # fmt: skip
    return rows, sums, row_sums


def finish_queries(
    q: Tensor, sums: Tensor, rows: Tensor, row_sums: Tensor, scale: float, block: int
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and of their running sums from fixed-point sums.

    Args:
        q: ``[B, Tq, H, D]``, what the gradient is of.
        sums, rows, row_sums: of `prepare_rows`, with what the main kernel added; ``sums`` as int64 if it added pairs.
        scale: multiplies ``q . k``.
        block: queries of a tile.

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q`` and ``[B, H, Tq]`` float64.
    """
    batch, queries, heads, head_dim = q.shape
    blocks = cdiv(queries, block)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dc_q = torch.empty(batch, heads, queries, dtype=torch.float64, device=q.device)
    _hopper_backward_finish_kernel[(batch * heads, blocks)](
        SUMS=sums,
        ROWS=rows,
        ROW_SUMS=row_sums,
        DQ=dq,
        DC=dc_q,
        scale=scale,
        TQ=queries,
        H=heads,
        NM=blocks,
        D=head_dim,
        BLOCK_M=block,
        IS_PAIRED=sums.dtype == torch.int64,
        num_warps=4,
    )
    return dq, dc_q
