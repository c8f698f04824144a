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

This is the definition, in plain PyTorch: for analysis, and for kernels to be held to.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .decay import accumulate

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
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps must be in (0, 1), got {eps}")
    if rule not in ("paper", "tight"):
        raise ValueError(f"rule must be 'paper' or 'tight', got {rule!r}")
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    c, hidden_before = accumulate(log_f)
    c, hidden_before = (_per_query_head(x, heads).contiguous() for x in (c, hidden_before))
    q_norm = q.double().norm(dim=-1).transpose(1, 2) * scale
    k_norm = _per_query_head(k.double().norm(dim=-1).transpose(1, 2), heads)

    if rule == "paper":
        if logit_bound is None:
            logit_bound = q_norm.amax(-1) * k_norm.amax(-1)
        bound = torch.as_tensor(logit_bound, dtype=torch.float64, device=c.device).expand(batch, heads)
        threshold = -2.0 * bound - math.log(keys) + math.log(eps)
        kept = torch.searchsorted(-c, threshold[..., None] - c[..., keys - queries :])
    else:
        own = k[:, keys - queries :].double().repeat_interleave(heads // k.shape[2], dim=2)
        own_logit = scale * (q.double() * own).sum(-1).transpose(1, 2)
        kept = _tight(q_norm, k_norm, c, own_logit, math.log(eps))
    kept = torch.maximum(kept, hidden_before[..., keys - queries :])
    return _blocks_minimum(kept, block_q) // block_k * block_k


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
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _tight(q_norm: Tensor, k_norm: Tensor, c: Tensor, own_logit: Tensor, log_eps: float) -> Tensor:
    """Largest ``n <= i`` for which row ``i`` may drop the keys before ``n``, by bisection: ``[B, H, Tq]``."""
    # Entry n describes the keys before n. In float64 the sums, of large numbers, stay exact to 1e-10.
    before_none = torch.full_like(c[..., :1], float("-inf"))
    log_decays = torch.cat([before_none, torch.logcumsumexp(-c, dim=-1)], dim=-1)
    largest_key = torch.cat([torch.zeros_like(before_none), k_norm.cummax(-1).values], dim=-1)
    c_q = c[..., c.shape[-1] - q_norm.shape[-1] :]

    low = torch.zeros_like(q_norm, dtype=torch.int64)
    high = torch.arange(c.shape[-1] - low.shape[-1], c.shape[-1], device=c.device).expand_as(low)
    for _ in range(c.shape[-1].bit_length()):
        middle = (low + high + 1) // 2
        weight = q_norm * largest_key.gather(-1, middle) + c_q + log_decays.gather(-1, middle) - own_logit
        droppable = weight <= log_eps
        low = torch.where(droppable, middle, low)
        high = torch.where(droppable, high, middle - 1)
        high = torch.maximum(low, high)
    return low


def _blocks_minimum(x: Tensor, block: int) -> Tensor:
    """Minimum over each block of the last dimension, the last block as long as it is."""
    padding = x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % block)
    return torch.cat([x, padding], dim=-1).unflatten(-1, (-1, block)).amin(-1)
