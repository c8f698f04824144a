"""Adaptive Computation Pruning of a sequence that lies on several ranks: the rules of `pruning`, without moving keys.

What the rules need of keys is a few numbers for each block of 64. All ranks get those of all blocks (a 700th of the
bytes of keys and values), and each finds what its own queries keep. With segments that begin at multiples of 128, and
so of 64, it is what one device would find.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, runs_kernels
from .context_parallel import Shards
from .decay import Decay
from .pruning import Rule, check_rule, search_tight
from .tiles import PRUNED_KEYS, PRUNED_QUERIES

if HAS_TRITON:
    from .boundaries import Blocks, Queries, decay_by_blocks, join_blocks, join_largest, norms, search

_NEVER = 2**31 - 1


class _Part(NamedTuple):
    """A segment of this rank: what its queries need, and what others need of its blocks of keys."""

    q_norm: Tensor
    own: Tensor
    end: Tensor
    log_sum: Tensor
    largest: Tensor


@torch.no_grad()
def prune_shards(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    shards: Shards,
    *,
    eps: float,
    rule: Rule,
    scale: float,
    logit_bound: float | Tensor | None = None,
) -> Decay:
    """As `pruning.prune`, for this rank's queries over the keys of all ranks.

    Args:
        decay: of this rank's tokens, with ``first`` and ``last`` in tokens of the whole sequence.
        q, k: ``[B, T, heads, D]`` of this rank's tokens, finite.
        shards: who has which tokens.
        eps, rule, scale, logit_bound: as for `pruning.prune`.

    Returns:
        ``decay`` with ``first`` raised, ``[B, H, T]``.
    """
    check_rule(eps, rule)
    heads, kv_heads = q.shape[2], k.shape[2]
    fast = runs_kernels(q) and q.dtype != torch.float64
    summarize = _summarize_on_device if fast else _summarize_in_pytorch
    parts = _by_segment(summarize, q, k, decay.key, scale, shards)
    end, log_sum, largest = _blocks_of_all(parts, decay.key, kv_heads, shards)
    logit_bound = _bound(logit_bound, parts, largest, q, kv_heads, shards) if rule == "paper" else None
    log_eps = math.log(eps) if rule == "tight" else math.log(eps) - math.log(shards.split.length)

    find = _search_on_device if fast else _search_in_pytorch
    if fast:
        join_blocks(end, log_sum)
        join_largest(largest)
    block_start = shards.block_starts(q.device)
    first = decay.first
    if first.shape[1] != heads:
        first = first.repeat_interleave(heads // first.shape[1], dim=1)
    sees_nothing = first > decay.last
    raised = []
    for index, part, rows in zip(shards.own, parts, shards.rows, strict=True):
        before = sum(-(-(b - a) // PRUNED_KEYS) for _, a, b in shards.split.segments[:index])
        kept = find(
            part, (end, log_sum, largest), decay.query[..., rows], sees_nothing[..., rows], before, log_eps, logit_bound
        )
        raised.append(block_start[kept])
    return decay._replace(first=torch.where(sees_nothing, first, torch.maximum(first, torch.cat(raised, -1))))


def _by_segment(
    summarize: Callable[..., _Part], q: Tensor, k: Tensor, c_k: Tensor, scale: float, shards: Shards
) -> list[_Part]:
    if any(rows.start % PRUNED_KEYS for rows in shards.rows):
        return [summarize(q[:, rows], k[:, rows], c_k[..., rows], scale) for rows in shards.rows]
    # In one go: no block has keys of two segments.
    whole = summarize(q, k, c_k, scale)
    tokens = [rows.stop - rows.start for rows in shards.rows]
    blocks = [-(-count // PRUNED_KEYS) for count in tokens]
    rows_parts = zip(*(x.split(tokens, -1) for x in whole[:2]), strict=True)
    block_parts = zip(*(x.split(blocks, -1) for x in whole[2:]), strict=True)
    return [_Part(*a, *b) for a, b in zip(rows_parts, block_parts, strict=True)]


def _summarize_on_device(q: Tensor, k: Tensor, c_k: Tensor, scale: float) -> _Part:
    q_norm, own, largest = norms(q, k, torch.zeros(1, dtype=torch.int64, device=q.device), scale)
    return _Part(q_norm, own, *decay_by_blocks(c_k), largest)


def _summarize_in_pytorch(q: Tensor, k: Tensor, c_k: Tensor, scale: float) -> _Part:
    heads, kv_heads = q.shape[2], k.shape[2]
    q, k = q.double(), k.double()
    own = scale * (q * k.repeat_interleave(heads // kv_heads, dim=2)).sum(-1).transpose(1, 2)
    c = _blocks(c_k, float("inf"))
    end = c.amin(-1)
    log_sum = torch.logsumexp((end[..., None] - c).masked_fill(torch.isposinf(c), float("-inf")), -1)
    largest = _blocks(k.norm(dim=-1).transpose(1, 2), 0.0).amax(-1)
    return _Part(q.norm(dim=-1).transpose(1, 2) * abs(scale), own, end, log_sum, largest)


def _blocks(x: Tensor, filling: float) -> Tensor:
    padding = x.new_full((*x.shape[:-1], -x.shape[-1] % PRUNED_KEYS), filling)
    return torch.cat([x, padding], -1).unflatten(-1, (-1, PRUNED_KEYS))


def _blocks_of_all(parts: list[_Part], c_k: Tensor, kv_heads: int, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """``end``, ``log_sum`` and ``largest`` of each block of all segments, each alone."""
    gates = c_k.shape[1]
    counts = [-(-(stop - start) // PRUNED_KEYS) for _, start, stop in shards.split.segments]
    packed = []
    for part in parts:
        numbers = torch.cat([part.end, part.log_sum, part.largest.double()], 1)
        packed.append(torch.nn.functional.pad(numbers, (0, max(counts) - numbers.shape[-1])))
    everything = shards.from_all(packed)
    joined = torch.cat([x[..., :count] for x, count in zip(everything, counts, strict=True)], -1)
    end, log_sum, largest = joined.split([gates, gates, kv_heads], dim=1)
    return end.contiguous(), log_sum.contiguous(), largest.to(parts[0].largest.dtype).contiguous()


def _bound(
    given: float | Tensor | None, parts: list[_Part], largest: Tensor, q: Tensor, kv_heads: int, shards: Shards
) -> Tensor:
    """``U`` of the rule ``paper``, ``[B, H]``: as given, or from the largest norms of all ranks."""
    batch, _, heads, _ = q.shape
    if given is not None:
        if not isinstance(given, Tensor):
            given = torch.full((1,), given, dtype=torch.float32, device=q.device)
        return given.to(device=q.device, dtype=torch.float32).expand(batch, heads)
    queries = torch.stack(shards.from_all([part.q_norm.amax(-1) for part in parts])).amax(0)
    return queries * largest.amax(-1).repeat_interleave(heads // kv_heads, dim=1)


def _search_on_device(
    part: _Part,
    blocks: tuple[Tensor, Tensor, Tensor],
    c_q: Tensor,
    sees_nothing: Tensor,
    before: int,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    """First block that each query keeps, ``[B, H, T]`` int64; ``before`` blocks lie before the segment."""
    # As if every block before were full: rows find themselves among blocks by their positions.
    last = torch.arange(c_q.shape[-1], device=c_q.device) + before * PRUNED_KEYS
    first = torch.where(sees_nothing, _NEVER, 0)
    rows = Queries(c_q, first, last, part.q_norm.contiguous(), part.own.contiguous())
    kept = search(rows, Blocks(*blocks), sees_nothing.shape[1], blocks[2].shape[1], log_eps, logit_bound)
    return kept.masked_fill(sees_nothing, 0) // PRUNED_KEYS


def _search_in_pytorch(
    part: _Part,
    blocks: tuple[Tensor, Tensor, Tensor],
    c_q: Tensor,
    sees_nothing: Tensor,
    before: int,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    heads = sees_nothing.shape[1]
    c_q, end, log_sum, largest = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (c_q, *blocks))
    own_block = before + torch.arange(c_q.shape[-1], device=c_q.device) // PRUNED_KEYS
    if logit_bound is None:
        log_decays = torch.logcumsumexp(log_sum - end.masked_fill(torch.isposinf(end), 0.0), -1)
        kept = search_tight(part.q_norm, part.own, c_q, log_decays, largest.cummax(-1).values, own_block, log_eps)
    else:
        threshold = log_eps - 2.0 * logit_bound.double()
        kept = torch.searchsorted(-end.cummin(-1).values.contiguous(), (threshold[..., None] - c_q).contiguous())
        kept = torch.minimum(kept, own_block)
    kept = kept.masked_fill(sees_nothing, _NEVER)
    padding = kept[..., -1:].expand(*kept.shape[:-1], -kept.shape[-1] % PRUNED_QUERIES)
    kept = torch.cat([kept, padding], -1).unflatten(-1, (-1, PRUNED_QUERIES)).amin(-1)
    kept = kept.repeat_interleave(PRUNED_QUERIES, -1)[..., : c_q.shape[-1]]
    return kept.masked_fill(sees_nothing, 0)
