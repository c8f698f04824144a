"""Triton kernels for what context parallelism does between others: each is one launch in place of ten to thirty.

On a GPU it is the host that attention over several ranks waits for: until it has learnt what is needed, little is under
way. The same in PyTorch is where these are called.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .group import Shards
    from .row_copy import Rows, Runs

_BLOCK = 1024
# Of a run, by one program.
_COPIED_ROWS = 64


@triton.jit
def _needs_kernel(
    FIRST, SEGMENTS, LEAST, CROSSING, first_b, first_h, HEADS, G, GROUP, BLOCK: tl.constexpr
):  # fmt: skip
    slot, head = tl.program_id(0), tl.program_id(1)
    p_segment = SEGMENTS + slot * 4
    row, stop, start = tl.load(p_segment), tl.load(p_segment + 1), tl.load(p_segment + 2)
    p_first = FIRST + (head // G).to(tl.int64) * first_b + (head % G * GROUP).to(tl.int64) * first_h
    least = tl.zeros([BLOCK], tl.int64) + start
    crossing = tl.zeros([BLOCK], tl.int64)
    for begin in range(row, stop, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        for member in range(0, GROUP):
            first = tl.load(p_first + member * first_h + rows, mask=rows < stop, other=9223372036854775807)
            least = tl.minimum(least, first)
            crossing = tl.maximum(crossing, tl.where(first < start, rows - row + 1, 0))
    tl.store(LEAST + slot * HEADS + head, tl.min(least, 0))
    tl.store(CROSSING + slot * HEADS + head, tl.max(crossing, 0))


def needs_on_device(first: Tensor, kv_heads: int, shards: "Shards") -> tuple[Tensor, Tensor]:
    """What the queries of each segment of this rank need, from their first keys ``[B, H, T]`` int64.

    Returns:
        ``[segments, B, G]`` int64 each: first token that one of them keeps, with room for as many segments as any rank
        has; and how many leading ones keep a key before the segment.
    """
    batch, heads, _ = first.shape
    own = len(shards.segments)
    least = torch.empty(shards.split.most_segments, batch, kv_heads, dtype=torch.int64, device=first.device)
    crossing = torch.empty(own, batch, kv_heads, dtype=torch.int64, device=first.device)
    with torch.cuda.device_of(first):
        _needs_kernel[(own, batch * kv_heads)](
            first,
            shards.tables(first.device).segments,
            least,
            crossing,
            *first.stride()[:2],
            batch * kv_heads,
            kv_heads,
            heads // kv_heads,
            BLOCK=_BLOCK,
        )
    return least, crossing


@triton.jit
def _first_of_segment(first, row, start):
    """From an index among this rank's tokens, counted from 1, to one of the sequence; 0 if it is of another segment."""
    first += start - row - 1
    return tl.where(first < start, 0, first)


@triton.jit
def _ends_kernel(C, FIRST, SEGMENTS, ENDS, HEADS, T, BLOCK: tl.constexpr):
    slot = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_segment = SEGMENTS + slot * 4
    row, stop, start = tl.load(p_segment), tl.load(p_segment + 1), tl.load(p_segment + 2)
    p = heads.to(tl.int64) * T + stop - 1
    first = _first_of_segment(tl.load(FIRST + p, mask=heads < HEADS, other=0), row, start)
    p_ends = ENDS + 2 * slot * HEADS + heads
    tl.store(p_ends, tl.load(C + p, mask=heads < HEADS, other=0.0), mask=heads < HEADS)
    tl.store(p_ends + HEADS, first.to(tl.float64), mask=heads < HEADS)


