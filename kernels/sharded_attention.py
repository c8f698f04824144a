"""Forgetting attention of a sequence that lies on several ranks: each has the queries of its tokens.

The rank's work is cut into tasks that ordinary kernels compute, each for a run of queries of one segment and some heads
over a window of keys that ends with the last of them:

* *Inside*: the queries after the first few, for heads that keep keys of the segment only. Queries, keys and values
  are views of what the rank has. It is almost everything where heads forget, and runs while rows are on their way.
* *Edge*: the first queries of these heads, whose window reaches back over the border of the segment.
* *Far*: heads that look back from most of the segment, in groups whose windows are at most twice as long as another's.

Each query of a head is computed by one task over all keys that it keeps, so nothing is combined or rescaled, and
results are those of one device but for the order of sums within tiles. Backward runs the tasks with fetched keys first,
and sends the gradients of these home while the others run.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import Passes, best_passes
from .context_parallel import Shards
from .decay import Decay
from .remote_keys import Exchange, Fetch, Needs, Rows, Runs, find_needs, plan_fetch, to_device
from .tiles import PRUNED_QUERIES


class Task(NamedTuple):
    """Queries and heads that are computed in one call.

    Attributes:
        rows: queries, among this rank's tokens.
        heads: key/value heads; None for all.
        hidden: of all heads, those that are left out.
        start, stop: window of keys, in tokens of the sequence; the last is that of the last query.
        segment: rows of the segment that the queries are of.
        segment_start: its first token.
    """

    rows: slice
    heads: list[int] | None
    hidden: list[int]
    start: int
    stop: int
    segment: slice
    segment_start: int

    @property
    def is_inside(self) -> bool:
        """Whether all keys are of the queries' segment and all heads are asked for, so that nothing is copied."""
        return self.heads is None and self.start >= self.segment_start


