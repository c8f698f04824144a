"""Decoding, first launch, in Triton: which blocks of keys each key/value head must read (names: `triton_common`).

A program handles one key/value head. Its *rows* are the ``R = KV_GROUP * TQ`` queries of its query heads, padded to
``BLOCK_R``. Each row searches for the last block boundary before which the pruning rule (`pruning.rules`) lets it drop
all keys, ``BLOCK_BOUNDARIES`` candidates at a time, by what the `KeySummary` holds; the head reads what any of its rows
must. Its blocks are those of pruning, 64 keys, as are the pages of a paged cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches.launch import launched
from ..pruning.key_stats import KeySummary
from ..pruning.predicates import lengths, log_add, may_drop, raised, sink_bound
from ..pruning.rounding import decay_margin, logit_margin
from ..tiles import PRUNED_KEYS, cdiv, next_power_of_2, padded_head_dim
from ..triton_common import INF, INT32_MAX, PARTS_OF_TENSORS, VARYING_SIZES, overlapping, wait_for_inputs

KEY_BLOCK = tl.constexpr(PRUNED_KEYS)
# Boundaries that one step of the search looks at, for all rows together.
_CANDIDATES = 256


def decode_kernel(function: Callable[..., Any]) -> Any:
    """As `triton_common.kernel`, but for one query, the usual case, divisions by their number go."""
    varying = [x for x in VARYING_SIZES if x != "TQ"]
    compiled = triton.jit(do_not_specialize=varying, do_not_specialize_on_alignment=PARTS_OF_TENSORS)
    return launched(compiled(function))


class DecodeInputs(NamedTuple):
    """What both launches read; as the arguments of `decode_attention` of the same names.

    Attributes:
        q: ``[B, Tq, H, D]``.
        k, v: ``[B, Tk, G, D]``, or pools of pages: ``[P, 64, D]``, or ``[P, G, 64, D]`` if heads share them.
        c_q: ``[B, Hf, Tq]`` float64.
        c_k: ``[B, Hf, Tk]`` float64, or ``[P, max(1, Hf / G), 64]``, or ``[P, Hf, 64]`` if heads share pages.
        kv_start: ``[B, H or Hf or 1, Tq]`` int64.
        last: ``[Tq]`` int64, or ``[B, Tq]``.
        real: ``[B, Tk]`` bool or None.
        pages: int32 or None: contiguous ``[B, G, N]``, or ``[B, N]`` if heads share them.
        start: ``[B, G]`` int32 or None.
        counts: ``[2]`` int64 or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    c_q: Tensor
    c_k: Tensor
    kv_start: Tensor
    last: Tensor
    real: Tensor | None
    pages: Tensor | None
    start: Tensor | None
    counts: Tensor | None = None

    @property
    def shares_pages(self) -> bool:
        return self.pages is not None and self.pages.ndim == 2

    @property
    def kv_heads(self) -> int:
        if self.pages is None:
            return self.k.shape[2]
        return self.k.shape[1] if self.shares_pages else self.pages.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of 64 keys of a head."""
        return cdiv(self.k.shape[1], PRUNED_KEYS) if self.pages is None else self.pages.shape[-1]

    @property
    def pages_stride(self) -> int:
        """Of the table, from one sequence or head to the next."""
        return 0 if self.pages is None else self.pages.stride(-2)

    @property
    def last_stride(self) -> int:
        """Of ``last``, from one sequence to the next."""
        return 0 if self.last.ndim == 1 else self.last.stride(0)

    @property
    def rows(self) -> int:
        """Queries times query heads of a key/value head."""
        return self.q.shape[2] // self.kv_heads * self.q.shape[1]

    def kv_strides(self, x: Tensor) -> tuple[int, int, int]:
        """Strides of ``k`` or ``v``: of a sequence or page, a token, a head."""
        if self.shares_pages:
            return x.stride(0), x.stride(2), x.stride(1)
        return (x.stride(0), x.stride(1), x.stride(2) if self.pages is None else 0)


class DecodePruning(NamedTuple):
    """The pruning rule of `search_blocks`.

    Attributes:
        rule: value of the `PruningRule`; None prunes nothing.
        log_eps: of `pruning.rounding.log_allowed`.
        bound: ``U`` of ``paper``, unless there are ``bounds``.
        bounds: ``[B, H]``, ``U`` of each head.
        summary: of the keys; None without a rule. If heads share pages, of each page: ``[P, Hf or G, 1]``.
        sink: contiguous ``[G, D]`` key of an attention sink, or None.
    """

    rule: str | None
    log_eps: float
    bound: float
    bounds: Tensor | None
    summary: KeySummary | None
    sink: Tensor | None = None


@decode_kernel
def _decode_search_kernel(
    Q, K, C_Q, KV_START, LAST, PAGES, HELD_FROM, C, LOG_DECAYS, LARGEST, BOUND, SINK, RANGES,
    COUNTS,
    q_b, q_t, q_h, k_b, k_t, k_h, cq_b, cq_h, s_b, s_h, c_b, c_h, decays_b, decays_h, largest_b, largest_h, bound_b,
    bound_h, last_b, pages_b,
    scale, bound, log_eps, margin, c_margin, bound_margin, TQ, H, HF, G, START_HEADS, STEPS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_BOUNDARIES: tl.constexpr,
    RULE: tl.constexpr,
    SHARES_PAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """What `search_blocks` returns, of one key/value head. ``C``, ``LOG_DECAYS``, ``LARGEST`` are a `KeySummary`."""
    wait_for_inputs(OVERLAPS)
    i_bg, heads = tl.program_id(0), tl.num_programs(0)
    i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < H // G * TQ
    i_h, o_q = i_g * (H // G) + o_r // TQ, o_r % TQ
    p_start = KV_START + i_b * s_b + (i_h // (H // START_HEADS)).to(tl.int64) * s_h + o_q
    kv_start = tl.load(p_start, mask=m_r, other=1).to(tl.int32)
    last = tl.load(LAST + i_b * last_b + o_q, mask=m_r, other=0).to(tl.int32)
    if PAGES is not None:
        p_page = PAGES + (i_b if SHARES_PAGES else i_bg.to(tl.int64)) * pages_b
    # Whether a row is not fully masked.
    attends = m_r & (kv_start <= last)
    first_block = kv_start // KEY_BLOCK

    if RULE is not None:
        i_gate = i_h // (H // HF)
        c = raised(tl.load(C_Q + i_b * cq_b + i_gate.to(tl.int64) * cq_h + o_q, mask=m_r, other=0.0), c_margin)
        p_c = C + i_gate.to(tl.int64) * c_h
        norm = None
        diagonal_logit = None
        if RULE == "paper":
            if BOUND is not None:
                bound = tl.load(BOUND + i_b * bound_b + i_h.to(tl.int64) * bound_h, mask=m_r, other=0.0)
            keys = (last + 1).to(tl.float32).to(tl.float64)
            log_eps = (log_eps - tl.log(keys))[:, None]
            bound = (bound + tl.zeros([BLOCK_R], tl.float64))[:, None]
        else:
            o_d = tl.arange(0, BLOCK_D)
            m_d = o_d[None, :] < D
            p_q = Q + i_b * q_b + o_q.to(tl.int64) * q_t + i_h.to(tl.int64) * q_h
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0).to(tl.float64)
            if PAGES is None:
                p_k = K + i_b * k_b + i_g.to(tl.int64) * k_h + last.to(tl.int64) * k_t
                is_held = attends
            else:
                page = tl.load(p_page + last // KEY_BLOCK, mask=attends, other=-1)
                p_k = K + page.to(tl.int64) * k_b + (last % KEY_BLOCK).to(tl.int64) * k_t + i_g.to(tl.int64) * k_h
                is_held = page >= 0
            b_k = tl.load(p_k[:, None] + o_d[None, :], mask=is_held[:, None] & m_d, other=0.0).to(tl.float64)
            # As `query_bounds`, but these sums are float64, off by less than 1e-4 up to logits of 1e10: what counts is
            # how `scale` is rounded. The length of the key would cost as much as all the rest here.
            diagonal_logit = tl.sum(b_q * b_k, 1) * scale
            diagonal_logit -= margin * tl.abs(diagonal_logit)
            norm = lengths(b_q) * (1.0 + margin) * tl.abs(scale)
            if SINK is not None:
                of_sink = sink_bound(b_q, SINK + i_g.to(tl.int64) * D, norm, scale, margin, D, BLOCK_D)
                diagonal_logit = log_add(diagonal_logit, of_sink)
            norm = norm[:, None]
            diagonal_logit = diagonal_logit[:, None]
            p_decays = LOG_DECAYS + i_gate.to(tl.int64) * decays_h
            p_largest = LARGEST + i_g.to(tl.int64) * largest_h

        # Keys before block `low` may be dropped; those before any block after `high` may not.
        low = tl.zeros([BLOCK_R], tl.int32)
        high = tl.where(attends, last // KEY_BLOCK, 0)
        for _ in range(0, STEPS):
            step = tl.maximum((high - low + BLOCK_BOUNDARIES - 1) // BLOCK_BOUNDARIES, 1)
            boundary = low[:, None] + (1 + tl.arange(0, BLOCK_BOUNDARIES))[None, :] * step[:, None]
            m_boundary = boundary <= high[:, None]
            before = tl.where(m_boundary, boundary - 1, 0)
            # Where the summary of a block is: in a row of the sequence's, or beside the block's page.
            i_summary = i_b
            if SHARES_PAGES:
                i_summary = tl.load(p_page + before, mask=m_boundary, other=0).to(tl.int64)
                before = tl.zeros_like(before)
            end = tl.load(p_c[:, None] + i_summary * c_b + before, mask=m_boundary, other=INF)
            decay = tl.where(end == INF, -INF, c[:, None] - tl.where(end == INF, 0.0, end))
            log_decays = None
            largest = None
            if RULE != "paper":
                p_decays_before = p_decays[:, None] + i_summary * decays_b + before
                log_decays = c[:, None] + tl.load(p_decays_before, mask=m_boundary, other=-INF)
                p_largest_before = p_largest + i_summary * largest_b + before
                largest = tl.load(p_largest_before, mask=m_boundary, other=0.0).to(tl.float64)
            droppable = may_drop(RULE, norm, diagonal_logit, bound, bound_margin, decay, log_decays, largest, log_eps)
            low = tl.maximum(low, tl.max(tl.where(m_boundary & droppable, boundary, 0), 1))
            high = tl.minimum(high, low + step - 1)
        first_block = tl.maximum(first_block, low)

    end_block = tl.max(tl.where(attends, last // KEY_BLOCK + 1, 1), 0)
    first_block = tl.min(tl.where(attends, first_block, INT32_MAX), 0)
    if HELD_FROM is not None:
        first_block = tl.maximum(first_block, tl.load(HELD_FROM + i_bg))
    # At least one block, so that every head has a program that writes its output.
    first_block = tl.minimum(first_block, end_block - 1)
    p_range = RANGES + i_bg
    tl.store(p_range, first_block)
    tl.store(p_range + heads, end_block - first_block)
    tl.store(p_range + 2 * heads, 0)
    tl.store(p_range + 3 * heads, tl.min(tl.where(attends, kv_start, INT32_MAX), 0))
    tl.store(p_range + 4 * heads, tl.max(tl.where(attends, last, -1), 0))
    if COUNTS is not None:
        any_attends = tl.max(attends.to(tl.int32), 0) > 0
        first_visible = tl.min(tl.where(attends, kv_start // KEY_BLOCK, INT32_MAX), 0)
        tl.atomic_add(COUNTS, (end_block - first_block).to(tl.int64), mask=any_attends, sem="relaxed")
        tl.atomic_add(COUNTS + 1, (end_block - first_visible).to(tl.int64), mask=any_attends, sem="relaxed")


@functools.cache
def _search_steps(blocks: int, candidates: int) -> int:
    """Steps until a search among ``blocks`` boundaries has nothing left between its ends."""
    steps = 0
    while blocks > 0:
        blocks = cdiv(blocks, candidates) - 1
        steps += 1
    return steps


def search_blocks(inputs: DecodeInputs, pruning: DecodePruning, scale: float) -> Tensor:
    """Blocks of keys that each key/value head reads.

    Returns:
        ``[5, B * G]`` int32: first block, number of blocks, a counter at 0 for `attend_blocks`, and the first and the
        last key that any row may attend to.
    """
    q, k, start, bounds = inputs.q, inputs.k, inputs.start, pruning.bounds
    batch, queries, heads, head_dim = q.shape
    kv_heads, blocks = inputs.kv_heads, inputs.blocks
    kv_total = batch * kv_heads
    k_b, k_t, k_h = inputs.kv_strides(k)
    c, log_decays, largest = (None, None, None) if pruning.summary is None else pruning.summary
    c_b, c_h, decays_b, decays_h, largest_b, largest_h, bound_b, bound_h = (
        0 if x is None else x.stride(i) for x in (c, log_decays, largest, bounds) for i in (0, 1)
    )
    ranges = torch.empty(5, kv_total, dtype=torch.int32, device=q.device)
    padded_rows = next_power_of_2(heads // kv_heads * queries)
    candidates = max(16, _CANDIDATES // padded_rows)
    _decode_search_kernel[(kv_total,)](
        Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
        K=k, k_b=k_b, k_t=k_t, k_h=k_h,
        C_Q=inputs.c_q, cq_b=inputs.c_q.stride(0), cq_h=inputs.c_q.stride(1),
        KV_START=inputs.kv_start, s_b=inputs.kv_start.stride(0), s_h=inputs.kv_start.stride(1),
        LAST=inputs.last, last_b=inputs.last_stride,
        PAGES=inputs.pages, pages_b=inputs.pages_stride,
        HELD_FROM=None if start is None else start.contiguous(),
        C=c, c_b=c_b, c_h=c_h,
        LOG_DECAYS=log_decays, decays_b=decays_b, decays_h=decays_h,
        LARGEST=largest, largest_b=largest_b, largest_h=largest_h,
        BOUND=bounds, bound_b=bound_b, bound_h=bound_h,
        SINK=pruning.sink,
        RANGES=ranges,
        COUNTS=inputs.counts,
        scale=scale,
        bound=pruning.bound,
        log_eps=pruning.log_eps,
        margin=logit_margin(head_dim, torch.float32),
        c_margin=decay_margin(blocks * PRUNED_KEYS),
        bound_margin=logit_margin(0, torch.float32),
        TQ=queries,
        H=heads,
        HF=inputs.c_q.shape[1],
        G=kv_heads,
        START_HEADS=inputs.kv_start.shape[1],
        STEPS=_search_steps(blocks, candidates),
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_R=padded_rows,
        BLOCK_BOUNDARIES=candidates,
        RULE=pruning.rule,
        SHARES_PAGES=inputs.shares_pages,
        **overlapping(q),
    )  # fmt: skip
    return ranges
