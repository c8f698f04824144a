"""How attention over several ranks is cut into tasks for kernels that want queries in a row and one window of keys.

Each task is a run of queries of one segment and some heads, over a window of keys that ends with the last of them:

* *Local*: the queries after the first 32nd of a segment, for heads that keep no key before the segment from there.
  Queries, keys and values are views of what the rank has. The device knows these heads by itself; so local tasks run
  while metadata come to the host, and while rows come from other ranks.
* *Halo*: the first 32nd, for the same heads. Its window reaches back over the border of the segment.
* *Remote*: the other heads, in groups whose windows are at most four times as long as another's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..tiles import PRUNED_QUERIES
from .exchange import Fetch, MetadataExchange, Needs, plan_fetch
from .partition import Segment
from .row_copy import NO_RUNS, Place, Runs, to_device
from .shards import Shards

# One in so many queries of a segment is in its halo task.
_HALO_PART = 32


class Task(NamedTuple):
    """Queries and heads that are computed in one call.

    Attributes:
        rows: queries, among this rank's tokens.
        heads: key/value heads; None for all.
        start, stop: window of keys, in tokens of the sequence; the last is that of the last query.
        segment: which segment of the rank the queries are of.
        local: whether it is for all heads that keep only keys of the segment: nothing is copied.
    """

    rows: slice
    heads: list[int] | None
    start: int
    stop: int
    segment: int
    local: bool = False


def _halo(segment: Segment) -> int:
    """How many leading queries of a segment are left to its halo task."""
    length = segment.stop - segment.start
    part = -(-length // _HALO_PART // PRUNED_QUERIES) * PRUNED_QUERIES
    return min(part, length) if segment.start else 0


def plan_local(shards: Shards, parts: int = 1) -> list[Task]:
    """The tasks of this rank that need nothing of other ranks, each of a segment in so many."""
    tasks = []
    for number, (segment, rows) in enumerate(zip(shards.segments, shards.rows, strict=True)):
        halo, length = _halo(segment), segment.stop - segment.start
        bounds = [halo + (length - halo) * i // parts // PRUNED_QUERIES * PRUNED_QUERIES for i in range(parts)]
        for begin, end in zip(bounds, [*bounds[1:], length], strict=True):
            if begin < end:
                queries = slice(rows.start + begin, rows.start + end)
                tasks.append(Task(queries, None, segment.start, segment.start + end, number, local=True))
    return tasks


def plan_others(needs: Needs, shards: Shards) -> list[Task]:
    """The rest, the largest first: while a GPU computes one, the host prepares the next."""
    tasks = []
    kv_start, crossing = needs.kv_start[shards.own].min(1), needs.crossing.max(1)
    heads = kv_start.shape[1]
    for number, (segment, rows) in enumerate(zip(shards.segments, shards.rows, strict=True)):
        halo, length = _halo(segment), segment.stop - segment.start
        in_halo = [g for g in range(heads) if crossing[number, g] <= halo]
        remote = [g for g in range(heads) if g not in in_halo]
        for group, count in ((in_halo, halo), (remote, length)):
            if count:
                for some, start in _by_length(group, kv_start[number], segment.start, count):
                    queries = slice(rows.start, rows.start + count)
                    chosen = None if len(some) == heads else some
                    tasks.append(Task(queries, chosen, start, segment.start + count, number))
    return sorted(tasks, key=lambda task: _pairs(task, heads), reverse=True)


def _pairs(task: Task, heads: int) -> int:
    """Of queries and keys in its window, whether they are kept or not."""
    count = heads if task.heads is None else len(task.heads)
    return (task.rows.stop - task.rows.start) * (task.stop - task.start) * count


def _by_length(heads: list[int], kv_start: np.ndarray, start: int, queries: int) -> list[tuple[list[int], int]]:
    """Heads by how far they look back, in steps of four times, and where the window of each group begins."""
    groups: dict[int, list[int]] = {}
    for g in heads:
        back = (start - int(kv_start[g])) / queries
        groups.setdefault(max(0, int(np.ceil(np.log2(back) / 2))) if back > 1 else 0, []).append(g)
    # Aligned, so that what pruning drops in blocks are whole tiles.
    return [(some, int(kv_start[some].min()) // PRUNED_QUERIES * PRUNED_QUERIES) for some in groups.values()]


@dataclass
class Placed:
    """A task with its indices on the device.

    Attributes:
        task: what is computed.
        rows: of its segment.
        crossing: of a local task, ``[B, G]`` int64 how many leading queries look beyond the segment; None otherwise.
        halo: how many may; heads of which more do are left out.
        own, received: from this rank's keys, and from the rows that came, to the window. Local tasks have none.
        heads: how many key/value heads.
        of_query, of_gate: their query heads and gates; None for all.
    """

    task: Task
    rows: slice
    crossing: Tensor | None = None
    halo: int = 0
    own: Runs = NO_RUNS
    received: Runs = NO_RUNS
    heads: int = 0
    of_query: Tensor | None = None
    of_gate: Tensor | None = None


class Plan:
    """What one call of attention does, for its forward and its backward pass."""

    def __init__(
        self,
        kv_start: Tensor,
        kv_heads: int,
        gates: int,
        shards: Shards,
        find_needs: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        """
        Args:
            kv_start: ``[B, H, T]`` int64, of this rank's queries.
            kv_heads: number of key/value heads.
            gates: of each of them.
            shards: who has which tokens.
            find_needs: that of the `ContextBackend`.
        """
        self.shards, self.kv_heads, self.gates = shards, kv_heads, gates
        self.group = kv_start.shape[1] // kv_heads
        self._metadata = MetadataExchange(kv_start, kv_heads, shards, find_needs)
        self._crossing = self._metadata.crossing

    def local(self, parts: int = 1) -> list[Placed]:
        """The tasks that need nothing of other ranks."""
        placed = []
        for task in plan_local(self.shards, parts):
            segment = self.shards.segments[task.segment]
            crossing = self._crossing[task.segment] if segment.start else None
            rows = self.shards.rows[task.segment]
            placed.append(Placed(task, rows, crossing, _halo(segment), heads=self.kv_heads))
        return placed

    def complete(self) -> None:
        """Wait for the metadata, and plan the rest: what to `fetch`, and the `others`, halo and remote tasks."""
        needs = self._metadata.wait()
        del self._metadata
        device = self._crossing.device
        fetch = plan_fetch(needs, self.shards)
        self.others, tables = [], [fetch.runs.table]
        for task in plan_others(needs, self.shards):
            chosen = np.arange(self.kv_heads) if task.heads is None else np.array(task.heads)
            kv_start = needs.kv_start[self.shards.own[task.segment]][:, chosen]
            own = _own_runs(task, chosen, kv_start, self.shards)
            received = _received_runs(task, chosen, kv_start, fetch, self.shards)
            self.others.append(Placed(task, self.shards.rows[task.segment], None, 0, own, received, len(chosen)))
            tables += [own.table, received.table, _members(chosen, self.group), _members(chosen, self.gates)]
        index, *parts = to_device(tables, device)
        self.fetch: Fetch = fetch._replace(runs=fetch.runs._replace(device=index))
        for i, placed in enumerate(self.others):
            of_own, of_received, of_query, of_gate = parts[4 * i : 4 * i + 4]
            placed.own = placed.own._replace(device=of_own)
            placed.received = placed.received._replace(device=of_received)
            if placed.task.heads is not None:
                placed.of_query, placed.of_gate = of_query, of_gate


def _members(heads: np.ndarray, count: int) -> np.ndarray:
    """Those of ``count`` each that belong to key/value heads."""
    return (heads[:, None] * count + np.arange(count)).ravel().astype(np.int64)


def _own_runs(task: Task, heads: np.ndarray, kv_start: np.ndarray, shards: Shards) -> Runs:
    """From this rank's tokens to a task's window: what each sequence and head keeps, from ``kv_start`` on."""
    batches, places = np.arange(len(kv_start))[:, None], np.arange(len(heads))
    runs = []
    for (_, start, stop), rows in zip(shards.segments, shards.rows, strict=True):
        begin = np.maximum(kv_start, max(start, task.start))
        source = Place(batches, rows.start + begin - start, heads)
        target = Place(batches, begin - task.start, places)
        runs.append(Runs.between(source, target, min(stop, task.stop) - begin))
    return Runs.joined(runs)


def _received_runs(task: Task, heads: np.ndarray, kv_start: np.ndarray, fetch: Fetch, shards: Shards) -> Runs:
    """From the rows that came to the window of a task."""
    batches, places = np.arange(len(kv_start))[:, None], np.arange(len(heads))
    runs = []
    for segment in fetch.segments:
        if task.start < segment.stop <= shards.segments[task.segment].start:
            came = segment.kv_start[:, heads]
            begin = np.maximum(came, np.maximum(kv_start, task.start))
            source = Place(0, segment.row[:, heads] + begin - came, 0)
            runs.append(Runs.between(source, Place(batches, begin - task.start, places), segment.stop - begin))
    return Runs.joined(runs)
