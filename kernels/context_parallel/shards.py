"""Who has which tokens of one sequence, and the exchanges of small tensors between the ranks that share it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..tiles import PRUNED_KEYS
from .partition import TokenSplit
from .partition_tables import SplitTables, split_tables

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
    def centered(self, k: Tensor) -> Tensor:
        """As `pruning.rules.centered`, for this rank's keys: minus the mean of the first 64 of the first segment."""
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        means = self.from_all([k[:, rows][:, :PRUNED_KEYS].mean(1, keepdim=True) for rows in self.rows])
        return k - means[0]


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
