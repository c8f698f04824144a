"""What a page of vLLM's cache holds of a FoX layer, and how one step reads and writes it. Imports nothing of vLLM.

A page holds ``N`` tokens of one request. Beside keys and values it has the float64 gate sum of each token, and of the
last of its tokens that was computed what the next token goes on from: the first key that is still visible, with token
shift the key and value before it, and, on a GPU, what pruning reads of all keys so far
(`kernels.block_tables.append.PagePools`).
vLLM lets requests share full pages only (prefix caching), and computes a request anew from its first token, or from a
full page, after it was preempted; so what a full page says of its last token is all that a request needs that goes on
after it.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.decay import accumulate

# Of everything in a page: kernels read keys in vectors of this size, and a float64 may stand anywhere.
_ALIGNMENT = 16


class PageLayout(NamedTuple):
    """Sizes of a layer's pages.

    Attributes:
        tokens: ``N`` of a page.
        gates: ``Hf``, forget gates of a token.
        kv_heads, head_dim: ``G`` and ``D``.
        shifted: which of ``key`` and ``value`` go through token shift.
        dtype: of keys and values.
    """

    tokens: int
    gates: int
    kv_heads: int
    head_dim: int
    shifted: tuple[str, ...]
    dtype: torch.dtype

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a page, in the order in which they are stored."""
        heads_of_page = (self.kv_heads, self.tokens, self.head_dim)
        return {
            "key": (heads_of_page, self.dtype),
            "value": (heads_of_page, self.dtype),
            "gate_sum": ((self.gates, self.tokens), torch.float64),
            "kv_start": ((self.gates,), torch.int64),
            "log_decay": ((self.gates,), torch.float64),
            "largest": ((self.kv_heads,), torch.float32),
            **{f"unshifted_{name}": ((self.kv_heads, self.head_dim), self.dtype) for name in self.shifted},
        }

    def bytes_per_token(self) -> int:
        """A page's size, as vLLM counts it: by the token."""
        size = sum(_aligned_size(*part) for part in self.parts().values())
        return _aligned(-(-size // self.tokens))

    def read_buffers(self, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
        """As much memory as `Pages.read` returns of so many tokens."""
        heads = torch.empty(2, self.kv_heads, tokens, self.head_dim, dtype=self.dtype, device=device)
        return heads, torch.empty(self.gates, tokens, dtype=torch.float64, device=device)

    def views(self, cache: Tensor) -> dict[str, Tensor]:
        """Each tensor of all pages, ``[pages, ...]``, as a view of the bytes that vLLM allocates.

        Args:
            cache: int8, ``[pages, 1, N, bytes of a token]``, each page contiguous.
        """
        expected = (1, self.tokens, self.bytes_per_token())
        if cache.dtype != torch.int8 or cache.shape[1:] != expected or not cache[0].is_contiguous():
            raise ValueError(
                f"cache must be int8 [pages, {', '.join(map(str, expected))}] with contiguous pages, got {cache.dtype} "
                f"of shape {list(cache.shape)} and strides {list(cache.stride())}"
            )
        pages = cache.view(len(cache), -1)
        views, start = {}, 0
        for name, (shape, dtype) in self.parts().items():
            size = math.prod(shape) * dtype.itemsize
            views[name] = pages[:, start : start + size].view(dtype).unflatten(1, shape)
            start += _aligned(size)
        return views


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return _aligned(math.prod(shape) * dtype.itemsize)


class Chunk(NamedTuple):
    """The tokens of one request in a step.

    Attributes:
        rows: of these tokens among those of the step.
        start: how many tokens of the request come before.
        pages: ``[pages]`` int, of all tokens up to the last of these.
    """

    rows: slice
    start: int
    pages: Tensor

    @property
    def end(self) -> int:
        return self.start + self.rows.stop - self.rows.start


class _Carried(NamedTuple):
    """Chunks that go on from a page: their first rows, and the page of the token before; both ``[chunks]`` int64."""

    rows: Tensor
    pages: Tensor


class Step(NamedTuple):
    """The tokens that one forward pass computes: chunks of requests, one after the other.

    Attributes:
        tokens: their number.
        chunks: by `Chunk.start`, increasing: one that goes on from a page which another writes in this step comes after
            it, since vLLM may let a request share the pages of another that was scheduled in the same step.
        pages, offsets: ``[tokens]`` int64, where each token is stored.
        firsts: ``[chunks]`` int64 rows.
        lasts: ``[..]`` int64, rows after which a page or a chunk ends.
        within, after: chunks that begin within a page, and those that begin after a full one.
    """

    tokens: int
    chunks: list[Chunk]
    pages: Tensor
    offsets: Tensor
    firsts: Tensor
    lasts: Tensor
    within: _Carried
    after: _Carried
    # As of `GpuStep`; here each chunk is attended to alone.
    single: int = 0
    prompts: tuple[()] = ()

    def begin(self) -> "Step":
        """Of a forward pass, before its layers."""
        return self


def make_step(chunks: Iterable[Chunk], page_tokens: int) -> Step:
    """The `Step` of chunks in the order of their rows, in pages of so many tokens."""
    chunks = list(chunks)
    positions = torch.cat([torch.arange(x.start, x.end) for x in chunks])
    pages = torch.cat([x.pages[torch.arange(x.start, x.end) // page_tokens] for x in chunks])
    offsets = positions % page_tokens
    ends = offsets == page_tokens - 1
    ends[[x.rows.stop - 1 for x in chunks]] = True

    def carried(is_within: bool) -> _Carried:
        found = [x for x in chunks if x.start > 0 and bool(x.start % page_tokens) == is_within]
        rows = torch.tensor([x.rows.start for x in found], dtype=torch.int64)
        before = [int(x.pages[(x.start - 1) // page_tokens]) for x in found]
        return _Carried(rows, torch.tensor(before, dtype=torch.int64))

    return Step(
        tokens=len(positions),
        chunks=sorted(chunks, key=lambda x: x.start),
        pages=pages,
        offsets=offsets,
        firsts=torch.tensor([x.rows.start for x in chunks]),
        lasts=ends.nonzero()[:, 0],
        within=carried(True),
        after=carried(False),
    )


class Pages:
    """A layer's pages.

    Args:
        cache: as vLLM allocates it.
        layout: sizes of a page.
    """

    def __init__(self, cache: Tensor, layout: PageLayout) -> None:
        self.layout = layout
        self.views = layout.views(cache)

    def previous(self, name: str, states: Tensor, step: Step) -> Tensor:
        """The unshifted state before each of ``states``, ``[1, T, G, D]``; zero before a request's first token.

        Args:
            name: ``key`` or ``value``.
            states: unshifted, of the tokens of the step; they are taken in.
            step: which tokens these are.
        """
        held = self.views[f"unshifted_{name}"]
        previous = torch.cat([states.new_zeros(1, 1, *states.shape[2:]), states[:, :-1]], dim=1)
        previous[0, step.firsts] = 0.0
        # A chunk that begins within a page is the one that writes it; one that begins after a page may share a page
        # that is written in this step.
        previous[0, step.within.rows] = held[step.within.pages]
        held[step.pages[step.lasts]] = states[0, step.lasts]
        previous[0, step.after.rows] = held[step.after.pages]
        return previous

    def append(
        self, k: Tensor, v: Tensor, log_f: Tensor, step: Step, stands_for: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take in the tokens of a step.

        Args:
            k, v: ``[1, T, G, D]`` keys and values as attention takes them.
            log_f: ``[1, T, Hf]`` log gates.
            step: whose tokens these are.
            stands_for: ``[T]`` bool, tokens that the attention sink stands for where they begin a request, or None.

        Returns:
            Running sums of each token's own request ``[1, Hf, T]`` float64, and the first key it may see, int64.
        """
        self.views["key"][step.pages, :, step.offsets] = k[0]
        self.views["value"][step.pages, :, step.offsets] = v[0]
        sums, kv_starts, size = self.views["gate_sum"], self.views["kv_start"], self.layout.tokens
        all_c = log_f.new_empty(1, log_f.shape[2], step.tokens, dtype=torch.float64)
        all_first = torch.empty(all_c.shape, dtype=torch.int64)
        for chunk in step.chunks:
            carry = None
            if chunk.start > 0:
                before, offset = int(chunk.pages[(chunk.start - 1) // size]), (chunk.start - 1) % size
                carry = sums[before, :, offset][None], kv_starts[before][None]
            c, first = accumulate(log_f[:, chunk.rows], chunk.start, carry)
            if chunk.start == 0 and stands_for is not None and stands_for[chunk.rows.start]:
                # Nothing sees the first key beside the sink.
                first = first.clamp(min=1)
            pages, offsets = step.pages[chunk.rows], step.offsets[chunk.rows]
            sums[pages, :, offsets] = c[0].T
            # Later tokens of a page write over earlier ones: only the last of each is written.
            ends = offsets == size - 1
            ends[-1] = True
            kv_starts[pages[ends]] = first[0].T[ends]
            all_c[..., chunk.rows], all_first[..., chunk.rows] = c, first
        return all_c, all_first

    def read(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[1, Tk, G, D]`` and gate sums ``[1, Hf, Tk]`` of all tokens of a request so far."""
        views = (self.views[name].transpose(0, 1)[:, chunk.pages] for name in ("key", "value", "gate_sum"))
        k, v, c = (x.flatten(1, 2)[:, : chunk.end] for x in views)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None], c[None]
