"""The tokens of a step into pages, in two Triton launches: keys and values; then gates and what pruning reads.

    c_t = c + sum_{s <= t} log f_s,   P = log sum_j exp(-c_j),   largest = max_j |k_j|

(names: `triton_common`). The first launch also copies what each request goes on from, since the second one overwrites
it. A request that goes on after a page which another fills in the same step sums that one's gates too: it follows the
*writers* (`requests.find_writers`) to a request whose page before is not written in this step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import LOG_ZERO_GATE
from ..devices import on_device_of
from ..launches.launch import launched
from ..operators import maybe_contiguous
from ..pruning.predicates import lengths
from ..pruning.rounding import SHORTEST_LENGTH
from ..tiles import padded_head_dim
from ..triton_common import INF, larger, load_rows, overlapping, wait_for_inputs
from .requests import PAGE, Requests, span_of, start_of

_LOG_ZERO = tl.constexpr(LOG_ZERO_GATE)
_SHORTEST = tl.constexpr(SHORTEST_LENGTH)
_REQUESTS = ["ROWS", "LENGTHS", "PAGES", "WRITERS"]
_STATISTICS = ["SUMS", "FIRSTS", "DECAYS", "LARGEST", "C_BEFORE", "FIRST_BEFORE", "DECAYS_BEFORE", "LARGEST_BEFORE"]
_OTHERS = ["K", "V", "KEYS", "VALUES", "NORMS", "LOG_F", "STANDS_FOR", "C", "FIRST"]
_parts = _REQUESTS + _STATISTICS + _OTHERS


class PagePools(NamedTuple):
    """What ``P`` pages of 64 tokens hold of a layer, in any strides but of the last dimension, which is contiguous.

    Attributes:
        keys, values: ``[P, G, 64, D]``.
        sums: ``[P, Hf, 64]`` float64 running sums of log gates.
        firsts: ``[P, Hf]`` int64, first key visible to the last token of a page so far.
        log_decays: ``[P, Hf]`` float64, ``log sum_j exp(-c_j)`` over all keys up to that token.
        largest: ``[P, G]`` float32, ``max_j |k_j|`` over the same, at least `SHORTEST_LENGTH`.
    """

    keys: Tensor
    values: Tensor
    sums: Tensor
    firsts: Tensor
    log_decays: Tensor
    largest: Tensor


class _Before(NamedTuple):
    """What each request goes on from: ``[R, Hf]`` sums, first keys and decays, and ``[R, G]`` largest lengths."""

    c: Tensor
    first: Tensor
    log_decays: Tensor
    largest: Tensor


@launched
@triton.jit(do_not_specialize=["pages_r", "BEGIN"], do_not_specialize_on_alignment=_parts)
def _append_keys_kernel(
    K, V, KEYS, VALUES, NORMS, SUMS, FIRSTS, DECAYS, LARGEST,
    C_BEFORE, FIRST_BEFORE, DECAYS_BEFORE, LARGEST_BEFORE, ROWS, LENGTHS, PAGES, WRITERS,
    k_t, k_h, v_t, v_h, keys_p, keys_h, values_p, values_h, sums_p, sums_h, firsts_p, decays_p, largest_p, pages_r,
    G, HF, BEGIN,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A page of a head of a request, or what a gate or a head of it goes on from; arguments as in `append_step`."""
    wait_for_inputs(OVERLAPS)
    i_r, i_row, i_span = BEGIN + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(ROWS + i_r)
    start, end = start_of(ROWS, LENGTHS, i_r), tl.load(LENGTHS + i_r)
    p_pages = PAGES + i_r.to(tl.int64) * pages_r
    if i_row < G:
        i_g = i_row.to(tl.int64)
        i_page = start // PAGE + i_span
        if (end > start) & (i_page * PAGE < end):
            span = span_of(first_row, start, end, i_page, BLOCK)
            o_d = tl.arange(0, BLOCK_D)
            b_k = load_rows(K + i_g * k_h, span.rows, k_t, span.mask, D, BLOCK_D, True)
            b_v = load_rows(V + i_g * v_h, span.rows, v_t, span.mask, D, BLOCK_D, True)
            page = tl.load(p_pages + i_page).to(tl.int64)
            m_kv = span.mask[:, None] & (o_d < D)[None, :]
            o_kv = (span.o_n % PAGE)[:, None] * D + o_d[None, :]
            tl.store(KEYS + page * keys_p + i_g * keys_h + o_kv, b_k, mask=m_kv)
            tl.store(VALUES + page * values_p + i_g * values_h + o_kv, b_v, mask=m_kv)
            # Rounded once: their squares are summed in float64. No bound is known where one is NaN.
            norms = lengths(b_k.to(tl.float64)).to(tl.float32)
            norms = tl.where(norms == norms, norms, INF)
            tl.store(NORMS + span.rows.to(tl.int64) * G + i_g, norms, mask=span.mask)
        if i_span == 0:
            page = tl.load(p_pages + (start - 1) // PAGE, mask=start > 0, other=0).to(tl.int64)
            largest = tl.load(LARGEST + page * largest_p + i_g, mask=start > 0, other=_SHORTEST)
            tl.store(LARGEST_BEFORE + i_r * G + i_g, largest)
    elif i_span == 0:
        i_gate = (i_row - G).to(tl.int64)
        page = tl.load(p_pages + (start - 1) // PAGE, mask=start > 0, other=0).to(tl.int64)
        p_sum = SUMS + page * sums_p + i_gate * sums_h + (start - 1) % PAGE
        tl.store(C_BEFORE + i_r * HF + i_gate, tl.load(p_sum, mask=start > 0, other=0.0))
        first = tl.load(FIRSTS + page * firsts_p + i_gate, mask=start > 0, other=0)
        tl.store(FIRST_BEFORE + i_r * HF + i_gate, first)
        decays = tl.load(DECAYS + page * decays_p + i_gate, mask=start > 0, other=-INF)
        tl.store(DECAYS_BEFORE + i_r * HF + i_gate, decays)


@triton.jit
def _ancestor(WRITERS, i_r, distance):
    """The request that is ``distance`` writers before."""
    for _ in range(0, distance):
        i_r = tl.load(WRITERS + i_r)
    return i_r


@triton.jit
def _followed(ROWS, LENGTHS, WRITERS, i_r, distance):
    """What a request sums of the one ``distance`` writers before: its first row in this step, and first and last token.

    Of the request itself, at a distance of 0, all tokens of the step; of others those before the next one begins.
    """
    i = _ancestor(WRITERS, i_r, distance)
    end = tl.load(LENGTHS + i)
    if distance > 0:
        end = start_of(ROWS, LENGTHS, _ancestor(WRITERS, i_r, distance - 1))
    return tl.load(ROWS + i), start_of(ROWS, LENGTHS, i), end


@triton.jit
def _append_gate(
    LOG_F, STANDS_FOR, SUMS, FIRSTS, DECAYS, C_BEFORE, FIRST_BEFORE, DECAYS_BEFORE, C, FIRST,
    ROWS, LENGTHS, PAGES, WRITERS,
    f_t, f_h, sums_p, sums_h, firsts_p, decays_p, pages_r, c_h, HF,
    i_r, i_gate, distance, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running sums, first visible keys and decays of one gate of a request."""
    root = _ancestor(WRITERS, i_r, distance)
    c = tl.load(C_BEFORE + root * HF + i_gate)
    first = tl.load(FIRST_BEFORE + root * HF + i_gate)
    decays = tl.load(DECAYS_BEFORE + root * HF + i_gate)
    if STANDS_FOR is not None:
        # Nothing sees the first key beside the sink.
        stands = tl.load(STANDS_FOR + tl.load(ROWS + root), mask=start_of(ROWS, LENGTHS, root) == 0, other=0)
        first = tl.maximum(first, stands.to(tl.int64))
    for passed in range(0, distance + 1):
        first_row, start, end = _followed(ROWS, LENGTHS, WRITERS, i_r, distance - passed)
        for i_page in range(start // PAGE, (end + PAGE - 1) // PAGE):
            span = span_of(first_row, start, end, i_page, BLOCK)
            m = span.mask
            log_f = tl.load(LOG_F + span.rows.to(tl.int64) * f_t + i_gate * f_h, mask=m, other=0.0).to(tl.float64)
            is_reset = log_f < _LOG_ZERO
            log_f = tl.where(is_reset, 0.0, log_f)
            resets = tl.where(is_reset & m, span.o_n, 0).to(tl.int64)
            if BLOCK == 1:
                sums, firsts = log_f + c, tl.maximum(resets, first)
            else:
                sums, firsts = tl.cumsum(log_f, 0) + c, tl.maximum(tl.associative_scan(resets, 0, larger), first)
            is_last = m & (span.o_n == span.end - 1)
            c, first = tl.sum(tl.where(is_last, sums, 0.0), 0), tl.max(tl.where(is_last, firsts, 0), 0)
            terms = tl.where(m, -sums, -INF)
            maximum = tl.maximum(decays, tl.max(terms, 0))
            decays = maximum + tl.log(tl.exp(decays - maximum) + tl.sum(tl.exp(terms - maximum), 0))
            if passed == distance:
                page = tl.load(PAGES + i_r.to(tl.int64) * pages_r + i_page).to(tl.int64)
                tl.store(SUMS + page * sums_p + i_gate * sums_h + span.o_n % PAGE, sums, mask=m)
                tl.store(FIRSTS + page * firsts_p + i_gate, first)
                tl.store(DECAYS + page * decays_p + i_gate, decays)
                tl.store(C + i_gate * c_h + span.rows, sums, mask=m)
                tl.store(FIRST + i_gate * c_h + span.rows, firsts, mask=m)


@triton.jit
def _append_lengths(
    NORMS, LARGEST, LARGEST_BEFORE, ROWS, LENGTHS, PAGES, WRITERS, largest_p, pages_r, G, i_r, i_g, distance,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest length of the keys of one head of a request."""
    largest = tl.load(LARGEST_BEFORE + _ancestor(WRITERS, i_r, distance) * G + i_g)
    for passed in range(0, distance + 1):
        first_row, start, end = _followed(ROWS, LENGTHS, WRITERS, i_r, distance - passed)
        for i_page in range(start // PAGE, (end + PAGE - 1) // PAGE):
            span = span_of(first_row, start, end, i_page, BLOCK)
            norms = tl.load(NORMS + span.rows.to(tl.int64) * G + i_g, mask=span.mask, other=0.0)
            largest = tl.maximum(largest, tl.max(norms, 0))
            if passed == distance:
                page = tl.load(PAGES + i_r.to(tl.int64) * pages_r + i_page).to(tl.int64)
                tl.store(LARGEST + page * largest_p + i_g, largest)


@launched
@triton.jit(do_not_specialize=["pages_r", "c_h"], do_not_specialize_on_alignment=_parts)
def _append_gates_kernel(
    LOG_F, STANDS_FOR, NORMS, SUMS, FIRSTS, DECAYS, LARGEST,
    C_BEFORE, FIRST_BEFORE, DECAYS_BEFORE, LARGEST_BEFORE, C, FIRST, ROWS, LENGTHS, PAGES, WRITERS,
    f_t, f_h, sums_p, sums_h, firsts_p, decays_p, largest_p, pages_r, c_h, G, HF,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A gate or a head of a request; arguments as in `append_step`."""
    wait_for_inputs(OVERLAPS)
    i_r, i_row = tl.program_id(0), tl.program_id(1)
    if tl.load(ROWS + i_r + 1) > tl.load(ROWS + i_r):
        distance, root = 0, i_r
        writer = tl.load(WRITERS + root)
        while writer >= 0:
            distance, root = distance + 1, writer
            writer = tl.load(WRITERS + root)
        if i_row < HF:
            _append_gate(
                LOG_F, STANDS_FOR, SUMS, FIRSTS, DECAYS, C_BEFORE, FIRST_BEFORE, DECAYS_BEFORE, C, FIRST,
                ROWS, LENGTHS, PAGES, WRITERS,
                f_t, f_h, sums_p, sums_h, firsts_p, decays_p, pages_r, c_h, HF,
                i_r, i_row.to(tl.int64), distance, BLOCK,
            )  # fmt: skip
        else:
            _append_lengths(
                NORMS, LARGEST, LARGEST_BEFORE, ROWS, LENGTHS, PAGES, WRITERS, largest_p, pages_r, G,
                i_r, (i_row - HF).to(tl.int64), distance, BLOCK,
            )  # fmt: skip
    elif (BLOCK == 1) & (i_row < HF) & (i_r < c_h):
        # Where all have one row, a request without one gets a fully masked row.
        tl.store(C + i_row.to(tl.int64) * c_h + i_r, 0.0)
        tl.store(FIRST + i_row.to(tl.int64) * c_h + i_r, 1)


def append_step(
    k: Tensor, v: Tensor, log_f: Tensor, requests: Requests, pools: PagePools, stands_for: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take the tokens of a step into their pages, in place, without gradients and without waiting for the device.

    What `accumulate` and `extend_summary` give for each request alone, and where it goes.

    Args:
        k, v: ``[T, G, D]`` keys and values of the rows of the step, in the dtype of the pools.
        log_f: ``[T, Hf]`` their log gates.
        requests: of the step.
        pools: pages; those of tokens before are read.
        stands_for: ``[T]`` bool, tokens that the attention sink stands for where they begin a request, or None.

    Returns:
        Running sums ``[Hf, T]`` float64, and the first key that each token may see, ``[Hf, T]`` int64. A request
        without rows, which may only follow those with one, has row ``r`` if it is the ``r``-th: a fully masked one.

    Raises:
        ValueError: the pages hold another dtype.
    """
    if k.dtype != pools.keys.dtype or v.dtype != pools.values.dtype:
        raise ValueError(
            f"keys and values must be of the dtypes that pages hold, {pools.keys.dtype} and {pools.values.dtype}; got "
            f"{k.dtype} and {v.dtype}"
        )
    k, v = maybe_contiguous(k), maybe_contiguous(v)
    (tokens, heads, head_dim), gates, count = k.shape, log_f.shape[1], len(requests.lengths)
    norms = torch.empty(tokens, heads, dtype=torch.float32, device=k.device)
    before = _Before(
        torch.empty(count, gates, dtype=torch.float64, device=k.device),
        torch.empty(count, gates, dtype=torch.int64, device=k.device),
        torch.empty(count, gates, dtype=torch.float64, device=k.device),
        torch.empty(count, heads, dtype=torch.float32, device=k.device),
    )
    c = torch.empty(gates, tokens, dtype=torch.float64, device=k.device)
    first = torch.empty(gates, tokens, dtype=torch.int64, device=k.device)
    shared = dict(
        NORMS=norms,
        SUMS=pools.sums, sums_p=pools.sums.stride(0), sums_h=pools.sums.stride(1),
        FIRSTS=pools.firsts, firsts_p=pools.firsts.stride(0),
        DECAYS=pools.log_decays, decays_p=pools.log_decays.stride(0),
        LARGEST=pools.largest, largest_p=pools.largest.stride(0),
        C_BEFORE=before.c,
        FIRST_BEFORE=before.first,
        DECAYS_BEFORE=before.log_decays,
        LARGEST_BEFORE=before.largest,
        **requests.arguments,
        G=heads,
        HF=gates,
        **overlapping(k),
    )  # fmt: skip
    launches = requests.launches()
    with on_device_of(k):
        for launch in launches:
            _append_keys_kernel[(launch.requests, heads + gates, launch.pages)](
                K=k, k_t=k.stride(0), k_h=k.stride(1),
                V=v, v_t=v.stride(0), v_h=v.stride(1),
                KEYS=pools.keys, keys_p=pools.keys.stride(0), keys_h=pools.keys.stride(1),
                VALUES=pools.values, values_p=pools.values.stride(0), values_h=pools.values.stride(1),
                D=head_dim,
                BLOCK_D=padded_head_dim(head_dim),
                BEGIN=launch.begin,
                BLOCK=launch.block,
                num_warps=launch.warps,
                **shared,
            )  # fmt: skip
        # A request with one row may follow one with many.
        _append_gates_kernel[(count, gates + heads)](
            LOG_F=log_f, f_t=log_f.stride(0), f_h=log_f.stride(1),
            STANDS_FOR=stands_for,
            C=c, c_h=c.stride(0),
            FIRST=first,
            BLOCK=launches[-1].block,
            num_warps=1,
            **shared,
        )  # fmt: skip
    return c, first
