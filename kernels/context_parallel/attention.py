"""Forgetting attention of a sequence that lies on several ranks: each has the queries of its tokens.

Its work is cut into tasks (`schedule`) that ordinary kernels compute. Each query of a head is computed by one task over
all keys that it keeps, so nothing is combined or rescaled, and results are those of one device but for the order of
sums within tiles. Forward begins with the local tasks, which need no other rank; backward ends with them, while the
gradients of fetched keys travel back to their ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..decay import Decay
from ..operators import maybe_contiguous
from ..validation import ONLY_REVERSE_MODE
from .exchange import Exchange, Fetch, Packed
from .operations import ContextBackend
from .row_copy import Rows
from .schedule import Placed, Plan
from .shards import Shards

# Bytes of a rank's keys and values. Of fewer, what is fetched is there before the host has the next task ready.
_WORTH_HIDING = 1 << 29


class _Tensors(NamedTuple):
    """Of this rank's tokens, ``[B, T, heads, D]`` and ``[B, gates, T]``; ``c_k`` is +inf for padding."""

    q: Tensor
    k: Tensor
    v: Tensor
    c_q: Tensor
    c_k: Tensor
    kv_start: Tensor

    def gates(self) -> int:
        """Of a key/value head."""
        return self.c_k.shape[1] // self.k.shape[2]


def _by_token(c: Tensor, kv_heads: int) -> Tensor:
    """``[B, G * gates, T] -> [B, T, G, gates]``, a view."""
    return c.unflatten(1, (kv_heads, -1)).permute(0, 3, 1, 2)


def _as_rows(k: Tensor, v: Tensor, c: Tensor) -> Rows:
    """Of ``[B, T, G, D]`` keys and values with ``[B, G * gates, T]`` running sums."""
    return Rows(k, v, _by_token(c, k.shape[2]))


