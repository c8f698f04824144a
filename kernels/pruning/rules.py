"""Adaptive Computation Pruning (ACP, arXiv 2504.06949): which keys a query may drop, with a proof.

All rules guarantee that no row loses more than ``eps`` of its attention weight in total. ``D_ij = c_i - c_j`` rises
with ``j`` and falls with ``i``, so what a query keeps is one range that ends at its diagonal key.

``paper``
    Drop key ``j`` where ``D_ij < -2U - log L + log eps`` with ``|scale * q . k| <= U`` and ``L`` keys: a dropped weight
    is at most ``exp(U + D_ij) / exp(-U)``, and there are at most ``L`` of them.
``tight``
    Replaces three worst cases by what is cheaply known. A row's normalizer is at least its diagonal term ``s_ii``
    (instead of ``-U``); a dropped logit is at most ``scale |q_i| Kmax_n`` with ``Kmax_n = max_{j < n} |k_j|`` (instead
    of ``U``); the decays of the dropped keys add up to ``P_n = log sum_{j < n} exp(-c_j)`` (instead of ``L`` times the
    worst). Drop keys ``j < n`` where ``scale |q_i| Kmax_n + c_i + P_n - s_ii <= log eps``. Drops at least what
    ``paper`` drops where ``U`` is the true maximum of ``scale |q| |k|``.
``measured``
    Drops what ``tight`` drops, then measures the weights of what is left from its first key on, and drops more while
    their sum is at most ``eps``: see `measured`.

An attention sink is a key that every query sees undecayed (`elementwise.attention_sink`): a term of the normalizer
that is known before any key is read. ``tight`` and ``measured`` add it to ``exp(s_ii)``; ``paper`` does without.

All hold for `centered` keys as well. `PruningRule` names them. Each is written once in PyTorch, which is the
definition (`may_drop`), and once in Triton (`predicates.may_drop`), for all kernels that search. `prune`
applies them, `later_queries` to queries that are still to come.

**In floating point** the guarantee is about the exact attention weights of ``q``, ``k``, ``log_f`` as they are given:
attention rounds with pruning as it does without. Every value that a rule reads is rounded towards keeping keys, by
a bound of its own rounding error and that of every later operation on it (`rounding`). ``u``, half of ``finfo.eps``, is
2^-24 for inputs up to float32, in which kernels compute (PyTorch, and sums of gates everywhere, are float64), and 2^-53
for float64.

* Inputs in half precision are exact in float32. A dot product of ``D`` terms, in any order, is off by at most
  ``D u |q| |k|``, a length by ``(D / 2 + 2) u`` of itself (by as much again if squares underflow, since lengths count
  as 2^-51 at least), ``scale`` and each further operation by a few ``u``. ``scale |q|`` raised by ``m = 2 (D + 32) u``
  of itself, and ``s_ii`` lowered by ``m scale |q_i| |k_i|`` (by ``m |s_ii|`` in decoding, which takes it in float64),
  cover that, what the rule does with them, and the subtraction in `centered`, of ``u`` in each element.
* Sums over ``n`` gates, in any order, are off by ``n u |c|`` with ``u = 2^-53``, differences of two by twice that, and
  ``P_n`` by ``n u (|c| + log n + 2)`` more: ``c_i`` is raised by ``4 n u (|c_i| + 32)``. What kernels take in float32
  of a block of 64 keys is relative to its last one, so the sum is at least 1, and its log off by at most 100 ``u``.
* Where a rule is about to drop, ``|c_i + P_n|``, or ``-D_ij``, is at most twice the sum of all other terms, or it drops
  anyhow. So the rounding of that term is covered by the first margin and by ``log eps`` lowered by
  ``256 u (1 + |log eps|)``, as are its own and those 100 ``u``.
* ``U`` is raised by ``64 u``. As a product of lengths it is one of upper bounds; a bound by weights must hold for ``q``
  and ``k`` as the model rounds them (`FoxAttention.logit_bound`); one that is given must be one.

An overflow, or any NaN, makes a comparison false, which keeps keys. So does a ``U`` that is NaN, infinite or negative.
"""

