"""Adaptive Computation Pruning of a sequence that lies on several ranks: the rules of `pruning`, without moving keys.

What the rules need of keys is a few numbers for each block of 64. All ranks get those of all blocks (a 700th of the
bytes of keys and values), and each finds what its own queries keep. With segments that begin at multiples of 128, and
so of 64, it is what one device would find.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import HAS_TRITON, rows_together, runs_kernels
from ..decay import Decay
from ..pruning.key_stats import KeySummary
from ..pruning.rounding import log_allowed
from ..pruning.rules import QueryBounds, Rule, margin_dtype, most_droppable, query_bounds, raised
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES
from ..validation import check_logit_bound, check_rule
from .group import Shards
from .partition_tables import most_blocks

if HAS_TRITON:
    from ..pruning.search import Blocks, Queries, decay_by_blocks, join_blocks, join_largest, norms, search

_NEVER = 2**31 - 1


class _Keys(NamedTuple):
    """Blocks of 64 keys, each alone or joined with all before it: see `boundaries.Blocks`."""

    end: Tensor
    log_sum: Tensor
    largest: Tensor


class _Rows(NamedTuple):
    """Queries of this rank, ``[B, H, T]``: see `pruning.QueryBounds`."""

    norm: Tensor
    own: Tensor


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
        decay: of this rank's tokens, with ``kv_start`` and ``last`` in tokens of the whole sequence.
        q, k: ``[B, T, heads, D]`` of this rank's tokens, finite.
        shards: who has which tokens.
        eps, rule, scale, logit_bound: as for `pruning.prune`.

    Returns:
        ``decay`` with ``kv_start`` raised, ``[B, H, T]``.
    """
    check_rule(eps, rule)
    heads, kv_heads = q.shape[2], k.shape[2]
    check_logit_bound(logit_bound, len(q), heads)
    fast = runs_kernels(q) and q.dtype != torch.float64
    q, k = rows_together(q), rows_together(k)
    rows, packed = _summarize(q, k, decay.key, scale, shards, fast)
    keys = _blocks_of_all(packed, decay.key.shape[:2], kv_heads, shards)
    logit_bound = _bound(logit_bound, rows, keys, kv_heads, shards) if rule == "paper" else None
    log_eps = log_allowed(eps, margin_dtype(k), shards.split.length if rule == "paper" else 1)

    first = decay.kv_start
    if first.shape[1] != heads:
        first = first.repeat_interleave(heads // first.shape[1], dim=1)
    if fast:
        join_blocks(keys.end, keys.log_sum)
        join_largest(keys.largest)
    find = _search_on_device if fast else _search_in_pytorch
    raised = []
    for part in _parts(shards):
        of_part = _Rows(*(x[..., part] for x in rows))
        c_q, seen = decay.query[..., part], first[..., part]
        raised.append(find(of_part, keys, c_q, seen, part, shards, log_eps, logit_bound))
    return decay._replace(kv_start=raised[0] if len(raised) == 1 else torch.cat(raised, -1))


def _parts(shards: Shards) -> list[slice]:
    """Rows of this rank of which no block, of keys or of queries, has those of two segments."""
    if any(rows.start % PRUNED_QUERIES for rows in shards.rows):
        return shards.rows
    return [slice(0, shards.rows[-1].stop)]


def _summarize(q: Tensor, k: Tensor, c_k: Tensor, scale: float, shards: Shards, fast: bool) -> tuple[_Rows, Tensor]:
    """Of this rank's queries, and of its blocks of keys: `_Keys` one after the other, ``[rows, blocks]`` float64."""
    summarize = _summarize_on_device if fast else _summarize_in_pytorch
    found = [summarize(q[:, part], k[:, part], c_k[..., part], scale, shards) for part in _parts(shards)]
    if len(found) == 1:
        return found[0]
    rows, packed = zip(*found, strict=True)
    return _Rows(*(torch.cat(x, -1) for x in zip(*rows, strict=True))), torch.cat(packed, -1)


def _summarize_on_device(q: Tensor, k: Tensor, c_k: Tensor, scale: float, shards: Shards) -> tuple[_Rows, Tensor]:
    batch, gates, tokens = c_k.shape
    kv_heads, blocks = k.shape[2], -(-tokens // PRUNED_KEYS)
    packed = torch.empty(batch * (2 * gates + kv_heads), blocks, dtype=torch.float64, device=q.device)
    decays, largest = packed.split([2 * batch * gates, batch * kv_heads])
    decay_by_blocks(c_k, out=decays.view(2, batch, gates, blocks))
    norm, own, _ = norms(q, k, shards.tables(q.device).tokens, scale, out=largest)
    return _Rows(norm, own), packed


def _summarize_in_pytorch(q: Tensor, k: Tensor, c_k: Tensor, scale: float, shards: Shards) -> tuple[_Rows, Tensor]:
    c = _blocks(c_k, float("inf"))
    end = c.amin(-1)
    log_sum = torch.logsumexp((end[..., None] - c).masked_fill(torch.isposinf(c), float("-inf")), -1)
    largest = _blocks(k.double().norm(dim=-1).transpose(1, 2), 0.0).amax(-1)
    packed = torch.cat([x.flatten(0, 1) for x in (end, log_sum, largest)])
    return _Rows(*query_bounds(q, k, scale)), packed


def _blocks(x: Tensor, filling: float) -> Tensor:
    padding = x.new_full((*x.shape[:-1], -x.shape[-1] % PRUNED_KEYS), filling)
    return torch.cat([x, padding], -1).unflatten(-1, (-1, PRUNED_KEYS))


def _blocks_of_all(packed: Tensor, sums: torch.Size, kv_heads: int, shards: Shards) -> _Keys:
    """Each block of all segments alone, in the order of the sequence, from those of each rank."""
    batch, gates = sums
    if missing := most_blocks(shards.split) - packed.shape[-1]:
        packed = torch.nn.functional.pad(packed, (0, missing))
    slots = shards.tables(packed.device).block_slots
    everything = shards.gather(packed).transpose(0, 1).flatten(1).index_select(1, slots)
    end, log_sum, largest = everything.split([batch * gates, batch * gates, batch * kv_heads])
    return _Keys(*(x.unflatten(0, (batch, -1)) for x in (end, log_sum, largest)))


def _bound(given: float | Tensor | None, rows: _Rows, keys: _Keys, kv_heads: int, shards: Shards) -> Tensor:
    """``U`` of the rule ``paper``, ``[B, H]``: as given, or from the largest norms of all ranks."""
    batch, heads, _ = rows.norm.shape
    if given is not None:
        if not isinstance(given, Tensor):
            given = torch.full((1,), given, dtype=torch.float32, device=rows.norm.device)
        return given.to(device=rows.norm.device, dtype=torch.float32).expand(batch, heads)
    largest = keys.largest.amax(-1).to(rows.norm.dtype)
    return shards.gather(rows.norm.amax(-1)).amax(0) * largest.repeat_interleave(heads // kv_heads, dim=1)


def _search_on_device(
    rows: _Rows,
    keys: _Keys,
    c_q: Tensor,
    first: Tensor,
    part: slice,
    shards: Shards,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    """First key that each query keeps, ``[B, H, rows]`` int64 in tokens of the sequence."""
    tables = shards.tables(c_q.device)
    last, own_block = tables.positions[part], tables.own_blocks[part]
    queries = Queries(c_q, first, last, rows.norm.contiguous(), rows.own.contiguous(), own_block)
    blocks = Blocks(*keys, tables.block_starts)
    return search(queries, blocks, first.shape[1], keys.largest.shape[1], log_eps, logit_bound)


def _search_in_pytorch(
    rows: _Rows,
    keys: _Keys,
    c_q: Tensor,
    first: Tensor,
    part: slice,
    shards: Shards,
    log_eps: float,
    logit_bound: Tensor | None,
) -> Tensor:
    heads = first.shape[1]
    c_q, end, log_sum, largest = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (c_q, *keys))
    tables = shards.tables(c_q.device)
    last, own_block = tables.positions[part], tables.own_blocks[part]
    log_decays = torch.logcumsumexp(log_sum - end.masked_fill(torch.isposinf(end), 0.0), -1)
    keys_before = KeySummary(end.cummin(-1).values, log_decays, largest.cummax(-1).values)
    query = QueryBounds(raised(c_q, shards.split.length), rows.norm, rows.own)
    kept = most_droppable(query, keys_before, own_block, log_eps, logit_bound)
    sees_nothing = first > last
    kept = kept.masked_fill(sees_nothing, _NEVER)
    padding = kept[..., -1:].expand(*kept.shape[:-1], -kept.shape[-1] % PRUNED_QUERIES)
    kept = torch.cat([kept, padding], -1).unflatten(-1, (-1, PRUNED_QUERIES)).amin(-1)
    kept = kept.repeat_interleave(PRUNED_QUERIES, -1)[..., : c_q.shape[-1]].masked_fill(sees_nothing, 0)
    return torch.where(sees_nothing, first, torch.maximum(first, tables.block_starts[kept]))
