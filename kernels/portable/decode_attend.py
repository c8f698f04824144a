"""Decoding, second launch, in Triton: attention over the blocks of keys that `decode_search` found.

All blocks of all key/value heads are one list, which is cut into equal shares, one for each of a fixed number of
programs (split-KV decoding): a head that must read more gets more of them. For each head in its share a program writes
an unnormalized *partial result*; the last program to finish with a head merges them in the order of their keys, so
results are bitwise deterministic.

Names are those of `triton_common`; a tile's *rows* are the ``R = KV_GROUP * TQ`` queries of a key/value head's query
heads, padded to ``BLOCK_R``. One row alone has no use for the matrix units (``IS_DOT`` is false): every key of a tile
then has a running maximum and an output of its own, which are only merged at the end.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import multiprocessors_of
from ..tiles import next_power_of_2, padded_head_dim
from ..triton_common import INF, LN_2, LOG2_E, dot_precision, load_rows, overlapping, wait_for_inputs
from .decode_search import KEY_BLOCK, DecodeInputs, decode_kernel

# Heads whose numbers of blocks are summed at a time: one compilation for all batches.
_SCAN = 128
# Programs where there are no multiprocessors to count.
_INTERPRETED_PROGRAMS = 5


class DecodeTile(NamedTuple):
    """Shape and resources of `_decode_attend_kernel`.

    Attributes:
        dot: whether matmuls run on matrix units; must be if there is more than one row.
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


@functools.cache
def choose_decode_tile(rows: int, head_dim: int, dtype: torch.dtype) -> DecodeTile:
    """What fits any GPU from compute capability 8.0: 4,096 elements of keys, and as many of values. Tuned on an H100.

    Args:
        rows: queries times query heads of a key/value head.
        head_dim: size of a head.
        dtype: of queries and keys.
    """
    keys = 4096 // max(64, padded_head_dim(head_dim))
    if rows == 1:
        return DecodeTile(dot=False, keys=keys, warps=4, stages=1, programs=4, registers=128)
    # Three stages of float32 are more than the shared memory of an A10 or L4.
    return DecodeTile(dot=True, keys=keys, warps=4, stages=3 if dtype.itemsize < 4 else 2, programs=2, registers=None)


