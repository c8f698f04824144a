"""Triton kernels of the backward pass: every score is computed once, and the result is the same bits every time.

A program holds one block of keys of one key/value head and walks over the blocks of queries that see it. It keeps its
``dK``, ``dV`` and key gradients of the decay; its share of ``dQ`` must be added to that of other programs.
Floating-point sums in the order of arrival would differ from run to run, so shares are rounded to integers, whose sums
do not depend on order: row ``i`` in units of ``2^-30`` (``2^-62`` for float32 inputs) of what bounds its sum,

    |sum_j dS_ij k_jd| <= (2 |dO_i| max_j |v_j| + |dlse_i|) max_jd |k_jd|.

A row of ``dS`` sums to ``dlse_i``, but for the rounding of ``O`` in ``delta_i = dO_i . O_i``; summed along the sequence
those residues would grow into the gates' gradients. The sum of every tile is known from its columns at no cost, so the
residue of each block of queries is taken from there and spread evenly over its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decay
from .forward import _INF, _LOG2_E, dot_precision, dropout_scale, heaviest_first, load_rows, split, visible_ranges
from .tiles import Tile, padded_head_dim

_MAXIMA_ROWS = 128
# Keeps bounds and their reciprocals normal numbers.
_LEAST_BOUND = tl.constexpr(2.0**-60)


@triton.jit
def _stops_kernel(
    LOW, HIGH, LAST, STOP, CUT, NM, NN, TK, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):
    """For blocks of keys: one past the last block of queries that sees them, and the first that `first` may cut."""
    head = tl.program_id(1)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    offset = tl.load(LAST).to(tl.int32)
    begin = tl.maximum(n * BLOCK_N - offset, 0) // BLOCK_M
    last_key = tl.minimum((n + 1) * BLOCK_N, TK) - 1
    far = tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_M)
    stop = begin
    cut = tl.full([CHUNK], 0, tl.int32) + NM
    for start in range(0, NM, CHUNK):
        m = start + tl.arange(0, CHUNK)
        low = tl.load(LOW + head * NM + m, mask=m < NM, other=2147483647)
        high = tl.load(HIGH + head * NM + m, mask=m < NM, other=0)
        seen = (low[None, :] < ((n + 1) * BLOCK_N)[:, None]) & (m[None, :] >= begin[:, None])
        stop = tl.maximum(stop, tl.max(tl.where(seen, m[None, :] + 1, 0), 1))
        cuts = (high[None, :] > (n * BLOCK_N)[:, None]) & (m[None, :] >= far[:, None])
        cut = tl.minimum(cut, tl.min(tl.where(cuts, m[None, :], NM), 1))
    tl.store(STOP + head * NN + n, stop, mask=n < NN)
    tl.store(CUT + head * NN + n, cut, mask=n < NN)


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
):
    """Largest ``|k_jd|`` and ``|v_j|^2`` of a block of keys."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    keys = block * ROWS + tl.arange(0, ROWS)
    k = load_rows(K + b * k_b + g * k_h, keys, k_t, keys < TK, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    v = load_rows(V + b * v_b + g * v_h, keys, v_t, keys < TK, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    p = MAXIMA + (head * NB + block) * 2
    tl.store(p, tl.max(tl.max(tl.abs(k), 1), 0))
    tl.store(p + 1, tl.max(tl.sum(v * v, 1), 0))


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
    TOTAL_BOUND,
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
    dropout,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNITS: tl.constexpr,
):
    """What the main kernel needs of each row: delta, the shift of its scores, and the units of its integer sums."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    out = load_rows(OUT + b * o_b + h * o_h, rows, o_t, is_row, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    d_out = load_rows(D_OUT + b * do_b + h * do_h, rows, do_t, is_row, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    d_lse = tl.load(D_LSE + b * dl_b + h * dl_h + rows, mask=is_row, other=0.0)
    lse = tl.load(LSE + head.to(tl.int64) * TQ + rows, mask=is_row, other=0.0)
    delta = tl.sum(out * d_out, 1) - d_lse
    # exp(-inf - 0) = 0 for a row that sees nothing, where exp(-inf + inf) would be NaN.
    shift = tl.where(lse == -_INF, 0.0, lse) * _LOG2_E
    p_c = C_Q + b * cq_b + (h // (H // HF)) * cq_h
    base = tl.load(p_c + block * BLOCK_M) * _LOG2_E
    c = tl.load(p_c + rows, mask=is_row, other=0.0) * _LOG2_E
    p = head.to(tl.int64) * TQ + rows
    tl.store(DELTA + p, delta, mask=is_row)
    tl.store(SHIFT + p, shift, mask=is_row)
    tl.store(TERM + p, (c - base).to(tl.float32) - shift, mask=is_row)
    tl.store(BASE + head * NM + block, base)

    p_maxima = MAXIMA + ((head // H) * (H // KV_GROUP) + (head % H) // KV_GROUP) * 2
    largest_k, largest_v = tl.load(p_maxima), tl.sqrt(tl.load(p_maxima + 1))
    total_bound = 2.0 / (1.0 - dropout) * tl.sqrt(tl.sum(d_out * d_out, 1)) * largest_v + tl.abs(d_lse)
    # A delta that is not a number makes the bound one that is not either, and with it the gradient.
    bound = tl.maximum(total_bound * largest_k, _LEAST_BOUND) + delta * 0.0
    tl.store(PER_QUANTUM + p, UNITS / bound, mask=is_row)
    tl.store(TOTAL_BOUND + head * NM + block, tl.maximum(tl.sum(total_bound, 0), _LEAST_BOUND))


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
    TOTAL_BOUND,
    DQ,
    TOTALS,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of queries to the gradients of a block of keys. Scores are held as ``[keys, queries]``."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    p_row = head.to(tl.int64) * TQ + rows
    q = load_rows(p_q, rows, q_t, is_row, HEAD_DIM, PADDED_DIM, True)
    do = load_rows(p_do, rows, do_t, is_row, HEAD_DIM, PADDED_DIM, True)
    delta = tl.load(DELTA + p_row, mask=is_row, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
    if MASKED:
        row_high, row_low = split(tl.load(p_cq + rows, mask=is_row, other=0.0) * _LOG2_E - base)
        shift = tl.load(SHIFT + p_row, mask=is_row, other=0.0)
        scores += (row_high[None, :] - key_high[:, None]) + (row_low[None, :] - key_low[:, None]) - shift[None, :]
        first = tl.load(p_first + rows, mask=is_row, other=0).to(tl.int32)
        visible = (keys[:, None] <= (rows + offset)[None, :]) & (keys[:, None] >= first[None, :]) & is_row[None, :]
        weights = tl.exp2(tl.where(visible, scores, -_INF))
    else:
        far = (tl.load(BASE + head * NM + block) - base).to(tl.float32)
        term = tl.load(TERM + p_row, mask=is_row, other=-_INF) + far
        weights = tl.exp2((scores - key_high[:, None]) + term[None, :])
    d_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    kept_weights = weights
    if DROPOUT:
        kept = dropout_scale(SEED, head, rows[None, :], keys[:, None], TQ, TK, dropout)
        kept_weights = weights * kept
        d_weights = d_weights * kept
    dv += tl.dot(kept_weights.to(do.dtype), do, input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[None, :])
    columns = tl.sum(d_scores, 1)
    dc += columns
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
    units = (1 << 62) / tl.load(TOTAL_BOUND + head * NM + block)
    tl.atomic_add(TOTALS + head * NM + block, (tl.sum(columns, 0) * units).to(tl.int64), sem="relaxed")
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
    TOTAL_BOUND,
    STOP,
    CUT,
    ORDER,
    SEED,
    DQ,
    DK,
    DV,
    DC,
    TOTALS,
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
    qk_scale = scale * _LOG2_E
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
        c = tl.load(C_K + b64 * ck_b + gate * ck_h + keys, mask=is_key, other=_INF) * _LOG2_E
        base = tl.min(c, 0)
        base = tl.where(base == _INF, 0.0, base)
        key_high, key_low = split(c - base)
        dc = tl.zeros([BLOCK_N], tl.float32)
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
                TOTAL_BOUND,
                DQ,
                TOTALS,
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
                TOTAL_BOUND,
                DQ,
                TOTALS,
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
    TOTALS,
    TOTAL_BOUND,
    D_LSE,
    DQ,
    DC,
    dl_b,
    dl_h,
    scale,
    TQ,
    H,
    NM,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Integer sums to gradients of queries and of their running sums."""
    block, head = tl.program_id(0), tl.program_id(1)
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

    d_lse = tl.load(D_LSE + b * dl_b + h * dl_h + rows, mask=is_row, other=0.0).to(tl.float64)
    bound = tl.load(TOTAL_BOUND + head * NM + block).to(tl.float64)
    total = tl.load(TOTALS + head * NM + block).to(tl.float64) * (bound / (1 << 62))
    residue = (total - tl.sum(d_lse, 0)) / tl.minimum(TQ - block * BLOCK_M, BLOCK_M)
    tl.store(DC + p_row, d_lse + residue, mask=is_row)


def _largest_keys_and_values(k: Tensor, v: Tensor) -> Tensor:
    """Per key/value head, ``max |k_jd|`` and ``max |v_j|^2``: ``[B, G, 2]`` float32."""
    batch, keys, kv_heads, head_dim = k.shape
    blocks = triton.cdiv(keys, _MAXIMA_ROWS)
    maxima = torch.empty(batch, kv_heads, blocks, 2, dtype=torch.float32, device=k.device)
    _maxima_kernel[(blocks, batch * kv_heads)](
        k,
        v,
        maxima,
        *k.stride()[:3],
        *v.stride()[:3],
        keys,
        kv_heads,
        blocks,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_head_dim(head_dim),
        ROWS=_MAXIMA_ROWS,
    )
    return maxima.amax(2)


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
    low, high = visible_ranges(decay.first, decay.last, heads, tile.queries)
    order = heaviest_first(low.view(batch * kv_heads, -1))
    blocks, key_blocks = low.shape[-1], triton.cdiv(keys, tile.keys)
    stop, cut = torch.empty(2, batch, heads, key_blocks, dtype=torch.int32, device=q.device).unbind()
    chunk = 64
    _stops_kernel[(triton.cdiv(key_blocks, chunk), batch * heads)](
        low,
        high,
        decay.last,
        stop,
        cut,
        blocks,
        key_blocks,
        keys,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        CHUNK=chunk,
    )

    wide = q.dtype == torch.float32
    delta, shift, term, per_quantum = torch.empty(
        4, batch, heads, queries, dtype=torch.float32, device=q.device
    ).unbind()
    base = torch.empty(batch, heads, blocks, dtype=torch.float64, device=q.device)
    total_bound = torch.empty(batch, heads, blocks, dtype=torch.float32, device=q.device)
    _rows_kernel[(blocks, batch * heads)](
        out,
        d_out,
        lse,
        d_lse,
        decay.query,
        _largest_keys_and_values(k, v),
        delta,
        shift,
        term,
        base,
        per_quantum,
        total_bound,
        *out.stride()[:3],
        *d_out.stride()[:3],
        *d_lse.stride()[:2],
        *decay.query.stride()[:2],
        queries,
        heads,
        gates,
        heads // kv_heads,
        blocks,
        dropout,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        BLOCK_M=tile.queries,
        UNITS=2.0 ** (62 if wide else 30),
    )

    words = head_dim if wide else triton.cdiv(head_dim, 2)
    sums = torch.zeros(batch, heads, queries, words, dtype=torch.int64, device=q.device)
    totals = torch.zeros(batch, heads, blocks, dtype=torch.int64, device=q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dc_q = torch.empty(batch, heads, queries, dtype=torch.float64, device=q.device)
    dc_k = torch.empty(batch, heads, keys, dtype=torch.float64, device=q.device)
    _backward_kernel[(key_blocks * batch * kv_heads,)](
        q,
        k,
        v,
        d_out,
        decay.query,
        decay.key,
        decay.first,
        decay.last,
        delta,
        shift,
        term,
        base,
        per_quantum,
        total_bound,
        stop,
        cut,
        order,
        seed,
        sums,
        dk,
        dv,
        dc_k,
        totals,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *d_out.stride()[:3],
        *decay.query.stride()[:2],
        *decay.key.stride()[:2],
        *decay.first.stride()[:2],
        scale,
        dropout,
        queries,
        keys,
        heads,
        kv_heads,
        heads // kv_heads,
        heads // gates,
        heads // decay.first.shape[1],
        blocks,
        key_blocks,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        WIDE=wide,
        DROPOUT=dropout > 0.0,
        PRECISION=dot_precision(q),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _finish_kernel[(blocks, batch * heads)](
        sums,
        per_quantum,
        totals,
        total_bound,
        d_lse,
        dq,
        dc_q,
        *d_lse.stride()[:2],
        scale,
        queries,
        heads,
        blocks,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        BLOCK_M=tile.queries,
        WIDE=wide,
    )
    return dq, dk, dv, dc_q, dc_k
