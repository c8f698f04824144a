"""Forgetting attention of a sequence that lies on several ranks: each has the queries of its tokens.

Its work is cut into tasks (`sharded_tasks`) that ordinary kernels compute. Each query of a head is computed by one
task over all keys that it keeps, so nothing is combined or rescaled, and results are those of one device but for the
order of sums within tiles. Forward begins with the tasks that need no other rank; backward ends with them, while the
gradients of fetched keys are on their way home.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Passes, best_passes
from .backend import ONLY_REVERSE_MODE
from .context_parallel import Shards
from .decay import Decay
from .remote_keys import Exchange, Rows
from .sharded_tasks import Placed, Plan


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


def _inputs(x: _Tensors, placed: Placed, rows: Rows | None) -> _Inputs:
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


def _window(x: _Tensors, placed: Placed, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
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

        def run(placed: Placed, rows: Rows | None) -> None:
            nonlocal lse
            seed = torch.randint(2**62, (), dtype=torch.int64, device=q.device) if dropout > 0.0 else None
            seeds.append(seed)
            result, sums = passes.forward(*_inputs(x, placed, rows), scale, dropout, seed)
            if lse is None:
                lse = sums.new_empty(q.shape[0], q.shape[2], q.shape[1])
            _put(out, result, placed, token_dim=1)
            _put(lse, sums, placed, token_dim=2)

        plan = Plan(first, k.shape[2], x.gates(), shards)
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
        plan: Plan = ctx.plan
        # Once: what activation checkpointing has stored in their place may be asked for only once.
        saved = ctx.saved_tensors
        x, (out, lse), seeds = _Tensors(*saved[:6]), saved[6:8], saved[8 : 8 + ctx.calls]
        rows = None if plan.fetch.idle else Rows(*saved[8 + ctx.calls :])
        inside = plan.inside()
        gradients = _Gradients(x, rows, plan, inside)

        def run(placed: Placed, seed: Tensor | None) -> None:
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


def _count(plan: Plan, x: _Tensors, shards: Shards) -> None:
    """Add what was fetched to the group's `Traffic`."""
    batch, tokens, kv_heads, size = x.k.shape
    row_bytes = 2 * size * x.k.element_size()
    traffic = shards.context.traffic
    traffic.moved += sum(plan.fetch.received) * (row_bytes + x.gates() * x.c_k.element_size())
    traffic.ring += (shards.split.length - tokens) * batch * kv_heads * row_bytes


def _get(x: Tensor, placed: Placed, token_dim: int) -> Tensor:
    """The queries and heads of a task, of ``x`` with query heads in dimension 1 or 2 and tokens in the other."""
    rows = placed.task.rows
    x = x.narrow(token_dim, rows.start, rows.stop - rows.start)
    return x if placed.of_query is None else x.index_select(3 - token_dim, placed.of_query)


def _put(whole: Tensor, x: Tensor, placed: Placed, token_dim: int) -> None:
    rows = placed.task.rows
    whole = whole.narrow(token_dim, rows.start, rows.stop - rows.start)
    if placed.of_query is None:
        whole.copy_(x)
    else:
        whole.index_copy_(3 - token_dim, placed.of_query, x)


class _Gradients:
    """Sums of what tasks find. Inside ones write whole segments, so they come first: what others found waits."""

    def __init__(self, x: _Tensors, rows: Rows | None, plan: Plan, inside: list[Placed]) -> None:
        self._plan = plan
        covered = len(inside) == len(plan.shards.segments)
        make = torch.empty_like if covered else torch.zeros_like
        self.k, self.v = (make(y, memory_format=torch.contiguous_format) for y in (x.k, x.v))
        self.q = torch.empty_like(x.q, memory_format=torch.contiguous_format)
        self.c_q, self.c_k = (torch.zeros_like(y, memory_format=torch.contiguous_format) for y in (x.c_q, x.c_k))
        self.of_rows = None if rows is None else Rows(*(torch.zeros_like(y) for y in rows))
        self._waiting: list[tuple[Placed, Tensor, list[list[Tensor]]]] = []

    def add(self, placed: Placed, dq: Tensor, dk: Tensor, dv: Tensor, dc_q: Tensor, dc_k: Tensor) -> None:
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
