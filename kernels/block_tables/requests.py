"""The requests of one step of a server, whose tokens lie in pages that a block table names.

A server such as vLLM computes in each step some tokens of each of many requests, the one after the other in *rows*.
Pages hold 64 tokens of one request; full ones may be shared, even where one request fills a page in the step in which
another goes on after it. Everything here is read on the device, so that a CUDA graph can replay a step.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..tiles import PRUNED_KEYS, cdiv
from ..triton_common import overlapping, wait_for_inputs

PAGE = tl.constexpr(PRUNED_KEYS)
# Requests that are compared at a time.
_COMPARED = 128


class Requests(NamedTuple):
    """What a step computes of each of ``R`` requests.

    Attributes:
        rows: ``[R + 1]`` int32, its first row, and the number of rows of all.
        lengths: ``[R]`` int32, tokens of it so far, those of the step included. A request without rows, which only
            fills up a batch, has 0.
        pages: ``[R, P]`` int32, contiguous rows: the page of each 64 tokens; what lies beyond a request is not read.
        single: so many at the front have one row or none.
        longest: at least as many as the rows of any request.
        writers: ``[R]`` int32, of `find_writers`.
    """

    rows: Tensor
    lengths: Tensor
    pages: Tensor
    single: int
    longest: int
    writers: Tensor

    def launches(self) -> list["RequestLaunch"]:
        """Which programs handle a page of a request each: one for a request with one row, for others as many as it
        takes."""
        others, found = len(self.lengths) - self.single, []
        if self.single:
            found.append(RequestLaunch(0, self.single, 1, 1, 1))
        if others:
            pages = cdiv(self.longest + PRUNED_KEYS - 1, PRUNED_KEYS)
            found.append(RequestLaunch(self.single, others, pages, PRUNED_KEYS, 4))
        return found

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a kernel that reads them."""
        tensors = dict(ROWS=self.rows, LENGTHS=self.lengths, PAGES=self.pages, WRITERS=self.writers)
        return tensors | {"pages_r": self.pages.stride(0)}


class RequestLaunch(NamedTuple):
    """A launch over some requests of a step.

    Attributes:
        begin, requests: the first of them, and how many.
        pages: programs for each of them.
        block: tokens that a program handles at most.
        warps: of a program.
    """

    begin: int
    requests: int
    pages: int
    block: int
    warps: int


class Span(NamedTuple):
    """Tokens that a program handles: in device code, of one request and one page."""

    o_n: Any
    rows: Any
    mask: Any
    begin: Any
    end: Any


@triton.jit
def start_of(ROWS, LENGTHS, i_r):
    """Tokens of a request that come before the step."""
    return tl.load(LENGTHS + i_r) - (tl.load(ROWS + i_r + 1) - tl.load(ROWS + i_r))


@triton.jit
def span_of(first_row, start, end, i_page, BLOCK: tl.constexpr):
    """Tokens from ``start`` to ``end`` of a request that are in its page ``i_page``, and their rows.

    ``first_row`` is that of token ``start``. With a ``BLOCK`` of 1 there is only that one.
    """
    begin, page_end = tl.maximum(start, i_page * PAGE), tl.minimum(end, (i_page + 1) * PAGE)
    o_n = (begin if BLOCK == 1 else i_page * PAGE) + tl.arange(0, BLOCK)
    return Span(o_n, first_row + o_n - start, (o_n >= begin) & (o_n < page_end), begin, page_end)


@launched
@triton.jit(do_not_specialize=["R", "pages_r"], do_not_specialize_on_alignment=["ROWS", "LENGTHS", "PAGES", "WRITERS"])
def _find_writers_kernel(ROWS, LENGTHS, PAGES, WRITERS, pages_r, R, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """A program for each request; arguments as of `find_writers`."""
    wait_for_inputs(OVERLAPS)
    i_r = tl.program_id(0)
    start = start_of(ROWS, LENGTHS, i_r)
    writer = -1
    if (start > 0) & (start % PAGE == 0) & (tl.load(LENGTHS + i_r) > start):
        i_page = start // PAGE - 1
        page = tl.load(PAGES + i_r.to(tl.int64) * pages_r + i_page)
        for begin in range(0, R, BLOCK):
            o_r = begin + tl.arange(0, BLOCK)
            m_r = o_r < R
            ends = tl.load(LENGTHS + o_r, mask=m_r, other=0)
            rows = tl.load(ROWS + o_r + 1, mask=m_r, other=0) - tl.load(ROWS + o_r, mask=m_r, other=0)
            # Those that write the last token of that page of theirs in this step.
            m_r = m_r & (ends >= start) & (ends - rows < start)
            pages = tl.load(PAGES + o_r.to(tl.int64) * pages_r + i_page, mask=m_r, other=-1)
            writer = tl.maximum(writer, tl.max(tl.where(m_r & (pages == page), o_r, -1), 0))
    tl.store(WRITERS + i_r, writer)


def find_writers(rows: Tensor, lengths: Tensor, pages: Tensor) -> Tensor:
    """Which other request, if any, fills in this step the page after which a request goes on.

    Args:
        rows, lengths, pages: as of `Requests`.

    Returns:
        ``[R]`` int32 requests, -1 for none.
    """
    writers = torch.empty_like(lengths)
    with on_device_of(lengths):
        _find_writers_kernel[(len(lengths),)](
            ROWS=rows,
            LENGTHS=lengths,
            PAGES=pages,
            pages_r=pages.stride(0),
            WRITERS=writers,
            R=len(lengths),
            BLOCK=_COMPARED,
            num_warps=1,
            **overlapping(lengths),
        )
    return writers