class _Inputs(NamedTuple):
    """What the kernels are given for one task."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Decay


def _inputs(x: _Tensors, placed: Placed, packed: Packed | None, shards: Shards, ops: ContextBackend) -> _Inputs:
    task = placed.task
    q, c_q = x.q[:, task.rows], x.c_q[..., task.rows]
    width, queries = task.stop - task.start, task.rows.stop - task.rows.start
    if placed.of_query is not None and placed.of_gate is not None:
        q, c_q = q.index_select(2, placed.of_query), c_q.index_select(1, placed.of_gate)
    kv_start = x.kv_start[..., task.rows]
    if task.start or placed.of_query is not None or placed.crossing is not None:
        kv_start = ops.window_kv_start(kv_start, task.start, width, placed.of_query, placed.crossing, placed.halo)
    if task.local:
        keys = slice(placed.rows.start, task.rows.stop)
        k, v, c_k = x.k[:, keys], x.v[:, keys], x.c_k[..., keys]
    else:
        k, v, c_k = _window(x, placed, packed, ops)
    return _Inputs(q, k, v, Decay(c_q, c_k, kv_start, shards.tables(q.device).tokens[width - queries : width]))


def window_kv_start(
    kv_start: Tensor, start: int, width: int, heads: Tensor | None, crossing: Tensor | None, halo: int
) -> Tensor:
    """First key of each query among those of a window, ``[B, heads, L]`` int64.

    Args:
        kv_start: ``[B, H, L]`` int64 in tokens of the sequence.
        start, width: of the window, in tokens of the sequence.
        heads: which of them; None for all.
        crossing: ``[B, G]``, how many leading queries look beyond the segment. Rows of query heads of which more than
            ``halo`` do are fully masked. None if no row is.
        halo: how many may.
    """
    if heads is not None:
        kv_start = kv_start.index_select(1, heads)
    kv_start = (kv_start - start).clamp_(min=0)
    if crossing is not None:
        left_out = (crossing.amax(0) > halo).repeat_interleave(kv_start.shape[1] // crossing.shape[1])
        kv_start.masked_fill_(left_out[:, None], width)
    return kv_start


def _window(x: _Tensors, placed: Placed, packed: Packed | None, ops: ContextBackend) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values ``[B, W, heads, D]`` and sums ``[B, gates, W]`` of a task; what nobody needs is zero and hidden."""
    batch, _, _, size = x.k.shape
    width = placed.task.stop - placed.task.start
    k, v = x.k.new_zeros(2, batch, width, placed.heads, size).unbind()
    c = x.c_k.new_full((batch, placed.heads * x.gates(), width), float("inf"))
    window = _as_rows(k, v, c)
    ops.copy_rows(_as_rows(x.k, x.v, x.c_k), window, placed.own)
    if packed is not None:
        ops.copy_rows(packed.rows(), window, placed.received)
    return k, v, c


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, c_q, c_k, kv_start, shards, backend, ops, scale, dropout):
        x = _Tensors(q, k, v, c_q, c_k, kv_start)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse: Tensor | None = None
        seeds = []

        def run(placed: Placed, packed: Packed | None) -> None:
            nonlocal lse
            seed = torch.randint(2**62, (), dtype=torch.int64, device=q.device) if dropout > 0.0 else None
            seeds.append(seed)
            result, sums = backend.forward(*_inputs(x, placed, packed, shards, ops), scale, dropout, seed)
            if lse is None:
                lse = sums.new_empty(q.shape[0], q.shape[2], q.shape[1])
            _put(out, result, placed, token_dim=1)
            _put(lse, sums, placed, token_dim=2)

        plan = Plan(kv_start, k.shape[2], x.gates(), shards, ops.find_needs)
        # All of them run while metadata come to the host. Where there is much to fetch some are left for when rows are
        # on their way, so they are at least two; but dropout depends on how the work is cut, and backward must drop the
        # same weights.
        hides = x.k.nbytes + x.v.nbytes > _WORTH_HIDING
        local = plan.local(parts=2 if hides and len(shards.segments) == 1 and dropout == 0.0 else 1)
        at_once = (len(local) + 1) // 2 if hides else len(local)
        for placed in local[:at_once]:
            run(placed, None)
        plan.complete()
        exchange = None
        if not plan.fetch.idle:
            exchange = Exchange(_pack(x, plan.fetch, ops), plan.fetch.sent, plan.fetch.received, shards)
        for placed in local[at_once:]:
            run(placed, None)
        packed = None if exchange is None else exchange.wait()
        for placed in plan.others:
            run(placed, packed)
        _count(plan, x, shards)
        ctx.save_for_backward(*x, out, lse, *seeds, *(packed or ()))
        ctx.plan, ctx.backend, ctx.ops, ctx.scale, ctx.dropout = plan, backend, ops, scale, dropout
        ctx.calls = len(seeds)
        assert lse is not None, "there is a local task"
        # The log-sum-exp seldom has a gradient.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        if torch.is_grad_enabled():
            # With create_graph=True. Not later, as other operators do: what is sent has no graph that could lead here.
            raise NotImplementedError(ONLY_REVERSE_MODE)
        plan: Plan = ctx.plan
        # Once: what activation checkpointing has stored in their place may be asked for only once.
        saved = ctx.saved_tensors
        x, (out, lse), seeds = _Tensors(*saved[:6]), saved[6:8], saved[8 : 8 + ctx.calls]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_lse = torch.zeros_like(lse, dtype=torch.float32) if d_lse is None else d_lse
        packed = None if plan.fetch.idle else Packed(*saved[8 + ctx.calls :])
        local = plan.local()
        gradients = _Gradients(x, packed, plan, local, ctx.ops)

        def run(placed: Placed, seed: Tensor | None) -> None:
            inputs = _inputs(x, placed, packed, plan.shards, ctx.ops)
            d, o = (_get(y, placed, token_dim=1) for y in (d_out, out))
            d_sums, sums = (_get(y, placed, token_dim=2).contiguous() for y in (d_lse, lse))
            gradients.add(placed, *ctx.backend.backward(d, d_sums, *inputs, o, sums, ctx.scale, ctx.dropout, seed))

        for placed, seed in zip(plan.others, seeds[ctx.calls - len(plan.others) :], strict=True):
            run(placed, seed)
        exchange = None
        if gradients.packed is not None:
            # Back to the ranks that the keys came from.
            exchange = Exchange(gradients.packed, plan.fetch.received, plan.fetch.sent, plan.shards)
        for placed, seed in zip(local, seeds, strict=False):
            run(placed, seed)
        gradients.finish(exchange)
        return gradients.q, gradients.k, gradients.v, gradients.c_q, gradients.c_k, *[None] * 6


def _pack(x: _Tensors, fetch: Fetch, ops: ContextBackend) -> Packed:
    """The rows that others need."""
    count, size = sum(fetch.sent), x.k.shape[-1]
    packed = Packed(x.k.new_empty(count, 2, size), x.c_k.new_empty(count, x.gates()))
    ops.copy_rows(_as_rows(x.k, x.v, x.c_k), packed.rows(), fetch.runs)
    return packed


