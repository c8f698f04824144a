"""What pruning knows of the keys of a chunk, a `KeySummary`, in Triton: each block of new ones, then all joined.

The first is a launch of its own here, and part of the kernel of `paged_chunk` that reads pages; blocks are joined by
one kernel for both. Names are those of `triton_common`; ``PAST`` tokens are held, ``R`` gates belong to a head. Blocks
are those of 64 tokens of the whole sequence, of which the first that a chunk touches may be half full.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..launches.replay import replayed
from ..operators import may_launch, maybe_contiguous
from ..pruning.key_stats import KeySummary, Running
from ..pruning.key_stats import extend_summary as extend_summary_in_pytorch
from ..pruning.predicates import lengths, may_drop, raised
from ..tiles import PRUNED_KEYS, cdiv, padded_head_dim
from ..triton_common import INF, larger, load_rows

_PAGE = tl.constexpr(PRUNED_KEYS)
# Blocks that a program joins, or looks at, at a time.
JOINED_BLOCKS = 128
# One compilation serves all lengths and caches.
CHUNK_SIZES = [
    "PAST", "LENGTH", "N", "TOKEN", "BLOCKS", "d_b", "d_h", "l_b", "l_h", "k_b", "k_h", "v_b", "v_h",
    "c_b", "c_h", "f_b", "f_h", "ks_b", "vs_b",
]  # fmt: skip
CHUNK_PARTS = [
    "K", "V", "C", "OUT_K", "OUT_V", "OUT_C", "PAGES", "START", "FIRST", "OUT_FIRST", "C_RING", "FIRST_RING",
    "KEY_STATES", "VALUE_STATES",
]  # fmt: skip


@triton.jit
def summarize_keys(BLOCK_LARGEST, i_bg, i_block, b_new, m_new, PAST, N):
    """The largest length of the new keys of a block, ``[64, D]``."""
    is_touched = i_block * _PAGE + _PAGE > PAST
    tl.store(BLOCK_LARGEST + i_bg * N + i_block, tl.max(tl.where(m_new, lengths(b_new.to(tl.float32)), 0.0), 0),
             mask=is_touched)  # fmt: skip


@triton.jit
def summarize_gate(BLOCK_C, BLOCK_DECAYS, p_block, i_block, c, PAST):
    """The last running sum of a block's new tokens, and ``log sum exp(-c)``; ``c`` is infinite for others."""
    is_touched = i_block * _PAGE + _PAGE > PAST
    # Running sums never rise, so the last is the least, and its term the greatest.
    least = tl.min(c, 0)
    least = tl.where(least == INF, 0.0, least)
    log_sum = tl.log(tl.sum(tl.exp(least - c), 0)) - least
    tl.store(BLOCK_C + p_block, least, mask=is_touched)
    tl.store(BLOCK_DECAYS + p_block, log_sum, mask=is_touched)


