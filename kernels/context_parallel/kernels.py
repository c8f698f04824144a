"""Context parallelism on Triton kernels: what takes ten to thirty operators of PyTorch is one launch each.

Attention over several ranks is launch-bound: until the host has the metadata of all ranks, little is under way. Each
function takes and returns what the function of its name in PyTorch does (`ContextBackend`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..pruning.rules import PruningRule
from ..pruning.search import Blocks, Queries, search
from ..pruning.search import join_blocks as join_in_place
from ..pruning.search import summarize as summarize_blocks
from ..tiles import PRUNED_KEYS
from .pruning import KeyBlocks, SearchedRows
from .pruning import Rows as QueryRows
from .row_copy import Rows, Runs
from .shards import Shards

_BLOCK = 1024
# Of a run, by one program.
_COPIED_ROWS = 64


@launched
@triton.jit
def _needs_kernel(
    KV_START, SEGMENTS, LEAST, CROSSING, s_b, s_h, HEADS, G, KV_GROUP, BLOCK: tl.constexpr
):  # fmt: skip
    """Of a segment and a key/value head: the least ``kv_start`` of its queries, and how many leading ones cross."""
    slot, head = tl.program_id(0), tl.program_id(1)
    p_segment = SEGMENTS + slot * 4
    row, stop, start = tl.load(p_segment), tl.load(p_segment + 1), tl.load(p_segment + 2)
    p_start = KV_START + (head // G).to(tl.int64) * s_b + (head % G * KV_GROUP).to(tl.int64) * s_h
    least = tl.zeros([BLOCK], tl.int64) + start
    crossing = tl.zeros([BLOCK], tl.int64)
    for begin in range(row, stop, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        for member in range(0, KV_GROUP):
            kv_start = tl.load(p_start + member * s_h + rows, mask=rows < stop, other=9223372036854775807)
            least = tl.minimum(least, kv_start)
            crossing = tl.maximum(crossing, tl.where(kv_start < start, rows - row + 1, 0))
    tl.store(LEAST + slot * HEADS + head, tl.min(least, 0))
    tl.store(CROSSING + slot * HEADS + head, tl.max(crossing, 0))


def find_needs(kv_start: Tensor, kv_heads: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """As `exchange.find_needs`."""
    batch, heads, _ = kv_start.shape
    own = len(shards.segments)
    least = torch.empty(shards.split.most_segments, batch, kv_heads, dtype=torch.int64, device=kv_start.device)
    crossing = torch.empty(own, batch, kv_heads, dtype=torch.int64, device=kv_start.device)
    with on_device_of(kv_start):
        _needs_kernel[(own, batch * kv_heads)](
            KV_START=kv_start, s_b=kv_start.stride(0), s_h=kv_start.stride(1),
            SEGMENTS=shards.tables(kv_start.device).segments,
            LEAST=least,
            CROSSING=crossing,
            HEADS=batch * kv_heads,
            G=kv_heads,
            KV_GROUP=heads // kv_heads,
            BLOCK=_BLOCK,
        )  # fmt: skip
    return least, crossing


@triton.jit
def _start_of_segment(kv_start, row, start):
    """From an index among this rank's tokens, counted from 1, to one of the sequence; 0 if it is of another segment."""
    kv_start += start - row - 1
    return tl.where(kv_start < start, 0, kv_start)


@launched
@triton.jit
def _ends_kernel(C, KV_START, SEGMENTS, ENDS, HEADS, T, BLOCK: tl.constexpr):
    """``c`` and ``kv_start`` at the last token of each segment of this rank, both as float64."""
    slot = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_segment = SEGMENTS + slot * 4
    row, stop, start = tl.load(p_segment), tl.load(p_segment + 1), tl.load(p_segment + 2)
    p = heads.to(tl.int64) * T + stop - 1
    kv_start = _start_of_segment(tl.load(KV_START + p, mask=heads < HEADS, other=0), row, start)
    p_ends = ENDS + 2 * slot * HEADS + heads
    tl.store(p_ends, tl.load(C + p, mask=heads < HEADS, other=0.0), mask=heads < HEADS)
    tl.store(p_ends + HEADS, kv_start.to(tl.float64), mask=heads < HEADS)


