"""Adaptive Computation Pruning (ACP, arXiv 2504.06949): which keys a query may drop, with a proof.

Both rules guarantee that no row loses more than ``eps`` of its attention weight in total. ``D_ij = c_i - c_j`` rises
with ``j`` and falls with ``i``, so what a query keeps is one range that ends at its own key.

``paper``
    Drop key ``j`` where ``D_ij < -2U - log L + log eps`` with ``|scale * q . k| <= U`` and ``L`` keys: a dropped weight
    is at most ``exp(U + D_ij) / exp(-U)``, and there are at most ``L`` of them.
``tight``
    Replaces three worst cases by what is cheaply known. A row's normalizer is at least its own term ``s_ii`` (instead
    of ``-U``); a dropped logit is at most ``scale |q_i| Kmax_n`` with ``Kmax_n = max_{j < n} |k_j|`` (instead of
    ``U``); the decays of the dropped keys add up to ``P_n = log sum_{j < n} exp(-c_j)`` (instead of ``L`` times the
    worst). Drop keys ``j < n`` where ``scale |q_i| Kmax_n + c_i + P_n - s_ii <= log eps``. Drops at least what
    ``paper`` drops where ``U`` is the true maximum of ``scale |q| |k|``.

Both hold for `centered` keys as well. `first_kept` is the definition, in plain PyTorch, for analysis; `prune` is what
attention runs, on a GPU by kernels (`boundaries`).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .backend import HAS_TRITON, runs_kernels
from .decay import Decay, KeySummary, accumulate
from .tiles import PRUNED_KEYS, PRUNED_QUERIES
from .validation import check_rule

if HAS_TRITON:
    from .boundaries import raise_first

Rule = Literal["paper", "tight"]


def first_kept(
    q: Tensor,
    k: Tensor,
    log_f: Tensor,
    *,
    eps: float,
    rule: Rule,
    scale: float | None = None,
    logit_bound: float | Tensor | None = None,
    block_q: int = 1,
    block_k: int = 1,
) -> Tensor:
    """First key that each block of queries keeps: it may drop every key before.

    Args:
        q: ``[B, Tq, H, D]`` queries, the last ``Tq`` of ``Tk`` tokens.
        k: ``[B, Tk, G, D]`` keys.
        log_f: ``[B, Tk, Hf]`` log forget gates, ``Hf`` in ``{H, G, 1}``.
        eps: largest attention weight that a row may lose in total, in ``(0, 1)``.
        rule: ``"paper"`` or ``"tight"``.
        scale: multiplies the logits; ``1 / sqrt(D)`` by default.
        logit_bound: ``U`` of the rule ``paper``, a number or ``[H]``, e.g. from QK-norm weights; by default
            ``scale * max |q| * max |k|`` per sequence and head.
        block_q, block_k: queries and keys are dropped in blocks of these sizes; 1 is per query and key.

    Returns:
        ``[B, H, ceil(Tq / block_q)]`` int64, multiples of ``block_k``. Keys hidden by a hard reset count as dropped.

    Raises:
        ValueError: ``eps`` or ``rule`` is not as above.
    """
    check_rule(eps, rule)
    heads, queries, keys = q.shape[2], q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    c, first = accumulate(log_f)
    last = torch.arange(keys - queries, keys, device=c.device)
    decay = Decay(c[..., keys - queries :], c, first[..., keys - queries :], last)
    kept = _kept(decay, q, k, eps, rule, scale, logit_bound)
    kept = torch.maximum(kept, _per_query_head(decay.first, heads))
    return _blocks_minimum(kept, block_q) // block_k * block_k


def prune(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    *,
    eps: float,
    rule: Rule = "tight",
    scale: float,
    logit_bound: float | Tensor | None = None,
) -> Decay:
    """Hide from every query the keys that it may drop, in blocks of 128 queries and 64 keys.

    Args:
        decay: of ``Tq`` queries over ``Tk`` keys; with resets, packing and padding.
        q, k, eps, rule, logit_bound: as for `first_kept`; q and k finite, also where they are padding; k may be wider.
        scale: multiplies the logits.

    Returns:
        ``decay`` with ``first`` raised, ``[B, H, Tq]``. No row loses more than ``eps`` of its attention weight.

    Raises:
        ValueError: an argument is not as above.
    """
    check_rule(eps, rule)
    batch, queries, heads, _ = q.shape
    if k.shape[1] <= PRUNED_KEYS or q.numel() == 0:
        return decay
    if runs_kernels(q) and q.dtype != torch.float64:
        if logit_bound is not None:
            if not isinstance(logit_bound, Tensor):
                # Filled on the device: a copy of a number from the host would wait for all that is queued.
                logit_bound = torch.full((1,), logit_bound, dtype=torch.float32, device=q.device)
            logit_bound = logit_bound.to(device=q.device, dtype=torch.float32).expand(batch, heads)
        first = raise_first(decay, q, k, eps=eps, tight=rule == "tight", scale=scale, logit_bound=logit_bound)
        return decay._replace(first=first)
    kept = _kept(decay, q, k, eps, rule, scale, logit_bound)
    first = _per_query_head(decay.first, heads)
    sees_nothing = first > decay.last
    kept = kept.masked_fill(sees_nothing, torch.iinfo(torch.int64).max)
    kept = _blocks_minimum(kept, PRUNED_QUERIES) // PRUNED_KEYS * PRUNED_KEYS
    kept = kept.repeat_interleave(PRUNED_QUERIES, dim=-1)[..., :queries]
    return decay._replace(first=torch.where(sees_nothing, first, torch.maximum(first, kept)))


@torch.no_grad()
def centered(k: Tensor) -> Tensor:
    """Keys as short as they may be taken for: minus the mean of the first 64, ``[B, T, G, D]`` in float32 or wider.

    Subtracting one vector from all keys of a head shifts all logits of a row alike, which changes no attention weight.
    So the rules may be given these keys in place of ``k``. Without QK-norm keys have a large part in common, and the
    bound ``scale |q| max |k|`` pays for it: in SmolLM2 40 nats, 27 of the centered keys. Of the first 64 because they
    are there before anything can be dropped.
    """
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    return wide - wide[:, :PRUNED_KEYS].mean(1, keepdim=True)


def first_dead_block(
    c: Tensor, summary: KeySummary, bounds: tuple[Tensor, Tensor], blocks: int, *, eps: float, rule: Rule, keys: int
) -> Tensor:
    """First block of 64 keys that a query to come may need; every later one may drop all before.

    The rules above for a query of which only bounds are known: of its length, and of the logit with its own key. Its
    running sum is not above that of any token before it.

    Args:
        c: ``[B, Hf]`` float64 running sum at some token.
        summary: of the keys.
        bounds: of any query from that token on: ``scale |q|`` and ``-scale q . k`` with its own key are at most these,
            ``[H]`` each; the second also bounds any ``|scale q . k|``.
        blocks: how many blocks lie wholly before that token.
        eps: as for `first_kept`.
        rule: as for `first_kept`.
        keys: most keys there will ever be.

    Returns:
        ``[B, G]`` int32, at most ``blocks``: the least over the query heads of a key/value head.
    """
    check_rule(eps, rule)
    query_bound, own_bound = (x.double()[:, None] for x in bounds)
    heads, kv_heads = len(query_bound), summary.largest.shape[1]
    c, c_end, log_decays, largest = (
        _per_query_head(x, heads) for x in (c[..., None], *(x[..., :blocks] for x in summary))
    )
    if rule == "tight":
        dead = query_bound * largest + c + log_decays + own_bound <= math.log(eps)
    else:
        dead = c - c_end < math.log(eps) - math.log(keys) - 2.0 * own_bound
    return dead.int().cumprod(-1).sum(-1, dtype=torch.int32).unflatten(1, (kv_heads, -1)).amin(2)


def share_skipped(first: Tensor, length: int, block_q: int = 1, block_k: int = 1, queries: int | None = None) -> Tensor:
    """Share of the causal tiles that are skipped when each block of queries starts at its first kept key.

    Args:
        first: ``[B, H, ceil(Tq / block_q)]`` as `first_kept` returns it for the same blocks.
        length: number of keys ``Tk``.
        block_q, block_k: tile sizes; with both 1, pairs of query and key are counted.
        queries: number of queries ``Tq``, the last of the keys; all of them by default.

    Returns:
        ``[B, H]`` float64 in ``[0, 1)``.
    """
    queries = length if queries is None else queries
    ends = torch.arange(first.shape[-1], device=first.device) * block_q + block_q
    tiles = (ends.clamp(max=queries) + length - queries + block_k - 1) // block_k
    return (first // block_k).sum(-1).double() / tiles.sum()


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """``[B, Hf, T] -> [B, H, T]``."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _kept(
    decay: Decay, q: Tensor, k: Tensor, eps: float, rule: Rule, scale: float, logit_bound: float | Tensor | None
) -> Tensor:
    """First key that each query keeps by the rule alone, ``[B, H, Tq]``; never after its own."""
    batch, _, heads, _ = q.shape
    keys = k.shape[1]
    c_q, c_k = (_per_query_head(x, heads) for x in (decay.query, decay.key))
    hidden = torch.isposinf(c_k)
    q_norm = q.double().norm(dim=-1).transpose(1, 2) * abs(scale)
    k_norm = _per_query_head(k.double().norm(dim=-1).transpose(1, 2), heads).masked_fill(hidden, 0.0)
    if rule == "paper":
        if logit_bound is None:
            logit_bound = q_norm.amax(-1) * k_norm.amax(-1)
        bound = torch.as_tensor(logit_bound, dtype=torch.float64, device=c_q.device).expand(batch, heads)
        threshold = -2.0 * bound - math.log(keys) + math.log(eps)
        # A hidden key goes with the last one before it that is not.
        falling = c_k.cummin(-1).values
        kept = torch.searchsorted(-falling.contiguous(), (threshold[..., None] - c_q).contiguous())
        return torch.minimum(kept, decay.last)
    own = k.index_select(1, decay.last).double().repeat_interleave(heads // k.shape[2], dim=2)
    own_logit = scale * (q.double() * own).sum(-1).transpose(1, 2)
    # In float64 the sums, of large numbers, stay exact to 1e-10.
    log_decays = torch.logcumsumexp(-c_k, dim=-1)
    return search_tight(q_norm, own_logit, c_q, log_decays, k_norm.cummax(-1).values, decay.last, math.log(eps))


def search_tight(
    q_norm: Tensor, own: Tensor, c_q: Tensor, log_decays: Tensor, largest: Tensor, most: Tensor, log_eps: float
) -> Tensor:
    """How many leading keys, or blocks of them, each row may drop by the rule ``tight``, by bisection.

    Args:
        q_norm, own, c_q: ``[B, H, Tq]`` ``scale |q|``, logit with the own key, and running sum of each row.
        log_decays, largest: ``[B, H, N]`` ``log sum exp(-c_j)`` and ``max |k_j|`` of each key or block and all before.
        most: ``[Tq]`` int64, not more than these may be dropped.
        log_eps: log of the weight that a row may lose.

    Returns:
        ``[B, H, Tq]`` int64.
    """
    # Entry n describes the keys before n.
    before_none = torch.full_like(log_decays[..., :1], float("-inf"))
    log_decays = torch.cat([before_none, log_decays], dim=-1)
    largest = torch.cat([torch.zeros_like(largest[..., :1]), largest], dim=-1)

    low = torch.zeros_like(q_norm, dtype=torch.int64)
    high = most.expand_as(low)
    for _ in range(log_decays.shape[-1].bit_length()):
        middle = (low + high + 1) // 2
        weight = q_norm * largest.gather(-1, middle) + c_q + log_decays.gather(-1, middle) - own
        droppable = weight <= log_eps
        low = torch.where(droppable, middle, low)
        high = torch.where(droppable, high, middle - 1)
        high = torch.maximum(low, high)
    return low


def _blocks_minimum(x: Tensor, block: int) -> Tensor:
    """Minimum over each block of the last dimension, the last block as long as it is."""
    padding = x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % block)
    return torch.cat([x, padding], dim=-1).unflatten(-1, (-1, block)).amin(-1)
