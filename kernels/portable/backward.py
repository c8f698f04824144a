"""The backward pass in Triton: every score is computed once, and results are bitwise deterministic.

    dV_j = sum_i P_ij dO_i,   dS_ij = P_ij (dO_i . V_j - delta_i),   delta_i = dO_i . O_i - dlse_i
    dQ_i = scale sum_j dS_ij K_j,   dK_j = scale sum_i dS_ij Q_i,   dc_i = sum_j dS_ij,   dc_j = -sum_i dS_ij

(names: `triton_common`). A program holds one block of keys of one key/value head and loops over the blocks of queries
that attend to it. It accumulates their ``dK``, ``dV`` and ``dc_j``; its share of ``dQ`` must be added to that of other
programs. Floating-point sums in the order of arrival would differ from run to run, so shares are rounded to integers,
whose sums do not depend on order. The fixed-point scale of row ``i`` is ``2^30`` (``2^62`` for float32 inputs) over
what bounds its sum,

    |sum_j dS_ij k_jd| <= (2 |dO_i| max_j |v_j| + |dlse_i|) max_jd |k_jd|

with the maxima over the keys up to that row.

A row of ``dS`` sums to ``dlse_i``, but for the rounding of ``O`` in ``delta_i``. Summed along the sequence those
residues would grow into the gates' gradients, so the rows are summed too, of the same ``dS`` as the columns, and in the
same way: in the gradient of a gate all but the pairs across it cancel.

For float32 inputs the residues would be the largest error, so a first pass finds them, and ``delta_i`` becomes the sum
of the very ``P_ij dP_ij`` that it is subtracted from. Scores are rounded as in the forward pass, and what the
log-sum-exp loses as a float32 value is a factor of the row's weights: they sum to one as those of a softmax that
divides.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, padded_head_dim
from ..triton_common import INF, LOG2_E, dot_precision, load_rows, split_fp64
from .backward_rows import MAXIMA_KEYS, backward_rows_kernel, running_maxima
from .block_ranges import heaviest_first, kv_start_ranges, query_ranges
from .forward import dropout_scale


class _HeadPointers(NamedTuple):
    """What a query head's rows are loaded from; ``p_do`` as ``p_q``."""

    p_q: Any
    q_t: Any
    p_do: Any
    do_t: Any
    p_cq: Any
    p_start: Any


class _RowStatistics(NamedTuple):
    """Of all rows, as `backward_rows_kernel` writes them."""

    DELTA: Any
    SHIFT: Any
    ROW_TERM: Any
    BASE: Any
    DQ_SCALE: Any
    ROW_BOUND: Any


class _Sums(NamedTuple):
    """Fixed-point sums, int64: of ``dQ``, for 16-bit inputs two values in one; and of rows of ``dS``."""

    DQ: Any
    ROW_SUMS: Any


class _KeyBlock(NamedTuple):
    """The program's keys and values, and ``c_j`` relative to ``base`` in two parts."""

    b_k: Any
    b_v: Any
    o_n: Any
    key_high: Any
    key_low: Any
    base: Any


class _Sizes(NamedTuple):
    TQ: Any
    TK: Any
    NM: Any
    offset: Any


class _Dropout(NamedTuple):
    SEED: Any
    dropout: Any


