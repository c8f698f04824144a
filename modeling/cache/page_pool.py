"""Pages of keys, values and running sums of gates: a pool, a table, and the operations that move pages.

A page holds 64 tokens of one key/value head. The table says which page holds each block of 64 tokens of a head; the
pages of evicted blocks wait to be used again. Pages are allocated and evicted between steps. A decoding step only reads
the table, so that a CUDA graph can replay it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...kernels.pruning.key_stats import KeySummary
from ...kernels.pruning.rounding import logit_margin
from ...kernels.tiles import PRUNED_KEYS as PAGE


class PagePool:
    """The pages of one layer.

    Attributes:
        keys, values: ``[P, 64, D]`` pages; page 0 takes what has no place. None before any token.
        c: ``[P, R, 64]`` float64 running sums of log gates, of the ``R`` gates of a page's key/value head.
        pages: ``[B, G, N]`` int32 page of each 64 tokens, -1 where there is none.
        start: ``[B, G]`` int32 first block of 64 tokens that is not evicted.
    """

    # Set by `make_pool`.
    keys: Any = None
    values: Any = None
    c: Any = None
    pages: Tensor
    start: Tensor
    _gates: int
    # Begins with the pages that are not in use, ``[P or more]`` int32; how many; and blocks that ever had pages.
    _free: Any = None
    _free_count = _used = 0

    def make_pool(self, key_states: Tensor, value_states: Tensor, gates: int, blocks: int) -> None:
        """An empty pool and table.

        Args:
            key_states, value_states: ``[B, G, any, D]``, for keys and values like these.
            gates: per token, ``Hf``.
            blocks: of 64 tokens that a sequence may have.
        """
        batch, heads = key_states.shape[:2]
        self.dtype, self.device, self._gates = key_states.dtype, key_states.device, gates
        self.keys, self.values = (x.new_zeros(1, PAGE, x.shape[-1]) for x in (key_states, value_states))
        self.c = torch.zeros(1, max(1, gates // heads), PAGE, dtype=torch.float64, device=self.device)
        self.pages = fixed_address(torch.full((batch, heads, blocks), -1, dtype=torch.int32, device=self.device))
        self.start = fixed_address(torch.zeros(batch, heads, dtype=torch.int32, device=self.device))
        self._free = torch.empty(1, dtype=torch.int32, device=self.device)
        self._free_count = self._used = 0

    def drop_pool(self) -> None:
        """Give back all memory of pages."""
        self.keys = self.values = self.c = self._free = None

    def held_bytes(self) -> int:
        """Bytes of keys, values and running sums of gates, those of unused pages included."""
        return sum(x.nbytes for x in (self.keys, self.values, self.c) if x is not None)

    def plan_moves(self, new_start: Tensor | None, blocks: int, counts: Tensor) -> None:
        """Give back the pages of blocks before ``new_start``, and hand out pages for all of the first ``blocks`` from
        `start` on, also some that `take_counts` has yet to make.

        Args:
            new_start: ``[B, G]`` int32; None gives nothing back.
            blocks: of 64 tokens.
            counts: ``[2]`` int32, written: pages that are free now, and those that are to be made.
        """
        self._used = max(self._used, blocks)
        from ...kernels.backends import backend_of

        move = backend_of(self.keys).move_pages
        if move is not None:
            sizes = dict(n_free=self._free_count, n_pages=len(self.keys), used=self._used, blocks=blocks)
            start = self.start if new_start is None else new_start
            move(self.pages, self.start, start, self._free, counts, **sizes)
            return
        # By masks and sums alone: to select by a mask would synchronise, to find out how many there are.
        index = torch.arange(self.pages.shape[-1], device=self.device)
        if new_start is not None:
            self.start.copy_(torch.maximum(self.start, new_start))
        is_needed = index >= self.start[..., None]
        evicted = ((self.pages >= 0) & ~is_needed).flatten()
        order = evicted.cumsum(0)
        # The last place takes what is not evicted: page 0 is never free, so pages are one more than free ones.
        places = torch.where(evicted, order + (self._free_count - 1), len(self._free) - 1)
        self._free.scatter_(0, places, self.pages.flatten())
        free = order[-1] + self._free_count
        wanted = ((self.pages < 0) & is_needed & (index < blocks)).flatten()
        order = wanted.cumsum(0)
        # The last is handed out first.
        found = self._free[(free - order).clamp(min=0)]
        found = torch.where(order <= free, found, len(self.keys) + order - free - 1).view_as(self.pages)
        self.pages.masked_fill_(evicted.view_as(self.pages), -1)
        self.pages.copy_(torch.where(wanted.view_as(self.pages), found, self.pages))
        left = free - order[-1]
        counts.copy_(torch.stack([left.clamp(min=0), (-left).clamp(min=0)]))

    def take_counts(self, free: int, missing: int) -> None:
        """Take what `plan_moves` has found, and make the pages that are missing."""
        self._free_count = free
        if missing == 0:
            return
        held, row_blocks = len(self.keys), self.pages[..., 0].numel()
        # Larger steps mean fewer copies and fewer new captures of a CUDA graph.
        spare = max(4 * row_blocks, held // 16)
        total = held + missing + spare
        pools = [(name, getattr(self, name)) for name in ("keys", "values", "c")]
        # All or none: there may be no memory for the last.
        grown = [(name, old, old.new_zeros(total, *old.shape[1:])) for name, old in pools]
        unused = torch.empty(total, dtype=torch.int32, device=self.device)
        for name, old, new in grown:
            new[:held] = old
            torch._dynamo.mark_dynamic(fixed_address(new), 0)
            setattr(self, name, new)
        torch.arange(held + missing, total, out=unused[:spare])
        self._free, self._free_count = unused, spare

    def forget_missing(self) -> None:
        """Take pages that could not be made out of the table; a query that needs them gets NaN. Free ones are lost."""
        self.pages.masked_fill_(self.pages >= len(self.keys), -1)
        self._free_count = 0

    def write_tokens(self, keys: Tensor, values: Tensor, c: Tensor, positions: Tensor) -> None:
        """Write tokens whose pages are allocated.

        Args:
            keys, values: ``[B, G, T, D]``.
            c: ``[B, Hf, T]``.
            positions: ``[T]`` int64.
        """
        slot = positions.remainder(PAGE)
        page = self.pages.index_select(-1, positions // PAGE).clamp(min=0).long()
        self.keys[page, slot] = keys
        self.values[page, slot] = values
        rows = torch.arange(self.c.shape[1], device=c.device)
        self.c[page[:, :, None], rows[:, None], slot] = self.by_head(c)

    def write_blocks(self, begin: int, keys: Tensor, values: Tensor, c: Tensor) -> None:
        """Write whole blocks from ``begin`` on: `in_blocks` of keys, values and sums, ``[B, G, T, R]``.

        Evicted blocks go to page 0. Selecting the others by a mask would synchronise, to find out how many they are.
        """
        pages = self.pages[..., begin : begin + keys.shape[2]].clamp(min=0).long()
        for pool, x in ((self.keys, keys), (self.values, values), (self.c.mT, c)):
            pool[pages] = x

    def read(self, length: int, summary: KeySummary) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[B, G, length, D]`` and running sums ``[B, G, R, length]``.

        No query attends to evicted keys, but pruning must count them. So all keys of an evicted block get the length of
        the longest key so far and equal decays, whose sum is that of the true ones.

        Args:
            length: tokens to read, from the first.
            summary: of all keys, evicted ones included.
        """
        blocks = -(-length // PAGE)
        pages = self.pages[..., :blocks]
        evicted = (pages < 0)[..., None, None]
        pages = pages.clamp(min=0).long()
        size = self.keys.shape[-1]
        # As rounded to the dtype of the keys.
        margin = torch.finfo(self.keys.dtype).eps + logit_margin(size, torch.float32)
        largest = summary.largest[..., :blocks, None, None] * (1.0 + margin)
        largest = torch.nn.functional.pad(largest, (0, size - 1))
        keys = torch.where(evicted, largest.to(self.keys.dtype), self.keys[pages])
        values = self.values[pages].masked_fill(evicted, 0.0)
        log_decays = self.by_head(summary.log_decays[..., :blocks])
        before = torch.nn.functional.pad(log_decays, (1, 0), value=float("-inf"))[..., :blocks]
        equal_c = math.log(PAGE) - log_decays - torch.log1p(-torch.exp(before - log_decays))
        c = torch.where(evicted, equal_c.mT[..., None], self.c[pages]).mT
        keys, values, c = (x.flatten(2, 3)[:, :, :length] for x in (keys, values, c))
        return keys, values, c.mT

    def by_head(self, c: Tensor) -> Tensor:
        """``[B, Hf, T] -> [B, G, R, T]``: the gates of each key/value head."""
        heads = self.pages.shape[1]
        return c[:, None].expand(-1, heads, -1, -1) if c.shape[1] == 1 else c.unflatten(1, (heads, -1))

    def by_gate(self, c: Tensor) -> Tensor:
        """``[B, G, R, T] -> [B, Hf, T]``, the reverse; a gate shared by all heads is held once for each of them."""
        return c[:, 0] if self._gates == 1 else c.flatten(1, 2)

    def select_rows(self, rows: Tensor) -> None:
        """Make the sequences those at ``rows``, each with pages of its own."""
        pages = self.pages.index_select(0, rows)
        held = pages >= 0
        used = pages[held].long()
        # Page 0 stays; the others follow in the order of the table, without gaps.
        order = torch.cat([used.new_zeros(1), used])
        for name in ("keys", "values", "c"):
            setattr(self, name, fixed_address(getattr(self, name).index_select(0, order)))
        pages[held] = torch.arange(1, len(order), device=self.device, dtype=torch.int32)
        self.pages, self.start = fixed_address(pages), fixed_address(self.start.index_select(0, rows))
        self._free = torch.empty(len(order), dtype=torch.int32, device=self.device)
        self._free_count = 0


def move_pages(layers: Sequence[PagePool], starts: Sequence[Tensor | None], blocks: int) -> None:
    """Evict all blocks before ``starts``, then have pages for all of the first ``blocks`` that are not evicted.

    Synchronises once for the layers of a device: once for each would keep the device waiting for the host.

    Args:
        layers: of a cache.
        starts: of each, ``[B, G]`` int32; None evicts nothing.
        blocks: of 64 tokens.

    Raises:
        torch.OutOfMemoryError: there is no memory for the pages. The cache is then to be reset.
    """
    for device in dict.fromkeys(layer.pages.device for layer in layers):
        of_device = [(layer, x) for layer, x in zip(layers, starts, strict=True) if layer.pages.device == device]
        # Zeros, since they are read where launches are left out, too.
        counts = torch.zeros(len(of_device), 2, dtype=torch.int32, device=device)
        for (layer, start), of_layer in zip(of_device, counts, strict=True):
            layer.plan_moves(start, blocks, of_layer)
        try:
            for (layer, _), of_layer in zip(of_device, counts.tolist(), strict=True):
                layer.take_counts(*of_layer)
        except torch.OutOfMemoryError:
            for layer, _ in of_device:
                layer.forget_missing()
            raise


def fixed_address(x: Tensor) -> Tensor:
    """Tell torch.compile that ``x`` keeps its address: CUDA graphs take in-place writes then."""
    if not is_torchdynamo_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def in_blocks(x: Tensor) -> Tensor:
    """``[B, G, T, D] -> [B, G, blocks, 64, D]``, a copy, padded with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % PAGE)).unflatten(2, (-1, PAGE)).contiguous()
