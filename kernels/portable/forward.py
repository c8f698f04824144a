"""Triton kernels of the forward pass, and what both passes prepare.

A program holds one block of queries of one head and walks over the blocks of keys that it may see. Two kinds of tiles:

* *Masked* ones: on the diagonal, or cut by the first visible key of a row. The bias ``c_i - c_j`` is a difference of
  float64 numbers, each split in two float32 halves relative to the block's first row, so it is exact however large
  the sums.
* *Far* ones, all of whose pairs are visible. The bias of a column is added to the scores,
  ``(base - c_last) + (c_last - c_j)`` with one float64 number per block of 64 keys; that of a row, ``c_i - base``, is
  only needed where the exponent is taken, and joins the running maximum there. All three have the same sign, so each is
  rounded relative to the bias itself.

For float32 inputs far tiles take the bias of masked ones, as in the backward pass: both must round a score alike. And
the log-sum-exp is float64, since all weights of a row would share its rounding.

Everything inside is in units of log 2: ``exp2`` is what the hardware has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, padded_head_dim

# Keys (and, backward, queries) that share one float64 base.
BASE_BLOCK = 64
# Of so many heads one program finds the order.
_ORDERED_HEADS = 128

_BASE_BLOCK = tl.constexpr(BASE_BLOCK)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))


@triton.jit
def load_rows(p, rows, stride, in_bounds, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CHECK: tl.constexpr):
    """``[rows, PADDED_DIM]`` rows of a head; zero beyond ``in_bounds`` (if ``CHECK``) and beyond ``HEAD_DIM``."""
    columns = tl.arange(0, PADDED_DIM)
    p = p + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if CHECK:
        return tl.load(p, mask=in_bounds[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM != PADDED_DIM:
        return tl.load(p, mask=columns[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def split(x):
    """A float64 number as the sum of two float32 ones; an infinite one has no second part."""
    high = x.to(tl.float32)
    low = (x - high.to(tl.float64)).to(tl.float32)
    return high, tl.where(tl.abs(high) == _INF, 0.0, low)


@triton.jit
def dropout_scale(SEED, head, rows, columns, TQ, TK, dropout):
    """0 for a dropped weight and ``1 / (1 - dropout)`` for a kept one, by seed, head, query and key alone."""
    offset = (head.to(tl.int64) * TQ + rows.to(tl.int64)) * TK + columns
    return tl.where(tl.rand(tl.load(SEED), offset) < dropout, 0.0, 1.0 / (1.0 - dropout))


@triton.jit
def _key_decay_kernel(C, RELATIVE, BASE, stride_b, stride_h, HF, TK, NB):
    head, block = tl.program_id(0), tl.program_id(1)
    keys = block * _BASE_BLOCK + tl.arange(0, _BASE_BLOCK)
    p_c = C + (head // HF).to(tl.int64) * stride_b + (head % HF).to(tl.int64) * stride_h
    c = tl.load(p_c + keys, mask=keys < TK, other=_INF) * _LOG2_E
    # Sums only fall, so the least is that of the last key that is not hidden.
    base = tl.min(c, 0)
    base = tl.where(base == _INF, 0.0, base)
    tl.store(RELATIVE + head.to(tl.int64) * TK + keys, (c - base).to(tl.float32), mask=keys < TK)
    tl.store(BASE + head * NB + block, base)


@triton.jit
def _ranges_kernel(FIRST, LAST, LOW, HIGH, stride_b, stride_h, H, GROUP, TQ, NM, BLOCK_M: tl.constexpr):
    head, block = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    p_first = FIRST + (head // H).to(tl.int64) * stride_b + (head % H // GROUP).to(tl.int64) * stride_h
    end = tl.load(LAST) + TQ
    low = tl.min(tl.load(p_first + rows, mask=rows < TQ, other=end), 0)
    high = tl.max(tl.load(p_first + rows, mask=rows < TQ, other=0), 0)
    tl.store(LOW + head * NM + block, low.to(tl.int32))
    tl.store(HIGH + head * NM + block, high.to(tl.int32))


@triton.jit
def _order_kernel(LOW, ORDER, H, NM, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Heads by rising sums of first keys, in one launch where a sum and a sort are eight."""
    heads = tl.arange(0, HEADS)
    totals = tl.zeros([HEADS], tl.int64)
    for start in range(0, NM, BLOCK):
        blocks = start + tl.arange(0, BLOCK)
        is_in = (heads[:, None] < H) & (blocks[None, :] < NM)
        totals += tl.sum(tl.load(LOW + heads[:, None] * NM + blocks[None, :], mask=is_in, other=0).to(tl.int64), 1)
    before = heads[None, :] < heads[:, None]
    heavier = (totals[None, :] < totals[:, None]) | ((totals[None, :] == totals[:, None]) & before)
    rank = tl.sum((heavier & (heads[None, :] < H)).to(tl.int32), 1)
    tl.store(ORDER + rank, heads.to(tl.int64), mask=heads < H)


