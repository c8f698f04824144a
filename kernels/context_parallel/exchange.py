"""What attention on one rank must have of the keys and values of others, and how it gets there.

A query keeps the keys from its ``kv_start`` to its own. So of an earlier segment a head needs the tokens from the least
``kv_start`` of its later queries on that rank to the end: a few next to the border for a head that forgets, nothing of
segments further back, all of them for a head that remembers. A small exchange of metadata tells every rank what every
other needs; so each sends, for each head and segment, exactly those rows, without a request.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .row_copy import Place, Rows, Runs
from .shards import Shards


class Needs(NamedTuple):
    """What the queries of each segment need, known on the host.

    Attributes:
        kv_start: ``[segments, B, G]`` int64, first token that a query of each segment keeps for a key/value head.
        crossing: ``[segments of this rank, B, G]`` int64, how many leading queries keep a key before the segment.
    """

    kv_start: np.ndarray
    crossing: np.ndarray


class MetadataExchange:
    """What every segment needs, on its way to the host: the device goes on with other work meanwhile."""

    def __init__(
        self, kv_start: Tensor, kv_heads: int, shards: Shards, find_needs: Callable[..., tuple[Tensor, Tensor]]
    ) -> None:
        """
        Args:
            kv_start: ``[B, H, T]`` int64 in tokens of the sequence, beyond its own for a fully masked row.
            kv_heads: number of key/value heads.
            shards: who has which tokens.
            find_needs: that of the `ContextBackend`.
        """
        least, crossing = find_needs(kv_start, kv_heads, shards)
        #: Of each segment of this rank, how many leading queries keep a key before it, ``[segments, B, G]``.
        self.crossing = crossing
        self._split = shards.split
        found = shards.gather(least)
        self._host, self._copied = [found, crossing], None
        if kv_start.is_cuda:
            self._host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in (found, crossing)]
            for host, x in zip(self._host, (found, crossing), strict=True):
                host.copy_(x, non_blocking=True)
            self._copied = torch.cuda.current_stream(kv_start.device).record_event()

    def wait(self) -> Needs:
        """What every segment needs, when it has come: synchronises with the device."""
        if self._copied is not None:
            self._copied.synchronize()
        found, crossing = (x.numpy() for x in self._host)
        ranks = [segment.rank for segment in self._split.segments]
        return Needs(found[ranks, self._split.slots], crossing)


def find_needs(kv_start: Tensor, kv_heads: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """What the queries of each segment of this rank need, from their first keys ``[B, H, T]`` int64.

    Returns:
        ``[segments, B, G]`` int64 each: first token that one of them keeps, with room for as many segments as any rank
        has; and how many leading ones keep a key before the segment.
    """
    kv_start = kv_start.unflatten(1, (kv_heads, -1)).amin(2)
    least = kv_start.new_zeros(shards.split.most_segments, *kv_start.shape[:2])
    crossing = []
    for slot, ((_, start, stop), rows) in enumerate(zip(shards.segments, shards.rows, strict=True)):
        part = kv_start[..., rows]
        least[slot] = part.amin(-1).clamp(max=start)
        count = torch.arange(1, stop - start + 1, device=kv_start.device)
        crossing.append(torch.where(part < start, count, 0).amax(-1))
    return least, torch.stack(crossing)


class Received(NamedTuple):
    """Rows that came of one segment.

    Attributes:
        stop: one past the last token of the segment.
        kv_start: ``[B, G]`` first token that came; ``stop`` if none.
        row: ``[B, G]`` its row.
    """

    stop: int
    kv_start: np.ndarray
    row: np.ndarray


class Fetch(NamedTuple):
    """One exchange of rows; a row is a token of one key/value head.

    Attributes:
        runs: from this rank's keys to the rows that it sends, by rank that gets them.
        of_rank: which of ``runs`` are for each rank.
        sent, received: how many rows, for each rank.
        segments: what comes, for each segment of others that is needed.
        idle: whether nobody in the group sends anything.
    """

    runs: Runs
    of_rank: list[slice]
    sent: list[int]
    received: list[int]
    segments: list[Received]
    idle: bool


def plan_fetch(needs: Needs, shards: Shards) -> Fetch:
    """Who sends what to whom."""
    split, me = shards.split, shards.rank
    _, batch, kv_heads = needs.kv_start.shape
    batches, heads = np.arange(batch)[:, None], np.arange(kv_heads)
    runs: list[Runs] = []
    of_rank: list[slice] = []
    sent, received = [0] * split.ranks, [0] * split.ranks
    end = 0
    for rank in range(split.ranks):
        for i, segment, own in zip(shards.own, shards.segments, shards.rows, strict=True):
            if rank == me:
                break
            kept = _kept_of(needs.kv_start, i, rank, shards)
            count = segment.stop - kept
            source = Place(batches, own.start + kept - segment.start, heads)
            runs.append(Runs.between(source, Place(0, _rows_after(end, count), 0), count))
            sent[rank] += int(count.sum())
            end += int(count.sum())
        so_far = sum(len(x.table) for x in runs)
        of_rank.append(slice(of_rank[-1].stop if of_rank else 0, so_far))
    segments, end = [], 0
    for source_rank in range(split.ranks):
        for i, segment in enumerate(split.segments):
            if segment.rank == source_rank != me:
                kept = _kept_of(needs.kv_start, i, me, shards)
                count = segment.stop - kept
                segments.append(Received(segment.stop, kept, _rows_after(end, count)))
                received[source_rank] += int(count.sum())
                end += int(count.sum())
    # What stands before a segment is on another rank.
    before_segment = needs.kv_start.min((1, 2)) < [segment.start for segment in split.segments]
    return Fetch(Runs.joined(runs), of_rank, sent, received, segments, not before_segment.any())


def _rows_after(row: int, count: np.ndarray) -> np.ndarray:
    """First row of each of so many, one after the other from ``row`` on."""
    return row + (np.cumsum(count) - count.ravel()).reshape(count.shape)


def _kept_of(kv_start: np.ndarray, i: int, rank: int, shards: Shards) -> np.ndarray:
    """First token of segment ``i`` that ``rank`` needs, ``[B, G]``; one past the last if it needs none."""
    owner, start, stop = shards.split.segments[i]
    later = [j for j, segment in enumerate(shards.split.segments) if segment.rank == rank and j > i]
    if rank == owner or not later:
        return np.full(kv_start.shape[1:], stop)
    return kv_start[later].min(0).clip(start, stop)


class Packed(NamedTuple):
    """Keys, values and running sums of rows: ``[N, 2, D]`` and ``[N, gates of a key/value head]`` float64."""

    kv: Tensor
    c: Tensor

    def rows(self) -> Rows:
        """The same, as tokens of one head."""
        kv, c = self.kv[None, :, :, None], self.c[None, :, None]
        return Rows(kv[:, :, 0], kv[:, :, 1], c)


class Exchange:
    """Rows on their way. They lie in `rows` after `wait`."""

    def __init__(self, rows: Packed, sent: list[int], received: list[int], shards: Shards) -> None:
        """
        Args:
            rows: to be sent, by rank that gets them.
            sent, received: how many, for each rank.
            shards: the group.
        """
        # Kept until they are sent.
        self._sent: Packed | None = rows
        self.rows = Packed(*(x.new_empty(sum(received), *x.shape[1:]) for x in rows))
        self._work = [
            dist.all_to_all_single(into, out, received, sent, group=shards.group, async_op=True)
            for into, out in zip(self.rows, rows, strict=True)
        ]

    def wait(self) -> Packed:
        """The rows that have come. The host does not wait for a GPU, whose queue does."""
        for work in self._work:
            work.wait()
        self._work, self._sent = [], None
        return self.rows
