"""Measured pruning: a query drops keys because their weights were added up, not because a bound shows it.

A bound of logits must hold for the worst direction of a key. So after the rule ``tight`` has found a first key, this
one computes logits: of the nearest keys, which give a part of the normalizer, then of the farthest, whose weights it
adds up for as long as they are negligible. Dropping a tile saves the seven matmuls of attention and its gradients and
costs one. Attention itself is not changed: it reads from ``kv_start`` on, forward and backward.

Let ``f`` be the first key of a block of queries by the bound, a multiple of the size of a block of keys, and ``r`` the
block's first query. With ``near = r - 64 - (r - f) // 8``, rounded down to a block of keys and at least ``f``,

    Z_i = sum_{near <= j <= i} exp(S_ij)        T_in = exp(scale |q_i| Kmax_f + c_i + P_f) + sum_{f <= j < n} exp(S_ij)

(with the term of an attention sink in ``Z_i``, if there is one), and all keys before ``n`` are dropped: the most blocks
up to ``near`` with ``T_in <= eps Z_i`` for every row ``i``, and with ``D_rj <= log(eps) / 2`` for the last key ``j`` of
each.

*Proof.* The first term of ``T_in`` is what the bound allows the keys before ``f`` to add up to, as in the proof of
``tight``; it is left out where a hard reset hides them. So ``T_in`` is at least the sum of all dropped terms of row
``i``, and ``Z_i``, some of its terms, at most its normalizer: the weight dropped is at most ``T_in / Z_i <= eps``.

The condition on ``D_rj`` decides nothing about weights. Where so little is forgotten hardly anything is negligible, and
heads that never forget should not pay for being measured.

**In floating point.** ``eps`` is lowered per row by the factor ``exp(-2 m scale |q_i| K)`` with ``K`` the greatest
length of a key up to the block: a logit is off by ``m / 2`` of that product at most, even in matrix units that truncate
(`rounding.logit_margin`), and the rest covers bias and maximum, since in a term that counts decays are at most twice
the other summands. Once for ``T``, once for ``Z``. Queries and keys that are not both of one 16-bit type are rounded to
bfloat16 first, which raises ``m`` by `rounding.stored_margin`. `rounding.log_allowed` covers the exponentials, and
``n u`` sums of ``n`` terms in any order. What underflows is counted as ``2^-126`` per key. The kernel is
`triton_measured`.
"""

import math

import torch
from torch import Tensor

from ..decay import Decay
from ..tiles import PRUNED_KEYS
from .blocks import block_minimum, of_each_query, per_query_head
from .key_stats import KeySummary
from .rounding import log_allowed, logit_margin
from .rules import QueryBounds

# The nearest keys are one in so many of those that the bound keeps.
NEAR_SHARE = 8
# Logits held at a time, in elements.
_CHUNK_ELEMENTS = 1 << 22


def log_measured(eps: float, dtype: torch.dtype, keys: int) -> float:
    """``log eps``, lowered by what rounding of sums of at most ``keys`` weights in ``dtype`` may be off."""
    return log_allowed(eps, dtype) - keys * torch.finfo(dtype).eps / 2.0


def measured_kv_start(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    kv_start: Tensor,
    query: QueryBounds,
    keys: KeySummary,
    eps: float,
    scale: float,
    block_q: int,
    block_k: int,
) -> Tensor:
    """``kv_start`` raised by measuring: the definition, in float64.

    Args:
        decay: of ``Tq`` queries over ``Tk`` keys.
        q: ``[B, Tq, H, D]``.
        k: ``[B, Tk, G, D]``; may be `rules.centered`.
        kv_start: ``[B, H, Tq]`` int64, first key that each query keeps by the rule ``tight`` in these blocks.
        query: ``[B, H, Tq]`` float64 each.
        keys: ``[B, H, Tk]`` each, of every key and all before.
        eps, scale: as for `prune.first_kept`.
        block_q, block_k: sizes of a block of queries and of keys.

    Returns:
        ``[B, H, Tq]`` int64, at least ``kv_start``; as it is in fully masked rows.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    log_eps = log_measured(eps, dtype, k.shape[1])
    heads, at_once = q.shape[2], max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[2] * k.shape[1] * block_q)) * block_q
    hidden_by_reset = per_query_head(decay.kv_start, heads)
    c_q, c_k = (per_query_head(x, heads) for x in (decay.query, decay.key))
    k = per_query_head(k.double().transpose(1, 2), heads)
    index = torch.arange(k.shape[2], device=k.device)
    # The last key of each one's block.
    c_end = c_k.gather(-1, (index // block_k * block_k + block_k - 1).clamp(max=len(index) - 1).expand_as(c_k))
    found = []
    for begin in range(0, q.shape[1], at_once):
        rows = slice(begin, begin + at_once)
        start, last, reset = kv_start[..., rows], decay.last[rows], hidden_by_reset[..., rows]
        is_seen = start <= last
        # Of each row, what its block of queries begins with.
        of_block = torch.arange(len(last), device=k.device) // block_q * block_q
        first = block_minimum(start.masked_fill(~is_seen, torch.iinfo(torch.int64).max), block_q) // block_k * block_k
        first = torch.minimum(of_each_query(first, block_q, len(last)), last)
        diagonal = last[of_block]
        near = diagonal - PRUNED_KEYS - (diagonal - first).clamp(min=0) // NEAR_SHARE
        near = torch.maximum(near, first) // block_k * block_k
        logits = scale * (q[:, rows].double().transpose(1, 2) @ k.mT) + c_q[..., rows, None] - c_k[..., None, :]
        is_hidden = (index > last[:, None]) | (index < start[..., None]) | torch.isposinf(c_k)[..., None, :]
        logits.masked_fill_(is_hidden, -math.inf)
        is_far = index < near[..., None]
        log_z = logits.masked_fill(is_far, -math.inf).logsumexp(-1)
        if query.sink is not None:
            log_z = torch.logaddexp(log_z, query.sink[..., rows])
        before = (first - 1).clamp(min=0)
        norm, c = query.norm[..., rows], query.c[..., rows]
        dropped = norm * keys.largest.gather(-1, before) + c + keys.log_decays.gather(-1, before)
        dropped = dropped.masked_fill((first == 0) | (reset >= first), -math.inf)
        log_t = torch.logaddexp(logits.logcumsumexp(-1), dropped[..., None])
        margin = 2.0 * logit_margin(q.shape[-1], dtype) * norm * keys.largest.gather(-1, last.expand_as(first))
        is_negligible = log_t <= (log_eps - margin + log_z)[..., None]
        is_decayed = c_q[..., rows][..., of_block, None] - c_end[..., None, :] <= math.log(eps) / 2.0
        # What comes before the first key is not looked at.
        passes = (is_negligible & is_decayed & is_far) | (index < first[..., None])
        most = passes.long().cumprod(-1).sum(-1).masked_fill(~is_seen, len(index))
        most = of_each_query(block_minimum(most, block_q) // block_k * block_k, block_q, len(last))
        found.append(torch.where(is_seen, torch.maximum(start, most), start))
    return torch.cat(found, -1) if found else kv_start
