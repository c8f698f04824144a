"""The main kernel of the backward pass in Triton, and the one that converts its fixed-point sums (see `backward`)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_common import INF, LOG2_E, kernel, load_rows, split_fp64
from .backward_rows import RowStatistics
from .forward import dropout_scale


class _HeadPointers(NamedTuple):
    """What a query head's rows are loaded from; ``p_do`` as ``p_q``."""

    p_q: Any
    q_t: Any
    p_do: Any
    do_t: Any
    p_cq: Any
    p_start: Any


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
    i_m, i_bh, dk, dv, dc, keys: _KeyBlock, head: _HeadPointers, rows: RowStatistics, sums: _Sums, drop: _Dropout,
    sizes: _Sizes, qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_FP32: tl.constexpr,
    IS_RESIDUE_PASS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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


@kernel
def backward_kernel(
    Q, K, V, D_OUT, C_Q, C_K, KV_START, LAST, DELTA, SHIFT, ROW_TERM, BASE, DQ_SCALE, ROW_BOUND, M_END, M_FULL_END,
    HEAD_ORDER, SEED, DQ, DK, DV, DC, ROW_SUMS,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, cq_b, cq_h, ck_b, ck_h, s_b, s_h,
    scale, dropout, TQ, TK, H, G, KV_GROUP, GATE_GROUP, START_GROUP, NM, NN,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_FP32: tl.constexpr,
    IS_RESIDUE_PASS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
    rows = RowStatistics(DELTA, SHIFT, ROW_TERM, BASE, DQ_SCALE, ROW_BOUND)
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


@kernel
def backward_finish_kernel(
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
