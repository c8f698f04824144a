"""Forgetting attention of a sequence that lies on several ranks: each has the queries of its tokens.

The rank's work is cut into tasks that ordinary kernels compute, each for a run of queries of one segment and some heads
over a window of keys that ends with the last of them:

* *Inside*: the queries after the first eighth of a segment, for heads that keep no key before it from there. Queries,
  keys and values are views of what the rank has. Which heads these are the device knows by itself; so this is under
  way while the host learns what is needed, and rows are on theirs.
* *Edge*: the first eighth, for the same heads. Its window reaches back over the border of the segment.
* *Far*: the other heads, in groups whose windows are at most twice as long as another's.

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
from .backend import ONLY_REVERSE_MODE
from .context_parallel import Shards
from .decay import Decay
from .remote_keys import Exchange, Fetch, Needs, Question, Rows, Runs, plan_fetch, to_device
from .tiles import PRUNED_QUERIES
from .token_split import Segment

# Of a segment, how much is its edge.
_EDGE = 8


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
    eighth = -(-length // _EDGE // PRUNED_QUERIES) * PRUNED_QUERIES
    return min(eighth, length) if segment.start else 0


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
class _Placed:
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


class _Plan:
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

    def inside(self, parts: int = 1) -> list[_Placed]:
        """The tasks that need nothing of other ranks."""
        return [self._placed(task) for task in plan_inside(self.shards, parts)]

    def _placed(self, task: Task) -> _Placed:
        left_out = self._left_out[task.segment] if task.inside else None
        return _Placed(task, self.shards.rows[task.segment], _own_parts(task, self.shards), left_out)

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
            heads, of_query, of_gate, source, target = parts[5 * i : 5 * i + 5]
            if task.heads is not None:
                placed.heads, placed.of_query, placed.of_gate = heads, of_query, of_gate
            placed.runs, placed.tables = own_runs, (source, target)
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
    if placed.left_out is not None:
        first.masked_fill_(placed.left_out[:, None], width)
    last = torch.arange(width - queries, width, device=q.device)
    if task.inside:
        keys = slice(placed.rows.start, task.rows.stop)
        k, v, c_k = x.k[:, keys], x.v[:, keys], x.c_k[..., keys]
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
    source, target = placed.received
    if rows is not None and len(source):
        kv = rows.kv.index_select(0, source)
        k.flatten(0, 2).index_copy_(0, target, kv[:, 0])
        v.flatten(0, 2).index_copy_(0, target, kv[:, 1])
        c.flatten(0, 2).index_copy_(0, target, rows.c.index_select(0, source))
    return k, v, c.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, c_q, c_k, first, shards, passes, scale, dropout):
        x = _Tensors(q, k, v, c_q, c_k, first)
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

        plan = _Plan(first, k.shape[2], x.gates(), shards)
        # In two, so that one is under way while the host learns what is needed, the other while rows are on their way.
        # What is dropped depends on how the work is cut, and backward must drop the same.
        inside = plan.inside(parts=2 if len(shards.segments) == 1 and dropout == 0.0 else 1)
        at_once = (len(inside) + 1) // 2
        for placed in inside[:at_once]:
            run(placed, None)
        plan.learn()
        exchange = None
        if not plan.fetch.idle:
            exchange = Exchange(_rows_of(x, plan.index), plan.fetch.sent, plan.fetch.received, shards)
        for placed in inside[at_once:]:
            run(placed, None)
        rows = None if exchange is None else exchange.wait()
        for placed in plan.others:
            run(placed, rows)
        _count(plan, x, shards)
        ctx.save_for_backward(*x, out, lse, *seeds, *(rows or ()))
        ctx.plan, ctx.passes, ctx.scale, ctx.dropout, ctx.calls = plan, passes, scale, dropout, len(seeds)
        return out

    @staticmethod
    def backward(ctx, d_out):
        if torch.is_grad_enabled():
            # With create_graph=True. Not later, as other operators do: what is sent has no graph that could lead here.
            raise NotImplementedError(ONLY_REVERSE_MODE)
        plan: _Plan = ctx.plan
        # Once: what activation checkpointing has stored in their place may be asked for only once.
        saved = ctx.saved_tensors
        x, (out, lse), seeds = _Tensors(*saved[:6]), saved[6:8], saved[8 : 8 + ctx.calls]
        rows = None if plan.fetch.idle else Rows(*saved[8 + ctx.calls :])
        inside = plan.inside()
        gradients = _Gradients(x, rows, plan, inside)

        def run(placed: _Placed, seed: Tensor | None) -> None:
            inputs = _inputs(x, placed, rows)
            d, o = (_get(y, placed, token_dim=1) for y in (d_out, out))
            sums = _get(lse, placed, token_dim=2).contiguous()
            gradients.add(placed, *ctx.passes.backward(d, *inputs, o, sums, ctx.scale, ctx.dropout, seed))

        for placed, seed in zip(plan.others, seeds[ctx.calls - len(plan.others) :], strict=True):
            run(placed, seed)
        exchange = None
        if gradients.of_rows is not None:
            # Home, to the ranks that they came from.
            exchange = Exchange(gradients.of_rows, plan.fetch.received, plan.fetch.sent, plan.shards)
        for placed, seed in zip(inside, seeds, strict=False):
            run(placed, seed)
        gradients.finish(exchange)
        return gradients.q, gradients.k, gradients.v, gradients.c_q, gradients.c_k, None, None, None, None, None


def _count(plan: _Plan, x: _Tensors, shards: Shards) -> None:
    """Add what was fetched to the group's `Traffic`."""
    batch, tokens, kv_heads, size = x.k.shape
    row_bytes = 2 * size * x.k.element_size()
    traffic = shards.context.traffic
    traffic.moved += sum(plan.fetch.received) * (row_bytes + x.gates() * x.c_k.element_size())
    traffic.ring += (shards.split.length - tokens) * batch * kv_heads * row_bytes


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

    def __init__(self, x: _Tensors, rows: Rows | None, plan: _Plan, inside: list[_Placed]) -> None:
        self._plan = plan
        covered = len(inside) == len(plan.shards.segments)
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
        if task.inside:
            self.q[:, task.rows] = dq
            self.k[:, placed.rows], self.v[:, placed.rows] = dk, dv
            self.c_k[..., placed.rows] += dc_k
            return
        found = (dk, dv, _by_token(dc_k, dk.shape[2]))
        source, target = placed.received
        if self.of_rows is not None and len(source):
            dk, dv, dc = (y.flatten(0, 2).index_select(0, target) for y in found)
            self.of_rows.kv.index_add_(0, source, torch.stack([dk, dv], 1))
            self.of_rows.c.index_add_(0, source, dc)
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
    return _ShardedAttention.apply(q, k, v, c_q, c_k, first, shards, passes or best_passes(q), scale, dropout)