@triton.jit
def _backward_tile(
    i_m,
    i_bh,
    dk,
    dv,
    dc,
    keys: _KeyBlock,
    head: _HeadPointers,
    rows: _RowStatistics,
    sums: _Sums,
    drop: _Dropout,
    sizes: _Sizes,
    qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_FP32: tl.constexpr,
    IS_RESIDUE_PASS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of queries to the gradients of a block of keys; in the residue pass only its rows to their sums.

    Scores are held transposed, ``[BLOCK_N, BLOCK_M]``.

    Returns:
        ``dk`` and ``dv``, ``[BLOCK_N, BLOCK_D]``, and ``dc``, ``[BLOCK_N]``, with what was added.
    """
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_m < sizes.TQ
    o_row = i_bh.to(tl.int64) * sizes.TQ + o_m
    b_q = load_rows(head.p_q, o_m, head.q_t, m_q, D, BLOCK_D, True)
    b_do = load_rows(head.p_do, o_m, head.do_t, m_q, D, BLOCK_D, True)
    delta = tl.load(rows.DELTA + o_row, mask=m_q, other=0.0)
    b_s = tl.dot(keys.b_k, tl.trans(b_q), input_precision=PRECISION) * qk_scale
    if IS_FP32 or IS_MASKED:
        c = tl.load(head.p_cq + o_m, mask=m_q, other=0.0 if IS_MASKED else -INF)
        row_high, row_low = split_fp64(c * LOG2_E - keys.base)
        shift = tl.load(rows.SHIFT + o_row, mask=m_q, other=0.0)
        bias = (row_high[None, :] - keys.key_high[:, None]) + (row_low[None, :] - keys.key_low[:, None])
        # Rounded as in the forward pass, the error of a score that outweighs its row cancels with that of the shift.
        b_s = (b_s + bias) - shift[None, :] if IS_FP32 else b_s + (bias - shift[None, :])
    else:
        distance = (tl.load(rows.BASE + i_bh * sizes.NM + i_m) - keys.base).to(tl.float32)
        term = tl.load(rows.ROW_TERM + o_row, mask=m_q, other=-INF) + distance
        b_s = (b_s - keys.key_high[:, None]) + term[None, :]
    if IS_MASKED:
        kv_start = tl.load(head.p_start + o_m, mask=m_q, other=0).to(tl.int32)
        is_past = keys.o_n[:, None] <= (o_m + sizes.offset)[None, :]
        m_s = is_past & (keys.o_n[:, None] >= kv_start[None, :]) & m_q[None, :]
        b_s = tl.where(m_s, b_s, -INF)
    b_p = tl.exp2(b_s)
    if IS_FP32:
        b_p *= tl.load(rows.ROW_TERM + o_row, mask=m_q, other=0.0)[None, :]
    b_dp = tl.dot(keys.b_v, tl.trans(b_do), input_precision=PRECISION)
    b_p_kept = b_p
    if HAS_DROPOUT:
        kept = dropout_scale(drop.SEED, i_bh, o_m[None, :], keys.o_n[:, None], sizes.TQ, sizes.TK, drop.dropout)
        b_p_kept = b_p * kept
        b_dp = b_dp * kept
    if not IS_RESIDUE_PASS:
        dv += tl.dot(b_p_kept.to(b_do.dtype), b_do, input_precision=PRECISION)
    b_ds = b_p * (b_dp - delta[None, :])
    # Rows and columns must cancel in the gates' gradients as exactly as the dtype of the inputs allows.
    summed = b_ds.to(tl.float64) if IS_FP32 else b_ds
    if not IS_RESIDUE_PASS:
        dc += tl.sum(summed, 1)
        b_ds_16 = b_ds.to(b_q.dtype)
        dk += tl.dot(b_ds_16, b_q, input_precision=PRECISION)

        b_dq = tl.dot(tl.trans(b_ds_16), keys.b_k, input_precision=PRECISION)
        dq_scale = tl.load(rows.DQ_SCALE + o_row, mask=m_q, other=0.0)
        fixed = tl.floor(b_dq * dq_scale[:, None] + 0.5).to(tl.int64)
        if not IS_FP32:
            # Two 32-bit sums to an addition of 64 bits, the second on top: half as many atomic operations.
            low, high = tl.split(tl.reshape(fixed, [BLOCK_M, BLOCK_D // 2, 2]))
            fixed = (high << 32) + low
        WORDS: tl.constexpr = D if IS_FP32 else (D + 1) // 2
        o_word = tl.arange(0, BLOCK_D if IS_FP32 else BLOCK_D // 2)
        m_word = m_q[:, None]
        if D != BLOCK_D:
            m_word = m_word & (o_word < WORDS)[None, :]
        tl.atomic_add(sums.DQ + o_row[:, None] * WORDS + o_word[None, :], fixed, mask=m_word, sem="relaxed")
    sum_scale = (1 << 62) / tl.load(rows.ROW_BOUND + o_row, mask=m_q, other=1.0).to(summed.dtype)
    tl.atomic_add(sums.ROW_SUMS + o_row, (tl.sum(summed, 0) * sum_scale).to(tl.int64), mask=m_q, sem="relaxed")
    return dk, dv, dc


@triton.jit
def _backward_kernel(
    Q,
    K,
    V,
    D_OUT,
    C_Q,
    C_K,
    KV_START,
    LAST,
    DELTA,
    SHIFT,
    ROW_TERM,
    BASE,
    DQ_SCALE,
    ROW_BOUND,
    M_END,
    M_FULL_END,
    HEAD_ORDER,
    SEED,
    DQ,
    DK,
    DV,
    DC,
    ROW_SUMS,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    do_b,
    do_t,
    do_h,
    cq_b,
    cq_h,
    ck_b,
    ck_h,
    s_b,
    s_h,
    scale,
    dropout,
    TQ,
    TK,
    H,
    G,
    KV_GROUP,
    GATE_GROUP,
    START_GROUP,
    NM,
    NN,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_FP32: tl.constexpr,
    IS_RESIDUE_PASS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one block of keys and values of one key/value head, and its shares of ``dQ`` and of the row sums.

    Arguments as in `backward`; ``DC`` is ``[B, H, Tk]`` float64, a value per query head.
    """
    # Heads with the most work first, and in each the keys that the most queries attend to.
    pid = tl.program_id(0)
    i_bg = tl.load(HEAD_ORDER + pid // NN).to(tl.int32)
    i_n = pid % NN
    i_b32, i_g = i_bg // G, i_bg % G
    i_b = i_b32.to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_n < TK
    b_k = load_rows(K + i_b * k_b + i_g.to(tl.int64) * k_h, o_n, k_t, m_k, D, BLOCK_D, True)
    b_v = load_rows(V + i_b * v_b + i_g.to(tl.int64) * v_h, o_n, v_t, m_k, D, BLOCK_D, True)
    offset = tl.load(LAST).to(tl.int32)
    m_begin = tl.maximum(i_n * BLOCK_N - offset, 0) // BLOCK_M
    full_begin = tl.cdiv(tl.maximum(tl.minimum((i_n + 1) * BLOCK_N, TK) - 1 - offset, 0), BLOCK_M)
    qk_scale = scale * LOG2_E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    rows = _RowStatistics(DELTA, SHIFT, ROW_TERM, BASE, DQ_SCALE, ROW_BOUND)
    sums = _Sums(DQ, ROW_SUMS)
    drop = _Dropout(SEED, dropout)
    sizes = _Sizes(TQ, TK, NM, offset)
    for member in range(0, KV_GROUP):
        i_h = i_g * KV_GROUP + member
        i_bh = i_b32 * H + i_h
        i_gate = (i_h // GATE_GROUP).to(tl.int64)
        head = _HeadPointers(
            p_q=Q + i_b * q_b + i_h.to(tl.int64) * q_h,
            q_t=q_t,
            p_do=D_OUT + i_b * do_b + i_h.to(tl.int64) * do_h,
            do_t=do_t,
            p_cq=C_Q + i_b * cq_b + i_gate * cq_h,
            p_start=KV_START + i_b * s_b + (i_h // START_GROUP).to(tl.int64) * s_h,
        )
        c = tl.load(C_K + i_b * ck_b + i_gate * ck_h + o_n, mask=m_k, other=INF) * LOG2_E
        base = tl.min(c, 0)
        base = tl.where(base == INF, 0.0, base)
        key_high, key_low = split_fp64(c - base)
        keys = _KeyBlock(b_k, b_v, o_n, key_high, key_low, base)
        dc = tl.zeros([BLOCK_N], tl.float64 if IS_FP32 else tl.float32)
        # Tiles from full_begin to full_end are full; masked ones come before, on the diagonal, and after.
        m_end = tl.load(M_END + i_bh * NN + i_n)
        full_end = tl.minimum(tl.maximum(tl.load(M_FULL_END + i_bh * NN + i_n), full_begin), m_end)
        tiles_before = tl.maximum(tl.minimum(full_begin, m_end) - m_begin, 0)
        tiles_after = tl.maximum(m_end - tl.maximum(full_end, full_begin), 0)
        for i in tl.range(0, tiles_before + tiles_after):
            i_m = tl.where(i < tiles_before, m_begin + i, full_end + i - tiles_before)
            dk, dv, dc = _backward_tile(
                i_m, i_bh, dk, dv, dc, keys, head, rows, sums, drop, sizes, qk_scale,
                D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, IS_MASKED=True, IS_FP32=IS_FP32,
                IS_RESIDUE_PASS=IS_RESIDUE_PASS, HAS_DROPOUT=HAS_DROPOUT, PRECISION=PRECISION,
            )  # fmt: skip
        for i_m in tl.range(full_begin, full_end):
            dk, dv, dc = _backward_tile(
                i_m, i_bh, dk, dv, dc, keys, head, rows, sums, drop, sizes, qk_scale,
                D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, IS_MASKED=False, IS_FP32=IS_FP32,
                IS_RESIDUE_PASS=IS_RESIDUE_PASS, HAS_DROPOUT=HAS_DROPOUT, PRECISION=PRECISION,
            )  # fmt: skip
        tl.store(DC + i_bh.to(tl.int64) * TK + o_n, -dc.to(tl.float64), mask=m_k)
    o_d = tl.arange(0, BLOCK_D)
    o_out = ((i_b * TK + o_n[:, None]) * G + i_g) * D + o_d[None, :]
    m_out = m_k[:, None] & (o_d < D)[None, :]
    tl.store(DK + o_out, (dk * scale).to(DK.dtype.element_ty), mask=m_out)
    tl.store(DV + o_out, dv.to(DV.dtype.element_ty), mask=m_out)


@triton.jit
def _backward_finish_kernel(
    SUMS,
    DQ_SCALE,
    ROW_SUMS,
    ROW_BOUND,
    DQ,
    DC,
    scale,
    TQ,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_FP32: tl.constexpr,
):
    """Fixed-point sums of a block of queries to ``DQ``, ``[B, Tq, H, D]``, and ``DC``, ``[B, H, Tq]`` float64."""
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_m < TQ
    o_row = i_bh.to(tl.int64) * TQ + o_m
    o_d = tl.arange(0, BLOCK_D)
    m_dq = m_q[:, None] & (o_d < D)[None, :]
    if IS_FP32:
        sums = tl.load(SUMS + o_row[:, None] * D + o_d[None, :], mask=m_dq, other=0)
    else:
        o_word = tl.arange(0, BLOCK_D // 2)
        WORDS: tl.constexpr = (D + 1) // 2
        m_word = m_q[:, None] & (o_word < WORDS)[None, :]
        pair = tl.load(SUMS + o_row[:, None] * WORDS + o_word[None, :], mask=m_word, other=0)
        low = pair.to(tl.int32).to(tl.int64)
        sums = tl.reshape(tl.join(low, (pair - low) >> 32), [BLOCK_M, BLOCK_D])
    dq_scale = tl.load(DQ_SCALE + o_row, mask=m_q, other=1.0)
    b_dq = sums.to(tl.float32) * (scale / dq_scale)[:, None]
    o_dq = ((i_b * TQ + o_m[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(DQ + o_dq, b_dq.to(DQ.dtype.element_ty), mask=m_dq)

    row_bound = tl.load(ROW_BOUND + o_row, mask=m_q, other=0.0).to(tl.float64)
    row_sums = tl.load(ROW_SUMS + o_row, mask=m_q, other=0).to(tl.float64)
    tl.store(DC + o_row, row_sums * (row_bound / (1 << 62)), mask=m_q)


class _Gradients(NamedTuple):
    """``sums`` and ``row_sums`` are fixed-point, the others what `backward` returns."""

    sums: Tensor
    row_sums: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dc_q: Tensor
    dc_k: Tensor


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> _Gradients:
    batch, queries, heads, head_dim = q.shape
    words = head_dim if q.dtype == torch.float32 else triton.cdiv(head_dim, 2)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return _Gradients(
        sums=torch.zeros(batch, heads, queries, words, dtype=torch.int64, device=q.device),
        row_sums=torch.zeros(batch, heads, queries, dtype=torch.int64, device=q.device),
        dq=dq,
        dk=dk,
        dv=dv,
        dc_q=torch.empty(batch, heads, queries, dtype=torch.float64, device=q.device),
        dc_k=torch.empty(batch, heads, k.shape[1], dtype=torch.float64, device=q.device),
    )


def _row_statistics(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, decay: Decay, maxima: Tensor, dropout: float, tile: Tile
) -> _RowStatistics:
    """Launch `backward_rows_kernel`; ``maxima`` is that of `running_maxima`."""
    batch, queries, heads, head_dim = out.shape
    gates, kv_heads = decay.key.shape[1], maxima.shape[2]
    blocks = triton.cdiv(queries, tile.queries)
    is_fp32 = out.dtype == torch.float32
    delta, shift, row_term, dq_scale, row_bound = torch.empty(
        5, batch, heads, queries, dtype=torch.float32, device=out.device
    ).unbind()
    base = torch.empty(batch, heads, blocks, dtype=torch.float64, device=out.device)
    backward_rows_kernel[(batch * heads, blocks)](
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
    return _RowStatistics(delta, shift, row_term, base, dq_scale, row_bound)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass. Each tensor is contiguous along its last dimension.

    Args:
        d_out, d_lse: gradients of ``out``, ``[B, Tq, H, D]``, and ``lse``, ``[B, H, Tq]`` float32.
        q, k, v, decay, scale, dropout, seed: what `forward` took.
        out, lse: what it returned.
        tile: shape and resources of a program.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes, and of the running sums at queries and keys, per query
        head: ``[B, H, Tq]`` and ``[B, H, Tk]`` float64.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    least, greatest = kv_start_ranges(decay.kv_start, decay.last, heads, tile.queries)
    order = heaviest_first(least.view(batch * kv_heads, -1))
    blocks, key_blocks = least.shape[-1], triton.cdiv(keys, tile.keys)
    m_end, full_end = query_ranges(least, greatest, decay.last, keys, tile)
    is_fp32 = q.dtype == torch.float32
    rows = _row_statistics(d_out, d_lse, out, lse, decay, running_maxima(k, v), dropout, tile)
    gradients = _empty_gradients(q, k, v)
    for is_residue_pass in (True, False) if is_fp32 else (False,):
        _backward_kernel[(key_blocks * batch * kv_heads,)](
            Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
            K=k, k_b=k.stride(0), k_t=k.stride(1), k_h=k.stride(2),
            V=v, v_b=v.stride(0), v_t=v.stride(1), v_h=v.stride(2),
            D_OUT=d_out, do_b=d_out.stride(0), do_t=d_out.stride(1), do_h=d_out.stride(2),
            C_Q=decay.query, cq_b=decay.query.stride(0), cq_h=decay.query.stride(1),
            C_K=decay.key, ck_b=decay.key.stride(0), ck_h=decay.key.stride(1),
            KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
            LAST=decay.last,
            DELTA=rows.DELTA,
            SHIFT=rows.SHIFT,
            ROW_TERM=rows.ROW_TERM,
            BASE=rows.BASE,
            DQ_SCALE=rows.DQ_SCALE,
            ROW_BOUND=rows.ROW_BOUND,
            M_END=m_end,
            M_FULL_END=full_end,
            HEAD_ORDER=order,
            SEED=seed,
            DQ=gradients.sums,
            DK=gradients.dk,
            DV=gradients.dv,
            DC=gradients.dc_k,
            ROW_SUMS=gradients.row_sums,
            scale=scale,
            dropout=dropout,
            TQ=queries,
            TK=keys,
            H=heads,
            G=kv_heads,
            KV_GROUP=heads // kv_heads,
            GATE_GROUP=heads // gates,
            START_GROUP=heads // decay.kv_start.shape[1],
            NM=blocks,
            NN=key_blocks,
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            IS_FP32=is_fp32,
            IS_RESIDUE_PASS=is_residue_pass,
            HAS_DROPOUT=dropout > 0.0,
            PRECISION=dot_precision(q),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        if is_residue_pass:
            # What else it stored is overwritten.
            rows.DELTA.add_(gradients.row_sums * (rows.ROW_BOUND.double() / 2**62) - d_lse)
            gradients.row_sums.zero_()
    _backward_finish_kernel[(batch * heads, blocks)](
        SUMS=gradients.sums,
        DQ_SCALE=rows.DQ_SCALE,
        ROW_SUMS=gradients.row_sums,
        ROW_BOUND=rows.ROW_BOUND,
        DQ=gradients.dq,
        DC=gradients.dc_q,
        scale=scale,
        TQ=queries,
        H=heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tile.queries,
        IS_FP32=is_fp32,
    )
    return gradients.dq, gradients.dk, gradients.dv, gradients.dc_q, gradients.dc_k