def _count(plan: Plan, x: _Tensors, shards: Shards) -> None:
    """Add what was fetched to the `CommunicationVolume`."""
    batch, tokens, kv_heads, size = x.k.shape
    row_bytes = 2 * size * x.k.element_size()
    volume = shards.volume
    volume.moved += sum(plan.fetch.received) * (row_bytes + x.gates() * x.c_k.element_size())
    volume.ring += (shards.split.length - tokens) * batch * kv_heads * row_bytes


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
    """Sums of what tasks find. Local ones write whole segments, so they come first: what others found waits."""

    def __init__(
        self, x: _Tensors, packed: Packed | None, plan: Plan, local: list[Placed], ops: ContextBackend
    ) -> None:
        self._plan, self._copy_rows = plan, ops.copy_rows
        covered = len(local) == len(plan.shards.segments)
        make = torch.empty_like if covered else torch.zeros_like
        self.k, self.v = (make(y, memory_format=torch.contiguous_format) for y in (x.k, x.v))
        self.q = torch.empty_like(x.q, memory_format=torch.contiguous_format)
        self.c_q, self.c_k = (torch.zeros_like(y, memory_format=torch.contiguous_format) for y in (x.c_q, x.c_k))
        #: Of the rows that came.
        self.packed = None if packed is None else Packed(*(torch.zeros_like(y) for y in packed))
        self._waiting: list[tuple[Placed, Tensor, Rows]] = []

    def add(self, placed: Placed, dq: Tensor, dk: Tensor, dv: Tensor, dc_q: Tensor, dc_k: Tensor) -> None:
        """What one task found, each in the shape of its inputs."""
        task = placed.task
        if placed.of_gate is None:
            self.c_q[..., task.rows] += dc_q
        else:
            self.c_q[..., task.rows].index_add_(1, placed.of_gate, dc_q)
        if task.local:
            self.q[:, task.rows] = dq
            self.k[:, placed.rows], self.v[:, placed.rows] = dk, dv
            self.c_k[..., placed.rows] += dc_k
            return
        found = _as_rows(dk, dv, dc_k)
        if self.packed is not None:
            self._copy_rows(found, self.packed.rows(), placed.received, add=True, back=True)
        self._waiting.append((placed, dq, found))

    def finish(self, exchange: Exchange | None) -> None:
        """Add what waits, and what other ranks found for this one's keys."""
        whole = _as_rows(self.k, self.v, self.c_k)
        for placed, dq, found in self._waiting:
            _put(self.q, dq, placed, token_dim=1)
            self._copy_rows(found, whole, placed.own, add=True, back=True)
        if exchange is not None:
            rows, runs = exchange.wait().rows(), self._plan.fetch.runs
            # One rank after the other: of one, no row comes twice, so the order of additions is always the same.
            for part in self._plan.fetch.of_rank:
                self._copy_rows(rows, whole, runs.part(part), add=True, back=True)


@torch.compiler.disable
def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    shards: Shards,
    backend: Backend,
    ops: ContextBackend,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Forgetting attention of this rank's queries over the keys of all ranks; differentiable as `reference_attention`.

    All ranks of the group call it together. Synchronises with the device once, for the metadata exchange.

    Args:
        q: ``[B, T, H, D]`` queries of this rank's tokens.
        k, v: ``[B, T, G, D]`` its keys and values.
        decay: of its tokens, with running sums, ``kv_start`` and ``last`` of the whole sequence, and pruned where keys
            may be left out (`prune_shards`): they need not be fetched then.
        shards: who has which tokens.
        backend: what computes each task.
        ops: what moves rows between tasks and ranks.
        scale: multiplies ``q . k``.
        dropout: probability of dropping an attention weight.

    Returns:
        ``[B, T, H, D]`` in the type of ``q``, and log-sum-exp ``[B, H, T]``, float32 (float64 for float64).
    """
    kv_heads, heads = k.shape[2], q.shape[2]
    c_q, c_k, kv_start = decay.query, decay.key, decay.kv_start
    if c_k.shape[1] == 1:
        c_q, c_k = c_q.expand(-1, kv_heads, -1), c_k.expand(-1, kv_heads, -1)
    if kv_start.shape[1] != heads:
        kv_start = kv_start.repeat_interleave(heads // kv_start.shape[1], dim=1)
    k, v = maybe_contiguous(k), maybe_contiguous(v)
    out, lse = _ShardedAttention.apply(q, k, v, c_q, c_k, kv_start, shards, backend, ops, scale, dropout)
    return out, lse if q.dtype == torch.float64 else lse.float()
