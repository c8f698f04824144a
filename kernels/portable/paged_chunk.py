"""A chunk of a prompt and an evicting cache, in three Triton launches: read what is held, summarize what is new, write.

What `PagePool.read`, `extend_summary`, `first_needed_block` and `PagePool.write_blocks` do in a hundred operators, and
what is kept of the last tokens.
Pages hold 64 tokens of one key/value head (names: `triton_common`; ``PAST`` tokens are held, ``R`` gates belong to a
head). Blocks are those of 64 tokens of the whole sequence, of which the first that a chunk touches may be half full.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..launches.replay import replayed
from ..operators import maybe_contiguous
from ..pruning.key_stats import KeySummary, Running
from ..pruning.later_queries import QueriesToCome
from ..pruning.rounding import decay_margin, log_allowed, logit_margin
from ..tiles import PRUNED_KEYS, cdiv, padded_head_dim
from ..triton_common import INF, load_rows
from .chunk_summary import CHUNK_PARTS, CHUNK_SIZES, JOINED_BLOCKS, join_chunk_kernel, summarize_gate, summarize_keys

_PAGE = tl.constexpr(PRUNED_KEYS)
_LOG_PAGE = tl.constexpr(math.log(PRUNED_KEYS))


@triton.jit
def _tile(POOL, page, X, x_b, x_h, x_t, i_b, i_g, o_t, PAST, m_held, m_new, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys or values of a block: those of a page, and new ones."""
    b_new = load_rows(X + i_b * x_b + i_g.to(tl.int64) * x_h, o_t - PAST, x_t, m_new, D, BLOCK_D, True)
    b_held = load_rows(POOL + page * _PAGE * D, o_t % _PAGE, D, m_held, D, BLOCK_D, True)
    return tl.where(m_new[:, None], b_new, b_held), b_new


