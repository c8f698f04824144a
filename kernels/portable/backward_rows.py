"""What the backward pass must know of rows before it begins, in Triton (names: `triton_common`).

Per query: ``delta_i = dO_i . O_i - dlse_i``, the shift of its scores, and the fixed-point scale of its sums, which
`backward` explains; for that scale, the largest keys and values up to it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, cdiv, padded_head_dim
from ..triton_common import INF, LN_2, LOG2_E, kernel, load_rows, make_running_maxima, split_fp64

# Keys are reduced to their largest in groups of so many, by programs of so many rows.
MAXIMA_KEYS, _MAXIMA_ROWS = 16, 128
# Groups that a scan takes at a time.
_GROUPS_AT_ONCE = 1024
# Keeps bounds and their reciprocals from being subnormal.
_LEAST_BOUND = tl.constexpr(2.0**-60)


@triton.jit
def row_norms(x):
    """Length of each row, ``[N, D] -> [N]``, without overflow on the way."""
    largest = tl.max(tl.abs(x), 1)
    scaled = x / tl.where(largest == 0.0, 1.0, largest)[:, None]
    return largest * tl.sqrt(tl.sum(scaled * scaled, 1))


@kernel
def _maxima_kernel(
    K, V, MAXIMA,
    k_b, k_t, k_h, v_b, v_t, v_h,
    TK, G, NG,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """``max |k_jd|`` and ``max |v_j|`` of each of the ``NG`` groups of ``KEYS`` keys of a head, ``[2, B, G, NG]``."""
    i_bg, i_n = tl.program_id(0), tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = load_rows(K + i_b * k_b + i_g * k_h, o_n, k_t, o_n < TK, D, BLOCK_D, True).to(tl.float32)
    b_v = load_rows(V + i_b * v_b + i_g * v_h, o_n, v_t, o_n < TK, D, BLOCK_D, True).to(tl.float32)
    GROUPS: tl.constexpr = BLOCK_N // KEYS
    o_g = i_n * GROUPS + tl.arange(0, GROUPS)
    p_maxima = MAXIMA + i_bg * NG + o_g
    largest_k, largest_v = tl.max(tl.abs(b_k), 1), row_norms(b_v)
    tl.store(p_maxima, tl.max(tl.reshape(largest_k, [GROUPS, KEYS]), 1), mask=o_g < NG)
    tl.store(p_maxima + tl.num_programs(0) * NG, tl.max(tl.reshape(largest_v, [GROUPS, KEYS]), 1), mask=o_g < NG)


@kernel
def _running_maxima_kernel(MAXIMA, NG, BLOCK: tl.constexpr):
    """Of all groups, a program for each row of ``MAXIMA``."""
    make_running_maxima(MAXIMA + tl.program_id(0) * NG, NG, BLOCK)


def running_maxima(k: Tensor, v: Tensor) -> Tensor:
    """Largest keys and values up to the end of each group of 16.

    Args:
        k, v: ``[B, Tk, G, D]``, contiguous along the last dimension.

    Returns:
        ``max |k_jd|`` and ``max |v_j|``, ``[2, B, G, ceil(Tk / 16)]`` float32.
    """
    batch, keys, kv_heads, head_dim = k.shape
    groups = cdiv(keys, MAXIMA_KEYS)
    maxima = torch.empty(2, batch, kv_heads, groups, dtype=torch.float32, device=k.device)
    _maxima_kernel[(batch * kv_heads, cdiv(keys, _MAXIMA_ROWS))](
        K=k, k_b=k.stride(0), k_t=k.stride(1), k_h=k.stride(2),
        V=v, v_b=v.stride(0), v_t=v.stride(1), v_h=v.stride(2),
        MAXIMA=maxima,
        TK=keys,
        G=kv_heads,
        NG=groups,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_N=_MAXIMA_ROWS,
        KEYS=MAXIMA_KEYS,
    )  # fmt: skip
    _running_maxima_kernel[(2 * batch * kv_heads,)](MAXIMA=maxima, NG=groups, BLOCK=_GROUPS_AT_ONCE)
    return maxima


class RowStatistics(NamedTuple):
    """Statistics of all rows, as `_backward_rows_kernel` writes them: pointers in a kernel, tensors outside."""

    DELTA: Any
    SHIFT: Any
    ROW_TERM: Any
    BASE: Any
    DQ_SCALE: Any
    ROW_BOUND: Any


@triton.jit
def _at_least_bound(bound):
    """``bound``, raised if it is too small; a NaN stays one."""
    return tl.where(bound < _LEAST_BOUND, _LEAST_BOUND, bound)


@kernel
def _backward_rows_kernel(
    OUT, D_OUT, LSE, D_LSE, C_Q, MAXIMA, DELTA, SHIFT, ROW_TERM, BASE, DQ_SCALE, ROW_BOUND, LAST,
    o_b, o_t, o_h, do_b, do_t, do_h, dl_b, dl_h, cq_b, cq_h,
    TQ, H, HF, KV_GROUP, NM, NG, dropout,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    LARGEST_SUM: tl.constexpr,
    IS_FP32: tl.constexpr,
):  # fmt: skip
    """What the main kernel needs of each row of a block of queries.

    It writes, ``[B, H, Tq]`` float32 each,

    * ``DELTA``, and ``SHIFT``, the log-sum-exp in units of log 2;
    * ``ROW_TERM``: ``c_i - base - lse_i`` of the exponent, or for float32 inputs a factor of the row's weights that
      undoes the rounding of ``SHIFT``;
    * ``DQ_SCALE``: by what ``dQ`` is multiplied before it is rounded, so that its sums stay below ``LARGEST_SUM``;
    * ``ROW_BOUND``: what bounds the row sums of ``dS``;

    and ``BASE``, ``[B, H, NM]`` float64, the running sum at the first row of each block.
    """
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_m < TQ
    b_o = load_rows(OUT + i_b * o_b + i_h * o_h, o_m, o_t, m_q, D, BLOCK_D, True).to(tl.float32)
    b_do = load_rows(D_OUT + i_b * do_b + i_h * do_h, o_m, do_t, m_q, D, BLOCK_D, True).to(tl.float32)
    d_lse = tl.load(D_LSE + i_b * dl_b + i_h * dl_h + o_m, mask=m_q, other=0.0).to(tl.float32)
    lse = tl.load(LSE + i_bh.to(tl.int64) * TQ + o_m, mask=m_q, other=0.0)
    delta = tl.sum(b_o * b_do, 1) - d_lse
    # exp(-inf - 0) = 0 for a fully masked row, where exp(-inf + inf) would be NaN.
    shift = tl.where(lse == -INF, 0.0, lse) * LOG2_E
    p_cq = C_Q + i_b * cq_b + (i_h // (H // HF)) * cq_h
    base = tl.load(p_cq + i_m * BLOCK_M) * LOG2_E
    c = tl.load(p_cq + o_m, mask=m_q, other=0.0) * LOG2_E
    o_row = i_bh.to(tl.int64) * TQ + o_m
    tl.store(DELTA + o_row, delta, mask=m_q)
    if IS_FP32:
        high, low = split_fp64(shift)
        tl.store(SHIFT + o_row, high, mask=m_q)
        tl.store(ROW_TERM + o_row, 1.0 - low * LN_2, mask=m_q)
    else:
        tl.store(SHIFT + o_row, shift, mask=m_q)
        tl.store(ROW_TERM + o_row, (c - base).to(tl.float32) - shift, mask=m_q)
    tl.store(BASE + i_bh * NM + i_m, base)

    # The largest of the keys that a row may attend to, and of a few after it.
    last = tl.load(LAST).to(tl.int32) + o_m
    p_maxima = MAXIMA + (i_bh // KV_GROUP) * NG + tl.minimum(last // KEYS, NG - 1)
    largest_k, largest_v = tl.load(p_maxima), tl.load(p_maxima + tl.num_programs(0) // KV_GROUP * NG)
    # A delta that is NaN or infinite makes the bounds NaN, and with them the gradients.
    row_bound = 2.0 / (1.0 - dropout) * row_norms(b_do) * largest_v + tl.abs(d_lse) + delta * 0.0
    tl.store(DQ_SCALE + o_row, LARGEST_SUM / _at_least_bound(row_bound * largest_k), mask=m_q)
    tl.store(ROW_BOUND + o_row, _at_least_bound(row_bound), mask=m_q)


def row_statistics(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, decay: Decay, maxima: Tensor, dropout: float, tile: Tile
) -> RowStatistics:
    """Launch `_backward_rows_kernel`; ``maxima`` is that of `running_maxima`."""
    batch, queries, heads, head_dim = out.shape
    gates, kv_heads = decay.key.shape[1], maxima.shape[2]
    blocks = cdiv(queries, tile.queries)
    is_fp32 = out.dtype == torch.float32
    delta, shift, row_term, dq_scale, row_bound = torch.empty(
        5, batch, heads, queries, dtype=torch.float32, device=out.device
    ).unbind()
    base = torch.empty(batch, heads, blocks, dtype=torch.float64, device=out.device)
    _backward_rows_kernel[(batch * heads, blocks)](
        OUT=out, o_b=out.stride(0), o_t=out.stride(1), o_h=out.stride(2),
        D_OUT=d_out, do_b=d_out.stride(0), do_t=d_out.stride(1), do_h=d_out.stride(2),
        LSE=lse,
        D_LSE=d_lse, dl_b=d_lse.stride(0), dl_h=d_lse.stride(1),
        C_Q=decay.query, cq_b=decay.query.stride(0), cq_h=decay.query.stride(1),
        MAXIMA=maxima,
        DELTA=delta,
        SHIFT=shift,
        ROW_TERM=row_term,
        BASE=base,
        DQ_SCALE=dq_scale,
        ROW_BOUND=row_bound,
        LAST=decay.last,
        TQ=queries,
        H=heads,
        HF=gates,
        KV_GROUP=heads // kv_heads,
        NM=blocks,
        NG=maxima.shape[-1],
        dropout=dropout,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tile.queries,
        KEYS=MAXIMA_KEYS,
        LARGEST_SUM=2.0 ** (62 if is_fp32 else 30),
        IS_FP32=is_fp32,
    )  # fmt: skip
    return RowStatistics(delta, shift, row_term, base, dq_scale, row_bound)