@launched
@triton.jit
def _carry_kernel(
    C,
    KV_START,
    ENDS,
    SEGMENTS,
    SLOTS,
    OUT_C,
    OUT_KV_START,
    HEADS,
    T,
    S,
    OWN,
    PADDED_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to ``c`` what all segments before have summed, and raise ``kv_start`` to the last reset in one of them."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = head.to(tl.int64) * T + rows
    c = tl.load(C + p, mask=rows < T, other=0.0)
    kv_start = tl.load(KV_START + p, mask=rows < T, other=0)
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
        tl.store(OUT_KV_START + p, tl.maximum(_start_of_segment(kv_start, row, start), reset), mask=is_own)


def carry_gates(c: Tensor, kv_start: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """As `shards.carry_gates`, of contiguous tensors."""
    batch, gates, tokens = c.shape
    heads, own = batch * gates, len(shards.segments)
    tables, split = shards.tables(c.device), shards.split
    ends = torch.empty(split.most_segments, 2, heads, dtype=torch.float64, device=c.device)
    with on_device_of(c):
        _ends_kernel[(own, triton.cdiv(heads, _BLOCK))](
            C=c, KV_START=kv_start, SEGMENTS=tables.segments, ENDS=ends, HEADS=heads, T=tokens, BLOCK=_BLOCK
        )
        found = shards.gather(ends)
        out_c, out_kv_start = torch.empty_like(c), torch.empty_like(kv_start)
        _carry_kernel[(heads, triton.cdiv(tokens, _BLOCK))](
            C=c,
            KV_START=kv_start,
            ENDS=found,
            SEGMENTS=tables.segments,
            SLOTS=tables.slots,
            OUT_C=out_c,
            OUT_KV_START=out_kv_start,
            HEADS=heads,
            T=tokens,
            S=len(split.segments),
            OWN=own,
            PADDED_S=triton.next_power_of_2(len(split.segments)),
            BLOCK=_BLOCK,
        )
    return out_c, out_kv_start


@launched
@triton.jit
def _window_kernel(
    KV_START,
    HEADS,
    CROSSING,
    OUT,
    s_b,
    s_h,
    L,
    N,
    B,
    G,
    KV_GROUP,
    start,
    width,
    halo,
    HAS_HEADS: tl.constexpr,
    HAS_CROSSING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``max(kv_start - start, 0)``, and ``width`` in rows of heads of which more than ``halo`` queries cross."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b, h = head // N, (head % N).to(tl.int64)
    if HAS_HEADS:
        h = tl.load(HEADS + h)
    kv_start = tl.load(KV_START + b.to(tl.int64) * s_b + h * s_h + rows, mask=rows < L, other=0)
    kv_start = tl.maximum(kv_start - start, 0)
    if HAS_CROSSING:
        crossing = tl.load(CROSSING + h // KV_GROUP)
        for i in range(1, B):
            crossing = tl.maximum(crossing, tl.load(CROSSING + i * G + h // KV_GROUP))
        kv_start = tl.where(crossing > halo, width, kv_start)
    tl.store(OUT + head.to(tl.int64) * L + rows, kv_start, mask=rows < L)


def window_kv_start(
    kv_start: Tensor, start: int, width: int, heads: Tensor | None, crossing: Tensor | None, halo: int
) -> Tensor:
    """As `attention.window_kv_start`."""
    batch, all_heads, length = kv_start.shape
    chosen = all_heads if heads is None else len(heads)
    kv_heads = all_heads if crossing is None else crossing.shape[1]
    out = torch.empty(batch, chosen, length, dtype=torch.int64, device=kv_start.device)
    with on_device_of(kv_start):
        _window_kernel[(batch * chosen, triton.cdiv(length, _BLOCK))](
            KV_START=kv_start, s_b=kv_start.stride(0), s_h=kv_start.stride(1),
            HEADS=heads,
            CROSSING=crossing,
            OUT=out,
            L=length,
            N=chosen,
            B=batch,
            G=kv_heads,
            KV_GROUP=all_heads // kv_heads,
            start=start,
            width=width,
            halo=halo,
            HAS_HEADS=heads is not None,
            HAS_CROSSING=crossing is not None,
            BLOCK=_BLOCK,
        )  # fmt: skip
    return out


@triton.jit
def _copy(SOURCE, TARGET, rows, is_row, columns, is_column, s_t, s_c, t_t, t_c, ADD: tl.constexpr):
    """Copy or add the rows of one tensor."""
    mask = is_row[:, None] & is_column[None, :]
    x = tl.load(SOURCE + rows[:, None] * s_t + columns[None, :] * s_c, mask=mask)
    p = TARGET + rows[:, None] * t_t + columns[None, :] * t_c
    if ADD:
        # Of half precision in float32, and rounded once.
        x = _sum(x, tl.load(p, mask=mask))
    tl.store(p, x, mask=mask)


@triton.jit
def _sum(x, y):
    """In float32 or wider, in the type of ``y``."""
    if x.dtype == tl.float64:
        return x + y
    return (x.to(tl.float32) + y.to(tl.float32)).to(y.dtype)


@launched
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
    """Copy or add some rows of a run: keys ``SK`` to ``TK``, values ``SV`` to ``TV``, running sums ``SC`` to ``TC``."""
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


def copy_rows(source: Rows, target: Rows, runs: Runs, *, add: bool = False, back: bool = False) -> None:
    """As `row_copy.copy_rows`."""
    if not len(runs.table):
        return
    head_dim, gates = source.k.shape[-1], source.c.shape[-1]
    grid = (len(runs.table), triton.cdiv(int(runs.table[:, 6].max()), _COPIED_ROWS))
    (sk, sv, sc), (tk, tv, tc) = source, target
    with on_device_of(source.k):
        _copy_kernel[grid](
            RUNS=runs.device,
            SK=sk, sk_b=sk.stride(0), sk_t=sk.stride(1), sk_h=sk.stride(2),
            SV=sv, sv_b=sv.stride(0), sv_t=sv.stride(1), sv_h=sv.stride(2),
            SC=sc, sc_b=sc.stride(0), sc_t=sc.stride(1), sc_h=sc.stride(2), sc_g=sc.stride(3),
            TK=tk, tk_b=tk.stride(0), tk_t=tk.stride(1), tk_h=tk.stride(2),
            TV=tv, tv_b=tv.stride(0), tv_t=tv.stride(1), tv_h=tv.stride(2),
            TC=tc, tc_b=tc.stride(0), tc_t=tc.stride(1), tc_h=tc.stride(2), tc_g=tc.stride(3),
            GATES=gates,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            PADDED_GATES=triton.next_power_of_2(gates),
            ROWS=_COPIED_ROWS,
            SOURCE=3 if back else 0,
            TARGET=0 if back else 3,
            ADD=add,
        )  # fmt: skip


def summarize(
    q: Tensor, k: Tensor, c_k: Tensor, scale: float, sink: Tensor | None, shards: Shards
) -> tuple[QueryRows, Tensor]:
    """As `pruning.summarize`."""
    batch, gates, tokens = c_k.shape
    kv_heads, blocks = k.shape[2], -(-tokens // PRUNED_KEYS)
    packed = torch.empty(batch * (2 * gates + kv_heads), blocks, dtype=torch.float64, device=q.device)
    decays, largest = packed.split([2 * batch * gates, batch * kv_heads])
    end, log_sum = decays.view(2, batch, gates, blocks).unbind()
    out = Blocks(end, log_sum, largest)
    norm, diagonal, _ = summarize_blocks(q, k, c_k, shards.tables(q.device).tokens, scale, sink, out)
    return QueryRows(norm, diagonal), packed


def join_blocks(blocks: KeyBlocks) -> KeyBlocks:
    """As `pruning.join_blocks`, in place, for `search_blocks`."""
    join_in_place(Blocks(*blocks))
    return blocks


def search_blocks(
    rule: PruningRule,
    rows: SearchedRows,
    joined: KeyBlocks,
    shards: Shards,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    """As `pruning.search_blocks`."""
    norm, diagonal = (x.contiguous() for x in rows.bounds)
    queries = Queries(rows.c, rows.kv_start, rows.last, norm, diagonal, rows.diagonal_block)
    blocks = Blocks(*joined, shards.tables(rows.c.device).block_starts)
    return search(rule, queries, blocks, rows.kv_start.shape[1], joined.largest.shape[1], log_eps, logit_bound)