@triton.jit
def _merge_partials(
    PARTIALS, STATISTICS, slot, count, R, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, MERGED: tl.constexpr
):
    """Maximum, sum of weights and output of the rows over ``count`` partial results from ``slot`` on."""
    o_r, o_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_R], -INF, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    b_o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(0, count, MERGED):
        o_p = begin + tl.arange(0, MERGED)
        m_p = (o_p < count)[:, None] & (o_r < R)[None, :]
        row = (slot + o_p).to(tl.int64)[:, None] * R + o_r[None, :]
        # From the L2 cache: other multiprocessors wrote them.
        maxima = tl.load(STATISTICS + 2 * row, mask=m_p, other=-INF, cache_modifier=".cg")
        totals = tl.load(STATISTICS + 2 * row + 1, mask=m_p, other=0.0, cache_modifier=".cg")
        p_outs = PARTIALS + row[:, :, None] * BLOCK_D + o_d[None, None, :]
        outs = tl.load(p_outs, mask=m_p[:, :, None], other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
        weights = tl.exp2(maxima - shift[None, :])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(totals * weights, 0)
        b_o = b_o * rescale[:, None] + tl.sum(outs * weights[:, :, None], 0)
        maximum = new_maximum
    return maximum, total, b_o


@decode_kernel
def _decode_attend_kernel(
    Q, K, V, C_Q, C_K, KV_START, LAST, REAL, PAGES, RANGES, PARTIALS, OUT, LSE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, cq_b, cq_h, ck_b, ck_h, s_b, s_h, real_b, last_b,
    pages_b,
    scale, KV_HEADS, TQ, H, HF, G, START_HEADS, PAGE_GATES,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    IS_DOT: tl.constexpr,
    IS_ONE_GATE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    MERGED: tl.constexpr,
    SHARES_PAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A program's share of the blocks; arguments as in `attend_blocks`, ``KV_HEADS`` is ``B * G``.

    ``PARTIALS`` holds a slot for each program and head, ``[slots, R, BLOCK_D]`` float32, and after these the maxima
    and sums of weights, ``[slots, R, 2]``.
    """
    wait_for_inputs(OVERLAPS)
    KV_GROUP = H // G
    R = KV_GROUP * TQ
    programs = tl.num_programs(0)
    STATISTICS = PARTIALS + (programs + KV_HEADS).to(tl.int64) * R * BLOCK_D
    o_head = tl.arange(0, SCAN)
    blocks = 0
    for begin in range(0, KV_HEADS, SCAN):
        blocks += tl.sum(tl.load(RANGES + KV_HEADS + begin + o_head, mask=begin + o_head < KV_HEADS, other=0), 0)
    share = tl.cdiv(blocks, programs)
    position = tl.program_id(0) * share
    stop = tl.minimum(position + share, blocks)

    # The head at `position`, whose blocks begin at `head_begin`.
    i_bg, head_begin, before = 0, 0, 0
    for begin in range(0, KV_HEADS, SCAN):
        m_head = begin + o_head < KV_HEADS
        ends = before + tl.cumsum(tl.load(RANGES + KV_HEADS + begin + o_head, mask=m_head, other=0), 0)
        is_passed = m_head & (ends <= position)
        i_bg += tl.sum(is_passed.to(tl.int32), 0)
        head_begin = tl.maximum(head_begin, tl.max(tl.where(is_passed, ends, 0), 0))
        before = tl.max(ends, 0)

    o_d = tl.arange(0, BLOCK_D)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    o_q = o_r % TQ
    while position < stop:
        p_range = RANGES + i_bg
        head_end = head_begin + tl.load(p_range + KV_HEADS)
        segment_end = tl.minimum(stop, head_end)
        first_block = tl.load(p_range) - head_begin
        n_begin, n_end = (first_block + position) * KEY_BLOCK, (first_block + segment_end) * KEY_BLOCK
        first_key, last_key = tl.load(p_range + 3 * KV_HEADS), tl.load(p_range + 4 * KV_HEADS)

        i_b, i_g = tl.cast(i_bg // G, tl.int64), i_bg % G
        i_h = i_g * KV_GROUP + o_r // TQ
        i_gate = i_h // (H // HF)
        p_q = Q + i_b * q_b + o_q.to(tl.int64) * q_t + i_h.to(tl.int64) * q_h
        m_q = m_r[:, None] & (o_d[None, :] < D)
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
        c_q = tl.load(C_Q + i_b * cq_b + i_gate.to(tl.int64) * cq_h + o_q, mask=m_r, other=0.0) * LOG2_E
        p_start = KV_START + i_b * s_b + (i_h // (H // START_HEADS)).to(tl.int64) * s_h + o_q
        kv_start = tl.load(p_start, mask=m_r, other=1).to(tl.int32)
        last = tl.load(LAST + i_b * last_b + o_q, mask=m_r, other=0).to(tl.int32)
        if PAGES is None:
            p_k, p_v = K + i_b * k_b + i_g.to(tl.int64) * k_h, V + i_b * v_b + i_g.to(tl.int64) * v_h
            p_ck = C_K + i_b * ck_b
        else:
            p_k, p_v, p_ck = K, V, C_K
            if SHARES_PAGES:
                p_k, p_v = K + i_g.to(tl.int64) * k_h, V + i_g.to(tl.int64) * v_h
            else:
                i_gate = o_r // TQ * PAGE_GATES // KV_GROUP
            # Each page is looked up a tile ahead: what is read of it waits for that.
            p_page = PAGES + (i_b if SHARES_PAGES else tl.cast(i_bg, tl.int64)) * pages_b
            next_page = tl.load(p_page + n_begin // KEY_BLOCK)
        if IS_ONE_GATE:
            p_ck += tl.min(i_gate, 0).to(tl.int64) * ck_h
        # Keys from kv_start on that a row may attend to, compared as unsigned: those before are large values.
        visible_keys = tl.maximum(last - kv_start + 1, 0).to(tl.uint32)

        if IS_DOT:
            maximum = tl.full([BLOCK_R], -INF, tl.float32)
            total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            b_o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        else:
            b_q_row = tl.sum(b_q.to(tl.float32), 0) * (scale * LOG2_E)
            maximum = tl.full([BLOCK_N], -INF, tl.float32)
            total = tl.zeros([BLOCK_N], tl.float32)
            b_o = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for n in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = (o_n >= first_key) & (o_n <= last_key) & (o_n < n_end)
            if PAGES is None:
                m_k, o_k = m_n, o_n
                p_k_tile, p_v_tile, p_ck_tile = p_k, p_v, p_ck
            else:
                page = next_page
                next_page = tl.load(p_page + (n + BLOCK_N) // KEY_BLOCK, mask=n + BLOCK_N < n_end, other=0)
                m_k, o_k = m_n & (page >= 0), o_n % KEY_BLOCK
                p_k_tile, p_v_tile = p_k + page.to(tl.int64) * k_b, p_v + page.to(tl.int64) * v_b
                p_ck_tile = p_ck + page.to(tl.int64) * ck_b
            b_k = load_rows(p_k_tile, o_k, k_t, m_k, D, BLOCK_D, True)
            b_v = load_rows(p_v_tile, o_k, v_t, m_k, D, BLOCK_D, True)
            if IS_ONE_GATE:
                c_k = tl.load(p_ck_tile + o_k, mask=m_k, other=INF)[None, :]
            else:
                p_ck_rows = p_ck_tile + i_gate.to(tl.int64)[:, None] * ck_h + o_k[None, :]
                c_k = tl.load(p_ck_rows, mask=m_r[:, None] & m_k[None, :], other=INF)
            bias = (c_q[:, None] - c_k * LOG2_E).to(tl.float32)
            if PAGES is not None:
                # A missing page must not pass for a result.
                bias = tl.where(m_n[None, :] & (page < 0), float("nan"), bias)
            if REAL is not None:
                is_real = tl.load(REAL + i_b * real_b + o_n, mask=m_n, other=0) != 0
                b_v = tl.where(is_real[:, None], b_v, 0.0)
            if IS_DOT:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E) + bias
                if IS_MASKED:
                    m_s = (o_n[None, :] - kv_start[:, None]).to(tl.uint32) < visible_keys[:, None]
                    b_s = tl.where(m_s, b_s, -INF)
                if REAL is not None:
                    b_s = tl.where(is_real[None, :], b_s, -INF)
                new_maximum = tl.maximum(maximum, tl.max(b_s, 1))
                # A row without a visible key so far: any finite shift leaves its weights at zero.
                shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
                b_p = tl.exp2(b_s - shift[:, None])
                rescale = tl.exp2(maximum - shift)
                # A sum for every key of a tile: to add them up now would make the warps wait for each other.
                total = total * rescale[:, None] + b_p
                b_o = b_o * rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
            else:
                b_s = tl.sum(b_k.to(tl.float32) * b_q_row[None, :], 1) + tl.sum(bias, 0)
                if REAL is not None:
                    b_s = tl.where(is_real, b_s, -INF)
                new_maximum = tl.maximum(maximum, b_s)
                shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
                b_p = tl.exp2(b_s - shift)
                rescale = tl.exp2(maximum - shift)
                total = total * rescale + b_p
                b_o = b_o * rescale[:, None] + b_p[:, None] * b_v.to(tl.float32)
            maximum = new_maximum

        if IS_DOT:
            row_maximum, row_total, row_out = maximum, tl.sum(total, 1), b_o
        else:
            largest = tl.max(maximum, 0)
            weights = tl.exp2(maximum - tl.where(largest == -INF, 0.0, largest))
            row_maximum = tl.zeros([BLOCK_R], tl.float32) + largest
            row_total = tl.zeros([BLOCK_R], tl.float32) + tl.sum(total * weights, 0)
            row_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32) + tl.sum(b_o * weights[:, None], 0)[None, :]

        # Programs with blocks of this head. A step to the next program or head is one to the next slot.
        first_program = head_begin // share
        count = (head_end - 1) // share - first_program + 1
        finished = 0
        if count > 1:
            row = (tl.program_id(0) + i_bg).to(tl.int64) * R + o_r
            tl.store(STATISTICS + 2 * row, row_maximum, mask=m_r)
            tl.store(STATISTICS + 2 * row + 1, row_total, mask=m_r)
            tl.store(PARTIALS + row[:, None] * BLOCK_D + o_d[None, :], row_out, mask=m_r[:, None])
            # All writes of the program come before its arrival.
            tl.debug_barrier()
            finished = tl.atomic_add(p_range + 2 * KV_HEADS, 1, sem="acq_rel")
            if finished == count - 1:
                row_maximum, row_total, row_out = _merge_partials(
                    PARTIALS, STATISTICS, first_program + i_bg, count, R, BLOCK_D, BLOCK_R, MERGED
                )
        if finished == count - 1:
            row_out = row_out / tl.where(row_total == 0.0, 1.0, row_total)[:, None]
            p_out = OUT + ((i_b * TQ + o_q) * H + i_h)[:, None] * D + o_d[None, :]
            tl.store(p_out, row_out.to(OUT.dtype.element_ty), mask=m_q)
            tl.store(LSE + (i_b * H + i_h) * TQ + o_q, (row_maximum + tl.log2(row_total)) * LN_2, mask=m_r)
        position, head_begin = segment_end, head_end
        i_bg += 1


def attend_blocks(
    inputs: DecodeInputs, ranges: Tensor, out: Tensor, lse: Tensor, scale: float, tile: DecodeTile
) -> None:
    """Attention over ``ranges``, of `search_blocks`.

    Args:
        inputs: queries and cache.
        ranges: ``[5, B * G]`` int32; its third row counts programs.
        out: ``[B, Tq, H, D]`` in the dtype of the queries, is written.
        lse: ``[B, H, Tq]`` float32, is written.
        scale: multiplies ``q . k``.
        tile: shape and resources of a program.
    """
    q, k, v, real = inputs.q, inputs.k, inputs.v, inputs.real
    batch, queries, heads, head_dim = q.shape
    kv_heads, gates, start_heads = inputs.kv_heads, inputs.c_q.shape[1], inputs.kv_start.shape[1]
    blocks, rows = inputs.blocks, heads // kv_heads * queries
    kv_total, padded_dim = batch * kv_heads, padded_head_dim(head_dim)
    padded_rows = next_power_of_2(rows)
    padded_rows = max(16, padded_rows) if tile.dot else padded_rows
    processors = multiprocessors_of(q)
    programs = _INTERPRETED_PROGRAMS if processors is None else processors * tile.programs
    programs = min(programs, kv_total * blocks)
    slots = programs + kv_total
    partials = torch.empty(slots * rows * (padded_dim + 2), dtype=torch.float32, device=q.device)
    k_b, k_t, k_h = inputs.kv_strides(k)
    v_b, v_t, v_h = inputs.kv_strides(v)
    _decode_attend_kernel[(programs,)](
        Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
        K=k, k_b=k_b, k_t=k_t, k_h=k_h,
        V=v, v_b=v_b, v_t=v_t, v_h=v_h,
        C_Q=inputs.c_q, cq_b=inputs.c_q.stride(0), cq_h=inputs.c_q.stride(1),
        C_K=inputs.c_k, ck_b=inputs.c_k.stride(0), ck_h=inputs.c_k.stride(1),
        KV_START=inputs.kv_start, s_b=inputs.kv_start.stride(0), s_h=inputs.kv_start.stride(1),
        LAST=inputs.last, last_b=inputs.last_stride,
        REAL=real, real_b=0 if real is None else real.stride(0),
        PAGES=inputs.pages, pages_b=inputs.pages_stride,
        RANGES=ranges,
        PARTIALS=partials,
        OUT=out,
        LSE=lse,
        scale=scale,
        KV_HEADS=kv_total,
        TQ=queries,
        H=heads,
        HF=gates,
        G=kv_heads,
        START_HEADS=start_heads,
        PAGE_GATES=max(1, gates // kv_heads),
        D=head_dim,
        BLOCK_D=padded_dim,
        BLOCK_R=padded_rows,
        BLOCK_N=tile.keys,
        STAGES=tile.stages,
        IS_DOT=tile.dot,
        IS_ONE_GATE=gates <= kv_heads or heads == kv_heads,
        IS_MASKED=queries > 1 or (start_heads > kv_heads and heads > kv_heads),
        PRECISION=dot_precision(q),
        SCAN=_SCAN,
        MERGED=max(1, min(32, 1024 * tile.warps // (padded_rows * padded_dim))),
        SHARES_PAGES=inputs.shares_pages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        **overlapping(q),
    )  # fmt: skip
