"""Triton kernels that search for what ACP may drop: by the rules of pruning, in blocks of queries and keys.

Everything is proportional to the number of tokens, and nothing walks along the sequence: a pass over keys and queries
takes norms, a scan over blocks of keys takes what the rules need of all keys before a block's end, and every row finds
its ``kv_start`` among the blocks by bisection. A block of queries keeps what any of its rows keeps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..devices import on_device_of
from ..launches.replay import replayed
from ..operators import NAMESPACE, contiguous_decay, maybe_contiguous, nothing_sees
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES, cdiv, padded_head_dim
from ..triton_common import INF, INT32_MAX, kernel, load_rows, make_running_maxima
from .predicates import lengths, log_add, may_drop, query_bounds, raised, sink_bound
from .rounding import decay_margin, log_allowed, logit_margin
from .rules import PruningRule
from .triton_measured import measure

_QUERY_BLOCK = tl.constexpr(PRUNED_QUERIES)
_KEY_BLOCK = tl.constexpr(PRUNED_KEYS)
# Blocks that a scan takes at a time: for any number of blocks, so that one compilation serves all lengths.
_SCAN = 256


@triton.jit
def _store_block_decay(C, END, LOG_SUM, b, gate, block, c_b, c_h, HF, TK, NB, is_mine):
    """Of a block of keys: ``c`` at its last visible one, ``+inf`` for none, and ``log sum_j exp(c_last - c_j)``."""
    keys = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    p = C + b.to(tl.int64) * c_b + gate.to(tl.int64) * c_h
    c = tl.load(p + keys, mask=(keys < TK) & is_mine, other=INF)
    end = tl.min(c, 0)
    weights = tl.where(c == INF, 0.0, tl.exp((end - c).to(tl.float32)))
    p_out = (b * HF + gate) * NB + block
    tl.store(END + p_out, end, mask=is_mine)
    tl.store(LOG_SUM + p_out, tl.log(tl.sum(weights, 0)).to(tl.float64), mask=is_mine)


@kernel
def _block_decay_kernel(C, END, LOG_SUM, c_b, c_h, HF, TK, NB):
    """A gate's block of keys, for rules that read no norms."""
    row, block = tl.program_id(0), tl.program_id(1)
    _store_block_decay(C, END, LOG_SUM, row // HF, row % HF, block, c_b, c_h, HF, TK, NB, True)


@kernel
def _summary_kernel(
    Q, K, C, LAST, SINK, NORM, DIAGONAL, END, LOG_SUM, LARGEST,
    q_b, q_t, q_h, k_b, k_t, k_h, c_b, c_h, sink_b, sink_h,
    scale, margin,
    TQ, TK, H, HF, G, NB,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a block of keys and the queries at its tokens: decays, the largest ``|k|`` and `query_bounds`.

    The first head of each gate stores the first, that of each key/value head the second.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    g, gate = h // (H // G), h // (H // HF)
    keys = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    rows = keys - tl.load(LAST).to(tl.int32)
    is_row = (rows >= 0) & (rows < TQ)
    p_k = K + b * k_b + g.to(tl.int64) * k_h
    k = load_rows(p_k, keys, k_t, keys < TK, D, BLOCK_D, True)
    q = load_rows(Q + b * q_b + h.to(tl.int64) * q_h, rows, q_t, is_row, D, BLOCK_D, True)
    # While they are on their way.
    _store_block_decay(C, END, LOG_SUM, b, gate, block, c_b, c_h, HF, TK, NB, h % (H // HF) == 0)
    k, q = k.to(tl.float32), q.to(tl.float32)
    p_row = head.to(tl.int64) * TQ + rows
    k_length = lengths(k)
    norm, diagonal = query_bounds(q, k, k_length, scale, margin)
    if SINK is not None:
        diagonal = log_add(diagonal, sink_bound(q, SINK + b * sink_b + g * sink_h, norm, scale, margin, D, BLOCK_D))
    tl.store(NORM + p_row, norm, mask=is_row)
    tl.store(DIAGONAL + p_row, diagonal, mask=is_row)
    tl.store(LARGEST + (b * G + g) * NB + block, tl.max(k_length, 0), mask=h % (H // G) == 0)


@triton.jit
def _join(end_a, sum_a, end_b, sum_b):
    """Two runs of keys, the second after the first, as one."""
    moved = tl.where(end_a == INF, -INF, sum_a + tl.where(end_a == INF, 0.0, end_b - end_a))
    large, small = tl.maximum(moved, sum_b), tl.minimum(moved, sum_b)
    joined = tl.where(small == -INF, large, large + tl.log(1.0 + tl.exp(small - tl.where(large == -INF, 0.0, large))))
    hidden = end_b == INF
    return tl.where(hidden, end_a, end_b), tl.where(hidden, sum_a, joined)


@triton.jit
def _join_decays(END, LOG_SUM, row, NB, BLOCK: tl.constexpr):
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


@kernel
def _join_kernel(END, LOG_SUM, LARGEST, HF, G, NB, HAS_LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Join every block with all before it, in place: a program for each gate, then one for each key/value head."""
    b, row = tl.program_id(0), tl.program_id(1)
    if row < HF:
        _join_decays(END, LOG_SUM, b * HF + row, NB, BLOCK)
    elif HAS_LARGEST:
        make_running_maxima(LARGEST + (b * G + row - HF) * NB, NB, BLOCK)


@kernel
def _search_kernel(
    C_Q, END, LOG_SUM, LARGEST, NORM, DIAGONAL, BOUND, KV_START, LAST, DIAGONAL_BLOCK, STARTS, OUT,
    cq_b, cq_h, s_b, s_h, bound_b, bound_h,
    log_eps, c_margin, bound_margin,
    TQ, H, HF, G, START_GROUP, NB, STEPS,
    RULE: tl.constexpr,
    IS_SCATTERED: tl.constexpr,
):  # fmt: skip
    """First key that each query of a block keeps: ``kv_start``, or the first block that a row may not drop if later."""
    head, block = tl.program_id(0), tl.program_id(1)
    b, h = head // H, head % H
    b64 = b.to(tl.int64)
    gate = h // (H // HF)
    rows = block * _QUERY_BLOCK + tl.arange(0, _QUERY_BLOCK)
    is_row = rows < TQ
    position = tl.load(LAST + rows, mask=is_row, other=0).to(tl.int32)
    c = raised(tl.load(C_Q + b64 * cq_b + gate.to(tl.int64) * cq_h + rows, mask=is_row, other=0.0), c_margin)
    p_start = KV_START + b64 * s_b + (h // START_GROUP).to(tl.int64) * s_h
    kv_start = tl.load(p_start + rows, mask=is_row, other=INT32_MAX)
    p_row = head.to(tl.int64) * TQ + rows
    p_end, p_sum = END + (b * HF + gate) * NB, LOG_SUM + (b * HF + gate) * NB
    norm = None
    diagonal = None
    bound = None
    if RULE == "paper":
        bound = tl.load(BOUND + b * bound_b + h * bound_h)
    else:
        p_largest = LARGEST + (b * G + h // (H // G)) * NB
        norm = tl.load(NORM + p_row, mask=is_row, other=0.0)
        diagonal = tl.load(DIAGONAL + p_row, mask=is_row, other=0.0)

    # Blocks before `low` may be dropped, from `high` on they may not; a query never drops its diagonal block.
    low = tl.zeros([_QUERY_BLOCK], tl.int32)
    if IS_SCATTERED:
        high = tl.load(DIAGONAL_BLOCK + rows, mask=is_row, other=0).to(tl.int32)
    else:
        high = tl.maximum(tl.minimum(position, NB * _KEY_BLOCK - 1), 0) // _KEY_BLOCK
    for _ in range(0, STEPS):
        middle = (low + high + 1) // 2
        last = tl.maximum(middle - 1, 0)
        end = tl.load(p_end + last)
        decay = tl.where(end == INF, -INF, c - tl.where(end == INF, 0.0, end))
        log_decays = None
        largest = None
        if RULE != "paper":
            largest = tl.load(p_largest + last).to(tl.float32)
            log_decays = decay + tl.load(p_sum + last)
        droppable = may_drop(RULE, norm, diagonal, bound, bound_margin, decay, log_decays, largest, log_eps)
        # With nothing left between them, low stays.
        low = tl.where(droppable & (low < high), middle, low)
        high = tl.where(droppable, high, middle - 1)
        high = tl.maximum(low, high)
    fully_masked = (kv_start > position) | (rows >= TQ)
    kept = tl.load(STARTS + low).to(tl.int32) if IS_SCATTERED else low * _KEY_BLOCK
    kept = tl.min(tl.where(fully_masked, INT32_MAX, kept), 0)
    kept = tl.where(fully_masked, 0, kept)
    tl.store(OUT + p_row, tl.maximum(kv_start, kept.to(tl.int64)), mask=is_row)


def search_kv_start(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    *,
    eps: float,
    rule: PruningRule,
    scale: float,
    logit_bound: float | Tensor | None,
    sink: Tensor | None = None,
) -> Tensor:
    """As `prune.search_kv_start`, for q up to float32. Where ``logit_bound`` is no bound nothing is dropped."""
    if logit_bound is not None:
        if not isinstance(logit_bound, Tensor):
            # Filled on the device: a copy of a number from the host would wait for all that is queued.
            logit_bound = torch.full((1,), logit_bound, dtype=torch.float32, device=q.device)
        logit_bound = logit_bound.to(device=q.device, dtype=torch.float32).expand(q.shape[0], q.shape[2])
    sink = None if sink is None else sink.detach().expand(len(q), *sink.shape[-2:])
    if torch.is_grad_enabled():
        q, k, c_q, c_k = (x.detach() for x in (q, k, decay.query, decay.key))
        decay = Decay(c_q, c_k, decay.kv_start, decay.last)
    if nothing_sees(q, k, decay.query, decay.key):
        return _search_blocks(decay, q, k, eps, rule, scale, logit_bound, sink)
    return _search_kv_start(
        q, k, decay.query, decay.key, decay.kv_start, decay.last, eps, rule.value, scale, logit_bound, sink
    )


def _search(
    q: Tensor,
    k: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    eps: float,
    rule: str,
    scale: float,
    logit_bound: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    return _search_blocks(Decay(c_q, c_k, kv_start, last), q, k, eps, PruningRule(rule), scale, logit_bound, sink)


_search_kv_start = torch.library.custom_op(f"{NAMESPACE}::search_kv_start", _search, mutates_args=())


@_search_kv_start.register_fake
def _search_kv_start_fake(q, k, c_q, c_k, kv_start, last, eps, rule, scale, logit_bound, sink):
    return kv_start.new_empty(q.shape[0], q.shape[2], q.shape[1])


def _search_blocks(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    eps: float,
    rule: PruningRule,
    scale: float,
    logit_bound: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    decay, q, k = contiguous_decay(decay), maybe_contiguous(q), maybe_contiguous(k)
    sink = None if sink is None else maybe_contiguous(sink)
    with on_device_of(q):
        return _launch(decay, q, k, eps, rule, scale, logit_bound, sink)


@replayed
def _launch(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    eps: float,
    rule: PruningRule,
    scale: float,
    logit_bound: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    norm = diagonal = None
    if rule.reads_bound and logit_bound is not None:
        blocks = decay_by_blocks(decay.key)
    else:
        norm, diagonal, blocks = summarize(q, k, decay.key, decay.last, scale, sink)
        if rule.reads_bound:
            assert blocks.largest is not None
            logit_bound = norm.amax(-1) * blocks.largest.amax(-1).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    join_blocks(blocks)
    rows = Queries(decay.query, decay.kv_start, decay.last, norm, diagonal)
    log_eps = log_allowed(eps, torch.float32, rule.terms(k.shape[1]))
    kept = search(rule, rows, blocks, q.shape[2], k.shape[2], log_eps, logit_bound)
    if rule is PruningRule.MEASURED:
        assert norm is not None and blocks.largest is not None
        measure(q, k, decay, kept, norm, blocks.end, blocks.log_sum, blocks.largest, eps, scale, sink)
    return kept


class Queries(NamedTuple):
    """Queries that look for their first key.

    Attributes:
        c: ``[B, Hf, Tq]`` float64 running sums.
        kv_start: ``[B, H or Hf or 1, Tq]`` int64 first key that each may see anyway; beyond its own in a fully masked
            row.
        last: ``[Tq]`` int64 diagonal keys.
        norm: ``[B, H, Tq]`` float32, at least ``scale |q|``; this and the next are not needed by a rule that reads a
            bound.
        diagonal: ``[B, H, Tq]`` float32, as in `rules.QueryBounds`.
        diagonal_block: ``[Tq]`` int64 block of keys that each one's diagonal key is in; None if it is that of ``last``.
    """

    c: Tensor
    kv_start: Tensor
    last: Tensor
    norm: Tensor | None
    diagonal: Tensor | None
    diagonal_block: Tensor | None = None


class Blocks(NamedTuple):
    """Keys in blocks of 64: each alone, or as `join_blocks` leaves them with all before it. All contiguous.

    Attributes:
        end: ``[B, Hf, N]`` float64 running sum at the last visible key.
        log_sum: ``[B, Hf, N]`` float64 ``log sum_j exp(end - c_j)``.
        largest: ``[B, G, N]`` float32 or float64 ``max |k|``, at least `rounding.SHORTEST_LENGTH`; not needed by
            a rule that reads a bound.
        starts: ``[N]`` int64 first key of each; None if all but the last are full. With ``diagonal_block``.
    """

    end: Tensor
    log_sum: Tensor
    largest: Tensor | None
    starts: Tensor | None = None


def decay_by_blocks(c_k: Tensor) -> Blocks:
    """Each block alone, without ``largest``, from ``[B, Hf, Tk]`` running sums."""
    batch, gates, keys = c_k.shape
    blocks = cdiv(keys, PRUNED_KEYS)
    end, log_sum = torch.empty(2, batch, gates, blocks, dtype=torch.float64, device=c_k.device).unbind()
    _block_decay_kernel[(batch * gates, blocks)](
        C=c_k, c_b=c_k.stride(0), c_h=c_k.stride(1),
        END=end, LOG_SUM=log_sum, HF=gates, TK=keys, NB=blocks,
        num_warps=1,
    )  # fmt: skip
    return Blocks(end, log_sum, None)


def summarize(
    q: Tensor,
    k: Tensor,
    c_k: Tensor,
    last: Tensor,
    scale: float,
    sink: Tensor | None,
    out: Blocks | None = None,
) -> tuple[Tensor, Tensor, Blocks]:
    """``norm`` and ``diagonal`` of `Queries`, with ``sink`` ``[B, G, D]``, and each block of keys alone.

    The latter are written to ``out``, whose ``largest`` may have any type, if it is given.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], c_k.shape[1]
    count = cdiv(keys, PRUNED_KEYS)
    norm, diagonal = torch.empty(2, batch, heads, queries, dtype=torch.float32, device=q.device).unbind()
    if out is None:
        end, log_sum = torch.empty(2, batch, gates, count, dtype=torch.float64, device=q.device).unbind()
        out = Blocks(end, log_sum, torch.empty(batch, kv_heads, count, dtype=torch.float32, device=q.device))
    _summary_kernel[(batch * heads, count)](
        Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
        K=k, k_b=k.stride(0), k_t=k.stride(1), k_h=k.stride(2),
        C=c_k, c_b=c_k.stride(0), c_h=c_k.stride(1),
        LAST=last,
        SINK=sink, sink_b=0 if sink is None else sink.stride(0), sink_h=0 if sink is None else sink.stride(1),
        NORM=norm,
        DIAGONAL=diagonal,
        END=out.end,
        LOG_SUM=out.log_sum,
        LARGEST=out.largest,
        scale=scale,
        margin=logit_margin(head_dim, torch.float32),
        TQ=queries,
        TK=keys,
        H=heads,
        HF=gates,
        G=kv_heads,
        NB=count,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
    )  # fmt: skip
    return norm, diagonal, out


def join_blocks(blocks: Blocks) -> None:
    """Join every block with all before it, in place."""
    batch, gates, count = blocks.end.shape
    kv_heads = 0 if blocks.largest is None else blocks.largest.shape[1]
    _join_kernel[(batch, gates + kv_heads)](
        END=blocks.end,
        LOG_SUM=blocks.log_sum,
        LARGEST=blocks.largest,
        HF=gates,
        G=kv_heads,
        NB=count,
        HAS_LARGEST=blocks.largest is not None,
        BLOCK=_SCAN,
    )


def search(
    rule: PruningRule,
    rows: Queries,
    blocks: Blocks,
    heads: int,
    kv_heads: int,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    """First key that each query keeps, ``[B, H, Tq]`` int64.

    Args:
        rule: by which.
        rows, blocks: queries, and the keys that ``last`` counts.
        heads, kv_heads: how many.
        log_eps: as `rounding.log_allowed` gives it, for `PruningRule.terms` of the number of keys.
        logit_bound: ``U`` of a rule that reads one, ``[B, H]`` float32, any strides. Where it is NaN, infinite or
            negative nothing is dropped.
    """
    batch, gates, queries = rows.c.shape
    kv_start = torch.empty(batch, heads, queries, dtype=torch.int64, device=rows.c.device)
    bound = logit_bound if rule.reads_bound else None
    count = blocks.end.shape[-1]
    _search_kernel[(batch * heads, cdiv(queries, PRUNED_QUERIES))](
        C_Q=rows.c, cq_b=rows.c.stride(0), cq_h=rows.c.stride(1),
        END=blocks.end,
        LOG_SUM=blocks.log_sum,
        LARGEST=blocks.largest,
        NORM=rows.norm,
        DIAGONAL=rows.diagonal,
        BOUND=bound, bound_b=0 if bound is None else bound.stride(0), bound_h=0 if bound is None else bound.stride(1),
        KV_START=rows.kv_start, s_b=rows.kv_start.stride(0), s_h=rows.kv_start.stride(1),
        LAST=rows.last,
        DIAGONAL_BLOCK=rows.diagonal_block,
        STARTS=blocks.starts,
        OUT=kv_start,
        log_eps=log_eps,
        c_margin=decay_margin(count * PRUNED_KEYS),
        bound_margin=logit_margin(0, torch.float32),
        TQ=queries,
        H=heads,
        HF=gates,
        G=kv_heads,
        START_GROUP=heads // rows.kv_start.shape[1],
        NB=count,
        STEPS=count.bit_length() + 1,
        RULE=rule.bound.value,
        IS_SCATTERED=blocks.starts is not None,
    )  # fmt: skip
    return kv_start
