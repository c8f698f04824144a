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

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import Passes, best_passes
from .context_parallel import Shards
from .decay import Decay
from .remote_keys import Exchange, Fetch, Needs, Received, Rows, expand, find_needs, plan_fetch
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
    """The tasks of this rank, those inside first."""
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
    return inside + others


def _by_length(heads: list[int], first: np.ndarray, start: int, queries: int) -> list[tuple[list[int], int]]:
    """Heads by how far they look back, in steps of two times, and where the window of each group begins."""
    groups: dict[int, list[int]] = {}
    for g in heads:
        back = (start - int(first[g])) / queries
        groups.setdefault(max(0, int(np.ceil(np.log2(back)))) if back > 1 else 0, []).append(g)
    # Aligned, so that what pruning drops in blocks are whole tiles.
    return [(some, int(first[some].min()) // PRUNED_QUERIES * PRUNED_QUERIES) for some in groups.values()]


class _Plan:
    """What one call of attention does, for its forward and its backward pass."""

    def __init__(self, needs: Needs, shards: Shards, device: torch.device) -> None:
        self.shards, self.device = shards, device
        self.fetch: Fetch = plan_fetch(needs, shards, device)
        tasks = plan_tasks(needs, shards)
        self.inside = [task for task in tasks if task.is_inside]
        self.others = [task for task in tasks if not task.is_inside]

    def received_rows(self, task: Task, kv_heads: int) -> tuple[Tensor, Tensor]:
        """For a window ``[B, W, heads, ...]``: which received rows it holds, and where, as rows of it."""
        heads = list(range(kv_heads)) if task.heads is None else task.heads
        width = task.stop - task.start
        sources, targets, counts = [], [], []
        for of_segment in self.fetch.segments:
            if of_segment.stop <= task.start or of_segment.stop > task.segment_start:
                continue
            source, target, count = _overlap(of_segment, task.start, heads, width)
            sources.append(source), targets.append(target), counts.append(count)
        if not sources:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return nothing, nothing
        lengths = np.concatenate(counts)
        source = expand(np.concatenate(sources), lengths, 1, self.device)
        return source, expand(np.concatenate(targets), lengths, len(heads), self.device)


def _overlap(received: Received, start: int, heads: list[int], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rows among those received and in a window from ``start`` on, and how many, for each sequence and head."""
    first = received.first[:, heads]
    begin = np.maximum(first, start)
    source = received.row[:, heads] + begin - first
    batch = np.arange(len(first))[:, None]
    target = (batch * width + begin - start) * len(heads) + np.arange(len(heads))
    return source.ravel(), target.ravel(), (received.stop - begin).clip(min=0).ravel()


class _Inputs(NamedTuple):
    """What the kernels are given for one task, and where a window's rows come from (None inside)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Decay
    source: Tensor | None
    target: Tensor | None


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


def _inputs(x: _Tensors, task: Task, plan: _Plan, rows: Rows | None) -> _Inputs:
    q, c_q, first = x.q[:, task.rows], x.c_q[..., task.rows], x.first[..., task.rows]
    width, queries = task.stop - task.start, task.rows.stop - task.rows.start
    group, gates = x.q.shape[2] // x.k.shape[2], x.gates()
    if task.heads is not None:
        of_query = torch.tensor([g * group + i for g in task.heads for i in range(group)], device=q.device)
        of_gate = torch.tensor([g * gates + i for g in task.heads for i in range(gates)], device=q.device)
        q, first, c_q = q.index_select(2, of_query), first.index_select(1, of_query), c_q.index_select(1, of_gate)
    first = (first - task.start).clamp_(min=0)
    if task.hidden:
        left_out = torch.tensor([g * group + i for g in task.hidden for i in range(group)], device=q.device)
        first.index_fill_(1, left_out, width)
    last = torch.arange(width - queries, width, device=q.device)
    if task.is_inside:
        c_k = x.c_k[..., task.segment]
        return _Inputs(q, x.k[:, task.segment], x.v[:, task.segment], Decay(c_q, c_k, first, last), None, None)
    source, target = plan.received_rows(task, x.k.shape[2])
    k, v, c = _window(x, task, plan.shards)
    if rows is not None and len(source):
        kv = rows.kv.index_select(0, source)
        k.flatten(0, 2).index_copy_(0, target, kv[:, 0])
        v.flatten(0, 2).index_copy_(0, target, kv[:, 1])
        c.flatten(0, 2).index_copy_(0, target, rows.c.index_select(0, source))
    c_k = c.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    return _Inputs(q, k, v, Decay(c_q, c_k, first, last), source, target)


def _window(x: _Tensors, task: Task, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[B, W, heads, D]``, sums ``[B, W, heads, gates]``: of this rank's tokens, the others hidden."""
    batch, _, kv_heads, size = x.k.shape
    heads = kv_heads if task.heads is None else len(task.heads)
    k, v = x.k.new_zeros(2, batch, task.stop - task.start, heads, size).unbind()
    c = x.c_k.new_full((*k.shape[:3], x.gates()), float("inf"))
    sums = _by_token(x.c_k, kv_heads)
    for inside, rows in _own_parts(task, shards):
        for window, whole in ((k, x.k), (v, x.v), (c, sums)):
            part = whole[:, rows]
            window[:, inside] = part if task.heads is None else part[:, :, task.heads]
    return k, v, c


def _own_parts(task: Task, shards: Shards) -> list[tuple[slice, slice]]:
    """Where this rank's tokens lie in the window of a task, and in the rank."""
    parts = []
    for (_, start, stop), rows in zip(shards.segments, shards.rows, strict=True):
        begin, end = max(start, task.start), min(stop, task.stop)
        if begin < end:
            inside = slice(begin - task.start, end - task.start)
            parts.append((inside, slice(rows.start + begin - start, rows.start + end - start)))
    return parts


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, c_q, c_k, first, plan, passes, scale, dropout):
        x = _Tensors(q, k, v, c_q, c_k, first)
        exchange = None
        if not plan.fetch.idle:
            exchange = Exchange(_rows_of(x, plan.fetch.index), plan.fetch.sent, plan.fetch.received, plan.shards)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse: Tensor | None = None
        seeds = []

        def run(task: Task, rows: Rows | None) -> None:
            nonlocal lse
            seed = torch.randint(2**62, (), dtype=torch.int64, device=q.device) if dropout > 0.0 else None
            seeds.append(seed)
            inputs = _inputs(x, task, plan, rows)
            result, sums = passes.forward(inputs.q, inputs.k, inputs.v, inputs.decay, scale, dropout, seed)
            if lse is None:
                lse = sums.new_empty(q.shape[0], q.shape[2], q.shape[1])
            _put(out, result, task, q.shape[2] // k.shape[2], token_dim=1)
            _put(lse, sums, task, q.shape[2] // k.shape[2], token_dim=2)

        for task in plan.inside:
            run(task, None)
        rows = None if exchange is None else exchange.wait()
        for task in plan.others:
            run(task, rows)
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

        def run(task: Task, seed: Tensor | None) -> None:
            inputs = _inputs(x, task, plan, rows)
            group = x.q.shape[2] // x.k.shape[2]
            d, o = (_get(y, task, group, token_dim=1) for y in (d_out, out))
            sums = _get(lse, task, group, token_dim=2).contiguous()
            found = ctx.passes.backward(
                d, inputs.q, inputs.k, inputs.v, inputs.decay, o, sums, ctx.scale, ctx.dropout, seed
            )
            gradients.add(task, inputs, *found)

        for task, seed in zip(plan.others, seeds[len(plan.inside) :], strict=True):
            run(task, seed)
        exchange = None
        if rows is not None:
            # Home, by the ranks that they came from.
            exchange = Exchange(gradients.of_rows, plan.fetch.received, plan.fetch.sent, plan.shards)
        for task, seed in zip(plan.inside, seeds, strict=False):
            run(task, seed)
        gradients.finish(exchange)
        return gradients.q, gradients.k, gradients.v, gradients.c_q, gradients.c_k, None, None, None, None, None


def _get(x: Tensor, task: Task, group: int, token_dim: int) -> Tensor:
    x = x.narrow(token_dim, task.rows.start, task.rows.stop - task.rows.start)
    if task.heads is None:
        return x
    heads = torch.tensor([g * group + i for g in task.heads for i in range(group)], device=x.device)
    return x.index_select(3 - token_dim, heads)


def _put(whole: Tensor, x: Tensor, task: Task, group: int, token_dim: int) -> None:
    whole = whole.narrow(token_dim, task.rows.start, task.rows.stop - task.rows.start)
    if task.heads is None:
        whole.copy_(x)
    else:
        heads = torch.tensor([g * group + i for g in task.heads for i in range(group)], device=x.device)
        whole.index_copy_(3 - token_dim, heads, x)


class _Gradients:
    """Sums of what tasks find. Inside ones write whole segments, so they come first: what others found waits."""

    def __init__(self, x: _Tensors, rows: Rows | None, plan: _Plan) -> None:
        self._plan, self._group, self._gates = plan, x.q.shape[2] // x.k.shape[2], x.gates()
        covered = sum(task.segment.stop - task.segment.start for task in plan.inside) == x.q.shape[1]
        make = torch.empty_like if covered else torch.zeros_like
        self.k, self.v = (make(y, memory_format=torch.contiguous_format) for y in (x.k, x.v))
        self.q = torch.empty_like(x.q, memory_format=torch.contiguous_format)
        self.c_q, self.c_k = (torch.zeros_like(y, memory_format=torch.contiguous_format) for y in (x.c_q, x.c_k))
        self.of_rows = None if rows is None else Rows(*(torch.zeros_like(y) for y in rows))
        self._waiting: list[tuple[Task, Tensor, Tensor, Tensor]] = []

    def add(self, task: Task, inputs: _Inputs, dq: Tensor, dk: Tensor, dv: Tensor, dc_q: Tensor, dc_k: Tensor) -> None:
        """What one task found, each in the shape of its inputs."""
        if task.heads is None:
            self.c_q[..., task.rows] += dc_q
        else:
            gates = [g * self._gates + i for g in task.heads for i in range(self._gates)]
            self.c_q[..., task.rows].index_add_(1, torch.tensor(gates, device=dq.device), dc_q)
        if task.is_inside:
            self.q[:, task.rows] = dq
            self.k[:, task.segment], self.v[:, task.segment] = dk, dv
            self.c_k[..., task.segment] += dc_k
            return
        heads = dk.shape[2]
        sums = _by_token(dc_k, heads)
        if self.of_rows is not None and len(inputs.source):
            kv = torch.stack([y.flatten(0, 2).index_select(0, inputs.target) for y in (dk, dv)], 1)
            self.of_rows.kv.index_add_(0, inputs.source, kv)
            self.of_rows.c.index_add_(0, inputs.source, sums.flatten(0, 2).index_select(0, inputs.target))
        parts = _own_parts(task, self._plan.shards)
        own = [torch.cat([y[:, inside] for inside, _ in parts], 1) for y in (dk, dv, sums)]
        self._waiting.append((task, dq, *own))

    def finish(self, exchange: Exchange | None) -> None:
        """Add what waits, and what other ranks found for this one's keys."""
        kv_heads, size = self.k.shape[2:]
        by_token = torch.zeros_like(_by_token(self.c_k, kv_heads), memory_format=torch.contiguous_format)
        for task, dq, *own in self._waiting:
            _put(self.q, dq, task, self._group, token_dim=1)
            heads = torch.tensor(range(kv_heads) if task.heads is None else task.heads, device=dq.device)
            rows = [rows for _, rows in _own_parts(task, self._plan.shards)]
            for whole, found in zip((self.k, self.v, by_token), own, strict=True):
                for place, part in zip(rows, found.split([x.stop - x.start for x in rows], 1), strict=True):
                    whole[:, place].index_add_(2, heads, part)
        if exchange is not None:
            index, counts = self._plan.fetch.index, self._plan.fetch.sent
            kv, c = exchange.wait()
            # One rank after the other: of one, no row comes twice, so the order of additions is always the same.
            for rows, d_kv, d_c in zip(index.split(counts), kv.split(counts), c.split(counts), strict=True):
                self.k.view(-1, size).index_add_(0, rows, d_kv[:, 0].contiguous())
                self.v.view(-1, size).index_add_(0, rows, d_kv[:, 1].contiguous())
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
    plan = _Plan(find_needs(first, decay.last, kv_heads, shards), shards, q.device)
    traffic = shards.context.traffic
    row_bytes = 2 * q.shape[-1] * q.element_size()
    traffic.moved += sum(plan.fetch.received) * (row_bytes + 8 * c_k.shape[1] // kv_heads)
    traffic.ring += (shards.split.length - q.shape[1]) * q.shape[0] * kv_heads * row_bytes
    return _ShardedAttention.apply(q, k, v, c_q, c_k, first, plan, passes or best_passes(q), scale, dropout)
