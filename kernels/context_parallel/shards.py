"""Who has which tokens of one sequence, and the exchanges of small tensors between the ranks that share it.

What layers need of tokens before this rank's, sums of gates and states for token shift, are differentiable exchanges of
all ranks with all, for which the host does not wait.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..pruning.rules import key_center
from .partition import SplitTables, TokenSplit, split_tables

if dist.is_available():
    # Of torch 2.13, which warns of the older name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class CommunicationVolume:
    """Bytes of keys and values that this rank has received, over all layers and steps since `clear`.

    Attributes:
        moved: by forward passes, with the running sums that come along. Backward moves as many, in gradients.
        ring: what ring attention would have moved: all keys and values of all other ranks, causal or not.
    """

    moved: int = 0
    ring: int = 0

    @property
    def share(self) -> float:
        """What was moved, of what ring attention would have moved."""
        return self.moved / self.ring if self.ring else 0.0

    def clear(self) -> None:
        """Start counting again."""
        self.moved = self.ring = 0


class Shards:
    """The shards of a sequence: which rank has which of its tokens.

    Attributes:
        group: process group of the ranks.
        rank: of this process within it.
        split: the segments of all ranks.
        segments, rows: those of this rank, and where each lies among its tokens.
        own: their indices among all segments.
        volume: where attention counts what it fetches.
    """

    def __init__(
        self, group: "dist.ProcessGroup | None", rank: int, split: TokenSplit, volume: CommunicationVolume
    ) -> None:
        self.group, self.rank, self.split, self.volume = group, rank, split, volume
        self.segments = split.of(self.rank)
        self.rows = split.rows(self.rank)
        self.own = [i for i, segment in enumerate(split.segments) if segment.rank == self.rank]
        self._tables: dict[torch.device, SplitTables] = {}

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of ``x``, which has all of them along ``dim``."""
        return self.split.take(x, self.rank, dim)

    def tables(self, device: torch.device) -> SplitTables:
        """Those of this rank. Kept: a copy to a GPU would wait for it."""
        if device not in self._tables:
            self._tables[device] = split_tables(self.split, self.rank, device)
        return self._tables[device]

    def gather(self, own: Tensor) -> Tensor:
        """``[ranks, ...]``: a tensor of each rank, alike in shape and type; without gradients."""
        gathered = own.new_empty(self.split.ranks, *own.shape)
        all_gather(gathered.flatten(0, 1), own, group=self.group)
        return gathered

    def from_all(self, parts: list[Tensor]) -> list[Tensor]:
        """One tensor for each segment of the sequence, from the rank that has it; without gradients.

        Args:
            parts: a tensor for each segment of this rank, alike in shape and type on all ranks.
        """
        gathered = self.gather(torch.stack([*parts, *parts[:1] * (self.split.most_segments - len(parts))]))
        return [gathered[x.rank, slot] for x, slot in zip(self.split.segments, self.split.slots, strict=True)]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks. Differentiable: its gradient is the sum of all ranks' gradients."""
        return _Sum.apply(x, self.group)

    @torch.no_grad()
    def key_center(self, k: Tensor) -> Tensor:
        """As `pruning.rules.key_center`, from this rank's keys: the mean of the first 64 of the first segment."""
        return self.from_all([key_center(k[:, rows]) for rows in self.rows])[0]


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class GatesBefore(torch.autograd.Function):
    """Running sums and first keys over this rank's tokens, counted from 1, to those over the whole sequence."""

    @staticmethod
    def forward(
        ctx, c: Tensor, kv_start: Tensor, shards: Shards, carry_gates: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        ctx.shards = shards
        c, kv_start = carry_gates(c.contiguous(), kv_start.contiguous(), shards)
        ctx.mark_non_differentiable(kv_start)
        return c, kv_start

    @staticmethod
    def backward(ctx, dc: Tensor, _) -> tuple[Tensor, None, None, None]:
        shards = ctx.shards
        totals = shards.from_all([dc[..., rows].sum(-1) for rows in shards.rows])
        dc = dc.clone()
        # A gate is in the sums of all later tokens. Of those on this rank autograd knows; here are those in between.
        for i, rows, following in zip(shards.own, shards.rows, [*shards.own[1:], len(totals)], strict=True):
            for total in totals[i + 1 : following]:
                dc[..., rows.stop - 1] += total
        return dc, None, None, None


def carry_gates(c: Tensor, kv_start: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Running sums and first visible keys over the whole sequence, from those over this rank's tokens alone.

    Args:
        c: ``[B, Hf, T]`` float64.
        kv_start: ``[B, Hf, T]`` int64, index of the last reset among this rank's tokens counted from 1; 0 for none.
        shards: who has which tokens.
    """
    c, kv_start = c.clone(), kv_start.clone()
    ends = []
    for (_, start, _), rows in zip(shards.segments, shards.rows, strict=True):
        # A reset further back is of another segment, whose end says where it is.
        kv_start[..., rows].add_(start - rows.start - 1).masked_fill_(kv_start[..., rows] < start, 0)
        # Indices of tokens are exact in float64 too.
        ends.append(torch.stack([c[..., rows.stop - 1], kv_start[..., rows.stop - 1].double()]))
    sums, resets = torch.stack(shards.from_all(ends)).unbind(1)
    # The sum of a rank's segment goes on from its segment before.
    previous = shards.split.previous_of_rank
    own_before = torch.stack([torch.zeros_like(sums[0]) if i is None else sums[i] for i in previous])
    totals = sums - own_before
    shifts = totals.cumsum(0) - totals - own_before
    resets = resets.long().cummax(0).values
    for i, rows in zip(shards.own, shards.rows, strict=True):
        c[..., rows] += shifts[i, ..., None]
        if i:
            kv_start[..., rows].clamp_(min=resets[i - 1, ..., None])
    return c, kv_start


class StatesBefore(torch.autograd.Function):
    """The last real state before each segment of this rank: see `ShardedSequence.states_before`."""

    @staticmethod
    def forward(ctx, states: Tensor, real: Tensor | None, shards: Shards) -> Tensor:
        own_real = None if real is None else shards.take(real)
        last = [_last_real(states, None if own_real is None else own_real[:, rows], rows) for rows in shards.rows]
        # Of each segment, which sequences of the batch have a real token in it.
        has = [None if real is None else real[:, start:stop].any(1) for _, start, stop in shards.split.segments]
        ctx.shards, ctx.last, ctx.has, ctx.shape = shards, last, has, states.shape
        batch = torch.arange(len(states), device=states.device)
        before = torch.zeros_like(states[:, 0])
        found = []
        for i, end in enumerate(shards.from_all([states[batch, index] for index in last])):
            if i in shards.own:
                found.append(before)
            some = has[i]
            before = end if some is None else torch.where(some[:, None, None], end, before)
        return torch.stack(found, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        shards = ctx.shards
        # To the last real token before: in the segment before, or further back for the sequences without one there.
        to = gradient.new_zeros(len(shards.split.segments), len(gradient), *gradient.shape[2:])
        for i, d_before in zip(shards.own, gradient.unbind(1), strict=True):
            left = d_before
            for j in reversed(range(i)):
                has = ctx.has[j]
                to[j] += left if has is None else left.masked_fill(~has[:, None, None], 0.0)
                if has is None:
                    break
                left = left.masked_fill(has[:, None, None], 0.0)
        dist.all_reduce(to, group=shards.group)
        d_states = gradient.new_zeros(ctx.shape)
        batch = torch.arange(len(gradient), device=gradient.device)
        for i, index in zip(shards.own, ctx.last, strict=True):
            d_states[batch, index] = to[i]
        return d_states, None, None


def _last_real(states: Tensor, real: Tensor | None, rows: slice) -> Tensor:
    """Index of the last real token of ``rows`` for each sequence, ``[B]``; any of them where none is."""
    if real is None:
        return torch.full((len(states),), rows.stop - 1, device=states.device)
    index = torch.arange(rows.start, rows.stop, device=states.device)
    return torch.where(real, index, rows.start).amax(1)