@launched
@triton.jit(do_not_specialize=CHUNK_SIZES, do_not_specialize_on_alignment=CHUNK_PARTS)
def _summarize_chunk_kernel(
    K, C, BLOCK_C, BLOCK_DECAYS, BLOCK_LARGEST, k_b, k_t, k_h, c_b, c_h, PAST, LENGTH, G, HF, N,
    R: tl.constexpr,
    GATE_STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `paged_chunk._read_chunk_kernel` finds of a block of new tokens, without pages."""
    i_bg, i_block = tl.program_id(0), tl.program_id(1) + PAST // _PAGE
    i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
    o_t = i_block * _PAGE + tl.arange(0, _PAGE)
    m_new = (o_t >= PAST) & (o_t < LENGTH)
    b_new = load_rows(K + i_b * k_b + i_g.to(tl.int64) * k_h, o_t - PAST, k_t, m_new, D, BLOCK_D, True)
    summarize_keys(BLOCK_LARGEST, i_bg, i_block, b_new, m_new, PAST, N)
    for r in range(0, R):
        i_gate = i_g * GATE_STEP + r
        c = tl.load(C + i_b * c_b + i_gate * c_h + o_t - PAST, mask=m_new, other=INF)
        summarize_gate(BLOCK_C, BLOCK_DECAYS, (i_b * HF + i_gate) * N + i_block, i_block, c, PAST)


@triton.jit
def _log_add_exp(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return tl.where(low == -INF, high, high + tl.log(1.0 + tl.exp(low - high)))


@launched
@triton.jit(do_not_specialize=CHUNK_SIZES, do_not_specialize_on_alignment=CHUNK_PARTS)
def join_chunk_kernel(
    BLOCK_C, BLOCK_DECAYS, BLOCK_LARGEST, DECAYS, LARGEST, NEW_DECAYS, NEW_LARGEST, C, NORM, DIAGONAL, START,
    d_b, d_h, l_b, l_h, c_b, c_h, log_eps, c_margin, bound_margin, PAST, LENGTH, TOKEN, BLOCKS, G, HF, N,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    GATE_STEP: tl.constexpr,
    KV_GROUP: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the blocks that a chunk touches with all before, and find the first that a later query may need.

    A program has ``HEADS`` key/value heads with all gates of theirs: whoever reads a value is the one who writes it.
    """
    first, last = PAST // _PAGE, (LENGTH - 1) // _PAGE
    for i_bg in range(tl.program_id(0) * HEADS, (tl.program_id(0) + 1) * HEADS):
        i_b, i_g = i_bg // G, i_bg % G
        longest = tl.zeros([BLOCK], tl.float32) + tl.load(LARGEST + i_b * l_b + i_g * l_h)
        for begin in range(first, last + 1, BLOCK):
            blocks = begin + tl.arange(0, BLOCK)
            p = BLOCK_LARGEST + i_bg * N + blocks
            found = tl.associative_scan(tl.load(p, mask=blocks <= last, other=0.0), 0, larger)
            found = tl.maximum(found, longest)
            tl.store(p, found, mask=blocks <= last)
            longest = tl.max(found, 0) + tl.zeros([BLOCK], tl.float32)
        tl.store(NEW_LARGEST + i_bg, tl.max(longest, 0))
        for r in range(0, R):
            # A gate that all heads share is joined once.
            if (i_g == 0) | (GATE_STEP > 0):
                row = i_b * HF + i_g * GATE_STEP + r
                p_total = DECAYS + i_b * d_b + (i_g * GATE_STEP + r) * d_h
                total = tl.zeros([BLOCK], tl.float64) + tl.load(p_total)
                for begin in range(first, last + 1, BLOCK):
                    blocks = begin + tl.arange(0, BLOCK)
                    p = BLOCK_DECAYS + row * N + blocks
                    sums = tl.associative_scan(tl.load(p, mask=blocks <= last, other=-INF), 0, _log_add_exp)
                    sums = _log_add_exp(sums, total)
                    tl.store(p, sums, mask=blocks <= last)
                    # They never fall.
                    total = tl.max(sums, 0) + tl.zeros([BLOCK], tl.float64)
                tl.store(NEW_DECAYS + row, tl.max(total, 0))
        if START is not None:
            # What other threads of the program have stored is read.
            tl.debug_barrier()
            start = BLOCKS
            for i_h in range(i_g * KV_GROUP, (i_g + 1) * KV_GROUP):
                r = (i_h - i_g * KV_GROUP) // (KV_GROUP // R)
                i_gate = i_g * GATE_STEP + r
                row = i_b * HF + i_gate
                c = raised(tl.load(C + i_b.to(tl.int64) * c_b + i_gate * c_h + TOKEN), c_margin)
                norm, diagonal = tl.load(NORM + i_h), tl.load(DIAGONAL + i_h)
                for begin in range(0, BLOCKS, BLOCK):
                    blocks = begin + tl.arange(0, BLOCK)
                    m = blocks < BLOCKS
                    decay = c - tl.load(BLOCK_C + row * N + blocks, mask=m, other=0.0)
                    log_decays = c + tl.load(BLOCK_DECAYS + row * N + blocks, mask=m, other=0.0)
                    largest = tl.load(BLOCK_LARGEST + i_bg * N + blocks, mask=m, other=0.0).to(tl.float64)
                    may = may_drop(RULE, norm, diagonal, -diagonal, bound_margin, decay, log_decays, largest, log_eps)
                    start = tl.minimum(start, tl.min(tl.where(m & (may == 0), blocks, BLOCKS), 0))
            tl.store(START + i_bg, start)


def extend_summary(summary: KeySummary, running: Running, c: Tensor, k: Tensor, position: int | Tensor) -> Running:
    """As `key_stats.extend_summary`, which itself runs for few tokens and where the host does not know the position."""
    gates, kv_heads = c.shape[1], k.shape[1]
    fits = isinstance(position, int) and c.shape[-1] >= PRUNED_KEYS and (gates == 1 or gates % kv_heads == 0)
    if not fits or not may_launch(c, k) or not all(x.is_contiguous() for x in summary):
        return extend_summary_in_pytorch(summary, running, c, k, position)
    return _launch_summary(summary, running, c, k, position)


@replayed
def _launch_summary(summary: KeySummary, running: Running, c: Tensor, k: Tensor, position: int) -> Running:
    k, c = maybe_contiguous(k), maybe_contiguous(c)
    (batch, kv_heads, tokens, head_dim), gates = k.shape, c.shape[1]
    rows = 1 if gates == 1 else gates // kv_heads
    statistics = dict(BLOCK_C=summary.c, BLOCK_DECAYS=summary.log_decays, BLOCK_LARGEST=summary.largest)
    log_decays, largest = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in running)
    shapes = dict(
        PAST=position,
        LENGTH=position + tokens,
        G=kv_heads,
        HF=gates,
        N=summary.c.shape[-1],
        R=rows,
        GATE_STEP=rows if gates > 1 else 0,
    )
    touched = cdiv(position + tokens, PRUNED_KEYS) - position // PRUNED_KEYS
    with on_device_of(k):
        _summarize_chunk_kernel[(batch * kv_heads, touched)](
            K=k, k_b=k.stride(0), k_t=k.stride(2), k_h=k.stride(1),
            C=c, c_b=c.stride(0), c_h=c.stride(1),
            **statistics,
            **shapes,
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
        )  # fmt: skip
        join_chunk_kernel[(batch if gates == 1 else batch * kv_heads,)](
            **statistics,
            DECAYS=running[0], d_b=running[0].stride(0), d_h=running[0].stride(1),
            LARGEST=running[1], l_b=running[1].stride(0), l_h=running[1].stride(1),
            NEW_DECAYS=log_decays,
            NEW_LARGEST=largest,
            C=c, c_b=0, c_h=0,
            NORM=None,
            DIAGONAL=None,
            START=None,
            log_eps=0.0,
            c_margin=0.0,
            bound_margin=0.0,
            **shapes,
            TOKEN=0,
            BLOCKS=0,
            HEADS=kv_heads if gates == 1 else 1,
            KV_GROUP=1,
            RULE="tight",
            BLOCK=JOINED_BLOCKS,
        )  # fmt: skip
    return log_decays, largest
