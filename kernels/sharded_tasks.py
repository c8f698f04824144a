"""How attention over several ranks is cut into tasks for kernels that want queries in a row and one window of keys.

Each task is a run of queries of one segment and some heads, over a window of keys that ends with the last of them:

* *Inside*: the queries after the first 32nd of a segment, for heads that keep no key before it from there. Queries,
  keys and values are views of what the rank has. Which heads these are the device knows by itself; so this is under
  way while the host learns what is needed, and rows are on theirs.
* *Edge*: the first 32nd, for the same heads. Its window reaches back over the border of the segment.
* *Far*: the other heads, in groups whose windows are at most twice as long as another's.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .context_parallel import Shards
from .remote_keys import Fetch, Needs, Question, Runs, plan_fetch, to_device
from .tiles import PRUNED_QUERIES
from .token_split import Segment

# One in so many queries of a segment is at its edge. Measured: docs/tuning.md.
_EDGE_PART = 32


class Task(NamedTuple):
    """Queries and heads that are computed in one call.

    Attributes:
        rows: queries, among this rank's tokens.
        heads: key/value heads; None for all.
        start, stop: window of keys, in tokens of the sequence; the last is that of the last query.
        segment: which segment of the rank the queries are of.
        inside: whether all heads are asked for that keep only keys of the segment: nothing is copied.
    """

    rows: slice
    heads: list[int] | None
    start: int
    stop: int
    segment: int
    inside: bool = False


def _edge(segment: Segment) -> int:
    """How many queries are at the edge of a segment."""
    length = segment.stop - segment.start
    part = -(-length // _EDGE_PART // PRUNED_QUERIES) * PRUNED_QUERIES
    return min(part, length) if segment.start else 0


def plan_inside(shards: Shards, parts: int = 1) -> list[Task]:
    """The tasks of this rank that need nothing of other ranks, each of a segment in so many."""
    tasks = []
    for number, (segment, rows) in enumerate(zip(shards.segments, shards.rows, strict=True)):
        edge, length = _edge(segment), segment.stop - segment.start
        bounds = [edge + (length - edge) * i // parts // PRUNED_QUERIES * PRUNED_QUERIES for i in range(parts)]
        for begin, end in zip(bounds, [*bounds[1:], length], strict=True):
            if begin < end:
                queries = slice(rows.start + begin, rows.start + end)
                tasks.append(Task(queries, None, segment.start, segment.start + end, number, inside=True))
    return tasks


def plan_others(needs: Needs, shards: Shards) -> list[Task]:
    """The rest, the largest first: while a GPU computes one, the host prepares the next."""
    tasks = []
    first, crossing = needs.first[shards.own].min(1), needs.crossing.max(1)
    heads = first.shape[1]
    for number, (segment, rows) in enumerate(zip(shards.segments, shards.rows, strict=True)):
        edge, length = _edge(segment), segment.stop - segment.start
        near = [g for g in range(heads) if crossing[number, g] <= edge]
        far = [g for g in range(heads) if g not in near]
        for group, count in ((near, edge), (far, length)):
            if count:
                for some, start in _by_length(group, first[number], segment.start, count):
                    queries = slice(rows.start, rows.start + count)
                    chosen = None if len(some) == heads else some
                    tasks.append(Task(queries, chosen, start, segment.start + count, number))
    return sorted(tasks, key=lambda task: _pairs(task, heads), reverse=True)


def _pairs(task: Task, heads: int) -> int:
    """Of queries and keys in its window, whether they are kept or not."""
    count = heads if task.heads is None else len(task.heads)
    return (task.rows.stop - task.rows.start) * (task.stop - task.start) * count


def _by_length(heads: list[int], first: np.ndarray, start: int, queries: int) -> list[tuple[list[int], int]]:
    """Heads by how far they look back, in steps of two times, and where the window of each group begins."""
    groups: dict[int, list[int]] = {}
    for g in heads:
        back = (start - int(first[g])) / queries
        groups.setdefault(max(0, int(np.ceil(np.log2(back)))) if back > 1 else 0, []).append(g)
    # Aligned, so that what pruning drops in blocks are whole tiles.
    return [(some, int(first[some].min()) // PRUNED_QUERIES * PRUNED_QUERIES) for some in groups.values()]


@dataclass
class Placed:
    """A task with its indices on the device.

    Attributes:
        task: what is computed.
        rows: of its segment.
        own: where tokens of this rank lie in its window, and on the rank.
        left_out: ``[H]`` bool, query heads that an inside task leaves out; None if it has all.
        heads, of_query, of_gate: key/value heads, and their query heads and gates; None for all.
        runs, tables: for `source` and `target`.
    """

    task: Task
    rows: slice
    own: list[tuple[slice, slice]]
    left_out: Tensor | None = None
    heads: Tensor | None = None
    of_query: Tensor | None = None
    of_gate: Tensor | None = None
    runs: tuple[Runs, Runs] | None = None
    tables: tuple[Tensor, Tensor] | None = None

    @cached_property
    def received(self) -> tuple[Tensor, Tensor]:
        """Which of the rows that were received are in its window, and where, as rows of ``[B, W, heads]``."""
        assert self.runs is not None and self.tables is not None, "only inside tasks have none"
        source, target = (runs.expand(table) for runs, table in zip(self.runs, self.tables, strict=True))
        return source, target


class Plan:
    """What one call of attention does, for its forward and its backward pass."""

    def __init__(self, first: Tensor, kv_heads: int, gates: int, shards: Shards) -> None:
        """
        Args:
            first: ``[B, H, T]`` int64, of this rank's queries.
            kv_heads: number of key/value heads.
            gates: of each of them.
            shards: who has which tokens.
        """
        self.shards, self.kv_heads, self.gates = shards, kv_heads, gates
        self.group = first.shape[1] // kv_heads
        self._question = Question(first, kv_heads, shards)
        self._left_out: list[Tensor | None] = []
        for segment, crossing in zip(shards.segments, self._question.crossing, strict=True):
            far = None
            if segment.start:
                far = (crossing.amax(0) > _edge(segment)).repeat_interleave(self.group)
            self._left_out.append(far)

    def inside(self, parts: int = 1) -> list[Placed]:
        """The tasks that need nothing of other ranks."""
        return [self._placed(task) for task in plan_inside(self.shards, parts)]

    def _placed(self, task: Task) -> Placed:
        left_out = self._left_out[task.segment] if task.inside else None
        return Placed(task, self.shards.rows[task.segment], _own_parts(task, self.shards), left_out)

    def learn(self) -> None:
        """Wait until it is known what is needed, and plan the rest: `fetch`, the `index` of rows to send, `others`."""
        needs = self._question.answer()
        device = self._question.crossing[0].device
        del self._question
        self.fetch: Fetch = plan_fetch(needs, self.shards)
        tasks = plan_others(needs, self.shards)
        runs = [_received_rows(task, self.fetch, self.shards, self.kv_heads) for task in tasks]
        tables = [self.fetch.rows.table()]
        for task, (source, target) in zip(tasks, runs, strict=True):
            chosen = np.arange(self.kv_heads) if task.heads is None else np.array(task.heads)
            tables += [chosen, _members(chosen, self.group), _members(chosen, self.gates)]
            tables += [source.table(), target.table()]
        index, *parts = to_device(tables, device)
        self.index = self.fetch.rows.expand(index)
        self.others = []
        for i, (task, own_runs) in enumerate(zip(tasks, runs, strict=True)):
            placed = self._placed(task)
            heads, of_query, of_gate, sources, targets = parts[5 * i : 5 * i + 5]
            if task.heads is not None:
                placed.heads, placed.of_query, placed.of_gate = heads, of_query, of_gate
            placed.runs, placed.tables = own_runs, (sources, targets)
            self.others.append(placed)


def _members(heads: np.ndarray, count: int) -> np.ndarray:
    """Those of ``count`` each that belong to key/value heads."""
    return (heads[:, None] * count + np.arange(count)).ravel().astype(np.int64)


def _received_rows(task: Task, fetch: Fetch, shards: Shards, kv_heads: int) -> tuple[Runs, Runs]:
    """Which received rows are in the window ``[B, W, heads]`` of a task, and where."""
    heads = np.arange(kv_heads) if task.heads is None else np.array(task.heads)
    width = task.stop - task.start
    sources, targets, counts = ([np.empty(0, np.int64)] for _ in range(3))
    for segment in fetch.segments:
        if task.start < segment.stop <= shards.segments[task.segment].start:
            first = segment.first[:, heads]
            begin = np.maximum(first, task.start)
            row = (np.arange(len(first))[:, None] * width + begin - task.start) * len(heads) + np.arange(len(heads))
            sources.append((segment.row[:, heads] + begin - first).ravel())
            targets.append(row.ravel())
            counts.append((segment.stop - begin).ravel())
    length = np.concatenate(counts)
    return Runs(np.concatenate(sources), length, 1), Runs(np.concatenate(targets), length, len(heads))


def _own_parts(task: Task, shards: Shards) -> list[tuple[slice, slice]]:
    parts = []
    for (_, start, stop), rows in zip(shards.segments, shards.rows, strict=True):
        begin, end = max(start, task.start), min(stop, task.stop)
        if begin < end:
            inside = slice(begin - task.start, end - task.start)
            parts.append((inside, slice(rows.start + begin - start, rows.start + end - start)))
    return parts
