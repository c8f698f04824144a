"""Adaptive Computation Pruning of a sequence that lies on several ranks: by the rules of pruning, without moving keys.

What the rules need of keys is a few values for each block of 64. All ranks get those of all blocks (a 700th of the
bytes of keys and values), and each finds what its own queries keep. With segments that begin at multiples of 128, and
so of 64, it is what one device would find.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..decay import Decay
from ..operators import maybe_contiguous
from ..pruning.key_stats import KeySummary
from ..pruning.rounding import log_allowed
from ..pruning.rules import (
    PruningRule,
    QueryBounds,
    Rule,
    check_logit_bound,
    check_rule,
    margin_dtype,
    most_droppable,
    query_bounds,
    raised,
)
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES
from .operations import ContextBackend
from .partition import most_blocks
from .shards import Shards

_NEVER = 2**31 - 1


class KeyBlocks(NamedTuple):
    """Blocks of 64 keys of all segments, each alone: see `pruning.search.Blocks`; ``[B, Hf or G, N]`` float64 each."""

    end: Tensor
    log_sum: Tensor
    largest: Tensor


class Rows(NamedTuple):
    """Queries of this rank, ``[B, H, T]`` each: see `pruning.rules.QueryBounds`."""

    norm: Tensor
    diagonal: Tensor


class SearchedRows(NamedTuple):
    """Queries of some segments of this rank.

    Attributes:
        bounds: of them.
        c: ``[B, Hf, T]`` float64 running sums.
        kv_start: ``[B, H, T]`` int64, first key that each may see.
        last, diagonal_block: ``[T]`` int64, index in the sequence of each, and its block among all of them.
    """

    bounds: Rows
    c: Tensor
    kv_start: Tensor
    last: Tensor
    diagonal_block: Tensor


@torch.no_grad()
def prune_shards(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    shards: Shards,
    ops: ContextBackend,
    *,
    eps: float,
    rule: Rule,
    scale: float,
    logit_bound: float | Tensor | None = None,
    sink: Tensor | None = None,
) -> Decay:
    """As `pruning.prune.prune`, for this rank's queries over the keys of all ranks.

    Args:
        decay: of this rank's tokens, with ``kv_start`` and ``last`` in tokens of the whole sequence.
        q, k: ``[B, T, heads, D]`` of this rank's tokens, finite.
        shards: who has which tokens.
        ops: what runs on the device.
        eps, rule, scale, logit_bound, sink: as for `pruning.prune.prune`.

    Returns:
        ``decay`` with ``kv_start`` raised, ``[B, H, T]``.

    Raises:
        ValueError: an argument is not as above, or the rule is ``measured``, which would need the keys of other ranks.
    """
    known = check_rule(eps, rule)
    if known is PruningRule.MEASURED:
        raise ValueError("rule must be 'tight' or 'paper' with context parallelism, got 'measured'")
    heads, kv_heads = q.shape[2], k.shape[2]
    check_logit_bound(logit_bound, len(q), heads)
    q, k = maybe_contiguous(q), maybe_contiguous(k)
    if sink is not None:
        sink = maybe_contiguous(sink).expand(len(q), *sink.shape[-2:])
    bounds, packed = _summarize(q, k, decay.key, scale, sink, shards, ops)
    blocks = _blocks_of_all(packed, decay.key.shape[:2], kv_heads, shards)
    logit_bound = _bound(logit_bound, bounds, blocks, kv_heads, shards) if known.reads_bound else None
    log_eps = log_allowed(eps, margin_dtype(k), known.terms(shards.split.length))

    kv_start = decay.kv_start
    if kv_start.shape[1] != heads:
        kv_start = kv_start.repeat_interleave(heads // kv_start.shape[1], dim=1)
    joined, tables = ops.join_blocks(blocks), shards.tables(q.device)
    found = []
    for part in _parts(shards):
        rows = SearchedRows(
            Rows(*(x[..., part] for x in bounds)),
            decay.query[..., part],
            kv_start[..., part],
            tables.positions[part],
            tables.diagonal_blocks[part],
        )
        found.append(ops.search_blocks(known, rows, joined, shards, log_eps, logit_bound))
    return decay._replace(kv_start=found[0] if len(found) == 1 else torch.cat(found, -1))


def _parts(shards: Shards) -> list[slice]:
    """Rows of this rank of which no block, of keys or of queries, has those of two segments."""
    if any(rows.start % PRUNED_QUERIES for rows in shards.rows):
        return shards.rows
    return [slice(0, shards.rows[-1].stop)]


def _summarize(
    q: Tensor, k: Tensor, c_k: Tensor, scale: float, sink: Tensor | None, shards: Shards, ops: ContextBackend
) -> tuple[Rows, Tensor]:
    """As `summarize`, of all queries and keys of this rank."""
    found = [ops.summarize(q[:, part], k[:, part], c_k[..., part], scale, sink, shards) for part in _parts(shards)]
    if len(found) == 1:
        return found[0]
    rows, packed = zip(*found, strict=True)
    return Rows(*(torch.cat(x, -1) for x in zip(*rows, strict=True))), torch.cat(packed, -1)


def summarize(
    q: Tensor, k: Tensor, c_k: Tensor, scale: float, sink: Tensor | None, shards: Shards
) -> tuple[Rows, Tensor]:
    """What the rules read of queries ``[B, T, H, D]`` and of blocks of 64 of the keys at the same tokens.

    With a sink, its key is ``[B, G, D]``.

    Returns:
        Of the queries, and `KeyBlocks` of the keys one after the other, ``[rows, blocks]`` float64.
    """
    c = _blocks(c_k, float("inf"))
    end = c.amin(-1)
    log_sum = torch.logsumexp((end[..., None] - c).masked_fill(torch.isposinf(c), float("-inf")), -1)
    largest = _blocks(k.double().norm(dim=-1).transpose(1, 2), 0.0).amax(-1)
    packed = torch.cat([x.flatten(0, 1) for x in (end, log_sum, largest)])
    norm, diagonal, _ = query_bounds(q, k, scale, sink)
    return Rows(norm, diagonal), packed


def _blocks(x: Tensor, filling: float) -> Tensor:
    padding = x.new_full((*x.shape[:-1], -x.shape[-1] % PRUNED_KEYS), filling)
    return torch.cat([x, padding], -1).unflatten(-1, (-1, PRUNED_KEYS))


def _blocks_of_all(packed: Tensor, sums: torch.Size, kv_heads: int, shards: Shards) -> KeyBlocks:
    """Each block of all segments alone, in the order of the sequence, from those of each rank."""
    batch, gates = sums
    if missing := most_blocks(shards.split) - packed.shape[-1]:
        packed = torch.nn.functional.pad(packed, (0, missing))
    slots = shards.tables(packed.device).block_slots
    everything = shards.gather(packed).transpose(0, 1).flatten(1).index_select(1, slots)
    end, log_sum, largest = everything.split([batch * gates, batch * gates, batch * kv_heads])
    return KeyBlocks(*(x.unflatten(0, (batch, -1)) for x in (end, log_sum, largest)))


def _bound(given: float | Tensor | None, rows: Rows, blocks: KeyBlocks, kv_heads: int, shards: Shards) -> Tensor:
    """``U`` of a rule that reads one, ``[B, H]``: as given, or from the largest norms of all ranks."""
    batch, heads, _ = rows.norm.shape
    if given is not None:
        if not isinstance(given, Tensor):
            given = torch.full((1,), given, dtype=torch.float32, device=rows.norm.device)
        return given.to(device=rows.norm.device, dtype=torch.float32).expand(batch, heads)
    largest = blocks.largest.amax(-1).to(rows.norm.dtype)
    return shards.gather(rows.norm.amax(-1)).amax(0) * largest.repeat_interleave(heads // kv_heads, dim=1)


def join_blocks(blocks: KeyBlocks) -> KeySummary:
    """Every block joined with all before it, for `search_blocks`."""
    end, log_sum, largest = blocks
    log_decays = torch.logcumsumexp(log_sum - end.masked_fill(torch.isposinf(end), 0.0), -1)
    return KeySummary(end.cummin(-1).values, log_decays, largest.cummax(-1).values)


def search_blocks(
    rule: PruningRule,
    rows: SearchedRows,
    joined: KeySummary,
    shards: Shards,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    """First key that each query keeps, ``[B, H, T]`` int64 in tokens of the sequence.

    Args:
        rule: by which.
        rows: queries of this rank.
        joined: what `join_blocks` of the same backend gave.
        shards: who has which tokens.
        log_eps: as `rounding.log_allowed` gives it.
        logit_bound: ``U`` of a rule that reads one, ``[B, H]``; None for others.
    """
    heads = rows.kv_start.shape[1]
    c_q, *of_keys = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (rows.c, *joined))
    bound = None if logit_bound is None else logit_bound[..., None]
    query = QueryBounds(raised(c_q, shards.split.length), *rows.bounds, bound)
    kept = most_droppable(rule, query, KeySummary(*of_keys), rows.diagonal_block, log_eps)
    fully_masked = rows.kv_start > rows.last
    kept = kept.masked_fill(fully_masked, _NEVER)
    padding = kept[..., -1:].expand(*kept.shape[:-1], -kept.shape[-1] % PRUNED_QUERIES)
    kept = torch.cat([kept, padding], -1).unflatten(-1, (-1, PRUNED_QUERIES)).amin(-1)
    kept = kept.repeat_interleave(PRUNED_QUERIES, -1)[..., : c_q.shape[-1]].masked_fill(fully_masked, 0)
    starts = shards.tables(c_q.device).block_starts
    return torch.where(fully_masked, rows.kv_start, torch.maximum(rows.kv_start, starts[kept]))
