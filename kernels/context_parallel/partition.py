"""How context parallelism partitions the tokens of a sequence among ranks: in segments, of any number and length."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..argument_types import typed
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` of the sequence, which lie on ``rank``."""

    rank: int
    start: int
    stop: int


# From the number of tokens and of ranks.
Split = Callable[[int, int], Sequence[Segment]]


@typed
def contiguous(length: int, ranks: int) -> list[Segment]:
    """One segment for each rank. The last has the most to do where heads do not forget."""
    bounds = _bounds(length, ranks)
    return [Segment(rank, *bounds[rank : rank + 2]) for rank in range(ranks)]


@typed
def zigzag(length: int, ranks: int) -> list[Segment]:
    """Two segments for each rank, the i-th from the start and the i-th from the end (head-tail partition).

    A query has as many keys as tokens before it, and those of two such segments together are as many for every rank.
    Heads that forget have the same work everywhere, so this is balanced for both.
    """
    if length < 2 * ranks:
        return contiguous(length, ranks)
    bounds = _bounds(length, 2 * ranks)
    owners = [*range(ranks), *reversed(range(ranks))]
    return [Segment(rank, *bounds[i : i + 2]) for i, rank in enumerate(owners)]


def _bounds(length: int, parts: int) -> list[int]:
    # Multiples of what pruning drops at once: then it drops what it would on one device.
    unit = PRUNED_QUERIES if length >= parts * PRUNED_QUERIES else 1
    return [length * i // parts // unit * unit for i in range(parts)] + [length]


NAMED_SPLITS: dict[str, Split] = {"zigzag": zigzag, "contiguous": contiguous}


class TokenSplit:
    """A sequence partitioned among ranks. On each, its tokens stand in the order of the sequence.

    Attributes:
        length: tokens of the sequence.
        ranks: number of ranks.
        segments: in order of tokens, none of them empty, neighbours on different ranks.
    """

    def __init__(self, length: int, ranks: int, segments: Sequence[Segment]) -> None:
        """
        Args:
            length: tokens of the sequence.
            ranks: number of ranks.
            segments: in any order; empty ones are left out, and neighbours on the same rank are joined.

        Raises:
            ValueError: the segments leave out tokens or a rank, hold some twice, or name a rank that is not there.
        """
        joined: list[Segment] = []
        end = 0
        for rank, start, stop in sorted(segments, key=lambda x: (x[1], x[2])):
            if not 0 <= rank < ranks or start != end or stop < start:
                raise ValueError(
                    f"split must assign tokens 0 to {length} to ranks 0 to {ranks - 1}, each token once, "
                    f"got tokens {start} to {stop} for rank {rank} after the first {end}"
                )
            end = stop
            if joined and joined[-1].rank == rank:
                joined[-1] = joined[-1]._replace(stop=stop)
            elif stop > start:
                joined.append(Segment(rank, start, stop))
        if end != length:
            raise ValueError(f"split must assign all {length} tokens, got {end}")
        if idle := set(range(ranks)) - {segment.rank for segment in joined}:
            raise ValueError(
                f"split must give every rank a token, got none of {length} for {sorted(idle)} of {ranks} ranks"
            )
        self.length, self.ranks, self.segments = length, ranks, tuple(joined)

    def of(self, rank: int) -> list[Segment]:
        """The segments of a rank."""
        return [segment for segment in self.segments if segment.rank == rank]

    @cached_property
    def slots(self) -> list[int]:
        """Of each segment, which one it is of its rank."""
        seen = [0] * self.ranks
        slots = []
        for segment in self.segments:
            slots.append(seen[segment.rank])
            seen[segment.rank] += 1
        return slots

    @cached_property
    def previous_of_rank(self) -> list[int | None]:
        """Of each segment, which one its rank has before it; None for its first."""
        last: list[int | None] = [None] * self.ranks
        previous = []
        for i, segment in enumerate(self.segments):
            previous.append(last[segment.rank])
            last[segment.rank] = i
        return previous

    @property
    def most_segments(self) -> int:
        """Of any rank."""
        return max(self.slots, default=0) + 1

    def rows(self, rank: int) -> list[slice]:
        """Where each segment of a rank lies among its tokens."""
        rows, end = [], 0
        for _, start, stop in self.of(rank):
            rows.append(slice(end, end + stop - start))
            end += stop - start
        return rows

    def take(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """What a rank has of ``x``, which has all tokens along ``dim``."""
        if x.shape[dim] != self.length:
            raise ValueError(f"x must have all {self.length} tokens along dimension {dim}, got shape {list(x.shape)}")
        return torch.cat([x.narrow(dim, start, stop - start) for _, start, stop in self.of(rank)], dim)


class SplitTables(NamedTuple):
    """Tables of a split for one rank, int64: made once, since a copy to a GPU synchronises.

    Blocks are of 64 tokens of one segment, counted over all segments.

    Attributes:
        tokens: ``[length]``, 0, 1, 2 and so on.
        positions: ``[T of this rank]`` index in the sequence of each token.
        segments: ``[segments of this rank, 4]``: first row on it, one past the last, first token, and which segment of
            the sequence it is.
        slots: ``[segments, 2]``: where each is among `TokenSplit.most_segments` of every rank, one rank after the
            other, and where the one before it on its rank is, -1 if there is none.
        block_starts: ``[blocks]`` first token of each.
        block_slots: ``[blocks]`` where each is among `most_blocks` of every rank, one rank after the other.
        diagonal_blocks: ``[T of this rank]`` which block each token is in.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    slots: Tensor
    block_starts: Tensor
    block_slots: Tensor
    diagonal_blocks: Tensor


def most_blocks(split: TokenSplit) -> int:
    """Blocks of the rank that has most."""
    counts = [0] * split.ranks
    for rank, start, stop in split.segments:
        counts[rank] += -(-(stop - start) // PRUNED_KEYS)
    return max(counts)


def split_tables(split: TokenSplit, rank: int, device: torch.device) -> SplitTables:
    """The tables of a rank."""
    own = [i for i, segment in enumerate(split.segments) if segment.rank == rank]
    blocks = [np.arange(start, stop, PRUNED_KEYS) for _, start, stop in split.segments]
    before = np.cumsum([0, *map(len, blocks)])
    most, ends = most_blocks(split), np.zeros(split.ranks, np.int64)
    block_slots = []
    for segment, starts in zip(split.segments, blocks, strict=True):
        block_slots.append(segment.rank * most + ends[segment.rank] + np.arange(len(starts)))
        ends[segment.rank] += len(starts)
    slots = [x.rank * split.most_segments + slot for x, slot in zip(split.segments, split.slots, strict=True)]
    segments = split.of(rank)
    rows = zip(split.rows(rank), segments, own, strict=True)
    tables = dict(
        tokens=np.arange(split.length),
        positions=np.concatenate([np.arange(start, stop) for _, start, stop in segments]),
        segments=np.array([(x.start, x.stop, segment.start, i) for x, segment, i in rows]),
        slots=np.array([(slots[i], -1 if j is None else slots[j]) for i, j in enumerate(split.previous_of_rank)]),
        block_starts=np.concatenate(blocks),
        block_slots=np.concatenate(block_slots),
        diagonal_blocks=np.concatenate(
            [before[i] + np.arange(x.stop - x.start) // PRUNED_KEYS for i, x in zip(own, segments, strict=True)]
        ),
    )
    return SplitTables(**{name: torch.from_numpy(x.astype(np.int64)).to(device) for name, x in tables.items()})
