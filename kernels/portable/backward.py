"""Triton kernels of the backward pass: every score is computed once, and the result is the same bits every time.

A program holds one block of keys of one key/value head and walks over the blocks of queries that see it. It keeps its
``dK``, ``dV`` and key gradients of the decay; its share of ``dQ`` must be added to that of other programs.
Floating-point sums in the order of arrival would differ from run to run, so shares are rounded to integers, whose sums
do not depend on order: row ``i`` in units of ``2^-30`` (``2^-62`` for float32 inputs) of what bounds its sum,

    |sum_j dS_ij k_jd| <= (2 |dO_i| max_j |v_j| + |dlse_i|) max_jd |k_jd|

with the maxima over the keys up to that row.

A row of ``dS`` sums to ``dlse_i``, but for the rounding of ``O`` in ``delta_i = dO_i . O_i``. Summed along the sequence
those residues would grow into the gates' gradients, so the rows are summed too, of the same ``dS`` as the columns, and
in the same way: in the gradient of a gate all but the pairs across it cancel.

For float32 inputs the residues would be the largest error, so a first pass finds them, and ``delta_i`` becomes the sum
of the very ``P_ij dP_ij`` that it is taken from. Scores are rounded as in the forward pass, and what the log-sum-exp
loses as a float32 number is a factor of the row's weights: they sum to one as those of a softmax that divides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, padded_head_dim
from ..triton_common import INF, LN_2, LOG2_E, dot_precision, load_rows, split_fp64
from .block_ranges import heaviest_first, kv_start_ranges, query_ranges
from .forward import dropout_scale

# Keys are reduced to their largest in groups of so many, by programs of so many rows.
MAXIMA_KEYS, _MAXIMA_ROWS = 16, 128
# Keeps bounds and their reciprocals normal numbers.
_LEAST_BOUND = tl.constexpr(2.0**-60)


@triton.jit
def _maxima_kernel(
    K,
    V,
    MAXIMA,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    TK,
    G,
    NB,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Largest ``|k_jd|`` and ``|v_j|`` of every `MAXIMA_KEYS` keys."""
    head, block = tl.program_id(0), tl.program_id(1)
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    keys = block * ROWS + tl.arange(0, ROWS)
    k = load_rows(K + b * k_b + g * k_h, keys, k_t, keys < TK, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    v = load_rows(V + b * v_b + g * v_h, keys, v_t, keys < TK, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    PER_PROGRAM: tl.constexpr = ROWS // KEYS
    groups = block * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    p = MAXIMA + head * NB + groups
    largest_k, largest_v = tl.max(tl.abs(k), 1), norms(v)
    tl.store(p, tl.max(tl.reshape(largest_k, [PER_PROGRAM, KEYS]), 1), mask=groups < NB)
    tl.store(p + tl.num_programs(0) * NB, tl.max(tl.reshape(largest_v, [PER_PROGRAM, KEYS]), 1), mask=groups < NB)


@triton.jit
def norms(x):
    """Length of each row, without overflow on the way."""
    largest = tl.max(tl.abs(x), 1)
    scaled = x / tl.where(largest == 0.0, 1.0, largest)[:, None]
    return largest * tl.sqrt(tl.sum(scaled * scaled, 1))


@triton.jit
def _rows_kernel(
    OUT,
    D_OUT,
    LSE,
    D_LSE,
    C_Q,
    MAXIMA,
    DELTA,
    SHIFT,
    TERM,
    BASE,
    PER_QUANTUM,
    ROW_BOUND,
    LAST,
    o_b,
    o_t,
    o_h,
    do_b,
    do_t,
    do_h,
    dl_b,
    dl_h,
    cq_b,
    cq_h,
    TQ,
    H,
    HF,
    KV_GROUP,
    NM,
    NB,
    dropout,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    UNITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the main kernel needs of each row: delta, the shift of its scores, and the units of its integer sums.

    For float32 inputs ``TERM`` is a factor of its weights instead of a part of its scores.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    out = load_rows(OUT + b * o_b + h * o_h, rows, o_t, is_row, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    d_out = load_rows(D_OUT + b * do_b + h * do_h, rows, do_t, is_row, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    d_lse = tl.load(D_LSE + b * dl_b + h * dl_h + rows, mask=is_row, other=0.0).to(tl.float32)
    lse = tl.load(LSE + head.to(tl.int64) * TQ + rows, mask=is_row, other=0.0)
    delta = tl.sum(out * d_out, 1) - d_lse
    # exp(-inf - 0) = 0 for a row that sees nothing, where exp(-inf + inf) would be NaN.
    shift = tl.where(lse == -INF, 0.0, lse) * LOG2_E
    p_c = C_Q + b * cq_b + (h // (H // HF)) * cq_h
    base = tl.load(p_c + block * BLOCK_M) * LOG2_E
    c = tl.load(p_c + rows, mask=is_row, other=0.0) * LOG2_E
    p = head.to(tl.int64) * TQ + rows
    tl.store(DELTA + p, delta, mask=is_row)
    if WIDE:
        high, low = split_fp64(shift)
        tl.store(SHIFT + p, high, mask=is_row)
        tl.store(TERM + p, 1.0 - low * LN_2, mask=is_row)
    else:
        tl.store(SHIFT + p, shift, mask=is_row)
        tl.store(TERM + p, (c - base).to(tl.float32) - shift, mask=is_row)
    tl.store(BASE + head * NM + block, base)

    # The largest of the keys that a row can see, and of a few after it.
    positions = tl.load(LAST).to(tl.int32) + rows
    p_maxima = MAXIMA + (head // KV_GROUP) * NB + tl.minimum(positions // KEYS, NB - 1)
    largest_k, largest_v = tl.load(p_maxima), tl.load(p_maxima + tl.num_programs(0) // KV_GROUP * NB)
    # A delta that is not a number makes the bounds ones that are not either, and with them the gradients.
    row_bound = 2.0 / (1.0 - dropout) * norms(d_out) * largest_v + tl.abs(d_lse) + delta * 0.0
    tl.store(PER_QUANTUM + p, UNITS / _at_least(row_bound * largest_k), mask=is_row)
    tl.store(ROW_BOUND + p, _at_least(row_bound), mask=is_row)


@triton.jit
def _at_least(bound):
    """``bound``, if it is a number not too small."""
    return tl.where(bound < _LEAST_BOUND, _LEAST_BOUND, bound)


@triton.jit
def _backward_tile(
    block,
    head,
    k,
    v,
    keys,
    key_high,
    key_low,
    base,
    offset,
    dk,
    dv,
    dc,
    p_q,
    p_do,
    p_cq,
    p_first,
    DELTA,
    SHIFT,
    TERM,
    BASE,
    PER_QUANTUM,
    ROW_BOUND,
    DQ,
    ROW_SUMS,
    SEED,
    q_t,
    do_t,
    qk_scale,
    dropout,
    TQ,
    TK,
    NM,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDUES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of queries to the gradients of a block of keys, or only, for ``RESIDUES``, its rows to their sums.

    Scores are held as ``[keys, queries]``.
    """
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    p_row = head.to(tl.int64) * TQ + rows
    q = load_rows(p_q, rows, q_t, is_row, HEAD_DIM, PADDED_DIM, True)
    do = load_rows(p_do, rows, do_t, is_row, HEAD_DIM, PADDED_DIM, True)
    delta = tl.load(DELTA + p_row, mask=is_row, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
    if WIDE or MASKED:
        row_high, row_low = split_fp64(tl.load(p_cq + rows, mask=is_row, other=0.0 if MASKED else -INF) * LOG2_E - base)
        shift = tl.load(SHIFT + p_row, mask=is_row, other=0.0)
        bias = (row_high[None, :] - key_high[:, None]) + (row_low[None, :] - key_low[:, None])
        # Rounded as in the forward pass, the error of a score that outweighs its row cancels with that of the shift.
        scores = (scores + bias) - shift[None, :] if WIDE else scores + (bias - shift[None, :])
    else:
        far = (tl.load(BASE + head * NM + block) - base).to(tl.float32)
        term = tl.load(TERM + p_row, mask=is_row, other=-INF) + far
        scores = (scores - key_high[:, None]) + term[None, :]
    if MASKED:
        first = tl.load(p_first + rows, mask=is_row, other=0).to(tl.int32)
        visible = (keys[:, None] <= (rows + offset)[None, :]) & (keys[:, None] >= first[None, :]) & is_row[None, :]
        scores = tl.where(visible, scores, -INF)
    weights = tl.exp2(scores)
    if WIDE:
        weights *= tl.load(TERM + p_row, mask=is_row, other=0.0)[None, :]
    d_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    kept_weights = weights
    if DROPOUT:
        kept = dropout_scale(SEED, head, rows[None, :], keys[:, None], TQ, TK, dropout)
        kept_weights = weights * kept
        d_weights = d_weights * kept
    if not RESIDUES:
        dv += tl.dot(kept_weights.to(do.dtype), do, input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[None, :])
    # Rows and columns must cancel in the gates' gradients as exactly as the type of the inputs allows.
    sums = d_scores.to(tl.float64) if WIDE else d_scores
    if not RESIDUES:
        dc += tl.sum(sums, 1)
        narrow = d_scores.to(q.dtype)
        dk += tl.dot(narrow, q, input_precision=PRECISION)

        dq = tl.dot(tl.trans(narrow), k, input_precision=PRECISION)
        per_quantum = tl.load(PER_QUANTUM + p_row, mask=is_row, other=0.0)
        share = tl.floor(dq * per_quantum[:, None] + 0.5).to(tl.int64)
        if not WIDE:
            # Two 32-bit sums to an addition of 64 bits, the second on top: half as many atomic operations.
            low, high = tl.split(tl.reshape(share, [BLOCK_M, PADDED_DIM // 2, 2]))
            share = (high << 32) + low
        WORDS: tl.constexpr = HEAD_DIM if WIDE else (HEAD_DIM + 1) // 2
        words = tl.arange(0, PADDED_DIM if WIDE else PADDED_DIM // 2)
        mask = is_row[:, None]
        if HEAD_DIM != PADDED_DIM:
            mask = mask & (words < WORDS)[None, :]
        tl.atomic_add(DQ + p_row[:, None] * WORDS + words[None, :], share, mask=mask, sem="relaxed")
    units = (1 << 62) / tl.load(ROW_BOUND + p_row, mask=is_row, other=1.0).to(sums.dtype)
    tl.atomic_add(ROW_SUMS + p_row, (tl.sum(sums, 0) * units).to(tl.int64), mask=is_row, sem="relaxed")
    return dk, dv, dc


@triton.jit
def _backward_kernel(
    Q,
    K,
    V,
    D_OUT,
    C_Q,
    C_K,
    FIRST,
    LAST,
    DELTA,
    SHIFT,
    TERM,
    BASE,
    PER_QUANTUM,
    ROW_BOUND,
    STOP,
    CUT,
    ORDER,
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
    first_b,
    first_h,
    scale,
    dropout,
    TQ,
    TK,
    H,
    G,
    KV_GROUP,
    GATE_GROUP,
    FIRST_GROUP,
    NM,
    NN,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDUES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads with the most work first, and in each the keys that the most queries see.
    pid = tl.program_id(0)
    kv_head = tl.load(ORDER + pid // NN).to(tl.int32)
    n = pid % NN
    b, g = kv_head // G, kv_head % G
    b64 = b.to(tl.int64)
    keys = n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = keys < TK
    k = load_rows(K + b64 * k_b + g.to(tl.int64) * k_h, keys, k_t, is_key, HEAD_DIM, PADDED_DIM, True)
    v = load_rows(V + b64 * v_b + g.to(tl.int64) * v_h, keys, v_t, is_key, HEAD_DIM, PADDED_DIM, True)
    offset = tl.load(LAST).to(tl.int32)
    near = tl.maximum(n * BLOCK_N - offset, 0) // BLOCK_M
    far = tl.cdiv(tl.maximum(tl.minimum((n + 1) * BLOCK_N, TK) - 1 - offset, 0), BLOCK_M)
    qk_scale = scale * LOG2_E
    dk = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    for member in range(0, KV_GROUP):
        h = g * KV_GROUP + member
        head = b * H + h
        gate = (h // GATE_GROUP).to(tl.int64)
        p_q = Q + b64 * q_b + h.to(tl.int64) * q_h
        p_do = D_OUT + b64 * do_b + h.to(tl.int64) * do_h
        p_cq = C_Q + b64 * cq_b + gate * cq_h
        p_first = FIRST + b64 * first_b + (h // FIRST_GROUP).to(tl.int64) * first_h
        c = tl.load(C_K + b64 * ck_b + gate * ck_h + keys, mask=is_key, other=INF) * LOG2_E
        base = tl.min(c, 0)
        base = tl.where(base == INF, 0.0, base)
        key_high, key_low = split_fp64(c - base)
        dc = tl.zeros([BLOCK_N], tl.float64 if WIDE else tl.float32)
        stop = tl.load(STOP + head * NN + n)
        far_stop = tl.minimum(tl.maximum(tl.load(CUT + head * NN + n), far), stop)
        near_blocks = tl.maximum(tl.minimum(far, stop) - near, 0)
        edge_blocks = tl.maximum(stop - tl.maximum(far_stop, far), 0)
        for index in tl.range(0, near_blocks + edge_blocks):
            block = tl.where(index < near_blocks, near + index, far_stop + index - near_blocks)
            dk, dv, dc = _backward_tile(
                block,
                head,
                k,
                v,
                keys,
                key_high,
                key_low,
                base,
                offset,
                dk,
                dv,
                dc,
                p_q,
                p_do,
                p_cq,
                p_first,
                DELTA,
                SHIFT,
                TERM,
                BASE,
                PER_QUANTUM,
                ROW_BOUND,
                DQ,
                ROW_SUMS,
                SEED,
                q_t,
                do_t,
                qk_scale,
                dropout,
                TQ,
                TK,
                NM,
                HEAD_DIM,
                PADDED_DIM,
                BLOCK_M,
                True,
                WIDE,
                RESIDUES,
                DROPOUT,
                PRECISION,
            )
        for block in tl.range(far, far_stop):
            dk, dv, dc = _backward_tile(
                block,
                head,
                k,
                v,
                keys,
                key_high,
                key_low,
                base,
                offset,
                dk,
                dv,
                dc,
                p_q,
                p_do,
                p_cq,
                p_first,
                DELTA,
                SHIFT,
                TERM,
                BASE,
                PER_QUANTUM,
                ROW_BOUND,
                DQ,
                ROW_SUMS,
                SEED,
                q_t,
                do_t,
                qk_scale,
                dropout,
                TQ,
                TK,
                NM,
                HEAD_DIM,
                PADDED_DIM,
                BLOCK_M,
                False,
                WIDE,
                RESIDUES,
                DROPOUT,
                PRECISION,
            )
        tl.store(DC + head.to(tl.int64) * TK + keys, -dc.to(tl.float64), mask=is_key)
    dims = tl.arange(0, PADDED_DIM)
    p = ((b64 * TK + keys[:, None]) * G + g) * HEAD_DIM + dims[None, :]
    mask = is_key[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(DK + p, (dk * scale).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + p, dv.to(DV.dtype.element_ty), mask=mask)


@triton.jit
def _finish_kernel(
    SUMS,
    PER_QUANTUM,
    ROW_SUMS,
    ROW_BOUND,
    DQ,
    DC,
    scale,
    TQ,
    H,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Integer sums to gradients of queries and of their running sums."""
    head, block = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    p_row = head.to(tl.int64) * TQ + rows
    dims = tl.arange(0, PADDED_DIM)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    if WIDE:
        sums = tl.load(SUMS + p_row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0)
    else:
        words = tl.arange(0, PADDED_DIM // 2)
        WORDS: tl.constexpr = (HEAD_DIM + 1) // 2
        is_word = is_row[:, None] & (words < WORDS)[None, :]
        pair = tl.load(SUMS + p_row[:, None] * WORDS + words[None, :], mask=is_word, other=0)
        low = pair.to(tl.int32).to(tl.int64)
        sums = tl.reshape(tl.join(low, (pair - low) >> 32), [BLOCK_M, PADDED_DIM])
    per_quantum = tl.load(PER_QUANTUM + p_row, mask=is_row, other=1.0)
    dq = sums.to(tl.float32) * (scale / per_quantum)[:, None]
    p = ((b * TQ + rows[:, None]) * H + h) * HEAD_DIM + dims[None, :]
    tl.store(DQ + p, dq.to(DQ.dtype.element_ty), mask=mask)

    bound = tl.load(ROW_BOUND + p_row, mask=is_row, other=0.0).to(tl.float64)
    row_sums = tl.load(ROW_SUMS + p_row, mask=is_row, other=0).to(tl.float64)
    tl.store(DC + p_row, row_sums * (bound / (1 << 62)), mask=is_row)


def largest_keys_and_values(k: Tensor, v: Tensor) -> Tensor:
    """``max |k_jd|`` and ``max |v_j|`` of all keys up to the end of each group of 16, ``[2, B, G, groups]`` float32."""
    batch, keys, kv_heads, head_dim = k.shape
    groups = triton.cdiv(keys, MAXIMA_KEYS)
    maxima = torch.empty(2, batch, kv_heads, groups, dtype=torch.float32, device=k.device)
    _maxima_kernel[(batch * kv_heads, triton.cdiv(keys, _MAXIMA_ROWS))](
        k,
        v,
        maxima,
        *k.stride()[:3],
        *v.stride()[:3],
        keys,
        kv_heads,
        groups,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_head_dim(head_dim),
        ROWS=_MAXIMA_ROWS,
        KEYS=MAXIMA_KEYS,
    )
    return maxima.cummax(-1).values


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

    Returns:
        Gradients of q, k and v, in their shapes and types, and of the running sums at queries and keys, per query
        head: ``[B, H, Tq]`` and ``[B, H, Tk]`` float64.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    padded = padded_head_dim(head_dim)
    low, high = kv_start_ranges(decay.kv_start, decay.last, heads, tile.queries)
    order = heaviest_first(low.view(batch * kv_heads, -1))
    blocks, key_blocks = low.shape[-1], triton.cdiv(keys, tile.keys)
    stop, cut = query_ranges(low, high, decay.last, keys, tile)
    wide = q.dtype == torch.float32
    delta, shift, term, per_quantum, row_bound = torch.empty(
        5, batch, heads, queries, dtype=torch.float32, device=q.device
    ).unbind()
    base = torch.empty(batch, heads, blocks, dtype=torch.float64, device=q.device)
    maxima = largest_keys_and_values(k, v)
    _rows_kernel[(batch * heads, blocks)](
        out,
        d_out,
        lse,
        d_lse,
        decay.query,
        maxima,
        delta,
        shift,
        term,
        base,
        per_quantum,
        row_bound,
        decay.last,
        *out.stride()[:3],
        *d_out.stride()[:3],
        *d_lse.stride()[:2],
        *decay.query.stride()[:2],
        queries,
        heads,
        gates,
        heads // kv_heads,
        blocks,
        maxima.shape[-1],
        dropout,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        BLOCK_M=tile.queries,
        KEYS=MAXIMA_KEYS,
        UNITS=2.0 ** (62 if wide else 30),
        WIDE=wide,
    )

    words = head_dim if wide else triton.cdiv(head_dim, 2)
    sums = torch.zeros(batch, heads, queries, words, dtype=torch.int64, device=q.device)
    row_sums = torch.zeros(batch, heads, queries, dtype=torch.int64, device=q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dc_q = torch.empty(batch, heads, queries, dtype=torch.float64, device=q.device)
    dc_k = torch.empty(batch, heads, keys, dtype=torch.float64, device=q.device)
    for residues in (True, False) if wide else (False,):
        _backward_kernel[(key_blocks * batch * kv_heads,)](
            q,
            k,
            v,
            d_out,
            decay.query,
            decay.key,
            decay.kv_start,
            decay.last,
            delta,
            shift,
            term,
            base,
            per_quantum,
            row_bound,
            stop,
            cut,
            order,
            seed,
            sums,
            dk,
            dv,
            dc_k,
            row_sums,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *d_out.stride()[:3],
            *decay.query.stride()[:2],
            *decay.key.stride()[:2],
            *decay.kv_start.stride()[:2],
            scale,
            dropout,
            queries,
            keys,
            heads,
            kv_heads,
            heads // kv_heads,
            heads // gates,
            heads // decay.kv_start.shape[1],
            blocks,
            key_blocks,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded,
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            WIDE=wide,
            RESIDUES=residues,
            DROPOUT=dropout > 0.0,
            PRECISION=dot_precision(q),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if residues:
            # What else it stored is overwritten.
            delta += row_sums * (row_bound.double() / 2**62) - d_lse
            row_sums.zero_()
    _finish_kernel[(batch * heads, blocks)](
        sums,
        per_quantum,
        row_sums,
        row_bound,
        dq,
        dc_q,
        scale,
        queries,
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        BLOCK_M=tile.queries,
        WIDE=wide,
    )
    return dq, dk, dv, dc_q, dc_k
