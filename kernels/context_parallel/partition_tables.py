"""Tables of a split for a device: they depend on nothing else, so they are made and copied there once."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tiles import PRUNED_KEYS
from .partition import TokenSplit


class SplitTables(NamedTuple):
    """Int64, of one rank; blocks are of 64 tokens of one segment, counted over all segments.

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