import math
from enum import Enum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..tiles import PRUNED_KEYS
from ..validation import check_tensor, is_number, is_readable
from .blocks import per_query_head
from .key_stats import KeySummary
from .rounding import decay_margin, logit_margin

Rule = Literal["paper", "tight", "measured"]
"""What arguments and configurations call a `PruningRule`."""


class PruningRule(str, Enum):
    """How it is proven that a query may drop keys. To add a rule, add a member here and a branch in both `may_drop`
    functions.
    """

    TIGHT = "tight"
    PAPER = "paper"
    MEASURED = "measured"

    @property
    def bound(self) -> "PruningRule":
        """The rule by which keys are dropped before, or where, none are measured."""
        return PruningRule.TIGHT if self is PruningRule.MEASURED else self

    @property
    def reads_bound(self) -> bool:
        """Whether it reads a bound of all logits, in place of lengths of keys and logits of diagonal keys."""
        return self is PruningRule.PAPER

    def terms(self, keys: int) -> int:
        """Number of terms that share ``eps``: ``keys`` where each dropped weight has a bound, 1 where their sum has."""
        return keys if self is PruningRule.PAPER else 1


_RULES = {rule.value: rule for rule in PruningRule}


def check_rule(eps: float, rule: str) -> PruningRule:
    """The rule that is meant.

    Raises:
        ValueError: ``eps`` or ``rule`` is not as `prune.first_kept` takes it.
    """
    if not (is_number(eps) and 0.0 < eps < 1.0):
        raise ValueError(f"eps must be a number in (0, 1), got {eps!r}")
    if isinstance(rule, PruningRule):
        return rule
    if not (isinstance(rule, str) and rule in _RULES):
        raise ValueError(f"rule must be one of {', '.join(map(repr, _RULES))}, got {rule!r}")
    return _RULES[rule]


def check_logit_bound(logit_bound: float | Tensor | None, batch: int, heads: int) -> None:
    """Raise a `ValueError` unless ``logit_bound`` is as `prune.first_kept` takes it."""
    if logit_bound is None:
        return
    if isinstance(logit_bound, Tensor):
        shape = list(logit_bound.shape)
        # What broadcasts to [B, H].
        fits = len(shape) <= 2 and all(n in (1, wanted) for n, wanted in zip(shape[::-1], (heads, batch), strict=False))
        if not fits or not logit_bound.is_floating_point():
            raise ValueError(
                f"logit_bound must be a number or floating point of shape [H] = [{heads}], [1] or [B, H] = "
                f"[{batch}, {heads}], got {logit_bound.dtype} of shape {shape}"
            )
        valid = not is_readable(logit_bound) or bool((logit_bound.isfinite() & (logit_bound >= 0.0)).all())
    else:
        valid = is_number(logit_bound) and math.isfinite(logit_bound) and logit_bound >= 0.0
    if not valid:
        raise ValueError(f"logit_bound must be finite and >= 0, as a bound of |scale * q . k| is, got {logit_bound!r}")


@torch.no_grad()
def key_center(k: Tensor) -> Tensor:
    """Mean of the first 64 keys ``[B, T, G, D]``: ``[B, 1, G, D]``, float32 or wider."""
    return k[:, :PRUNED_KEYS].to(torch.promote_types(k.dtype, torch.float32)).mean(1, keepdim=True)


@torch.no_grad()
def centered(k: Tensor) -> Tensor:
    """Keys less the mean of the first 64, which tightens the bound of the logits: ``[B, T, G, D]``, float32 or wider.

    Subtracting one vector from all keys of a head shifts all logits of a row alike, which changes no attention weight.
    So the rules may be given these keys in place of ``k``. Without QK-norm keys have a large part in common, and the
    bound ``scale |q| max |k|`` is loosened by it: in SmolLM2 it is 40 nats, and 27 nats with centered keys. Of the
    first 64 because they are there before anything can be dropped.

    Raises:
        ValueError: ``k`` is no tensor of four dimensions.
    """
    check_tensor("k", k)
    if k.ndim != 4:
        raise ValueError(f"k must have shape [B, T, G, D], got {list(k.shape)}")
    return k - key_center(k)