@triton.jit
def _carry_kernel(
    C,
    FIRST,
    ENDS,
    SEGMENTS,
    SLOTS,
    OUT_C,
    OUT_FIRST,
    HEADS,
    T,
    S,
    OWN,
    PADDED_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = head.to(tl.int64) * T + rows
    c = tl.load(C + p, mask=rows < T, other=0.0)
    first = tl.load(FIRST + p, mask=rows < T, other=0)
    # Of all segments of the sequence: the sum at its end, and at the end of the one before it on the same rank.
    segments = tl.arange(0, PADDED_S)
    slots = tl.load(SLOTS + 2 * segments, mask=segments < S, other=-1)
    before = tl.load(SLOTS + 2 * segments + 1, mask=segments < S, other=-1)
    sums = tl.load(ENDS + 2 * slots * HEADS + head, mask=slots >= 0, other=0.0)
    own_before = tl.load(ENDS + 2 * before * HEADS + head, mask=before >= 0, other=0.0)
    resets = tl.load(ENDS + (2 * slots + 1) * HEADS + head, mask=slots >= 0, other=0.0)
    totals = sums - own_before
    for own in range(0, OWN):
        p_segment = SEGMENTS + own * 4
        row, stop, start = tl.load(p_segment), tl.load(p_segment + 1), tl.load(p_segment + 2)
        index = tl.load(p_segment + 3)
        shift = tl.sum(tl.where(segments < index, totals, 0.0), 0)
        shift -= tl.sum(tl.where(segments == index, own_before, 0.0), 0)
        reset = tl.max(tl.where(segments < index, resets, 0.0), 0).to(tl.int64)
        is_own = (rows >= row) & (rows < stop)
        tl.store(OUT_C + p, c + shift, mask=is_own)
        tl.store(OUT_FIRST + p, tl.maximum(_first_of_segment(first, row, start), reset), mask=is_own)


def carry_on_device(c: Tensor, first: Tensor, shards: "Shards") -> tuple[Tensor, Tensor]:
    """`Shards.accumulate` from what this rank found alone: contiguous ``[B, Hf, T]`` float64, and int64 from 1."""
    batch, gates, tokens = c.shape
    heads, own = batch * gates, len(shards.segments)
    tables, split = shards.tables(c.device), shards.split
    ends = torch.empty(split.most_segments, 2, heads, dtype=torch.float64, device=c.device)
    with torch.cuda.device_of(c):
        _ends_kernel[(own, triton.cdiv(heads, _BLOCK))](c, first, tables.segments, ends, heads, tokens, BLOCK=_BLOCK)
        found = shards.gather(ends)
        out_c, out_first = torch.empty_like(c), torch.empty_like(first)
        _carry_kernel[(heads, triton.cdiv(tokens, _BLOCK))](
            c,
            first,
            found,
            tables.segments,
            tables.slots,
            out_c,
            out_first,
            heads,
            tokens,
            len(split.segments),
            own,
            PADDED_S=triton.next_power_of_2(len(split.segments)),
            BLOCK=_BLOCK,
        )
    return out_c, out_first


@triton.jit
def _window_first_kernel(
    FIRST,
    HEADS,
    CROSSING,
    OUT,
    first_b,
    first_h,
    L,
    N,
    B,
    G,
    GROUP,
    start,
    width,
    edge,
    CHOSEN: tl.constexpr,
    LEAVES_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b, h = head // N, (head % N).to(tl.int64)
    if CHOSEN:
        h = tl.load(HEADS + h)
    first = tl.load(FIRST + b.to(tl.int64) * first_b + h * first_h + rows, mask=rows < L, other=0)
    first = tl.maximum(first - start, 0)
    if LEAVES_OUT:
        crossing = tl.load(CROSSING + h // GROUP)
        for i in range(1, B):
            crossing = tl.maximum(crossing, tl.load(CROSSING + i * G + h // GROUP))
        first = tl.where(crossing > edge, width, first)
    tl.store(OUT + head.to(tl.int64) * L + rows, first, mask=rows < L)


def window_first_on_device(
    first: Tensor, start: int, width: int, heads: Tensor | None, crossing: Tensor | None, edge: int
) -> Tensor:
    """First key of each query among those of a window, ``[B, heads, L]`` int64.

    Args:
        first: ``[B, H, L]`` int64 in tokens of the sequence.
        start, width: of the window, in tokens of the sequence.
        heads: which of them; None for all.
        crossing: ``[B, G]``, how many leading queries look beyond the segment. Query heads of which more than ``edge``
            do see nothing. None if all see.
    """
    batch, all_heads, length = first.shape
    chosen = all_heads if heads is None else len(heads)
    kv_heads = all_heads if crossing is None else crossing.shape[1]
    out = torch.empty(batch, chosen, length, dtype=torch.int64, device=first.device)
    with torch.cuda.device_of(first):
        _window_first_kernel[(batch * chosen, triton.cdiv(length, _BLOCK))](
            first,
            heads,
            crossing,
            out,
            *first.stride()[:2],
            length,
            chosen,
            batch,
            kv_heads,
            all_heads // kv_heads,
            start,
            width,
            edge,
            CHOSEN=heads is not None,
            LEAVES_OUT=crossing is not None,
            BLOCK=_BLOCK,
        )
    return out


@triton.jit
def _copy(SOURCE, TARGET, rows, is_row, columns, is_column, s_t, s_c, t_t, t_c, ADD: tl.constexpr):
    mask = is_row[:, None] & is_column[None, :]
    x = tl.load(SOURCE + rows[:, None] * s_t + columns[None, :] * s_c, mask=mask)
    p = TARGET + rows[:, None] * t_t + columns[None, :] * t_c
    if ADD:
        # Of half precision in float32, and rounded once.
        x = _sum(x, tl.load(p, mask=mask))
    tl.store(p, x, mask=mask)


@triton.jit
def _sum(x, y):
    if x.dtype == tl.float64:
        return x + y
    return (x.to(tl.float32) + y.to(tl.float32)).to(y.dtype)


@triton.jit
def _copy_kernel(
    RUNS,
    SK,
    SV,
    SC,
    TK,
    TV,
    TC,
    sk_b,
    sk_t,
    sk_h,
    sv_b,
    sv_t,
    sv_h,
    sc_b,
    sc_t,
    sc_h,
    sc_g,
    tk_b,
    tk_t,
    tk_h,
    tv_b,
    tv_t,
    tv_h,
    tc_b,
    tc_t,
    tc_h,
    tc_g,
    GATES,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_GATES: tl.constexpr,
    ROWS: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    ADD: tl.constexpr,
):
    p = RUNS + tl.program_id(0).to(tl.int64) * 7
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < tl.load(p + 6)
    s_batch, s_token, s_head = tl.load(p + SOURCE), tl.load(p + SOURCE + 1), tl.load(p + SOURCE + 2)
    t_batch, t_token, t_head = tl.load(p + TARGET), tl.load(p + TARGET + 1), tl.load(p + TARGET + 2)
    columns = tl.arange(0, PADDED_DIM)
    is_column = columns < HEAD_DIM
    _copy(
        SK + s_batch * sk_b + s_token * sk_t + s_head * sk_h,
        TK + t_batch * tk_b + t_token * tk_t + t_head * tk_h,
        rows, is_row, columns, is_column, sk_t, 1, tk_t, 1, ADD,
    )  # fmt: skip
    _copy(
        SV + s_batch * sv_b + s_token * sv_t + s_head * sv_h,
        TV + t_batch * tv_b + t_token * tv_t + t_head * tv_h,
        rows, is_row, columns, is_column, sv_t, 1, tv_t, 1, ADD,
    )  # fmt: skip
    gates = tl.arange(0, PADDED_GATES)
    _copy(
        SC + s_batch * sc_b + s_token * sc_t + s_head * sc_h,
        TC + t_batch * tc_b + t_token * tc_t + t_head * tc_h,
        rows, is_row, gates, gates < GATES, sc_t, sc_g, tc_t, tc_g, ADD,
    )  # fmt: skip


def copy_on_device(source: "Rows", target: "Rows", runs: "Runs", add: bool, back: bool) -> None:
    """`runs.copy_rows` of one run at least."""
    head_dim, gates = source.k.shape[-1], source.c.shape[-1]
    grid = (len(runs.table), triton.cdiv(int(runs.table[:, 6].max()), _COPIED_ROWS))
    with torch.cuda.device_of(source.k):
        _copy_kernel[grid](
            runs.device,
            *source,
            *target,
            *source.k.stride()[:3],
            *source.v.stride()[:3],
            *source.c.stride(),
            *target.k.stride()[:3],
            *target.v.stride()[:3],
            *target.c.stride(),
            gates,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            PADDED_GATES=triton.next_power_of_2(gates),
            ROWS=_COPIED_ROWS,
            SOURCE=3 if back else 0,
            TARGET=0 if back else 3,
            ADD=add,
        )
