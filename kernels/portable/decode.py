"""Triton kernels of attention for few queries over a long cache, as in decoding: what counts is to read it once.

Two launches, whose grids depend on shapes alone, so that a CUDA graph can replay them while the sequence grows:

1. `_ranges_kernel` finds the blocks of 64 keys that each key/value head reads. With pruning, every row (a query of a
   query head) looks for the last boundary before which it may drop all keys (`pruning`), by what `KeySummary` knows of
   them; a head keeps what any of its rows keeps.
2. `_attend_kernel` cuts the list of all these blocks into equal shares, one for each of a fixed number of programs, so
   a head that keeps more gets more of them. For each head in its share a program leaves an unnormalized partial result.
   The last program to finish with a head joins them in the order of their keys: the bits are the same each time.

The query heads of a key/value head are rows of one tile. One row alone takes elementwise products: every key of a tile
then has a running maximum and an output of its own, which are only joined at the end.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import NAMESPACE, rows_together, runs_kernels
from ..decay import Decay
from ..pruning.key_stats import KeySummary
from ..pruning.predicates import lengths, may_drop_paper, may_drop_tight, raised
from ..pruning.rounding import decay_margin, log_allowed, logit_margin
from ..pruning.rules import Rule
from ..tiles import LARGEST_HEAD_DIM, PRUNED_KEYS, padded_head_dim
from ..triton_common import INF, INT32_MAX, LN_2, LOG2_E, dot_precision, load_rows
from ..validation import check_logit_bound, check_rule

LARGEST_ROWS, LARGEST_QUERIES = 64, 16

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = tl.constexpr(PRUNED_KEYS)
_NOT_PRUNED, _TIGHT, _PAPER = 0, 1, 2
# Counts of blocks that are summed at a time; boundaries that one step of the search looks at, for all rows together.
_SCAN = 1024
_CANDIDATES = 256
# Programs where there are no multiprocessors to count.
_INTERPRETED_PROGRAMS = 5


class DecodeTile(NamedTuple):
    """Shape and resources of `_attend_kernel`.

    Attributes:
        dot: whether products run on matrix units; must be if there is more than one row.
        keys: keys of a tile, a power of two from 16; over a paged cache at most 64.
        warps: warps per program.
        stages: depth of the software pipeline that loads tiles; 1 loads to registers.
        programs: programs per multiprocessor.
        registers: most that a thread gets; None does not limit them.
    """

    dot: bool
    keys: int
    warps: int
    stages: int
    programs: int
    registers: int | None


def choose_decode_tile(rows: int, head_dim: int) -> DecodeTile:
    """What fits any GPU from compute capability 8.0: 4,096 elements of keys, and as many of values. Tuned on an H100.

    Args:
        rows: queries times query heads of a key/value head.
        head_dim: size of a head.
    """
    keys = 4096 // max(64, padded_head_dim(head_dim))
    if rows == 1:
        return DecodeTile(dot=False, keys=keys, warps=4, stages=1, programs=4, registers=128)
    return DecodeTile(dot=True, keys=keys, warps=4, stages=3, programs=2, registers=None)


@triton.jit
def _ranges_kernel(
    Q,
    K,
    C_Q,
    FIRST,
    LAST,
    PAGES,
    START,
    C,
    LOG_DECAYS,
    LARGEST,
    BOUND,
    RANGES,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    cq_b,
    cq_h,
    first_b,
    first_h,
    c_b,
    c_h,
    decays_b,
    decays_h,
    largest_b,
    largest_h,
    bound_b,
    bound_h,
    scale,
    bound,
    log_eps,
    margin,
    c_margin,
    bound_margin,
    TQ,
    H,
    HF,
    G,
    FIRST_HEADS,
    NB,
    STEPS,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RULE: tl.constexpr,
):
    """Of a key/value head: first block, number of blocks, 0, first key and last key that a row may see."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    b, g = (head // G).to(tl.int64), head % G
    rows = tl.arange(0, ROWS)
    is_row = rows < H // G * TQ
    h, t = g * (H // G) + rows // TQ, rows % TQ
    p_first = FIRST + b * first_b + (h // (H // FIRST_HEADS)).to(tl.int64) * first_h + t
    first = tl.load(p_first, mask=is_row, other=1).to(tl.int32)
    last = tl.load(LAST + t, mask=is_row, other=0).to(tl.int32)
    sees = is_row & (first <= last)
    begin = first // _BLOCK

    if RULE != 0:
        gate = h // (H // HF)
        c = raised(tl.load(C_Q + b * cq_b + gate.to(tl.int64) * cq_h + t, mask=is_row, other=0.0), c_margin)
        p_c = C + b * c_b + gate.to(tl.int64) * c_h
        if RULE == 1:
            columns = tl.arange(0, PADDED_DIM)
            is_column = columns[None, :] < HEAD_DIM
            p_q = Q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h
            q = tl.load(p_q[:, None] + columns[None, :], mask=is_row[:, None] & is_column, other=0.0).to(tl.float64)
            if PAGES is None:
                p_k = K + b * k_b + g.to(tl.int64) * k_h + last.to(tl.int64) * k_t
                held = sees
            else:
                page = tl.load(PAGES + head.to(tl.int64) * NB + last // _BLOCK, mask=sees, other=-1)
                p_k = K + page.to(tl.int64) * k_b + (last % _BLOCK).to(tl.int64) * k_t
                held = page >= 0
            k = tl.load(p_k[:, None] + columns[None, :], mask=held[:, None] & is_column, other=0.0).to(tl.float64)
            # As `query_bounds`, but these sums are float64, off by less than 1e-4 up to logits of 1e10: what counts is
            # how `scale` is rounded. The length of the key would cost as much as all the rest here.
            own = tl.sum(q * k, 1) * scale
            own -= margin * tl.abs(own)
            norm = lengths(q) * (1.0 + margin) * tl.abs(scale)
            p_decays = LOG_DECAYS + b * decays_b + gate.to(tl.int64) * decays_h
            p_largest = LARGEST + b * largest_b + g.to(tl.int64) * largest_h
        else:
            if BOUND is not None:
                bound = tl.load(BOUND + b * bound_b + h.to(tl.int64) * bound_h, mask=is_row, other=0.0)
            seen = (last + 1).to(tl.float32).to(tl.float64)
            allowed = log_eps - tl.log(seen)
            bound += tl.zeros([ROWS], tl.float64)

        # Keys before block `low` may be dropped; those before any block after `high` may not.
        low = tl.zeros([ROWS], tl.int32)
        high = tl.where(sees, last // _BLOCK, 0)
        for _ in range(0, STEPS):
            step = tl.maximum((high - low + CANDIDATES - 1) // CANDIDATES, 1)
            candidates = low[:, None] + (1 + tl.arange(0, CANDIDATES))[None, :] * step[:, None]
            inside = candidates <= high[:, None]
            before = tl.where(inside, candidates - 1, 0)
            end = tl.load(p_c[:, None] + before, mask=inside, other=INF)
            decay = tl.where(end == INF, -INF, c[:, None] - tl.where(end == INF, 0.0, end))
            if RULE == 1:
                decays = tl.load(p_decays[:, None] + before, mask=inside, other=-INF)
                largest = tl.load(p_largest + before, mask=inside, other=0.0).to(tl.float64)
                droppable = may_drop_tight(norm[:, None], own[:, None], c[:, None] + decays, largest, log_eps)
            else:
                droppable = may_drop_paper(decay, bound[:, None], bound_margin, allowed[:, None])
            low = tl.maximum(low, tl.max(tl.where(inside & droppable, candidates, 0), 1))
            high = tl.minimum(high, low + step - 1)
        begin = tl.maximum(begin, low)

    end = tl.max(tl.where(sees, last // _BLOCK + 1, 1), 0)
    begin = tl.min(tl.where(sees, begin, INT32_MAX), 0)
    if START is not None:
        begin = tl.maximum(begin, tl.load(START + head))
    # At least one block, so that every head has a program that writes its output.
    begin = tl.minimum(begin, end - 1)
    p = RANGES + head
    tl.store(p, begin)
    tl.store(p + heads, end - begin)
    tl.store(p + 2 * heads, 0)
    tl.store(p + 3 * heads, tl.min(tl.where(sees, first, INT32_MAX), 0))
    tl.store(p + 4 * heads, tl.max(tl.where(sees, last, -1), 0))


@triton.jit
def _join_parts(PARTS, STATISTICS, slot, parts, R, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, MERGED: tl.constexpr):
    """Maximum, total and output of the rows over consecutive partial results."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    maximum = tl.full([ROWS], -INF, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in range(0, parts, MERGED):
        part = start + tl.arange(0, MERGED)
        is_part = (part < parts)[:, None] & (rows < R)[None, :]
        row = (slot + part).to(tl.int64)[:, None] * R + rows[None, :]
        # From the L2 cache: other multiprocessors wrote them.
        maxima = tl.load(STATISTICS + 2 * row, mask=is_part, other=-INF, cache_modifier=".cg")
        totals = tl.load(STATISTICS + 2 * row + 1, mask=is_part, other=0.0, cache_modifier=".cg")
        p_outs = PARTS + row[:, :, None] * PADDED_DIM + columns[None, None, :]
        outs = tl.load(p_outs, mask=is_part[:, :, None], other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
        weights = tl.exp2(maxima - shift[None, :])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(totals * weights, 0)
        out = out * rescale[:, None] + tl.sum(outs * weights[:, :, None], 0)
        maximum = new_maximum
    return maximum, total, out


@triton.jit
def _attend_kernel(
    Q,
    K,
    V,
    C_Q,
    C_K,
    FIRST,
    LAST,
    REAL,
    PAGES,
    RANGES,
    PARTS,
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
    real_b,
    scale,
    HEADS,
    TQ,
    H,
    HF,
    G,
    FIRST_HEADS,
    PAGE_GATES,
    NB,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    ONE_GATE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    MERGED: tl.constexpr,
):
    group = H // G
    R = group * TQ
    programs = tl.num_programs(0)
    STATISTICS = PARTS + (programs + HEADS).to(tl.int64) * R * PADDED_DIM
    index = tl.arange(0, SCAN)
    blocks = 0
    for start in range(0, HEADS, SCAN):
        blocks += tl.sum(tl.load(RANGES + HEADS + start + index, mask=start + index < HEADS, other=0), 0)
    share = tl.cdiv(blocks, programs)
    position = tl.program_id(0) * share
    stop = tl.minimum(position + share, blocks)

    # The head at `position`, whose blocks begin at `head_begin`.
    head, head_begin, before = 0, 0, 0
    for start in range(0, HEADS, SCAN):
        is_head = start + index < HEADS
        ends = before + tl.cumsum(tl.load(RANGES + HEADS + start + index, mask=is_head, other=0), 0)
        passed = is_head & (ends <= position)
        head += tl.sum(passed.to(tl.int32), 0)
        head_begin = tl.maximum(head_begin, tl.max(tl.where(passed, ends, 0), 0))
        before = tl.max(ends, 0)

    columns = tl.arange(0, PADDED_DIM)
    rows = tl.arange(0, ROWS)
    is_row = rows < R
    t = rows % TQ
    while position < stop:
        p_range = RANGES + head
        head_end = head_begin + tl.load(p_range + HEADS)
        segment_end = tl.minimum(stop, head_end)
        first_block = tl.load(p_range) - head_begin
        keys_begin, keys_end = (first_block + position) * _BLOCK, (first_block + segment_end) * _BLOCK
        first_key, last_key = tl.load(p_range + 3 * HEADS), tl.load(p_range + 4 * HEADS)

        b, g = tl.cast(head // G, tl.int64), head % G
        h = g * group + rows // TQ
        gate = h // (H // HF)
        p_q = Q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h
        is_element = is_row[:, None] & (columns[None, :] < HEAD_DIM)
        q = tl.load(p_q[:, None] + columns[None, :], mask=is_element, other=0.0)
        c_q = tl.load(C_Q + b * cq_b + gate.to(tl.int64) * cq_h + t, mask=is_row, other=0.0) * LOG2_E
        p_first = FIRST + b * first_b + (h // (H // FIRST_HEADS)).to(tl.int64) * first_h + t
        first = tl.load(p_first, mask=is_row, other=1).to(tl.int32)
        last = tl.load(LAST + t, mask=is_row, other=0).to(tl.int32)
        if PAGES is None:
            p_k, p_v = K + b * k_b + g.to(tl.int64) * k_h, V + b * v_b + g.to(tl.int64) * v_h
            p_c = C_K + b * ck_b
        else:
            gate = rows // TQ * PAGE_GATES // group
            p_c = C_K
        if ONE_GATE:
            p_c += tl.min(gate, 0).to(tl.int64) * ck_h
        # Keys from the first on that a row sees, compared as unsigned: those before are large numbers.
        visible_keys = tl.maximum(last - first + 1, 0).to(tl.uint32)

        if DOT:
            maximum = tl.full([ROWS], -INF, tl.float32)
            total = tl.zeros([ROWS, KEYS], tl.float32)
            out = tl.zeros([ROWS, PADDED_DIM], tl.float32)
        else:
            q_row = tl.sum(q.to(tl.float32), 0) * (scale * LOG2_E)
            maximum = tl.full([KEYS], -INF, tl.float32)
            total = tl.zeros([KEYS], tl.float32)
            out = tl.zeros([KEYS, PADDED_DIM], tl.float32)
        for j in tl.range(keys_begin, keys_end, KEYS, num_stages=STAGES):
            keys = j + tl.arange(0, KEYS)
            inside = (keys >= first_key) & (keys <= last_key) & (keys < keys_end)
            if PAGES is None:
                readable, tile_keys = inside, keys
                p_k_tile, p_v_tile, p_c_tile = p_k, p_v, p_c
            else:
                page = tl.load(PAGES + tl.cast(head, tl.int64) * NB + j // _BLOCK)
                readable, tile_keys = inside & (page >= 0), keys % _BLOCK
                p_k_tile, p_v_tile = K + page.to(tl.int64) * k_b, V + page.to(tl.int64) * v_b
                p_c_tile = p_c + page.to(tl.int64) * ck_b
            k = load_rows(p_k_tile, tile_keys, k_t, readable, HEAD_DIM, PADDED_DIM, True)
            v = load_rows(p_v_tile, tile_keys, v_t, readable, HEAD_DIM, PADDED_DIM, True)
            if ONE_GATE:
                c_k = tl.load(p_c_tile + tile_keys, mask=readable, other=INF)[None, :]
            else:
                p_c_rows = p_c_tile + gate.to(tl.int64)[:, None] * ck_h + tile_keys[None, :]
                c_k = tl.load(p_c_rows, mask=is_row[:, None] & readable[None, :], other=INF)
            bias = (c_q[:, None] - c_k * LOG2_E).to(tl.float32)
            if PAGES is not None:
                # A missing page is nothing that may pass for a result.
                bias = tl.where(inside[None, :] & (page < 0), float("nan"), bias)
            if REAL is not None:
                real = tl.load(REAL + b * real_b + keys, mask=inside, other=0) != 0
                v = tl.where(real[:, None], v, 0.0)
            if DOT:
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E) + bias
                if MASKED:
                    visible = (keys[None, :] - first[:, None]).to(tl.uint32) < visible_keys[:, None]
                    scores = tl.where(visible, scores, -INF)
                if REAL is not None:
                    scores = tl.where(real[None, :], scores, -INF)
                new_maximum = tl.maximum(maximum, tl.max(scores, 1))
                # Where nothing has been seen yet, any finite shift leaves weights at zero.
                shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
                weights = tl.exp2(scores - shift[:, None])
                rescale = tl.exp2(maximum - shift)
                # A total for every key of a tile: to add them up now would make the warps wait for each other.
                total = total * rescale[:, None] + weights
                out = out * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            else:
                scores = tl.sum(k.to(tl.float32) * q_row[None, :], 1) + tl.sum(bias, 0)
                if REAL is not None:
                    scores = tl.where(real, scores, -INF)
                new_maximum = tl.maximum(maximum, scores)
                shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
                weights = tl.exp2(scores - shift)
                rescale = tl.exp2(maximum - shift)
                total = total * rescale + weights
                out = out * rescale[:, None] + weights[:, None] * v.to(tl.float32)
            maximum = new_maximum

        if DOT:
            row_maximum, row_total, row_out = maximum, tl.sum(total, 1), out
        else:
            largest = tl.max(maximum, 0)
            weights = tl.exp2(maximum - tl.where(largest == -INF, 0.0, largest))
            row_maximum = tl.zeros([ROWS], tl.float32) + largest
            row_total = tl.zeros([ROWS], tl.float32) + tl.sum(total * weights, 0)
            row_out = tl.zeros([ROWS, PADDED_DIM], tl.float32) + tl.sum(out * weights[:, None], 0)[None, :]

        # Programs with blocks of this head. A step to the next program or head is one to the next slot.
        first_program = head_begin // share
        parts = (head_end - 1) // share - first_program + 1
        finished = 0
        if parts > 1:
            row = (tl.program_id(0) + head).to(tl.int64) * R + rows
            tl.store(STATISTICS + 2 * row, row_maximum, mask=is_row)
            tl.store(STATISTICS + 2 * row + 1, row_total, mask=is_row)
            tl.store(PARTS + row[:, None] * PADDED_DIM + columns[None, :], row_out, mask=is_row[:, None])
            # All of the program's writes are there before it says so.
            tl.debug_barrier()
            finished = tl.atomic_add(p_range + 2 * HEADS, 1, sem="acq_rel")
            if finished == parts - 1:
                row_maximum, row_total, row_out = _join_parts(
                    PARTS, STATISTICS, first_program + head, parts, R, PADDED_DIM, ROWS, MERGED
                )
        if finished == parts - 1:
            row_out = row_out / tl.where(row_total == 0.0, 1.0, row_total)[:, None]
            p_out = OUT + ((b * TQ + t) * H + h)[:, None] * HEAD_DIM + columns[None, :]
            tl.store(p_out, row_out.to(OUT.dtype.element_ty), mask=is_element)
            tl.store(LSE + (b * H + h) * TQ + t, (row_maximum + tl.log2(row_total)) * LN_2, mask=is_row)
        position, head_begin = segment_end, head_end
        head += 1


def decodes(q: Tensor, k: Tensor) -> bool:
    """Whether `decode_attention` takes queries ``q`` ``[B, Tq, H, D]`` where keys are like ``k`` ``[B, any, G, D]``."""
    _, queries, heads, head_dim = q.shape
    few = queries <= LARGEST_QUERIES and queries * (heads // k.shape[2]) <= LARGEST_ROWS
    return few and q.dtype in _DTYPES and head_dim <= LARGEST_HEAD_DIM and runs_kernels(q)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    *,
    scale: float,
    real: Tensor | None = None,
    summary: KeySummary | None = None,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | None = None,
    pages: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of few queries over ``decay``, without gradients, by GPU kernels that read what is kept once.

    As `reference_attention`, for what `decodes` accepts. The cache is either dense, and may be longer than the sequence
    (keys after the last query's are not read), or paged: 64 tokens of a key/value head to a page.

    Args:
        q: ``[B, Tq, H, D]`` queries; float16, bfloat16 or float32.
        k, v: ``[B, Tk, G, D]`` keys and values, or pools ``[P, 64, D]`` of their pages; the type of ``q``.
        decay: running sums and visible range of each query. Over a paged cache, ``key`` is a pool ``[P, R, 64]`` of
            the ``R = max(1, Hf // G)`` gates of a page's key/value head.
        scale: multiplies ``q . k``.
        real: ``[B, Tk]`` bool, False for padding, which is hidden and may hold NaN; None if there is none.
        summary: of the keys; pruning needs it.
        eps: with ``summary``, leave out keys of which it is proven that no row loses more than this of its attention
            weight in total, in ``(0, 1)``.
        rule: how that is proven, ``"tight"`` or ``"paper"``: see `pruning`.
        logit_bound: ``U`` of the rule ``paper``, a number, ``[H]`` or ``[B, H]``, as for `forgetting_attention`.
        pages: ``[B, G, N]`` int32 page of each block of 64 tokens; -1 where there is none. A row that must read such a
            block becomes NaN.
        start: ``[B, G]`` int32 first block that is still held; those before are not read.

    Returns:
        Output ``[B, Tq, H, D]`` in the type of ``q``, and log-sum-exp ``[B, H, Tq]`` float32; zero and -inf in rows
        that see nothing.

    Raises:
        ValueError: ``eps``, ``rule`` or ``logit_bound`` is not as above, or ``paper`` lacks its bound.
    """
    code, log_eps, bound = _NOT_PRUNED, 0.0, 0.0
    c = log_decays = largest = bounds = None
    if eps is not None:
        check_rule(eps, rule)
        check_logit_bound(logit_bound, q.shape[0], q.shape[2])
        if rule == "paper" and logit_bound is None:
            raise ValueError("logit_bound must be given for the rule 'paper'")
    if eps is not None and summary is not None:
        code, log_eps = _TIGHT if rule == "tight" else _PAPER, log_allowed(eps, torch.float32)
        c, log_decays, largest = summary
        if isinstance(logit_bound, Tensor):
            bounds = logit_bound.expand(q.shape[0], q.shape[2])
        elif logit_bound is not None:
            bound = float(logit_bound)
    return _decode(
        q,
        k,
        v,
        decay.query,
        decay.key,
        decay.kv_start,
        decay.last,
        real,
        pages,
        start,
        c,
        log_decays,
        largest,
        bounds,
        bound,
        scale,
        log_eps,
        code,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@torch.library.custom_op(f"{NAMESPACE}::decode_attention", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    first: Tensor,
    last: Tensor,
    real: Tensor | None,
    pages: Tensor | None,
    start: Tensor | None,
    c: Tensor | None,
    log_decays: Tensor | None,
    largest: Tensor | None,
    bounds: Tensor | None,
    bound: float,
    scale: float,
    log_eps: float,
    rule: int,
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), _empty_lse(q)
    if q.numel() == 0:
        return out, lse
    q, k, v, c_q, c_k, first = (rows_together(x) for x in (q, k, v, c_q, c_k, first))
    batch, queries, heads, head_dim = q.shape
    gates = c_q.shape[1]
    if pages is None:
        kv_heads, blocks = k.shape[2], triton.cdiv(k.shape[1], PRUNED_KEYS)
        k_strides, v_strides = k.stride()[:3], v.stride()[:3]
    else:
        kv_heads, blocks = pages.shape[1:]
        pages = pages.contiguous()
        k_strides, v_strides = (*k.stride()[:2], 0), (*v.stride()[:2], 0)
    kv_total = batch * kv_heads
    rows = heads // kv_heads * queries
    padded_rows, padded_dim = triton.next_power_of_2(rows), padded_head_dim(head_dim)
    tile = choose_decode_tile(rows, head_dim)
    multiprocessors = _multiprocessors(q.device) * tile.programs if q.is_cuda else _INTERPRETED_PROGRAMS
    programs = min(multiprocessors, kv_total * blocks)

    ranges = torch.empty(5, kv_total, dtype=torch.int32, device=q.device)
    parts = torch.empty((programs + kv_total) * rows * (padded_dim + 2), dtype=torch.float32, device=q.device)
    candidates = max(16, _CANDIDATES // padded_rows)
    with torch.cuda.device_of(q):
        _ranges_kernel[(kv_total,)](
            q,
            k,
            c_q,
            first,
            last,
            pages,
            None if start is None else start.contiguous(),
            c,
            log_decays,
            largest,
            bounds,
            ranges,
            *q.stride()[:3],
            *k_strides,
            *c_q.stride()[:2],
            *first.stride()[:2],
            *(x for y in (c, log_decays, largest, bounds) for x in ((0, 0) if y is None else y.stride()[:2])),
            scale,
            bound,
            log_eps,
            logit_margin(head_dim, torch.float32),
            decay_margin(blocks * PRUNED_KEYS),
            logit_margin(0, torch.float32),
            queries,
            heads,
            gates,
            kv_heads,
            first.shape[1],
            blocks,
            _search_steps(blocks, candidates),
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            ROWS=padded_rows,
            CANDIDATES=candidates,
            RULE=rule,
        )
        padded_rows = max(16, padded_rows) if tile.dot else padded_rows
        _attend_kernel[(programs,)](
            q,
            k,
            v,
            c_q,
            c_k,
            first,
            last,
            real,
            pages,
            ranges,
            parts,
            out,
            lse,
            *q.stride()[:3],
            *k_strides,
            *v_strides,
            *c_q.stride()[:2],
            *c_k.stride()[:2],
            *first.stride()[:2],
            0 if real is None else real.stride(0),
            scale,
            kv_total,
            queries,
            heads,
            gates,
            kv_heads,
            first.shape[1],
            max(1, gates // kv_heads),
            blocks,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            ROWS=padded_rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            DOT=tile.dot,
            ONE_GATE=gates <= kv_heads or heads == kv_heads,
            MASKED=queries > 1 or (first.shape[1] > kv_heads and heads > kv_heads),
            PRECISION=dot_precision(q),
            SCAN=min(_SCAN, max(16, triton.next_power_of_2(kv_total))),
            MERGED=max(1, min(32, 1024 * tile.warps // (padded_rows * padded_dim))),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
    return out, lse


def _search_steps(blocks: int, candidates: int) -> int:
    """Steps until a search among ``blocks`` boundaries has nothing left between its ends."""
    steps = 0
    while blocks > 0:
        blocks = triton.cdiv(blocks, candidates) - 1
        steps += 1
    return steps


def _empty_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)


@_decode.register_fake
def _decode_fake(q, *_):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _empty_lse(q)
