"""Pages of keys, values and running sums of gates: a pool, a table, and the operations that move pages.

A page holds 64 tokens of one key/value head. The table says which page holds each block of 64 tokens of a head; the
pages of evicted blocks wait to be used again. Pages are allocated and evicted between steps. A decoding step only reads
the table, so that a CUDA graph can replay it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    # Pages of the pool that are not in use.
    _free: Any = None

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
        self._free = torch.empty(0, dtype=torch.int64, device=self.device)

    def drop_pool(self) -> None:
        """Give back all memory of pages."""
        self.keys = self.values = self.c = self._free = None

    def held_bytes(self) -> int:
        """Bytes of keys, values and running sums of gates, those of unused pages included."""
        return sum(x.nbytes for x in (self.keys, self.values, self.c) if x is not None)

    def _carry_out(self, plan: "_PagePlan", evicted: int, wanted: int) -> None:
        """Do it; ``evicted`` and ``wanted`` are the numbers of pages."""
        if evicted:
            # Selecting by a mask would synchronise, to find out how many there are.
            order = plan.evicted.flatten().byte().argsort(descending=True, stable=True)
            self._free = torch.cat([self._free, self.pages.flatten()[order[:evicted]].long()])
            self.pages.masked_fill_(plan.evicted, -1)
        self.start.copy_(plan.start)
        if wanted:
            if (missing := wanted - len(self._free)) > 0:
                self._grow(missing)
            self.pages.masked_scatter_(plan.wanted, self._free[:wanted].int())
            self._free = self._free[wanted:]

    def _grow(self, missing: int) -> None:
        held, row_blocks = len(self.keys), self.pages[..., 0].numel()
        # Larger steps mean fewer copies and fewer new captures of a CUDA graph.
        more = missing + max(4 * row_blocks, held // 16)
        for name in ("keys", "values", "c"):
            old = getattr(self, name)
            grown = old.new_zeros(held + more, *old.shape[1:])
            grown[:held] = old
            torch._dynamo.mark_dynamic(fixed_address(grown), 0)
            setattr(self, name, grown)
        self._free = torch.cat([self._free, torch.arange(held, held + more, device=self.device)])

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
        self._free = self._free[:0]


class _PagePlan(NamedTuple):
    """Blocks of layers whose pages are freed, and that get pages: ``[L, B, G, N]`` bool.

    Attributes:
        start: ``[L, B, G]``, `PagePool.start` from then on.
    """

    start: Tensor
    evicted: Tensor
    wanted: Tensor


def move_pages(layers: Sequence[PagePool], starts: Sequence[Tensor | None], blocks: int) -> None:
    """Evict all blocks before ``starts``, then have pages for all of the first ``blocks`` that are not evicted.

    Plans for all layers of a device at once and synchronises once: operators and synchronisations for each layer would
    keep the device waiting for the host.

    Args:
        layers: of a cache.
        starts: of each, ``[B, G]`` int32; None evicts nothing.
        blocks: of 64 tokens.
    """
    for device in dict.fromkeys(layer.pages.device for layer in layers):
        of_device = [
            (layer, start) for layer, start in zip(layers, starts, strict=True) if layer.pages.device == device
        ]
        held_from = torch.stack([layer.start for layer, _ in of_device])
        start = torch.stack([layer.start if start is None else start for layer, start in of_device])
        start = torch.maximum(start, held_from)
        held = torch.stack([layer.pages for layer, _ in of_device]) >= 0
        index = torch.arange(held.shape[-1], device=device)
        needed = index >= start[..., None]
        plan = _PagePlan(start, held & ~needed, ~held & needed & (index < blocks))
        counts = torch.stack([x.flatten(1).sum(1) for x in (plan.evicted, plan.wanted)], dim=1).tolist()
        for i, (layer, _) in enumerate(of_device):
            layer._carry_out(_PagePlan(*(x[i] for x in plan)), *counts[i])


def fixed_address(x: Tensor) -> Tensor:
    """Tell torch.compile that ``x`` keeps its address: CUDA graphs take in-place writes then."""
    if not is_torchdynamo_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def in_blocks(x: Tensor) -> Tensor:
    """``[B, G, T, D] -> [B, G, blocks, 64, D]``, a copy, padded with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % PAGE)).unflatten(2, (-1, PAGE)).contiguous()
