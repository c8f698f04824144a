"""What a decoding step writes to a layer's cache, in one Triton launch: gates, keys, values and key statistics.

    c_t = c + sum_{s <= t} log f_s,   P = log sum_j exp(-c_j),   largest = max_j |k_j|

(names: `triton_common`). A program handles one key/value head, or one gate, of one sequence: whoever reads a running
value is the only one who writes it. The grid depends on shapes alone, so that a CUDA graph can replay it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import LOG_ZERO_GATE
from ..devices import on_device_of
from ..launches.launch import launched
from ..operators import maybe_contiguous
from ..pruning.key_stats import KeySummary, Running
from ..pruning.predicates import lengths
from ..tiles import PRUNED_KEYS, padded_head_dim
from ..triton_common import INF, load_rows, overlapping, wait_for_inputs

_KEY_BLOCK = tl.constexpr(PRUNED_KEYS)
_LOG_ZERO = tl.constexpr(LOG_ZERO_GATE)
# Tokens of a step at most: they touch two blocks of keys.
LARGEST_STEP = 16
# Nothing is faster for knowing what is a multiple of 16, and a cache of another length must compile nothing.
_TENSORS = (
    "K", "V", "LOG_F", "REAL", "POSITIONS", "KEYS", "VALUES", "C", "FIRST", "LAST_C", "LAST_FIRST", "BLOCK_C",
    "BLOCK_DECAYS", "BLOCK_LARGEST", "LOG_DECAYS", "LARGEST", "PAGES", "LENGTH", "C_NEW", "FIRST_NEW", "KEY_STATES",
    "KEY_HELD", "VALUE_STATES", "VALUE_HELD", "LAST_REAL",
)  # fmt: skip
_SIZES = (
    "k_b", "k_t", "k_h", "v_b", "v_t", "v_h", "f_b", "f_t", "f_h", "real_b", "ks_b", "ks_t", "ks_h", "vs_b", "vs_t",
    "vs_h", "T", "G", "HF", "N", "NB",
)  # fmt: skip


class _Step(NamedTuple):
    """The new tokens, where they go, and the `KeySummary`.

    ``N`` is the tokens that a cache, ``NB`` the blocks that its summary, has room for.
    """

    POSITIONS: Any
    PAGES: Any
    T: Any
    G: Any
    HF: Any
    N: Any
    NB: Any


@triton.jit
def _page(step: _Step, i_bg, o_n, m_t):
    """The page of a key/value head's tokens ``o_n``; page 0 takes what has none."""
    p_page = step.PAGES + i_bg * (step.N // _KEY_BLOCK) + o_n // _KEY_BLOCK
    return tl.maximum(tl.load(p_page, mask=m_t, other=0), 0).to(tl.int64)


@triton.jit
def _numbers_as_bounds(x):
    """Of lengths: no bound is known where one is NaN."""
    return tl.where(x == x, x, INF)


@triton.jit
def _append_keys(
    step: _Step, K, V, KEYS, VALUES, BLOCK_LARGEST, LARGEST,
    k_b, k_t, k_h, v_b, v_t, v_h, i_b, i_g,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Keys, values and their largest length, of one key/value head."""
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < step.T
    position = tl.load(step.POSITIONS).to(tl.int32)
    o_n = position + o_t
    i_bg = i_b * step.G + i_g
    b_k = load_rows(K + i_b * k_b + i_g.to(tl.int64) * k_h, o_t, k_t, m_t, D, BLOCK_D, True)
    b_v = load_rows(V + i_b * v_b + i_g.to(tl.int64) * v_h, o_t, v_t, m_t, D, BLOCK_D, True)
    before = _numbers_as_bounds(tl.load(LARGEST + i_bg))
    o_row = i_bg * step.N + o_n
    if step.PAGES is not None:
        o_row = _page(step, i_bg, o_n, m_t) * _KEY_BLOCK + o_n % _KEY_BLOCK
    o_kv = o_row[:, None] * D + o_d[None, :]
    m_kv = m_t[:, None] & (o_d[None, :] < D)
    tl.store(KEYS + o_kv, b_k, mask=m_kv)
    tl.store(VALUES + o_kv, b_v, mask=m_kv)

    # Rounded once: their squares are summed in float64.
    norms = _numbers_as_bounds(lengths(b_k.to(tl.float64)).to(tl.float32))
    block, last_block = position // _KEY_BLOCK, (position + step.T - 1) // _KEY_BLOCK
    # Where the last block is the first, so are the values.
    largest = tl.maximum(before, tl.max(tl.where(m_t & (o_n // _KEY_BLOCK == block), norms, 0.0), 0))
    last_largest = tl.maximum(largest, tl.max(tl.where(m_t, norms, 0.0), 0))
    # All threads have read what is overwritten.
    tl.debug_barrier()
    tl.store(BLOCK_LARGEST + i_bg * step.NB + block, largest)
    tl.store(BLOCK_LARGEST + i_bg * step.NB + last_block, last_largest)
    tl.store(LARGEST + i_bg, last_largest)


@triton.jit
def _keep_unshifted(
    step: _Step, STATES, HELD, LAST_REAL, s_b, s_t, s_h, i_b, i_g,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Unshifted keys or values of one head, the last ``WINDOW`` of them; padding repeats the last real one."""
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < step.T, o_d < D
    position = tl.load(step.POSITIONS).to(tl.int32)
    row = step.G * D
    p_held = HELD + i_b * WINDOW * row + i_g * D + o_d
    o_source = o_t
    if LAST_REAL is not None:
        o_source = tl.load(LAST_REAL + i_b * (step.T + 1) + 1 + o_t, mask=m_t, other=-1).to(tl.int32)
    p_states = STATES + i_b * s_b + i_g.to(tl.int64) * s_h
    b_new = load_rows(p_states, o_source, s_t, m_t & (o_source >= 0), D, BLOCK_D, True)
    if LAST_REAL is not None:
        b_before = tl.load(p_held + (position + WINDOW - 1) % WINDOW * row, mask=m_d, other=0.0)
        b_new = tl.where((o_source >= 0)[:, None], b_new, b_before[None, :])
        # All threads have read what may be overwritten.
        tl.debug_barrier()
    p_new = p_held[None, :] + ((position + o_t) % WINDOW * row)[:, None]
    tl.store(p_new, b_new, mask=(m_t & (o_t >= step.T - WINDOW))[:, None] & m_d[None, :])


@triton.jit
def _add_logs(total, x, m):
    """``log(exp(total) + sum exp(x))`` over ``m``; not both may be of nothing."""
    x = tl.where(m, x, -INF)
    maximum = tl.maximum(total, tl.max(x, 0))
    return maximum + tl.log(tl.exp(total - maximum) + tl.sum(tl.exp(x - maximum), 0))


@triton.jit
def _append_gates(
    step: _Step, LOG_F, REAL, C, FIRST, LAST_C, LAST_FIRST, BLOCK_C, BLOCK_DECAYS, LOG_DECAYS, C_NEW, FIRST_NEW,
    f_b, f_t, f_h, real_b, i_b, i_gate,
    BLOCK_T: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Running sums, first visible keys and decays, of one gate."""
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < step.T
    position = tl.load(step.POSITIONS).to(tl.int32)
    o_n = position + o_t
    i_row = i_b * step.HF + i_gate
    log_f = tl.load(LOG_F + i_b * f_b + i_gate * f_h + o_t.to(tl.int64) * f_t, mask=m_t, other=0.0).to(tl.float64)
    if REAL is not None:
        log_f = tl.where(tl.load(REAL + i_b * real_b + o_t, mask=m_t, other=0) != 0, log_f, 0.0)
    is_reset = log_f < _LOG_ZERO
    slot_before = (position + RING - 1) % RING
    c_before = tl.load(LAST_C + i_row * RING + slot_before)
    first_before = tl.load(LAST_FIRST + i_row * RING + slot_before).to(tl.int32)
    decays_before = tl.load(LOG_DECAYS + i_row)
    # Sums over a triangle, since there are so few.
    m_until = o_t[None, :] <= o_t[:, None]
    c = tl.sum(tl.where(m_until, tl.where(is_reset, 0.0, log_f)[None, :], 0.0), 1) + c_before
    first = tl.maximum(tl.max(tl.where(m_until, tl.where(is_reset, o_n, 0)[None, :], 0), 1), first_before)
    tl.store(C_NEW + i_row * step.T + o_t, c, mask=m_t)
    tl.store(FIRST_NEW + i_row * step.T + o_t, first.to(tl.int64), mask=m_t)
    if step.PAGES is None:
        tl.store(C + i_row * step.N + o_n, c, mask=m_t)
    else:
        # A gate shared by all heads is written to the pages of each.
        heads, gates = tl.maximum(step.G // step.HF, 1), tl.maximum(step.HF // step.G, 1)
        for i_head in range(0, heads):
            i_bg = i_b * step.G + i_gate // gates * heads + i_head
            o_row = _page(step, i_bg, o_n, m_t) * gates + i_gate % gates
            tl.store(C + o_row * _KEY_BLOCK + o_n % _KEY_BLOCK, c, mask=m_t)
    if FIRST is not None:
        tl.store(FIRST + i_row * step.N + o_n, first, mask=m_t)

    block, last_block = position // _KEY_BLOCK, (position + step.T - 1) // _KEY_BLOCK
    decays = _add_logs(decays_before, -c, m_t & (o_n // _KEY_BLOCK == block))
    last_decays = decays
    if BLOCK_T > 1:
        last_decays = _add_logs(decays, -c, m_t & (o_n // _KEY_BLOCK != block))
    end = tl.minimum((block + 1) * _KEY_BLOCK - position, step.T) - 1
    p_block = BLOCK_C + i_row * step.NB
    p_decays = BLOCK_DECAYS + i_row * step.NB
    # All threads have read what is overwritten.
    tl.debug_barrier()
    tl.store(p_block + block, tl.sum(tl.where(o_t == end, c, 0.0), 0))
    tl.store(p_block + last_block, tl.sum(tl.where(o_t == step.T - 1, c, 0.0), 0))
    tl.store(p_decays + block, decays)
    tl.store(p_decays + last_block, last_decays)
    tl.store(LOG_DECAYS + i_row, last_decays)
    m_ring = m_t & (o_t >= step.T - RING)
    tl.store(LAST_C + i_row * RING + o_n % RING, c, mask=m_ring)
    tl.store(LAST_FIRST + i_row * RING + o_n % RING, first.to(tl.int64), mask=m_ring)


# `debug` is what compiles the assertion.
@launched
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_TENSORS, debug=True)
def _decode_append_kernel(
    K, V, LOG_F, REAL, POSITIONS, KEYS, VALUES, C, FIRST, LAST_C, LAST_FIRST,
    BLOCK_C, BLOCK_DECAYS, BLOCK_LARGEST, LOG_DECAYS, LARGEST, PAGES, LENGTH, C_NEW, FIRST_NEW,
    KEY_STATES, KEY_HELD, VALUE_STATES, VALUE_HELD, LAST_REAL,
    k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, real_b, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h,
    T, G, HF, N, NB,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One key/value head, then one gate, of a sequence; arguments as in `append_tokens`.

    ``BLOCK_C``, ``BLOCK_DECAYS`` and ``BLOCK_LARGEST`` are a `KeySummary`; ``LAST_C`` and ``LAST_FIRST`` hold the last
    ``RING`` tokens, by index modulo ``RING``; ``KEY_HELD`` and ``VALUE_HELD`` the last ``WINDOW``.
    """
    wait_for_inputs(OVERLAPS)
    i_row, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    step = _Step(POSITIONS, PAGES, T, G, HF, N, NB)
    position = tl.load(POSITIONS)
    tl.device_assert(position + T <= N, "the cache has no room for these tokens: make it with a larger max_cache_len")
    if i_row < G:
        if KEY_STATES is not None:
            _keep_unshifted(
                step, KEY_STATES, KEY_HELD, LAST_REAL, ks_b, ks_t, ks_h, i_b, i_row, D, BLOCK_D, BLOCK_T, WINDOW
            )
        if VALUE_STATES is not None:
            _keep_unshifted(
                step, VALUE_STATES, VALUE_HELD, LAST_REAL, vs_b, vs_t, vs_h, i_b, i_row, D, BLOCK_D, BLOCK_T, WINDOW
            )
        _append_keys(
            step, K, V, KEYS, VALUES, BLOCK_LARGEST, LARGEST,
            k_b, k_t, k_h, v_b, v_t, v_h, i_b, i_row, D, BLOCK_D, BLOCK_T,
        )  # fmt: skip
    else:
        _append_gates(
            step, LOG_F, REAL, C, FIRST, LAST_C, LAST_FIRST, BLOCK_C, BLOCK_DECAYS, LOG_DECAYS, C_NEW, FIRST_NEW,
            f_b, f_t, f_h, real_b, i_b, i_row - G, BLOCK_T, RING,
        )  # fmt: skip
    if LENGTH is not None:
        tl.store(LENGTH, position + T, mask=(i_row == 0) & (i_b == 0))


def append_tokens(
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    positions: Tensor,
    real: Tensor | None = None,
    *,
    keys: Tensor,
    values: Tensor,
    c: Tensor,
    last: tuple[Tensor, Tensor],
    summary: KeySummary,
    running: Running,
    first: Tensor | None = None,
    length: Tensor | None = None,
    pages: Tensor | None = None,
    key_states: tuple[Tensor, Tensor] | None = None,
    value_states: tuple[Tensor, Tensor] | None = None,
    last_real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take up to 16 new tokens into a layer's cache, in place, without gradients and without waiting for the device.

    What `accumulate` and `extend_summary` give, and where it goes. Buffers are contiguous and must not overlap; on a
    GPU, tokens for which there is no room are an assertion of the device, as of `index_copy_`.

    Args:
        k, v: ``[B, G, T, D]`` keys and values of the new tokens.
        log_f: ``[B, T, Hf]`` their log gates.
        positions: ``[T]`` int64 consecutive indices of the tokens; only the first is read.
        real: ``[B, T]`` bool, False for padding, whose gates count as 0; None for none.
        keys, values: ``[B, G, N, D]`` buffers, or pools ``[P, 64, D]`` of pages; the dtypes of ``k`` and ``v``.
        c: ``[B, Hf, N]`` float64 buffer of running sums, or a pool ``[P, max(1, Hf // G), 64]``.
        last: running sum, float64, and first visible key, int64, of the last token, ``[B, Hf]``; or of the last 64,
            ``[B, Hf, 64]`` by index modulo 64.
        summary: of the keys so far, with room for as many as ``keys`` has.
        running: over the keys so far.
        first: ``[B, Hf, N]`` int32 buffer of first visible keys; None without.
        length: int64 scalar, set to the number of tokens so far; None without.
        pages: ``[B, G, N // 64]`` int32 page of each 64 tokens; what has none, -1, goes to page 0.
        key_states, value_states: with token shift, the unshifted states of the new tokens, ``[B, T, G, D]``, and the
            buffer of those of the last ``W``, ``[B, W, G, D]`` by index modulo ``W``, 1 or at least 16; else None.
        last_real: with padding and token shift, ``[B, 1 + T]`` int64: of new tokens, the last one up to each (from the
            second on) that is real, whose states are kept in its place; -1 if it is an earlier one.

    Returns:
        Running sums ``[B, Hf, T]`` float64, and the first visible key of each new token, int64.

    Raises:
        ValueError: the cache holds another dtype.
    """
    batch, kv_heads, tokens, head_dim = k.shape
    gates = log_f.shape[2]
    if k.dtype != keys.dtype or v.dtype != values.dtype:
        raise ValueError(
            f"keys and values must be of the dtypes that the cache holds, {keys.dtype} and {values.dtype}; "
            f"got {k.dtype} and {v.dtype}"
        )
    assert tokens <= LARGEST_STEP
    k, v = maybe_contiguous(k), maybe_contiguous(v)
    new_keys, held_keys = key_states or (None, None)
    new_values, held_values = value_states or (None, None)
    ks_b, ks_t, ks_h, vs_b, vs_t, vs_h = (
        0 if x is None else x.stride(i) for x in (new_keys, new_values) for i in (0, 1, 2)
    )
    held = held_keys if held_keys is not None else held_values
    last_c, last_first = last
    c_new = torch.empty(batch, gates, tokens, dtype=torch.float64, device=k.device)
    first_new = torch.empty(batch, gates, tokens, dtype=torch.int64, device=k.device)
    room = keys.shape[2] if pages is None else pages.shape[2] * PRUNED_KEYS
    with on_device_of(k):
        _decode_append_kernel[(kv_heads + gates, batch)](
            K=k, k_b=k.stride(0), k_t=k.stride(2), k_h=k.stride(1),
            V=v, v_b=v.stride(0), v_t=v.stride(2), v_h=v.stride(1),
            LOG_F=log_f, f_b=log_f.stride(0), f_t=log_f.stride(1), f_h=log_f.stride(2),
            REAL=real, real_b=0 if real is None else real.stride(0),
            POSITIONS=positions,
            KEYS=keys,
            VALUES=values,
            C=c,
            FIRST=first,
            LAST_C=last_c,
            LAST_FIRST=last_first,
            BLOCK_C=summary.c,
            BLOCK_DECAYS=summary.log_decays,
            BLOCK_LARGEST=summary.largest,
            LOG_DECAYS=running[0],
            LARGEST=running[1],
            PAGES=pages,
            LENGTH=length,
            C_NEW=c_new,
            FIRST_NEW=first_new,
            KEY_STATES=new_keys, ks_b=ks_b, ks_t=ks_t, ks_h=ks_h,
            KEY_HELD=held_keys,
            VALUE_STATES=new_values, vs_b=vs_b, vs_t=vs_t, vs_h=vs_h,
            VALUE_HELD=held_values,
            LAST_REAL=last_real,
            T=tokens,
            G=kv_heads,
            HF=gates,
            N=room,
            NB=summary.c.shape[2],
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK_T=1 if tokens == 1 else LARGEST_STEP,
            RING=1 if last_c.ndim == 2 else last_c.shape[2],
            WINDOW=1 if held is None else held.shape[1],
            num_warps=1 if tokens == 1 else 4,
            sanitize_overflow=False,
            **overlapping(k),
        )  # fmt: skip
    return c_new, first_new