def plan_tasks(needs: Needs, shards: Shards) -> list[Task]:
    """The tasks of this rank, the largest first: while a GPU computes one, the host prepares the next."""
    inside, others = [], []
    first, crossing = needs.first[shards.own].min(1), needs.crossing.max(1)
    heads = first.shape[1]
    for number, (segment, rows) in enumerate(zip(shards.segments, shards.rows, strict=True)):
        length = segment.stop - segment.start
        near = [g for g in range(heads) if crossing[number, g] <= length // 2]
        far = [g for g in range(heads) if g not in near]
        edge = int(crossing[number, near].max(initial=0))
        edge = min(-(-edge // PRUNED_QUERIES) * PRUNED_QUERIES, length)
        if near and edge < length:
            after = slice(rows.start + edge, rows.stop)
            inside.append(Task(after, None, far, segment.start, segment.stop, rows, segment.start))
        for group, count in ((near, edge), (far, length)):
            if count:
                for some, start in _by_length(group, first[number], segment.start, count):
                    queries = slice(rows.start, rows.start + count)
                    stop = segment.start + count
                    chosen = None if len(some) == heads else some
                    others.append(Task(queries, chosen, [], start, stop, rows, segment.start))
    return sorted(inside, key=_size, reverse=True) + sorted(others, key=_size, reverse=True)


def _size(task: Task) -> int:
    """Pairs of queries and keys in its window, whether they are kept or not."""
    heads = -len(task.hidden) if task.heads is None else len(task.heads)
    return (task.rows.stop - task.rows.start) * (task.stop - task.start) * heads


def _by_length(heads: list[int], first: np.ndarray, start: int, queries: int) -> list[tuple[list[int], int]]:
    """Heads by how far they look back, in steps of two times, and where the window of each group begins."""
    groups: dict[int, list[int]] = {}
    for g in heads:
        back = (start - int(first[g])) / queries
        groups.setdefault(max(0, int(np.ceil(np.log2(back)))) if back > 1 else 0, []).append(g)
    # Aligned, so that what pruning drops in blocks are whole tiles.
    return [(some, int(first[some].min()) // PRUNED_QUERIES * PRUNED_QUERIES) for some in groups.values()]


@dataclass
class _Placed:
    """A task with its indices on the device.

    Attributes:
        task: what is computed.
        heads, of_query, of_gate: its key/value heads, and their query heads and gates; None for all.
        left_out: query heads that it leaves out, of all.
        runs, tables: for `source` and `target`.
        own: where tokens of this rank lie in its window, and on the rank.
    """

    task: Task
    heads: Tensor | None
    of_query: Tensor | None
    of_gate: Tensor | None
    left_out: Tensor
    runs: tuple[Runs, Runs]
    tables: tuple[Tensor, Tensor]
    own: list[tuple[slice, slice]]

    @cached_property
    def source(self) -> Tensor:
        """The rows in its window, of those that were received."""
        return self.runs[0].expand(self.tables[0])

    @cached_property
    def target(self) -> Tensor:
        """Where they lie, as rows of the window ``[B, W, heads]``."""
        return self.runs[1].expand(self.tables[1])


class _Plan:
    """What one call of attention does, for its forward and its backward pass."""

    def __init__(self, needs: Needs, shards: Shards, group: int, gates: int, device: torch.device) -> None:
        """
        Args:
            needs: of all ranks.
            shards: who has which tokens.
            group, gates: query heads and gates of a key/value head.
            device: of the tensors.
        """
        self.shards, self.group = shards, group
        self.fetch: Fetch = plan_fetch(needs, shards)
        tasks = plan_tasks(needs, shards)
        kv_heads = needs.first.shape[2]
        runs = [_received_rows(task, self.fetch, kv_heads) for task in tasks]
        tables = [self.fetch.rows.table()]
        for task, (source, target) in zip(tasks, runs, strict=True):
            chosen = np.arange(kv_heads) if task.heads is None else np.array(task.heads)
            tables += [chosen, _members(chosen, group), _members(chosen, gates), _members(np.array(task.hidden), group)]
            tables += [source.table(), target.table()]
        index, *parts = to_device(tables, device)
        self.index = self.fetch.rows.expand(index)
        placed = []
        for i, (task, own_runs) in enumerate(zip(tasks, runs, strict=True)):
            *chosen, left_out, source, target = parts[6 * i : 6 * i + 6]
            heads = (None, None, None) if task.heads is None else chosen
            placed.append(_Placed(task, *heads, left_out, own_runs, (source, target), _own_parts(task, shards)))
        self.inside = [one for one in placed if one.task.is_inside]
        self.others = [one for one in placed if not one.task.is_inside]


def _members(heads: np.ndarray, count: int) -> np.ndarray:
    """Those of ``count`` each that belong to key/value heads."""
    return (heads[:, None] * count + np.arange(count)).ravel().astype(np.int64)


def _received_rows(task: Task, fetch: Fetch, kv_heads: int) -> tuple[Runs, Runs]:
    """Which received rows are in the window ``[B, W, heads]`` of a task, and where."""
    heads = np.arange(kv_heads) if task.heads is None else np.array(task.heads)
    width = task.stop - task.start
    sources, targets, counts = ([np.empty(0, np.int64)] for _ in range(3))
    for segment in fetch.segments:
        if task.start < segment.stop <= task.segment_start:
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


class _Tensors(NamedTuple):
    """Of this rank's tokens, ``[B, T, heads, D]`` and ``[B, gates, T]``; ``c_k`` is +inf for padding."""

    q: Tensor
    k: Tensor
    v: Tensor
    c_q: Tensor
    c_k: Tensor
    first: Tensor

    def gates(self) -> int:
        """Of a key/value head."""
        return self.c_k.shape[1] // self.k.shape[2]


def _rows_of(x: _Tensors, index: Tensor) -> Rows:
    """Rows ``(b T + t) G + g`` of keys, values and their running sums."""
    k, v = (y.reshape(-1, y.shape[-1]).index_select(0, index) for y in (x.k, x.v))
    return Rows(torch.stack([k, v], 1), _by_token(x.c_k, x.k.shape[2]).flatten(0, 2).index_select(0, index))


def _by_token(c: Tensor, kv_heads: int) -> Tensor:
    """``[B, G * gates, T] -> [B, T, G, gates]``."""
    return c.unflatten(1, (kv_heads, -1)).permute(0, 3, 1, 2)


class _Inputs(NamedTuple):
    """What the kernels are given for one task."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Decay


def _inputs(x: _Tensors, placed: _Placed, rows: Rows | None) -> _Inputs:
    task = placed.task
    q, c_q, first = x.q[:, task.rows], x.c_q[..., task.rows], x.first[..., task.rows]
    width, queries = task.stop - task.start, task.rows.stop - task.rows.start
    if placed.of_query is not None and placed.of_gate is not None:
        q, first = q.index_select(2, placed.of_query), first.index_select(1, placed.of_query)
        c_q = c_q.index_select(1, placed.of_gate)
    first = (first - task.start).clamp_(min=0)
    if task.hidden:
        first.index_fill_(1, placed.left_out, width)
    last = torch.arange(width - queries, width, device=q.device)
    if task.is_inside:
        k, v, c_k = x.k[:, task.segment], x.v[:, task.segment], x.c_k[..., task.segment]
    else:
        k, v, c_k = _window(x, placed, rows)
    return _Inputs(q, k, v, Decay(c_q, c_k, first, last))


def _window(x: _Tensors, placed: _Placed, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values ``[B, W, heads, D]`` and sums ``[B, gates, W]`` of a task; what nobody needs is zero and hidden."""
    batch, _, kv_heads, size = x.k.shape
    heads = kv_heads if placed.heads is None else len(placed.heads)
    k, v = x.k.new_zeros(2, batch, placed.task.stop - placed.task.start, heads, size).unbind()
    c = x.c_k.new_full((*k.shape[:3], x.gates()), float("inf"))
    sums = _by_token(x.c_k, kv_heads)
    for inside, own in placed.own:
        for window, whole in ((k, x.k), (v, x.v), (c, sums)):
            part = whole[:, own]
            window[:, inside] = part if placed.heads is None else part.index_select(2, placed.heads)
    if rows is not None and len(placed.source):
        kv = rows.kv.index_select(0, placed.source)
        k.flatten(0, 2).index_copy_(0, placed.target, kv[:, 0])
        v.flatten(0, 2).index_copy_(0, placed.target, kv[:, 1])
        c.flatten(0, 2).index_copy_(0, placed.target, rows.c.index_select(0, placed.source))
    return k, v, c.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, c_q, c_k, first, plan, passes, scale, dropout):
        x = _Tensors(q, k, v, c_q, c_k, first)
        exchange = None
        if not plan.fetch.idle:
            exchange = Exchange(_rows_of(x, plan.index), plan.fetch.sent, plan.fetch.received, plan.shards)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse: Tensor | None = None
        seeds = []

        def run(placed: _Placed, rows: Rows | None) -> None:
            nonlocal lse
            seed = torch.randint(2**62, (), dtype=torch.int64, device=q.device) if dropout > 0.0 else None
            seeds.append(seed)
            result, sums = passes.forward(*_inputs(x, placed, rows), scale, dropout, seed)
            if lse is None:
                lse = sums.new_empty(q.shape[0], q.shape[2], q.shape[1])
            _put(out, result, placed, token_dim=1)
            _put(lse, sums, placed, token_dim=2)

        for placed in plan.inside:
            run(placed, None)
        rows = None if exchange is None else exchange.wait()
        for placed in plan.others:
            run(placed, rows)
        ctx.save_for_backward(*x, out, lse, *seeds, *(rows or ()))
        ctx.plan, ctx.passes, ctx.scale, ctx.dropout = plan, passes, scale, dropout
        return out

    @staticmethod
    def backward(ctx, d_out):
        plan: _Plan = ctx.plan
        tasks = plan.inside + plan.others
        # Once: what activation checkpointing has stored in their place may be asked for only once.
        saved = ctx.saved_tensors
        x, (out, lse), seeds = _Tensors(*saved[:6]), saved[6:8], saved[8 : 8 + len(tasks)]
        rows = None if plan.fetch.idle else Rows(*saved[8 + len(tasks) :])
        gradients = _Gradients(x, rows, plan)

        def run(placed: _Placed, seed: Tensor | None) -> None:
            inputs = _inputs(x, placed, rows)
            d, o = (_get(y, placed, token_dim=1) for y in (d_out, out))
            sums = _get(lse, placed, token_dim=2).contiguous()
            gradients.add(placed, *ctx.passes.backward(d, *inputs, o, sums, ctx.scale, ctx.dropout, seed))

        for placed, seed in zip(plan.others, seeds[len(plan.inside) :], strict=True):
            run(placed, seed)
        exchange = None
        if gradients.of_rows is not None:
            # Home, to the ranks that they came from.
            exchange = Exchange(gradients.of_rows, plan.fetch.received, plan.fetch.sent, plan.shards)
        for placed, seed in zip(plan.inside, seeds, strict=False):
            run(placed, seed)
        gradients.finish(exchange)
        return gradients.q, gradients.k, gradients.v, gradients.c_q, gradients.c_k, None, None, None, None, None


def _get(x: Tensor, placed: _Placed, token_dim: int) -> Tensor:
    """The queries and heads of a task, of ``x`` with query heads in dimension 1 or 2 and tokens in the other."""
    rows = placed.task.rows
    x = x.narrow(token_dim, rows.start, rows.stop - rows.start)
    return x if placed.of_query is None else x.index_select(3 - token_dim, placed.of_query)


def _put(whole: Tensor, x: Tensor, placed: _Placed, token_dim: int) -> None:
    rows = placed.task.rows
    whole = whole.narrow(token_dim, rows.start, rows.stop - rows.start)
    if placed.of_query is None:
        whole.copy_(x)
    else:
        whole.index_copy_(3 - token_dim, placed.of_query, x)


class _Gradients:
    """Sums of what tasks find. Inside ones write whole segments, so they come first: what others found waits."""

    def __init__(self, x: _Tensors, rows: Rows | None, plan: _Plan) -> None:
        self._plan = plan
        segments = [placed.task.segment for placed in plan.inside]
        covered = sum(rows.stop - rows.start for rows in segments) == x.q.shape[1]
        make = torch.empty_like if covered else torch.zeros_like
        self.k, self.v = (make(y, memory_format=torch.contiguous_format) for y in (x.k, x.v))
        self.q = torch.empty_like(x.q, memory_format=torch.contiguous_format)
        self.c_q, self.c_k = (torch.zeros_like(y, memory_format=torch.contiguous_format) for y in (x.c_q, x.c_k))
        self.of_rows = None if rows is None else Rows(*(torch.zeros_like(y) for y in rows))
        self._waiting: list[tuple[_Placed, Tensor, list[list[Tensor]]]] = []

    def add(self, placed: _Placed, dq: Tensor, dk: Tensor, dv: Tensor, dc_q: Tensor, dc_k: Tensor) -> None:
        """What one task found, each in the shape of its inputs."""
        task = placed.task
        if placed.of_gate is None:
            self.c_q[..., task.rows] += dc_q
        else:
            self.c_q[..., task.rows].index_add_(1, placed.of_gate, dc_q)
        if task.is_inside:
            self.q[:, task.rows] = dq
            self.k[:, task.segment], self.v[:, task.segment] = dk, dv
            self.c_k[..., task.segment] += dc_k
            return
        found = (dk, dv, _by_token(dc_k, dk.shape[2]))
        if self.of_rows is not None and len(placed.source):
            dk, dv, dc = (y.flatten(0, 2).index_select(0, placed.target) for y in found)
            self.of_rows.kv.index_add_(0, placed.source, torch.stack([dk, dv], 1))
            self.of_rows.c.index_add_(0, placed.source, dc)
        self._waiting.append((placed, dq, [[y[:, inside] for y in found] for inside, _ in placed.own]))

    def finish(self, exchange: Exchange | None) -> None:
        """Add what waits, and what other ranks found for this one's keys."""
        kv_heads, size = self.k.shape[2:]
        by_token = torch.zeros_like(_by_token(self.c_k, kv_heads), memory_format=torch.contiguous_format)
        for placed, dq, parts in self._waiting:
            _put(self.q, dq, placed, token_dim=1)
            for (_, rows), found in zip(placed.own, parts, strict=True):
                for whole, part in zip((self.k, self.v, by_token), found, strict=True):
                    if placed.heads is None:
                        whole[:, rows] += part
                    else:
                        whole[:, rows].index_add_(2, placed.heads, part)
        if exchange is not None:
            counts = self._plan.fetch.sent
            kv, c = exchange.wait()
            # One rank after the other: of one, no row comes twice, so the order of additions is always the same.
            for rows, d_kv, d_c in zip(self._plan.index.split(counts), kv.split(counts), c.split(counts), strict=True):
                if len(rows):
                    self.k.view(-1, size).index_add_(0, rows, d_kv[:, 0])
                    self.v.view(-1, size).index_add_(0, rows, d_kv[:, 1])
                    by_token.flatten(0, 2).index_add_(0, rows, d_c)
        self.c_k += by_token.permute(0, 2, 3, 1).flatten(1, 2)


@torch.compiler.disable
def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    shards: Shards,
    *,
    scale: float,
    dropout: float = 0.0,
    passes: Passes | None = None,
) -> Tensor:
    """Forgetting attention of this rank's queries over the keys of all ranks; differentiable as `reference_attention`.

    All ranks of the group call it together. Waits for the device once, to learn what is needed.

    Args:
        q: ``[B, T, H, D]`` queries of this rank's tokens.
        k, v: ``[B, T, G, D]`` its keys and values.
        decay: of its tokens, with running sums, ``first`` and ``last`` of the whole sequence, and what may be left out
            left out (`sharded_pruning`): it is what need not be fetched.
        shards: who has which tokens.
        scale: multiplies ``q . k``.
        dropout: probability of dropping an attention weight.
        passes: what computes each task; `best_passes` by default.

    Returns:
        ``[B, T, H, D]`` in the type of ``q``.
    """
    kv_heads, heads = k.shape[2], q.shape[2]
    c_q, c_k, first = decay.query, decay.key, decay.first
    if c_k.shape[1] == 1:
        c_q, c_k = c_q.expand(-1, kv_heads, -1), c_k.expand(-1, kv_heads, -1)
    if first.shape[1] != heads:
        first = first.repeat_interleave(heads // first.shape[1], dim=1)
    needs = find_needs(first, kv_heads, shards)
    plan = _Plan(needs, shards, heads // kv_heads, c_k.shape[1] // kv_heads, q.device)
    traffic = shards.context.traffic
    row_bytes = 2 * q.shape[-1] * q.element_size()
    traffic.moved += sum(plan.fetch.received) * (row_bytes + 8 * c_k.shape[1] // kv_heads)
    traffic.ring += (shards.split.length - q.shape[1]) * q.shape[0] * kv_heads * row_bytes
    return _ShardedAttention.apply(q, k, v, c_q, c_k, first, plan, passes or best_passes(q), scale, dropout)
