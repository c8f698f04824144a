"""Token shift over pages, in Triton: the state before each token of a step, and what each page keeps for the next."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..operators import maybe_contiguous
from ..tiles import padded_head_dim
from ..triton_common import load_rows, overlapping, wait_for_inputs
from .requests import PAGE, Requests, span_of, start_of

_PARTS = ["STATES", "HELD", "PREVIOUS", "ROWS", "LENGTHS", "PAGES", "WRITERS"]


@launched
@triton.jit(do_not_specialize=["pages_r", "BEGIN"], do_not_specialize_on_alignment=_PARTS)
def _previous_states_kernel(
    STATES, HELD, PREVIOUS, ROWS, LENGTHS, PAGES, WRITERS,
    s_t, s_h, held_p, held_h, pages_r, G, BEGIN,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A page of a head of a request; arguments as of `previous_states`."""
    wait_for_inputs(OVERLAPS)
    i_r, i_g = BEGIN + tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_row = tl.load(ROWS + i_r)
    start, end = start_of(ROWS, LENGTHS, i_r), tl.load(LENGTHS + i_r)
    i_page = start // PAGE + tl.program_id(2)
    if (end > start) & (i_page * PAGE < end):
        span = span_of(first_row, start, end, i_page, BLOCK)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_states, p_pages = STATES + i_g * s_h, PAGES + i_r.to(tl.int64) * pages_r
        b = load_rows(p_states, span.rows - 1, s_t, span.mask & (span.o_n > start), D, BLOCK_D, True)
        if (span.begin == start) & (start > 0):
            writer = tl.load(WRITERS + i_r)
            if writer >= 0:
                # Its page is written in this launch.
                row = tl.load(ROWS + writer) + start - 1 - start_of(ROWS, LENGTHS, writer)
                before = tl.load(p_states + row.to(tl.int64) * s_t + o_d, mask=m_d, other=0.0)
            else:
                page = tl.load(p_pages + (start - 1) // PAGE).to(tl.int64)
                before = tl.load(HELD + page * held_p + i_g * held_h + o_d, mask=m_d, other=0.0)
            b = tl.where((span.o_n == start)[:, None], before[None, :], b)
        p_out = PREVIOUS + (span.rows.to(tl.int64) * G + i_g)[:, None] * D + o_d[None, :]
        tl.store(p_out, b, mask=span.mask[:, None] & m_d[None, :])
        last = tl.load(p_states + (first_row + span.end - 1 - start).to(tl.int64) * s_t + o_d, mask=m_d, other=0.0)
        # All threads have read what is overwritten.
        tl.debug_barrier()
        page = tl.load(p_pages + i_page).to(tl.int64)
        tl.store(HELD + page * held_p + i_g * held_h + o_d, last, mask=m_d)


def previous_states(states: Tensor, held: Tensor, requests: Requests) -> Tensor:
    """The state before each token of a step; zero before a request's first.

    Args:
        states: ``[T, G, D]`` keys or values before token shift, of the rows of the step.
        held: ``[P, G, D]`` the state of the last token of each page so far, in any strides but of the last dimension;
            takes in the new ones.
        requests: of the step.

    Returns:
        ``[T, G, D]`` contiguous; rows of no request are not written.
    """
    states = maybe_contiguous(states)
    previous = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    _, heads, head_dim = states.shape
    with on_device_of(states):
        for launch in requests.launches():
            _previous_states_kernel[(launch.requests, heads, launch.pages)](
                STATES=states, s_t=states.stride(0), s_h=states.stride(1),
                HELD=held, held_p=held.stride(0), held_h=held.stride(1),
                PREVIOUS=previous,
                **requests.arguments,
                G=heads,
                BEGIN=launch.begin,
                D=head_dim,
                BLOCK_D=padded_head_dim(head_dim),
                BLOCK=launch.block,
                num_warps=launch.warps,
                **overlapping(states),
            )  # fmt: skip
    return previous