@triton.jit
def _forward_kernel(
    Q,
    K,
    V,
    C_Q,
    C_K,
    RELATIVE,
    BASE,
    FIRST,
    LAST,
    LOW,
    HIGH,
    ORDER,
    SEED,
    OUT,
    LSE,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
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
    HF,
    KV_GROUP,
    GATE_GROUP,
    FIRST_GROUP,
    NM,
    NB,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads with the most work first, and in each the longest rows first: the short ones fill the gaps at the end.
    pid = tl.program_id(0)
    head = tl.load(ORDER + pid // NM).to(tl.int32)
    block = NM - 1 - pid % NM
    b, h = head // H, head % H
    b64, gate = b.to(tl.int64), h // GATE_GROUP
    p_k = K + b64 * k_b + (h // KV_GROUP).to(tl.int64) * k_h
    p_v = V + b64 * v_b + (h // KV_GROUP).to(tl.int64) * v_h
    p_cq = C_Q + b64 * cq_b + gate.to(tl.int64) * cq_h
    p_ck = C_K + b64 * ck_b + gate.to(tl.int64) * ck_h
    p_relative = RELATIVE + (b64 * HF + gate) * TK
    p_base = BASE + (b64 * HF + gate) * NB

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    q = load_rows(Q + b64 * q_b + h.to(tl.int64) * q_h, rows, q_t, is_row, HEAD_DIM, PADDED_DIM, True)
    base = tl.load(p_cq + block * BLOCK_M) * _LOG2_E
    row_high, row_low = split(tl.load(p_cq + rows, mask=is_row, other=0.0) * _LOG2_E - base)
    row_high = tl.where(is_row, row_high, 0.0)
    offset = tl.load(LAST).to(tl.int32)
    positions = rows + offset
    p_first = FIRST + b64 * first_b + (h // FIRST_GROUP).to(tl.int64) * first_h
    first = tl.load(p_first + rows, mask=is_row, other=0).to(tl.int32)

    # Masked tiles are those before far_start and from near on. Far tiles end at or before the block's first row, and so
    # does the block of keys that shares their base: else the parts of a bias would not have one sign.
    ALIGNED: tl.constexpr = BLOCK_N if BLOCK_N > _BASE_BLOCK else _BASE_BLOCK
    end = tl.minimum(offset + tl.minimum((block + 1) * BLOCK_M, TQ), TK)
    start = tl.minimum(tl.load(LOW + head * NM + block) // BLOCK_N * BLOCK_N, end)
    near = tl.maximum((offset + block * BLOCK_M + 1) // ALIGNED * ALIGNED, start)
    far_start = tl.minimum(tl.cdiv(tl.load(HIGH + head * NM + block), BLOCK_N) * BLOCK_N, near)
    far_start = tl.maximum(far_start, start)
    near_tiles = tl.cdiv(tl.maximum(end - near, 0), BLOCK_N)
    edge_tiles = (far_start - start) // BLOCK_N

    maximum = tl.full([BLOCK_M], -_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float64 if WIDE else tl.float32)
    out = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    qk_scale = scale * _LOG2_E
    for tile in tl.range(0, near_tiles + edge_tiles):
        j = tl.where(tile < near_tiles, near + tile * BLOCK_N, start + (tile - near_tiles) * BLOCK_N)
        keys = j + tl.arange(0, BLOCK_N)
        is_key = keys < TK
        k = load_rows(p_k, keys, k_t, is_key, HEAD_DIM, PADDED_DIM, True)
        key_high, key_low = split(tl.load(p_ck + keys, mask=is_key, other=_INF) * _LOG2_E - base)
        bias = (row_high[:, None] - key_high[None, :]) + (row_low[:, None] - key_low[None, :])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale + bias
        visible = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= first[:, None])
        scores = tl.where(visible, scores, -_INF)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet: any finite shift leaves its weights at zero.
        shift = tl.where(new_maximum == -_INF, 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        if DROPOUT:
            weights *= dropout_scale(SEED, head, rows[:, None], keys[None, :], TQ, TK, dropout)
        v = load_rows(p_v, keys, v_t, is_key, HEAD_DIM, PADDED_DIM, True)
        out = out * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        maximum = new_maximum
    for j in tl.range(far_start, near, BLOCK_N):
        keys = j + tl.arange(0, BLOCK_N)
        k = load_rows(p_k, keys, k_t, keys < TK, HEAD_DIM, PADDED_DIM, False)
        if WIDE:
            key_high, key_low = split(tl.load(p_ck + keys) * _LOG2_E - base)
            bias = (row_high[:, None] - key_high[None, :]) + (row_low[:, None] - key_low[None, :])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale + bias
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            weights = tl.exp2(scores - new_maximum[:, None])
        else:
            bias = key_bias(p_relative, p_base, keys, j, base, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale + bias[None, :]
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) + row_high)
            weights = tl.exp2(scores - (new_maximum - row_high)[:, None])
        rescale = tl.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(weights, 1)
        if DROPOUT:
            weights *= dropout_scale(SEED, head, rows[:, None], keys[None, :], TQ, TK, dropout)
        v = load_rows(p_v, keys, v_t, keys < TK, HEAD_DIM, PADDED_DIM, False)
        out = out * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        maximum = new_maximum

    out = out / tl.where(total == 0.0, 1.0, total).to(tl.float32)[:, None]
    columns = tl.arange(0, PADDED_DIM)
    p_out = OUT + ((b64 * TQ + rows[:, None]) * H + h) * HEAD_DIM + columns[None, :]
    tl.store(p_out, out.to(OUT.dtype.element_ty), mask=is_row[:, None] & (columns[None, :] < HEAD_DIM))
    lse = maximum.to(tl.float64) * _LN_2 + tl.log(total) if WIDE else (maximum + tl.log2(total)) * _LN_2
    tl.store(LSE + head.to(tl.int64) * TQ + rows, lse, mask=is_row)


@triton.jit
def key_bias(p_relative, p_base, keys, j, base, BLOCK_N: tl.constexpr):
    """``base - c_j`` of a far tile's keys in float32; float64 enters once per block of keys."""
    relative = tl.load(p_relative + keys)
    if BLOCK_N <= _BASE_BLOCK:
        far = (base - tl.load(p_base + j // _BASE_BLOCK)).to(tl.float32)
        return far - relative
    else:
        tl.static_assert(BLOCK_N == 2 * _BASE_BLOCK)
        far = (base - tl.load(p_base + j // _BASE_BLOCK)).to(tl.float32)
        farther = (base - tl.load(p_base + j // _BASE_BLOCK + 1)).to(tl.float32)
        return tl.where(keys < j + _BASE_BLOCK, far, farther) - relative


def dot_precision(q: Tensor) -> str:
    """How float32 products are taken: as torch takes its own."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def key_decay(c_k: Tensor) -> tuple[Tensor, Tensor]:
    """Split running sums of keys for far tiles, in units of log 2.

    Args:
        c_k: ``[B, Hf, Tk]`` float64, ``+inf`` for hidden keys.

    Returns:
        ``[B, Hf, Tk]`` float32 relative to the last visible key of each block of 64, and ``[B, Hf, ceil(Tk / 64)]``
        float64, the sums there.
    """
    batch, gates, keys = c_k.shape
    blocks = triton.cdiv(keys, BASE_BLOCK)
    relative = torch.empty(c_k.shape, dtype=torch.float32, device=c_k.device)
    base = torch.empty(batch, gates, blocks, dtype=torch.float64, device=c_k.device)
    _key_decay_kernel[(batch * gates, blocks)](
        c_k, relative, base, c_k.stride(0), c_k.stride(1), gates, keys, blocks, num_warps=1
    )
    return relative, base


def visible_ranges(first: Tensor, last: Tensor, heads: int, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest first key of each block of queries, ``[B, H, ceil(Tq / block)]`` int32 each."""
    batch, first_heads, queries = first.shape
    blocks = triton.cdiv(queries, block)
    low, high = torch.empty(2, batch, heads, blocks, dtype=torch.int32, device=first.device).unbind()
    _ranges_kernel[(batch * heads, blocks)](
        first,
        last,
        low,
        high,
        first.stride(0),
        first.stride(1),
        heads,
        heads // first_heads,
        queries,
        blocks,
        BLOCK_M=block,
        num_warps=1,
    )
    return low, high


def heaviest_first(low: Tensor) -> Tensor:
    """Order of heads by falling work, ``[heads]`` int64, from their contiguous first keys ``[heads, blocks]`` int32."""
    heads, blocks = low.shape
    if heads > _ORDERED_HEADS:
        return low.sum(-1).argsort(stable=True)
    order = torch.empty(heads, dtype=torch.int64, device=low.device)
    _order_kernel[(1,)](low, order, heads, blocks, HEADS=triton.next_power_of_2(heads), BLOCK=128, num_warps=8)
    return order


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float, dropout: float, seed: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass. Arguments as for `reference_attention`, each tensor contiguous along its last dimension.

    Returns:
        Output ``[B, Tq, H, D]`` in the type of ``q`` and log-sum-exp ``[B, H, Tq]``, float32 (float64 for float32).
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = q.dtype == torch.float32
    lse = torch.empty(batch, heads, queries, dtype=torch.float64 if wide else torch.float32, device=q.device)
    relative, base = key_decay(decay.key)
    low, high = visible_ranges(decay.first, decay.last, heads, tile.queries)
    order = heaviest_first(low.flatten(0, 1))
    blocks = low.shape[-1]
    _forward_kernel[(blocks * batch * heads,)](
        q,
        k,
        v,
        decay.query,
        decay.key,
        relative,
        base,
        decay.first,
        decay.last,
        low,
        high,
        order,
        seed,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *decay.query.stride()[:2],
        *decay.key.stride()[:2],
        *decay.first.stride()[:2],
        scale,
        dropout,
        queries,
        keys,
        heads,
        gates,
        heads // kv_heads,
        heads // gates,
        heads // decay.first.shape[1],
        blocks,
        base.shape[-1],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_head_dim(head_dim),
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        WIDE=wide,
        DROPOUT=dropout > 0.0,
        PRECISION=dot_precision(q),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse
