"""Pages of an evicting cache, given back and handed out in one Triton launch for a layer.

`PagePool.plan_moves` in PyTorch defines it, which takes two dozen operators.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched

# Entries of the table that the program looks at, at a time.
_ENTRIES = 4096
_VARYING = ["n_free", "n_pages", "ROWS", "USED", "BLOCKS", "N"]


@triton.jit
def _entries(begin, ROWS, USED, N, BLOCK: tl.constexpr):
    """Rows and blocks of some entries, which of them there are, and where."""
    i = begin + tl.arange(0, BLOCK)
    rows, blocks = i // USED, i % USED
    return rows, blocks, rows < ROWS, rows * N + blocks


@triton.jit
def _load_start(START, NEW_START, rows, m):
    return tl.maximum(tl.load(START + rows, mask=m, other=0), tl.load(NEW_START + rows, mask=m, other=0))


@launched
@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["FREE", "COUNTS"])
def _move_pages_kernel(
    PAGES, START, NEW_START, FREE, COUNTS,
    n_free, n_pages, ROWS, USED, BLOCKS, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: every page that is given back can be handed out again."""
    for begin in range(0, ROWS * USED, BLOCK):
        rows, blocks, m, entry = _entries(begin, ROWS, USED, N, BLOCK)
        page = tl.load(PAGES + entry, mask=m, other=-1)
        evicted = (page >= 0) & (blocks < _load_start(START, NEW_START, rows, m))
        tl.store(FREE + n_free + tl.cumsum(evicted.to(tl.int32), 0) - 1, page, mask=evicted)
        tl.store(PAGES + entry, -1 + tl.zeros_like(page), mask=evicted)
        n_free += tl.sum(evicted.to(tl.int32), 0)
    # What other threads have stored is read.
    tl.debug_barrier()
    wanted_before = n_free * 0
    for begin in range(0, ROWS * USED, BLOCK):
        rows, blocks, m, entry = _entries(begin, ROWS, USED, N, BLOCK)
        page = tl.load(PAGES + entry, mask=m, other=0)
        wanted = (page < 0) & (blocks < BLOCKS) & (blocks >= _load_start(START, NEW_START, rows, m))
        order = wanted_before + tl.cumsum(wanted.to(tl.int32), 0) - 1
        free = tl.load(FREE + n_free - 1 - order, mask=wanted & (order < n_free), other=0)
        tl.store(PAGES + entry, tl.where(order < n_free, free, n_pages + order - n_free), mask=wanted)
        wanted_before += tl.sum(wanted.to(tl.int32), 0)
    # All threads have read what is overwritten.
    tl.debug_barrier()
    for begin in range(0, ROWS, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        start = _load_start(START, NEW_START, rows, rows < ROWS)
        tl.store(START + rows, start, mask=rows < ROWS)
    tl.store(COUNTS, tl.maximum(n_free - wanted_before, 0))
    tl.store(COUNTS + 1, tl.maximum(wanted_before - n_free, 0))


def move_pages(
    pages: Tensor,
    start: Tensor,
    new_start: Tensor,
    free: Tensor,
    counts: Tensor,
    *,
    n_free: int,
    n_pages: int,
    used: int,
    blocks: int,
) -> None:
    """Give back the pages of all blocks before ``new_start``, and find one for every block that needs one.

    Args:
        pages: ``[B, G, N]`` int32 table, contiguous, -1 where there is no page; changed in place.
        start: ``[B, G]`` int32 first block that is not evicted; becomes the larger of itself and ``new_start``.
        new_start: likewise, contiguous; ``start`` itself to give nothing back.
        free: ``[n_pages or more]`` int32 pages that are not in use, of which the last is handed out first; changed in
            place.
        counts: ``[2]`` int32, written: pages that are free now, and those handed out that the pool does not have yet.
        n_free: pages in ``free``.
        n_pages: of the pool. If they do not suffice, those that follow are handed out too.
        used: blocks of the table in which there may be pages.
        blocks: the first so many are to have pages, from ``start`` on.
    """
    with on_device_of(pages):
        _move_pages_kernel[(1,)](
            PAGES=pages, START=start, NEW_START=new_start, FREE=free, COUNTS=counts,
            n_free=n_free,
            n_pages=n_pages,
            ROWS=start.numel(),
            USED=used,
            BLOCKS=blocks,
            N=pages.shape[-1],
            BLOCK=_ENTRIES,
            num_warps=8,
        )  # fmt: skip