class QueryBounds(NamedTuple):
    """What the rules read of queries, ``[B, H, Tq]`` each, rounded to the safe side as the proof says.

    Attributes:
        c: float64, at least the running sum.
        norm: at least ``scale |q|``.
        diagonal: at most the logit with the diagonal key, which is the query's own; with a sink, at most the log of the
            sum of both terms.
        logit_bound: ``U`` of a rule that reads one, ``[B, H, 1]``; None for others.
        sink: at most the logit with the sink; None without one.
    """

    c: Tensor
    norm: Tensor
    diagonal: Tensor
    logit_bound: Tensor | None = None
    sink: Tensor | None = None


def query_bounds(
    q: Tensor, diagonal_key: Tensor, scale: float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``norm``, ``diagonal`` and ``sink`` of `QueryBounds`, in float64.

    Args:
        q: ``[B, Tq, H, D]``.
        diagonal_key: ``[B, Tq, G, D]``, the key at each query's token.
        scale: multiplies the logits.
        sink: as for `prune`.
    """
    margin = logit_margin(q.shape[-1], margin_dtype(diagonal_key))
    q, diagonal_key = (x.double().transpose(1, 2) for x in (q, diagonal_key))
    norm = q.norm(dim=-1) * (abs(scale) * (1.0 + margin))

    def least_logit(key: Tensor) -> Tensor:
        key = per_query_head(key, q.shape[1])
        return scale * (q * key).sum(-1) - margin * norm * key.norm(dim=-1)

    diagonal = least_logit(diagonal_key)
    if sink is None:
        return norm, diagonal, None
    of_sink = least_logit(sink.double().expand(len(q), *sink.shape[-2:])[..., None, :])
    return norm, torch.logaddexp(diagonal, of_sink), of_sink


def margin_dtype(k: Tensor) -> torch.dtype:
    """The dtype whose rounding error sets the margins for keys ``k``."""
    return torch.promote_types(k.dtype, torch.float32)


def raised(c: Tensor, keys: int) -> Tensor:
    """Upper bound of running sums over at most ``keys`` keys, with the margin for rounding: ``c`` of `QueryBounds`."""
    margin = decay_margin(keys)
    return c * (1.0 - margin) + 32.0 * margin


def may_drop(rule: PruningRule, query: QueryBounds, keys: KeySummary, log_eps: float) -> Tensor:
    """The rules: whether a query may drop all keys that an entry of ``keys`` counts. False where a number is NaN.

    Args:
        rule: by which.
        query, keys: of shapes that broadcast.
        log_eps: as `rounding.log_allowed` gives it, for `PruningRule.terms` of the number of keys.
    """
    if rule.bound is PruningRule.TIGHT:
        return (query.c + keys.log_decays) + query.norm * keys.largest - query.diagonal <= log_eps
    assert rule == PruningRule.PAPER and query.logit_bound is not None
    threshold = log_eps - 2.0 * (1.0 + logit_margin(0, torch.float32)) * query.logit_bound
    return (query.logit_bound >= 0.0) & (query.c - keys.c < threshold)


def most_droppable(rule: PruningRule, query: QueryBounds, keys: KeySummary, most: Tensor, log_eps: float) -> Tensor:
    """How many leading keys, or blocks of them, each row may drop, by bisection: ``[B, H, Tq]`` int64.

    Args:
        rule: by which.
        query: of the rows.
        keys: ``[B, H, N]``, of each key or block and all before.
        most: ``[Tq]`` int64, not more than these may be dropped.
        log_eps: as for `may_drop`.
    """
    low = torch.zeros_like(query.norm, dtype=torch.int64)
    high = most.expand_as(low)
    for _ in range(keys.c.shape[-1].bit_length()):
        middle = (low + high + 1) // 2
        before = (middle - 1).clamp(min=0)
        droppable = may_drop(rule, query, KeySummary(*(x.gather(-1, before) for x in keys)), log_eps)
        low = torch.where(droppable, middle, low)
        high = torch.where(droppable, high, middle - 1)
        high = torch.maximum(low, high)
    return low
