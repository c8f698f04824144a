"""`Pages` on a GPU: the same pages, read and written by kernels that look tokens up in vLLM's block table.

Nothing here waits for the device, and what a step of one token for each request does depends on shapes alone, so that
vLLM can capture it as a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.block_tables.append import PagePools, append_step
from ...kernels.block_tables.requests import Requests, find_writers
from ...kernels.block_tables.shift import previous_states
from ...kernels.pruning.key_stats import KeySummary
from ..cache.view import CacheView
from .pages import Chunk, PageLayout, Pages


class Prompts(NamedTuple):
    """Requests, one after the other, of which the step computes the first tokens: attended to as one packed row.

    Attributes:
        requests: which.
        rows: of all their tokens.
        length: of one row with as many pairs of query and key.
        begins: ``[tokens]`` int64, for each the index among these rows of its request's first; after `GpuStep.begin`.
    """

    requests: slice
    rows: slice
    length: int
    begins: Tensor | None = None

    def isolated(self, v: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``v`` and ``log_f`` without what is not finite, which would reach the other requests of the row.

        Args:
            v: ``[1, T, G, D]`` values of these rows.
            log_f: ``[1, T, Hf]`` log gates; -inf is a gate of zero.

        Returns:
            Both, and ``[T]`` bool, tokens whose output is of such values or gates: those of the same request from
            there on. None where there is one request alone.
        """
        if self.requests.stop - self.requests.start == 1:
            return v, log_f, None
        assert self.begins is not None
        broken = log_f.isnan().any(-1)[0] | ~v.isfinite().all(-1).all(-1)[0]
        last = torch.where(broken, torch.arange(len(broken), device=v.device), -1).cummax(0).values
        v, log_f = v.masked_fill(broken[:, None, None], 0.0), log_f.masked_fill(broken[:, None], 0.0)
        return v, log_f, last >= self.begins


class GpuStep(NamedTuple):
    """The tokens that one forward pass computes: those of requests with one token, then those of others.

    Attributes:
        rows, lengths, pages, longest: as of `Requests`.
        single: so many requests at the front have one token or none.
        chunks: of the requests after those with one token.
        prompts: likewise, where there are no tokens before.
        counts: as of `CacheView`.
        requests: of the step, and `last` the index of the last token of those with one, ``[single, 1]`` int64; after
            `begin`.
    """

    rows: Tensor
    lengths: Tensor
    pages: Tensor
    longest: int
    single: int
    chunks: list[Chunk]
    prompts: list[Prompts]
    counts: Tensor | None = None
    requests: Requests | None = None
    last: Tensor | None = None

    def begin(self) -> "GpuStep":
        """What all layers read, computed once within a forward pass, so that a captured one computes it too."""
        writers = find_writers(self.rows, self.lengths, self.pages)
        requests = Requests(self.rows, self.lengths, self.pages, self.single, self.longest, writers)
        last = (self.lengths[: self.single].long() - 1)[:, None]
        prompts = [x._replace(begins=self._begins(x)) for x in self.prompts]
        return self._replace(requests=requests, last=last, prompts=prompts)

    def _begins(self, prompts: Prompts) -> Tensor:
        first, stop = prompts.requests.start, prompts.requests.stop
        begins = self.rows[first:stop] - prompts.rows.start
        index = torch.arange(prompts.rows.stop - prompts.rows.start, device=begins.device, dtype=begins.dtype)
        return begins[torch.searchsorted(begins, index, right=True) - 1].long()


class GpuPages(Pages):
    """A layer's pages, of 64 tokens; arguments and methods as of `Pages`."""

    def __init__(self, cache: Tensor, layout: PageLayout) -> None:
        super().__init__(cache, layout)
        names = ("key", "value", "gate_sum", "kv_start", "log_decay", "largest")
        self.pools = PagePools(*(self.views[name] for name in names))
        # At the end of each page.
        sums, log_decays, largest = self.pools.sums, self.pools.log_decays, self.pools.largest
        self.summary = KeySummary(sums[:, :, -1:], log_decays[..., None], largest[..., None])

    def previous(self, name: str, states: Tensor, step: GpuStep) -> Tensor:  # type: ignore[override]
        assert step.requests is not None
        return previous_states(states[0], self.views[f"unshifted_{name}"], step.requests)[None]

    def append(  # type: ignore[override]
        self, k: Tensor, v: Tensor, log_f: Tensor, step: GpuStep, stands_for: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert step.requests is not None
        c, first = append_step(k[0], v[0], log_f[0], step.requests, self.pools, stands_for)
        return c[None], first[None]

    def view(self, step: GpuStep) -> CacheView:
        """What the kernels of decoding read for the requests with one token."""
        return CacheView(self.summary, step.pages[: step.single], counts=step.counts)