@launched
@triton.jit(do_not_specialize=CHUNK_SIZES, do_not_specialize_on_alignment=CHUNK_PARTS)
def _read_chunk_kernel(
    K, V, C, KEYS, VALUES, SUMS, PAGES, OUT_K, OUT_V, OUT_C, BLOCK_C, BLOCK_DECAYS, BLOCK_LARGEST,
    FIRST, START, OUT_FIRST,
    k_b, k_t, k_h, v_b, v_t, v_h, c_b, c_h, f_b, f_h,
    margin, PAST, LENGTH, G, HF, N,
    R: tl.constexpr,
    GATE_STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of a head: what is held and what is new, one after the other; and the summary of what is new alone.

    All keys of an evicted block get the length of the longest key so far and equal decays, whose sum is that of the
    true ones: see `PagePool.read`.
    """
    i_bg, i_block = tl.program_id(0), tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
    o_t = i_block * _PAGE + tl.arange(0, _PAGE)
    m_new = (o_t >= PAST) & (o_t < LENGTH)
    page = tl.load(PAGES + i_bg * N + i_block, mask=i_block * _PAGE < PAST, other=0).to(tl.int64)
    is_evicted = page < 0
    m_held = (o_t < PAST) & (page >= 0)
    p_out = (i_bg.to(tl.int64) * LENGTH + o_t)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    m_out = (o_t < LENGTH)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    b_k, b_new = _tile(KEYS, page, K, k_b, k_h, k_t, i_b, i_g, o_t, PAST, m_held, m_new, D, BLOCK_D)
    if OUT_K is not None:
        longest = tl.load(BLOCK_LARGEST + i_bg * N + i_block, mask=is_evicted, other=0.0) * (1.0 + margin)
        is_first = (tl.arange(0, BLOCK_D) == 0)[None, :] & is_evicted
        tl.store(OUT_K + p_out, tl.where(is_first, longest.to(b_k.dtype), b_k), mask=m_out)
        b_v, _ = _tile(VALUES, page, V, v_b, v_h, v_t, i_b, i_g, o_t, PAST, m_held, m_new, D, BLOCK_D)
        tl.store(OUT_V + p_out, b_v, mask=m_out)
    summarize_keys(BLOCK_LARGEST, i_bg, i_block, b_new, m_new, PAST, N)
    for r in range(0, R):
        i_gate = i_g * GATE_STEP + r
        p_block = (i_b * HF + i_gate) * N + i_block
        c = tl.load(C + i_b * c_b + i_gate * c_h + o_t - PAST, mask=m_new, other=INF)
        # Evicted keys are not attended to; a gate that all heads share has a row for each.
        first = tl.load(FIRST + i_b * f_b + i_gate * f_h + o_t - PAST, mask=m_new, other=0)
        row = i_b * HF + i_gate if GATE_STEP > 0 else i_b * G + i_g
        shown = tl.maximum(first, tl.load(START + i_bg) * _PAGE)
        tl.store(OUT_FIRST + row * (LENGTH - PAST) + o_t - PAST, shown, mask=m_new)
        if OUT_C is not None:
            held = tl.load(SUMS + (page * R + r) * _PAGE + o_t % _PAGE, mask=m_held, other=0.0)
            decays = tl.load(BLOCK_DECAYS + p_block, mask=is_evicted, other=0.0)
            before = tl.load(BLOCK_DECAYS + p_block - 1, mask=is_evicted & (i_block > 0), other=-INF)
            equal = _LOG_PAGE - decays - tl.log(1.0 - tl.exp(before - decays))
            held = tl.where(is_evicted, equal, held)
            p_c = OUT_C + (i_bg.to(tl.int64) * R + r) * LENGTH + o_t
            tl.store(p_c, tl.where(m_new, c, held), mask=o_t < LENGTH)
        summarize_gate(BLOCK_C, BLOCK_DECAYS, p_block, i_block, c, PAST)


@triton.jit
def _keep_unshifted_rows(
    STATES, RING, s_b, s_t, s_h, i_b, i_g, o_t, PAST, m_kept, G, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Unshifted keys or values of the last tokens, by index modulo 64."""
    b_states = load_rows(STATES + i_b * s_b + i_g.to(tl.int64) * s_h, o_t - PAST, s_t, m_kept, D, BLOCK_D, True)
    o_d = tl.arange(0, BLOCK_D)
    p_ring = RING + ((i_b * _PAGE + o_t % _PAGE) * G + i_g)[:, None] * D + o_d[None, :]
    tl.store(p_ring, b_states, mask=m_kept[:, None] & (o_d < D)[None, :])


@launched
@triton.jit(do_not_specialize=CHUNK_SIZES, do_not_specialize_on_alignment=CHUNK_PARTS)
def _write_chunk_kernel(
    K, V, C, KEYS, VALUES, SUMS, PAGES,
    FIRST, C_RING, FIRST_RING, KEY_STATES, KEY_RING, VALUE_STATES, VALUE_RING,
    k_b, k_t, k_h, v_b, v_t, v_h, c_b, c_h, f_b, f_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h,
    PAST, LENGTH, G, HF, N,
    R: tl.constexpr,
    GATE_STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The new tokens of a block of a head to its page, if it has one; and what later tokens go on from, where given."""
    i_bg, i_block = tl.program_id(0), tl.program_id(1) + PAST // _PAGE
    i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
    page = tl.load(PAGES + i_bg * N + i_block).to(tl.int64)
    o_t = i_block * _PAGE + tl.arange(0, _PAGE)
    m_new = (o_t >= PAST) & (o_t < LENGTH)
    m_kept = m_new & (o_t >= LENGTH - _PAGE)
    m_t = m_new & (page >= 0)
    p_out = (page * _PAGE + o_t % _PAGE)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    m_out = m_t[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    p_k, p_v = K + i_b * k_b + i_g.to(tl.int64) * k_h, V + i_b * v_b + i_g.to(tl.int64) * v_h
    tl.store(KEYS + p_out, load_rows(p_k, o_t - PAST, k_t, m_t, D, BLOCK_D, True), mask=m_out)
    tl.store(VALUES + p_out, load_rows(p_v, o_t - PAST, v_t, m_t, D, BLOCK_D, True), mask=m_out)
    for r in range(0, R):
        i_gate = i_g * GATE_STEP + r
        c = tl.load(C + i_b * c_b + i_gate * c_h + o_t - PAST, mask=m_new, other=0.0)
        tl.store(SUMS + (page * R + r) * _PAGE + o_t % _PAGE, c, mask=m_t)
        if C_RING is not None:
            first = tl.load(FIRST + i_b * f_b + i_gate * f_h + o_t - PAST, mask=m_kept, other=0)
            p_ring = (i_b * HF + i_gate) * _PAGE + o_t % _PAGE
            tl.store(C_RING + p_ring, c, mask=m_kept)
            tl.store(FIRST_RING + p_ring, first, mask=m_kept)
    if KEY_STATES is not None:
        _keep_unshifted_rows(KEY_STATES, KEY_RING, ks_b, ks_t, ks_h, i_b, i_g, o_t, PAST, m_kept, G, D, BLOCK_D)
    if VALUE_STATES is not None:
        _keep_unshifted_rows(VALUE_STATES, VALUE_RING, vs_b, vs_t, vs_h, i_b, i_g, o_t, PAST, m_kept, G, D, BLOCK_D)


class Recent(NamedTuple):
    """What is kept of the last 64 tokens, by index modulo 64, and the unshifted states of new ones.

    Attributes:
        c: ``[B, Hf, 64]`` float64 running sums.
        first: ``[B, Hf, 64]`` int64 first visible keys.
        key_states, value_states: ``[B, T, G, D]``, unshifted, of new tokens; None without token shift.
        keys, values: ``[B, 64, G, D]`` of the last tokens.
    """

    c: Tensor | None = None
    first: Tensor | None = None
    key_states: Tensor | None = None
    keys: Tensor | None = None
    value_states: Tensor | None = None
    values: Tensor | None = None


def take_chunk(
    k: Tensor,
    v: Tensor,
    c: Tensor,
    past: int,
    *,
    first: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    pages: Tensor,
    start: Tensor,
    summary: KeySummary,
    running: Running,
    to_come: QueriesToCome | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """All keys, values and sums of an evicting cache and of new tokens, which the summary takes in, in place.

    Args:
        k, v: ``[B, G, T, D]`` new keys and values.
        c: ``[B, Hf, T]`` float64 their running sums.
        past: tokens held.
        first: ``[B, Hf, T]`` int64, contiguous, the first key visible from each.
        keys, values, sums, pages, start: pools and table that hold them, as `PagePool` has them.
        summary: of all of them, evicted ones included, with room for the new; it and ``running`` contiguous.
        running: over them.
        to_come: None if nothing may be evicted.

    Returns:
        Keys and values ``[B, G, past + T, D]``, sums ``[B, Hf, past + T]``, those of evicted tokens as `PagePool.read`
        says; ``first``, or the first key that is not evicted, ``[B, Hf or G, T]``; and the first block that a later
        query may need, ``[B, G]`` int32, or None.
    """
    return _launch_take(k, v, c, past, first, keys, values, sums, pages, start, summary, running, to_come)


@replayed
def _launch_take(
    k: Tensor,
    v: Tensor,
    c: Tensor,
    past: int,
    first: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    pages: Tensor,
    start: Tensor,
    summary: KeySummary,
    running: Running,
    to_come: QueriesToCome | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    arguments, (batch, kv_heads, tokens, rows) = _arguments(k, v, c, past, keys, values, sums, pages)
    length, gates = past + tokens, c.shape[1]
    all_k, all_v, all_c, needed = k, v, c, None
    if past:
        all_k, all_v = k.new_empty(2, batch, kv_heads, length, k.shape[-1]).unbind()
        all_c = c.new_empty(batch, kv_heads, rows, length)
    shown = first.new_empty(batch, kv_heads if gates == 1 else gates, tokens)
    if to_come is not None:
        needed = torch.empty(batch, kv_heads, dtype=torch.int32, device=k.device)
    statistics = dict(BLOCK_C=summary.c, BLOCK_DECAYS=summary.log_decays, BLOCK_LARGEST=summary.largest)
    shapes = {name: arguments[name] for name in ("PAST", "LENGTH", "G", "HF", "N", "R", "GATE_STEP")}
    with on_device_of(k):
        _read_chunk_kernel[(batch * kv_heads, cdiv(length, PRUNED_KEYS))](
            **arguments,
            **statistics,
            OUT_K=all_k if past else None,
            OUT_V=all_v if past else None,
            OUT_C=all_c if past else None,
            FIRST=first, f_b=first.stride(0), f_h=first.stride(1),
            START=start,
            OUT_FIRST=shown,
            margin=torch.finfo(k.dtype).eps + logit_margin(k.shape[-1], torch.float32),
        )  # fmt: skip
        join_chunk_kernel[(batch if gates == 1 else batch * kv_heads,)](
            **statistics,
            DECAYS=running[0], d_b=running[0].stride(0), d_h=running[0].stride(1),
            LARGEST=running[1], l_b=running[1].stride(0), l_h=running[1].stride(1),
            NEW_DECAYS=running[0],
            NEW_LARGEST=running[1],
            C=all_c, c_b=all_c.stride(0), c_h=all_c.stride(-2),
            NORM=None if to_come is None else to_come.norm,
            DIAGONAL=None if to_come is None else to_come.diagonal,
            START=needed,
            log_eps=0.0 if to_come is None else _log_eps(to_come),
            c_margin=0.0 if to_come is None else decay_margin(to_come.most_keys),
            bound_margin=logit_margin(0, torch.float32),
            **shapes,
            TOKEN=0 if to_come is None else to_come.token,
            BLOCKS=0 if to_come is None else to_come.token // PRUNED_KEYS,
            HEADS=kv_heads if gates == 1 else 1,
            KV_GROUP=1 if to_come is None else len(to_come.norm) // kv_heads,
            RULE="tight" if to_come is None else to_come.rule.bound.value,
            BLOCK=JOINED_BLOCKS,
        )  # fmt: skip
    if past:
        all_c = all_c[:, 0] if gates == 1 else all_c.flatten(1, 2)
    return all_k, all_v, all_c, shown, needed


def write_chunk(
    k: Tensor,
    v: Tensor,
    c: Tensor,
    past: int,
    *,
    first: Tensor,
    recent: Recent,
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    pages: Tensor,
) -> None:
    """Write new tokens to their pages, those of evicted blocks nowhere, and the last to ``recent``.

    Arguments as for `take_chunk`; ``recent`` is empty if it has taken them in.
    """
    _launch_write(k, v, c, past, first, recent, keys, values, sums, pages)


@replayed
def _launch_write(
    k: Tensor,
    v: Tensor,
    c: Tensor,
    past: int,
    first: Tensor,
    recent: Recent,
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    pages: Tensor,
) -> None:
    ks_b, ks_t, ks_h, _ = (0, 0, 0, 0) if recent.key_states is None else recent.key_states.stride()
    vs_b, vs_t, vs_h, _ = (0, 0, 0, 0) if recent.value_states is None else recent.value_states.stride()
    arguments, (batch, kv_heads, tokens, _) = _arguments(k, v, c, past, keys, values, sums, pages)
    with on_device_of(k):
        touched = cdiv(past + tokens, PRUNED_KEYS) - past // PRUNED_KEYS
        _write_chunk_kernel[(batch * kv_heads, touched)](
            **arguments,
            FIRST=first, f_b=first.stride(0), f_h=first.stride(1),
            C_RING=recent.c,
            FIRST_RING=recent.first,
            KEY_STATES=recent.key_states, ks_b=ks_b, ks_t=ks_t, ks_h=ks_h,
            KEY_RING=recent.keys,
            VALUE_STATES=recent.value_states, vs_b=vs_b, vs_t=vs_t, vs_h=vs_h,
            VALUE_RING=recent.values,
        )  # fmt: skip


def _log_eps(to_come: QueriesToCome) -> float:
    return log_allowed(to_come.eps, torch.float32, to_come.rule.terms(to_come.most_keys))


def _arguments(
    k: Tensor, v: Tensor, c: Tensor, past: int, keys: Tensor, values: Tensor, sums: Tensor, pages: Tensor
) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
    """What the first and the last kernel take; and sequences, heads, tokens and gates of a head."""
    batch, kv_heads, tokens, head_dim = k.shape
    k, v, c = maybe_contiguous(k), maybe_contiguous(v), maybe_contiguous(c)
    rows = sums.shape[1]
    arguments = dict(
        K=k, k_b=k.stride(0), k_t=k.stride(2), k_h=k.stride(1),
        V=v, v_b=v.stride(0), v_t=v.stride(2), v_h=v.stride(1),
        C=c, c_b=c.stride(0), c_h=c.stride(1),
        KEYS=keys,
        VALUES=values,
        SUMS=sums,
        PAGES=pages,
        PAST=past,
        LENGTH=past + tokens,
        G=kv_heads,
        HF=c.shape[1],
        N=pages.shape[2],
        R=rows,
        GATE_STEP=rows if c.shape[1] > 1 else 0,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
    )  # fmt: skip
    return arguments, (batch, kv_heads, tokens, rows)
