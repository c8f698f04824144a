"""Triton kernels that find what ACP may drop: the rules of `pruning`, for blocks of queries and keys, on the device.

Everything is proportional to the number of tokens, and nothing walks along the sequence: a pass over keys and queries
takes norms, a scan over blocks of keys takes what the rules need of all keys before a block's end, and every row finds
its boundary among the blocks by bisection. A block of queries keeps what any of its rows keeps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..operators import NAMESPACE, maybe_contiguous
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES, padded_head_dim
from ..triton_common import INF, larger, load_rows
from .predicates import lengths, may_drop_paper, may_drop_tight, query_bounds, raised
from .rounding import decay_margin, log_allowed, logit_margin
from .rules import Rule

_QUERY_BLOCK = tl.constexpr(PRUNED_QUERIES)
_KEY_BLOCK = tl.constexpr(PRUNED_KEYS)
_SCAN = 1024


@triton.jit
def _norms_kernel(
    Q,
    K,
    LAST,
    Q_NORM,
    OWN,
    K_MAX,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    scale,
    margin,
    TQ,
    TK,
    H,
    G,
    NB,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Of a block of keys and the queries at its tokens: the largest ``|k|`` and `query_bounds`."""
    head, block = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    g = h // (H // G)
    keys = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    rows = keys - tl.load(LAST).to(tl.int32)
    is_row = (rows >= 0) & (rows < TQ)
    p_k = K + b * k_b + g.to(tl.int64) * k_h
    k = load_rows(p_k, keys, k_t, keys < TK, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    q = load_rows(Q + b * q_b + h.to(tl.int64) * q_h, rows, q_t, is_row, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    p_row = head.to(tl.int64) * TQ + rows
    k_length = lengths(k)
    norm, own = query_bounds(q, k, k_length, scale, margin)
    tl.store(Q_NORM + p_row, norm, mask=is_row)
    tl.store(OWN + p_row, own, mask=is_row)
    tl.store(K_MAX + (b * G + g) * NB + block, tl.max(k_length, 0), mask=h % (H // G) == 0)


@triton.jit
def _block_decay_kernel(C, END, LOG_SUM, stride_b, stride_h, HF, TK, NB):
    """Of a block of keys: ``c`` at its last visible one, ``+inf`` for none, and ``log sum_j exp(c_last - c_j)``."""
    row, block = tl.program_id(0), tl.program_id(1)
    keys = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    p = C + (row // HF).to(tl.int64) * stride_b + (row % HF).to(tl.int64) * stride_h
    c = tl.load(p + keys, mask=keys < TK, other=INF)
    end = tl.min(c, 0)
    weights = tl.where(c == INF, 0.0, tl.exp((end - c).to(tl.float32)))
    tl.store(END + row * NB + block, end)
    tl.store(LOG_SUM + row * NB + block, tl.log(tl.sum(weights, 0)).to(tl.float64))


@triton.jit
def _join(end_a, sum_a, end_b, sum_b):
    """Two runs of keys, the second after the first, as one."""
    moved = tl.where(end_a == INF, -INF, sum_a + tl.where(end_a == INF, 0.0, end_b - end_a))
    large, small = tl.maximum(moved, sum_b), tl.minimum(moved, sum_b)
    joined = tl.where(small == -INF, large, large + tl.log(1.0 + tl.exp(small - tl.where(large == -INF, 0.0, large))))
    hidden = end_b == INF
    return tl.where(hidden, end_a, end_b), tl.where(hidden, sum_a, joined)


@triton.jit
def _scan_decay_kernel(END, LOG_SUM, NB, BLOCK: tl.constexpr):
    """Join every block with all before it, in place."""
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    end_before = tl.full([BLOCK], INF, tl.float64)
    sum_before = tl.full([BLOCK], -INF, tl.float64)
    for start in range(0, NB, BLOCK):
        blocks = start + index
        p = row * NB + blocks
        end = tl.load(END + p, mask=blocks < NB, other=INF)
        log_sum = tl.load(LOG_SUM + p, mask=blocks < NB, other=-INF)
        end, log_sum = tl.associative_scan((end, log_sum), 0, _join)
        end, log_sum = _join(end_before, sum_before, end, log_sum)
        tl.store(END + p, end, mask=blocks < NB)
        tl.store(LOG_SUM + p, log_sum, mask=blocks < NB)
        # The last one of these, to every lane: it stands at least as low, and has at least the sum, of any other.
        end_before = tl.min(end, 0) + tl.zeros([BLOCK], tl.float64)
        sum_before = tl.max(tl.where(index == BLOCK - 1, log_sum, -INF), 0) + tl.zeros([BLOCK], tl.float64)


@triton.jit
def _scan_largest_kernel(K_MAX, NB, BLOCK: tl.constexpr):
    """Running maximum over blocks, in place."""
    row = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.float32)
    for start in range(0, NB, BLOCK):
        blocks = start + tl.arange(0, BLOCK)
        p = K_MAX + row * NB + blocks
        largest = tl.associative_scan(tl.load(p, mask=blocks < NB, other=0.0).to(tl.float32), 0, larger)
        largest = tl.maximum(largest, before)
        tl.store(p, largest, mask=blocks < NB)
        before = tl.max(largest, 0) + tl.zeros([BLOCK], tl.float32)


@triton.jit
def _search_kernel(
    C_Q,
    END,
    LOG_SUM,
    K_MAX,
    Q_NORM,
    OWN,
    BOUND,
    FIRST,
    LAST,
    OWN_BLOCK,
    STARTS,
    OUT,
    c_b,
    c_h,
    first_b,
    first_h,
    bound_b,
    bound_h,
    log_eps,
    c_margin,
    bound_margin,
    TQ,
    H,
    HF,
    G,
    FIRST_GROUP,
    NB,
    STEPS,
    TIGHT: tl.constexpr,
    SCATTERED: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    b, h = head // H, head % H
    b64 = b.to(tl.int64)
    gate = h // (H // HF)
    rows = block * _QUERY_BLOCK + tl.arange(0, _QUERY_BLOCK)
    is_row = rows < TQ
    position = tl.load(LAST + rows, mask=is_row, other=0).to(tl.int32)
    c = raised(tl.load(C_Q + b64 * c_b + gate.to(tl.int64) * c_h + rows, mask=is_row, other=0.0), c_margin)
    p_first = FIRST + b64 * first_b + (h // FIRST_GROUP).to(tl.int64) * first_h
    first = tl.load(p_first + rows, mask=is_row, other=2147483647)
    p_row = head.to(tl.int64) * TQ + rows
    p_end, p_sum = END + (b * HF + gate) * NB, LOG_SUM + (b * HF + gate) * NB
    if TIGHT:
        p_largest = K_MAX + (b * G + h // (H // G)) * NB
        norm = tl.load(Q_NORM + p_row, mask=is_row, other=0.0)
        own = tl.load(OWN + p_row, mask=is_row, other=0.0)
    else:
        bound = tl.load(BOUND + b * bound_b + h * bound_h)

    # Blocks before `low` may be dropped, from `high` on they may not; a query never drops its own block.
    low = tl.zeros([_QUERY_BLOCK], tl.int32)
    if SCATTERED:
        high = tl.load(OWN_BLOCK + rows, mask=is_row, other=0).to(tl.int32)
    else:
        high = tl.maximum(tl.minimum(position, NB * _KEY_BLOCK - 1), 0) // _KEY_BLOCK
    for _ in range(0, STEPS):
        middle = (low + high + 1) // 2
        last = tl.maximum(middle - 1, 0)
        end = tl.load(p_end + last)
        decay = tl.where(end == INF, -INF, c - tl.where(end == INF, 0.0, end))
        if TIGHT:
            largest = tl.load(p_largest + last).to(tl.float32)
            droppable = may_drop_tight(norm, own, decay + tl.load(p_sum + last), largest, log_eps)
        else:
            droppable = may_drop_paper(decay, bound, bound_margin, log_eps)
        # With nothing left between them, low stays.
        low = tl.where(droppable & (low < high), middle, low)
        high = tl.where(droppable, high, middle - 1)
        high = tl.maximum(low, high)
    sees_nothing = (first > position) | (rows >= TQ)
    kept = tl.load(STARTS + low).to(tl.int32) if SCATTERED else low * _KEY_BLOCK
    kept = tl.min(tl.where(sees_nothing, 2147483647, kept), 0)
    kept = tl.where(sees_nothing, 0, kept)
    tl.store(OUT + p_row, tl.maximum(first, kept.to(tl.int64)), mask=is_row)


def search_kv_start(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    *,
    eps: float,
    rule: Rule,
    scale: float,
    logit_bound: float | Tensor | None,
) -> Tensor:
    """As `rules.search_kv_start`, for q up to float32. Where ``logit_bound`` is no bound nothing is dropped."""
    if logit_bound is not None:
        if not isinstance(logit_bound, Tensor):
            # Filled on the device: a copy of a number from the host would wait for all that is queued.
            logit_bound = torch.full((1,), logit_bound, dtype=torch.float32, device=q.device)
        logit_bound = logit_bound.to(device=q.device, dtype=torch.float32).expand(q.shape[0], q.shape[2])
    q, k, c_q, c_k = (x.detach() for x in (q, k, decay.query, decay.key))
    return _search_kv_start(q, k, c_q, c_k, decay.kv_start, decay.last, eps, rule == "tight", scale, logit_bound)


@torch.library.custom_op(f"{NAMESPACE}::search_kv_start", mutates_args=())
def _search_kv_start(
    q: Tensor,
    k: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    eps: float,
    tight: bool,
    scale: float,
    logit_bound: Tensor | None,
) -> Tensor:
    q, k, c_q, c_k, kv_start = (maybe_contiguous(x) for x in (q, k, c_q, c_k, kv_start))
    with torch.cuda.device_of(q):
        return _launch(Decay(c_q, c_k, kv_start, last), q, k, eps, tight, scale, logit_bound)


@_search_kv_start.register_fake
def _search_kv_start_fake(q, k, c_q, c_k, kv_start, last, eps, tight, scale, logit_bound):
    return kv_start.new_empty(q.shape[0], q.shape[2], q.shape[1])


def _launch(
    decay: Decay, q: Tensor, k: Tensor, eps: float, tight: bool, scale: float, logit_bound: Tensor | None
) -> Tensor:
    keys = k.shape[1]
    end, log_sum = decay_by_blocks(decay.key)
    join_blocks(end, log_sum)
    q_norm = own = largest = None
    if tight or logit_bound is None:
        q_norm, own, largest = norms(q, k, decay.last, scale)
        if tight:
            join_largest(largest)
        else:
            logit_bound = q_norm.amax(-1) * largest.amax(-1).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    rows = Queries(decay.query, decay.kv_start, decay.last, q_norm, own)
    blocks = Blocks(end, log_sum, largest)
    log_eps = log_allowed(eps, torch.float32, 1 if tight else keys)
    return search(rows, blocks, q.shape[2], k.shape[2], log_eps, None if tight else logit_bound)


class Queries(NamedTuple):
    """Queries that look for their first key.

    Attributes:
        c: ``[B, Hf, Tq]`` float64 running sums.
        first: ``[B, H or Hf or 1, Tq]`` int64 first key that each may see anyway; beyond its own if none.
        last: ``[Tq]`` int64 own keys.
        norm: ``[B, H, Tq]`` float32, at least ``scale |q|``; this and the next are only needed by the rule ``tight``.
        own: ``[B, H, Tq]`` float32, at most the logits with their own keys.
        own_block: ``[Tq]`` int64 block of keys that each one's own key is in; None if it is that of ``last``.
    """

    c: Tensor
    first: Tensor
    last: Tensor
    norm: Tensor | None
    own: Tensor | None
    own_block: Tensor | None = None


class Blocks(NamedTuple):
    """Keys in blocks of 64, as `join_blocks` and `join_largest` leave them: each with all before it.

    Attributes:
        end: ``[B, Hf, N]`` float64 running sum at the last visible key.
        log_sum: ``[B, Hf, N]`` float64 ``log sum_j exp(end - c_j)``.
        largest: ``[B, G, N]`` float32 or float64 ``max |k|``, at least `rounding.SHORTEST_LENGTH`; only needed by the
            rule ``tight``.
        starts: ``[N]`` int64 first key of each; None if all but the last are full. With ``own_block``.
    """

    end: Tensor
    log_sum: Tensor
    largest: Tensor | None
    starts: Tensor | None = None


def decay_by_blocks(c_k: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``end`` and ``log_sum`` of `Blocks`, of each block alone, from ``[B, Hf, Tk]`` running sums.

    They are written to ``out``, contiguous ``[2, B, Hf, N]`` float64, if it is given.
    """
    batch, gates, keys = c_k.shape
    blocks = triton.cdiv(keys, PRUNED_KEYS)
    if out is None:
        out = torch.empty(2, batch, gates, blocks, dtype=torch.float64, device=c_k.device)
    end, log_sum = out.unbind()
    _block_decay_kernel[(batch * gates, blocks)](c_k, end, log_sum, *c_k.stride()[:2], gates, keys, blocks, num_warps=1)
    return end, log_sum


def join_blocks(end: Tensor, log_sum: Tensor) -> None:
    """Join every block with all before it, in place; both contiguous."""
    blocks = end.shape[-1]
    _scan_decay_kernel[(end.shape[0] * end.shape[1],)](end, log_sum, blocks, BLOCK=_scan_block(blocks))


def join_largest(largest: Tensor) -> None:
    """Join every block with all before it, in place; contiguous."""
    blocks = largest.shape[-1]
    _scan_largest_kernel[(largest.shape[0] * largest.shape[1],)](largest, blocks, BLOCK=_scan_block(blocks))


def _scan_block(blocks: int) -> int:
    return min(_SCAN, max(16, triton.next_power_of_2(blocks)))


def norms(q: Tensor, k: Tensor, last: Tensor, scale: float, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``norm`` and ``own`` of `Queries`, and ``max |k|`` of each block of keys alone, ``[B, G, N]`` float32.

    The latter is written to ``out``, contiguous and of any type, if it is given.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    blocks = triton.cdiv(keys, PRUNED_KEYS)
    q_norm, own = torch.empty(2, batch, heads, queries, dtype=torch.float32, device=q.device).unbind()
    largest = torch.empty(batch, kv_heads, blocks, dtype=torch.float32, device=q.device) if out is None else out
    _norms_kernel[(batch * heads, blocks)](
        q,
        k,
        last,
        q_norm,
        own,
        largest,
        *q.stride()[:3],
        *k.stride()[:3],
        scale,
        logit_margin(head_dim, torch.float32),
        queries,
        keys,
        heads,
        kv_heads,
        blocks,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_head_dim(head_dim),
    )
    return q_norm, own, largest


def search(
    rows: Queries, blocks: Blocks, heads: int, kv_heads: int, log_eps: float, logit_bound: Tensor | None
) -> Tensor:
    """First key that each query keeps, ``[B, H, Tq]`` int64: by the rule ``paper`` if there is a ``logit_bound``.

    Args:
        rows, blocks: queries, and the keys that ``last`` counts.
        heads, kv_heads: how many.
        log_eps: as `rounding.log_allowed` gives it, for ``paper`` with the number of keys.
        logit_bound: ``U``, ``[B, H]`` float32, any strides. Where it is NaN, infinite or negative nothing is dropped.
    """
    batch, gates, queries = rows.c.shape
    first = torch.empty(batch, heads, queries, dtype=torch.int64, device=rows.c.device)
    count = blocks.end.shape[-1]
    _search_kernel[(batch * heads, triton.cdiv(queries, PRUNED_QUERIES))](
        rows.c,
        blocks.end,
        blocks.log_sum,
        blocks.largest,
        rows.norm,
        rows.own,
        logit_bound,
        rows.first,
        rows.last,
        rows.own_block,
        blocks.starts,
        first,
        *rows.c.stride()[:2],
        *rows.first.stride()[:2],
        *((0, 0) if logit_bound is None else logit_bound.stride()),
        log_eps,
        decay_margin(count * PRUNED_KEYS),
        logit_margin(0, torch.float32),
        queries,
        heads,
        gates,
        kv_heads,
        heads // rows.first.shape[1],
        count,
        count.bit_length() + 1,
        TIGHT=logit_bound is None,
        SCATTERED=blocks.starts is not None,
    )
    return first
