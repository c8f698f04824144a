"""What each query keeps: the rules applied to all pairs of queries and keys, in PyTorch, which is the definition.

`prune` is what attention runs, on a GPU by the kernels of `search`; `first_kept` and `share_skipped` are for analysis.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..decay import Decay, accumulate
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES
from ..validation import check_count, check_gates, check_inputs, check_scale, check_tensor, is_readable
from .blocks import block_minimum, of_each_query, per_query_head
from .key_stats import KeySummary
from .measured import measured_kv_start
from .rounding import log_allowed
from .rules import (
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
    sink: Tensor | None = None,
) -> Tensor:
    """First key that each block of queries keeps: it may drop every key before.

    Args:
        q: ``[B, Tq, H, D]`` queries, the last ``Tq`` of ``Tk`` tokens.
        k: ``[B, Tk, G, D]`` keys.
        log_f: ``[B, Tk, Hf]`` log forget gates, ``Hf`` in ``{H, G, 1}``.
        eps: largest attention weight that a row may lose in total, in ``(0, 1)``.
        rule: ``"paper"``, ``"tight"`` or ``"measured"``; the last takes time and memory of all pairs in blocks of rows.
        scale: multiplies the logits, finite; ``1 / sqrt(D)`` by default.
        logit_bound: ``U`` of the rule ``paper``, a number, ``[H]`` or ``[B, H]``, finite and at least 0, e.g. from
            QK-norm weights; by default ``scale * max |q| * max |k|`` per sequence and head. If some
            ``|scale * q . k|`` exceeds it by ``x``, rows may lose up to ``exp(2 x) eps``. Values on a GPU are not
            checked: nothing is dropped where they are NaN, infinite or negative.
        block_q, block_k: queries and keys are dropped in blocks of these sizes; 1 is per query and key.
        sink: as for `prune`.

    Returns:
        ``[B, H, ceil(Tq / block_q)]`` int64, multiples of ``block_k``. Keys hidden by a hard reset count as dropped.

    Raises:
        ValueError: an argument is not as above; the message names it. Positive or NaN gates raise on a CPU alone.
    """
    known = check_rule(eps, rule)
    check_inputs(q, k, k, log_f, wide_keys=True)
    check_gates(log_f)
    check_count("block_q", block_q)
    check_count("block_k", block_k)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    check_logit_bound(logit_bound, batch, heads)
    check_scale(scale)
    if sink is not None:
        check_tensor("sink", sink)
        if sink.shape not in (k.shape[2:], (batch, *k.shape[2:])):
            raise ValueError(
                f"sink must be [G, D] or [B, G, D] = {[batch, *k.shape[2:]]}, got one of shape {list(sink.shape)}"
            )
    scale = head_dim**-0.5 if scale is None else scale
    c, kv_start = accumulate(log_f)
    last = torch.arange(keys - queries, keys, device=c.device)
    decay = Decay(c[..., keys - queries :], c, kv_start[..., keys - queries :], last)
    query, summary = _summarize(decay, q, k, known, scale, logit_bound, sink)
    kept = _kept(decay, query, summary, eps, known, margin_dtype(k))
    kept = block_minimum(torch.maximum(kept, per_query_head(decay.kv_start, heads)), block_q) // block_k * block_k
    if known is PruningRule.MEASURED:
        rows = of_each_query(kept, block_q, queries)
        rows = measured_kv_start(decay, q, k, rows, query, summary, eps, scale, block_q, block_k)
        kept = rows[..., ::block_q]
    return kept


def search_kv_start(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    *,
    eps: float,
    rule: PruningRule,
    scale: float,
    logit_bound: float | Tensor | None,
    sink: Tensor | None = None,
) -> Tensor:
    """First key that each query keeps, ``[B, H, Tq]`` int64, in blocks of 128 queries and 64 keys: the definition.

    Arguments as for `prune`, which checks them. At least ``decay.kv_start``.
    """
    query, keys = _summarize(decay, q, k, rule, scale, logit_bound, sink)
    kept = _kept(decay, query, keys, eps, rule, margin_dtype(k))
    kv_start = per_query_head(decay.kv_start, q.shape[2])
    fully_masked = kv_start > decay.last
    kept = kept.masked_fill(fully_masked, torch.iinfo(torch.int64).max)
    kept = block_minimum(kept, PRUNED_QUERIES) // PRUNED_KEYS * PRUNED_KEYS
    kept = of_each_query(kept, PRUNED_QUERIES, q.shape[1])
    kv_start = torch.where(fully_masked, kv_start, torch.maximum(kv_start, kept))
    if rule is not PruningRule.MEASURED:
        return kv_start
    blocks = (PRUNED_QUERIES, PRUNED_KEYS)
    return measured_kv_start(decay, q, k, kv_start, query, keys, eps, scale, *blocks)


def prune(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    *,
    eps: float,
    rule: Rule = "tight",
    scale: float,
    logit_bound: float | Tensor | None = None,
    sink: Tensor | None = None,
    search: Callable[..., Tensor] = search_kv_start,
) -> Decay:
    """Hide from every query the keys that it may drop, in blocks of 128 queries and 64 keys.

    Args:
        decay: of ``Tq`` queries over ``Tk`` keys; with resets, packing and padding.
        q, k, eps, rule, logit_bound: as for `first_kept`; q and k finite, also where they are padding; k may have a
            wider dtype than q (see `centered`).
        scale: multiplies the logits.
        sink: key of an attention sink, ``[G, D]``, or ``[B, G, D]`` less the `key_center` if ``k`` is centered.
        search: that of the `Backend`.

    Returns:
        ``decay`` with ``kv_start`` raised, ``[B, H, Tq]``. No row loses more than ``eps`` of its attention weight.

    Raises:
        ValueError: an argument is not as above.
    """
    known = check_rule(eps, rule)
    check_logit_bound(logit_bound, q.shape[0], q.shape[2])
    if k.shape[1] <= PRUNED_KEYS or q.numel() == 0:
        return decay
    options = {"eps": eps, "rule": known, "scale": scale, "logit_bound": logit_bound, "sink": sink}
    return Decay(decay.query, decay.key, search(decay, q, k, **options), decay.last)


def share_skipped(first: Tensor, length: int, block_q: int = 1, block_k: int = 1, queries: int | None = None) -> Tensor:
    """Share of the causal tiles that are skipped when each block of queries starts at its first kept key.

    Args:
        first: ``[B, H, ceil(Tq / block_q)]`` as `first_kept` returns it for the same blocks.
        length: number of keys ``Tk``.
        block_q, block_k: tile sizes; with both 1, pairs of query and key are counted.
        queries: number of queries ``Tq``, the last of the keys; all of them by default.

    Returns:
        ``[B, H]`` float64 in ``[0, 1)``.

    Raises:
        ValueError: an argument is not as above; the message names it. Values of ``first`` on a GPU are not checked.
    """
    for name, value in (("length", length), ("block_q", block_q), ("block_k", block_k)):
        check_count(name, value)
    if queries is not None:
        check_count("queries", queries)
        if queries > length:
            raise ValueError(f"queries must be at most length, {length}, got {queries}")
    check_tensor("first", first)
    blocks = -(-(length if queries is None else queries) // block_q)
    if first.ndim == 0 or first.shape[-1] != blocks or first.is_floating_point() or first.is_complex():
        raise ValueError(
            f"first must hold whole numbers of shape [B, H, ceil(Tq / block_q)] = [B, H, {blocks}], got {first.dtype} "
            f"of shape {list(first.shape)}"
        )
    if is_readable(first) and not ((first >= 0) & (first <= length)).all():
        raise ValueError(f"first must be from 0 to length, {length}, got {first.min().item()} to {first.max().item()}")
    queries = length if queries is None else queries
    ends = torch.arange(first.shape[-1], device=first.device) * block_q + block_q
    tiles = (ends.clamp(max=queries) + length - queries + block_k - 1) // block_k
    return (first // block_k).sum(-1).double() / tiles.sum()


def _summarize(
    decay: Decay,
    q: Tensor,
    k: Tensor,
    rule: PruningRule,
    scale: float,
    logit_bound: float | Tensor | None,
    sink: Tensor | None,
) -> tuple[QueryBounds, KeySummary]:
    """What ``rule`` reads of every query, and of every key and all before, ``[B, H, Tk]`` each."""
    batch, _, heads, _ = q.shape
    c_q, c_k = (per_query_head(x, heads) for x in (decay.query, decay.key))
    norm, diagonal, of_sink = query_bounds(q, k.index_select(1, decay.last), scale, sink)
    k_norm = per_query_head(k.double().norm(dim=-1).transpose(1, 2), heads).masked_fill(torch.isposinf(c_k), 0.0)
    # A hidden key (c = +inf) takes the running sum of the last visible key before it.
    keys = KeySummary(c_k.cummin(-1).values, torch.logcumsumexp(-c_k, dim=-1), k_norm.cummax(-1).values)
    bound = None
    if rule.reads_bound:
        if logit_bound is None:
            logit_bound = norm.amax(-1) * k_norm.amax(-1)
        bound = torch.as_tensor(logit_bound, dtype=torch.float64, device=c_q.device).expand(batch, heads)[..., None]
    return QueryBounds(raised(c_q, k.shape[1]), norm, diagonal, bound, of_sink), keys


def _kept(
    decay: Decay, query: QueryBounds, keys: KeySummary, eps: float, rule: PruningRule, dtype: torch.dtype
) -> Tensor:
    """First key that each query keeps by the bound alone, ``[B, H, Tq]``; never after its own."""
    log_eps = log_allowed(eps, dtype, rule.terms(keys.c.shape[-1]))
    return most_droppable(rule, query, keys, decay.last, log_eps)
