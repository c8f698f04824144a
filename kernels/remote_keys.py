"""What attention on one rank must have of the keys and values of others, and how it gets there.

A query keeps the keys from some first one to its own. So of a segment before its own, a head needs the tokens from the
first key that any of its later queries on that rank keeps to the end: a few next to the border for a head that forgets,
nothing of segments further back, all of them for a head that remembers. Every rank knows what everybody needs from a
small table; so each sends, for each head and segment, exactly those rows, and nobody asks.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .context_parallel import Shards


class Needs(NamedTuple):
    """Known on the host.

    Attributes:
        first: ``[segments, B, G]`` int64, first token that a query of each segment keeps for a key/value head.
        crossing: ``[segments of this rank, B, G]`` int64, how many leading queries keep a key before the segment.
    """

    first: np.ndarray
    crossing: np.ndarray


class Question:
    """What every segment needs, on its way to the host: the device goes on with other work meanwhile."""

    def __init__(self, first: Tensor, kv_heads: int, shards: Shards) -> None:
        """
        Args:
            first: ``[B, H, T]`` int64 in tokens of the sequence, beyond its own for a query that sees nothing.
            kv_heads: number of key/value heads.
            shards: who has which tokens.
        """
        first = first.unflatten(1, (kv_heads, -1)).amin(2) if first.shape[1] > kv_heads else first
        least, crossing = [], []
        for (_, start, stop), rows in zip(shards.segments, shards.rows, strict=True):
            part = first[..., rows]
            least.append(part.amin(-1).clamp(max=start))
            count = torch.arange(1, stop - start + 1, device=first.device)
            crossing.append(torch.where(part < start, count, 0).amax(-1))
        #: Of each segment of this rank, how many leading queries keep a key before it, ``[B, G]`` on the device.
        self.crossing = crossing
        self._segments = len(shards.split.segments)
        self._device = torch.stack([*shards.from_all(least), *crossing])
        self._host, self._copied = self._device, None
        if first.is_cuda:
            self._host = torch.empty(self._device.shape, dtype=torch.int64, pin_memory=True)
            self._host.copy_(self._device, non_blocking=True)
            self._copied = torch.cuda.current_stream(first.device).record_event()

    def answer(self) -> Needs:
        """Wait until it is here."""
        if self._copied is not None:
            self._copied.synchronize()
        return Needs(*np.split(self._host.numpy(), [self._segments]))


class Runs(NamedTuple):
    """Indices in runs: ``start, start + step, ...`` so many times for each, one run after the other.

    Attributes:
        starts, counts: ``[N]`` int64.
        step: the same for all.
    """

    starts: np.ndarray
    counts: np.ndarray
    step: int

    def table(self) -> np.ndarray:
        """What `expand` needs on the device."""
        before = np.cumsum(self.counts) - self.counts
        return np.stack([self.starts - self.step * before, self.counts])

    def expand(self, table: Tensor) -> Tensor:
        """All indices, int64, on the device of its ``table``."""
        total = int(self.counts.sum())
        offsets, counts = table.view(2, -1)
        steps = torch.arange(0, self.step * total, self.step, device=table.device)
        return torch.repeat_interleave(offsets, counts, output_size=total) + steps


def to_device(tables: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Tables of integers, each as one flat int64 tensor, brought there together: the host waits for none of them."""
    flat = torch.from_numpy(np.concatenate([np.ravel(x) for x in tables]).astype(np.int64))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([np.size(x) for x in tables]))


class Received(NamedTuple):
    """Rows that came of one segment.

    Attributes:
        stop: one past the last token of the segment.
        first: ``[B, G]`` first token that came; ``stop`` if none.
        row: ``[B, G]`` its row.
    """

    stop: int
    first: np.ndarray
    row: np.ndarray


class Fetch(NamedTuple):
    """One exchange of rows; a row is a token of one key/value head.

    Attributes:
        rows: those that this rank sends, ``(b T + t) G + g`` for its token ``t``, by rank that gets them.
        sent, received: how many, for each rank.
        segments: what comes, for each segment of others that is needed.
        idle: whether nobody in the group sends anything.
    """

    rows: Runs
    sent: list[int]
    received: list[int]
    segments: list[Received]
    idle: bool


def plan_fetch(needs: Needs, shards: Shards) -> Fetch:
    """Who sends what to whom."""
    split, me = shards.split, shards.rank
    _, batch, kv_heads = needs.first.shape
    tokens = sum(stop - start for _, start, stop in shards.segments)
    # Row of token 0 of each sequence and head.
    origin = np.arange(batch)[:, None] * tokens * kv_heads + np.arange(kv_heads)
    starts, counts = [], []
    sent, received = [0] * split.ranks, [0] * split.ranks
    for rank in range(split.ranks):
        for i, segment, own in zip(shards.own, shards.segments, shards.rows, strict=True):
            kept = _kept_of(needs.first, i, rank, shards)
            count = segment.stop - kept
            starts.append((origin + (own.start + kept - segment.start) * kv_heads).ravel())
            counts.append(count.ravel())
            sent[rank] += int(count.sum())
    segments, end = [], 0
    for source in range(split.ranks):
        for i, segment in enumerate(split.segments):
            if segment.rank == source != me:
                kept = _kept_of(needs.first, i, me, shards)
                count = (segment.stop - kept).ravel()
                first_rows = end + np.cumsum(count) - count
                segments.append(Received(segment.stop, kept, first_rows.reshape(kept.shape)))
                received[source] += int(count.sum())
                end += int(count.sum())
    rows = Runs(np.concatenate(starts), np.concatenate(counts), kv_heads)
    # What stands before a segment is on another rank.
    before = needs.first.min((1, 2)) < [segment.start for segment in split.segments]
    return Fetch(rows, sent, received, segments, not before.any())


def _kept_of(first: np.ndarray, i: int, rank: int, shards: Shards) -> np.ndarray:
    """First token of segment ``i`` that ``rank`` needs, ``[B, G]``; one past the last if it needs none."""
    owner, start, stop = shards.split.segments[i]
    later = [j for j, segment in enumerate(shards.split.segments) if segment.rank == rank and j > i]
    if rank == owner or not later:
        return np.full(first.shape[1:], stop)
    return first[later].min(0).clip(start, stop)


class Rows(NamedTuple):
    """Keys, values and running sums of rows: ``[N, 2, D]`` and ``[N, gates of a key/value head]`` float64."""

    kv: Tensor
    c: Tensor


class Exchange:
    """Rows on their way. They lie in `rows` after `wait`."""

    def __init__(self, rows: Rows, sent: list[int], received: list[int], shards: Shards) -> None:
        """
        Args:
            rows: to be sent, by rank that gets them.
            sent, received: how many, for each rank.
            shards: the group.
        """
        # Kept until they are sent.
        self._sent: Rows | None = rows
        self.rows = Rows(*(x.new_empty(sum(received), *x.shape[1:]) for x in rows))
        self._work = [
            dist.all_to_all_single(into, out, received, sent, group=shards.context.group, async_op=True)
            for into, out in zip(self.rows, rows, strict=True)
        ]

    def wait(self) -> Rows:
        """The rows that have come. The host does not wait for a GPU, whose queue does."""
        for work in self._work:
            work.wait()
        self._work, self._sent = [], None
        return self.rows
