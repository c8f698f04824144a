"""Findings of all layers and texts, put together as the report's JSON: all that its page needs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from foxlm.modeling.cache.paged import PAGE

from ..gates import RULES
from .measure import GRAINS, Findings, Plan

SCHEMA = 1
KIND = "pruning-report"
# Where in the text's distribution of decay times each head is told.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Rows of the check that are drawn, for each rule.
_DRAWN = 700
_DIGITS = 5


def summarize(findings: Sequence[Sequence[Findings]], plan: Plan) -> dict[str, Any]:
    """The measured parts of a report.

    Args:
        findings: of each text and layer.
        plan: what was measured.

    Returns:
        ``gates``, ``skipped``, ``by_length``, ``check``, ``cache`` and ``kept_region``; shares and logs per
        layer and head are arrays ``[..., L, H]``, means over texts.
    """
    means = np.array([[layer.log_f_mean for layer in text] for text in findings]).mean(0)
    with np.errstate(divide="ignore"):
        times = 1.0 / np.abs(means)
    heads = choose_heads(times)
    return {
        "gates": _gates(findings, times),
        "skipped": _by_grain(findings, "skipped"),
        "by_length": {"lengths": plan.lengths}
        | {
            grain: {rule: shares.mean((1, 2)) for rule, shares in of_rule.items()}
            for grain, of_rule in _by_grain(findings, "by_length").items()
        },
        "check": _check(findings, plan),
        "cache": _cache(findings, plan),
        "kept_region": _kept_region(findings[0], plan, heads, times),
    }


def _by_grain(findings: Sequence[Sequence[Findings]], name: str) -> dict[str, dict[str, np.ndarray]]:
    """``[N, L, H]`` means over texts, by grain and rule."""
    return {
        grain: {
            rule: np.array([[getattr(layer, name)[grain, rule] for layer in text] for text in findings])
            .mean(0)
            .transpose(1, 0, 2)
            for rule in RULES
        }
        for grain in GRAINS
    }


def _gates(findings: Sequence[Sequence[Findings]], times: np.ndarray) -> dict[str, Any]:
    """Decay times: ``-1 / mean(log f)`` of each head, and quantiles of ``-1 / log f`` over tokens."""
    quantiles = []
    for layer in range(len(findings[0])):
        log_f = np.concatenate([text[layer].log_f for text in findings])
        with np.errstate(divide="ignore"):
            quantiles.append(np.quantile(1.0 / np.abs(log_f), QUANTILES, axis=0, method="nearest"))
    return {"decay_times": times, "quantiles_at": QUANTILES, "quantiles": np.stack(quantiles, axis=1)}


def _check(findings: Sequence[Sequence[Findings]], plan: Plan) -> dict[str, Any]:
    """Whether any row lost more than ``eps``; figures are natural logs of attention weights."""
    every = [layer for text in findings for layer in text]
    cases, scatter = [], {}
    for rule in RULES:
        for grain in GRAINS:
            those = [layer.dropped[grain, rule] for layer in every]
            largest = np.array([one.largest for one in those]).max((0, 2))
            violations = np.array([one.violations for one in those]).sum((0, 2))
            for index, value in enumerate(plan.log_eps):
                cases.append(
                    {
                        "rule": rule,
                        "grain": grain,
                        "log_eps": value,
                        "largest": largest[index],
                        "violations": int(violations[index]),
                    }
                )
        scatter[rule] = _scatter([layer.dropped["pairs", rule] for layer in every])
    own = np.array([[layer.dropped["tiles", plan.rule].largest[plan.own] for layer in text] for text in findings])
    violations = sum(one["violations"] for one in cases)
    return {
        "passed": violations == 0,
        "violations": violations,
        "rows": sum(layer.rows for layer in every),
        "cases": cases,
        "scatter": scatter,
        "largest": own.max(0),
        "quantiles": _quantiles_lost(every, plan),
    }


def _quantiles_lost(every: Sequence[Findings], plan: Plan) -> dict[str, Any]:
    """Of rows drawn evenly, without those that were chosen as the worst."""
    lost = np.concatenate([layer.dropped["tiles", plan.rule].lost[:, : plan.spread].ravel() for layer in every])
    dropping = np.sort(lost[np.isfinite(lost)])
    at = (0.5, 0.9, 0.99)
    values = [float(np.quantile(dropping, share)) for share in at] if dropping.size else [-math.inf] * len(at)
    return {"at": at, "values": values, "rows": int(lost.size), "dropping": int(dropping.size)}


def _scatter(those: Sequence[Any]) -> dict[str, np.ndarray]:
    """``proven`` and ``lost`` of rows that drop something: those that lost most, and others evenly."""
    proven = np.concatenate([one.proven.ravel() for one in those])
    lost = np.concatenate([one.lost.ravel() for one in those])
    drops = np.isfinite(proven) & ~np.isneginf(lost)
    proven, lost = proven[drops], lost[drops]
    order = np.argsort(-lost, kind="stable")
    top, rest = order[: _DRAWN // 4], order[_DRAWN // 4 :]
    chosen = np.concatenate([top, rest[:: max(1, len(rest) // (_DRAWN - _DRAWN // 4))]])
    return {"proven": proven[chosen], "lost": lost[chosen]}


def _cache(findings: Sequence[Sequence[Findings]], plan: Plan) -> dict[str, Any]:
    """What a freeing cache holds; ``pages`` is ``[L, G]`` at the end, all others are of all layers."""
    pages = np.array([[layer.pages for layer in text] for text in findings]).mean(0)
    page_bytes = findings[0][0].page_bytes
    full = np.array([-(-length // PAGE) for length in plan.cache_lengths])
    heads = pages.shape[0] * pages.shape[2]
    return {
        "page": PAGE,
        "page_bytes": page_bytes,
        "lengths": plan.cache_lengths,
        "held_bytes": pages.sum((0, 2)) * page_bytes,
        "full_bytes": full * heads * page_bytes,
        "full_pages": int(full[-1]),
        "pages": pages[:, -1],
    }


Head = tuple[str, int, int]
"""Kind, layer and index."""


def choose_heads(decay_times: np.ndarray) -> list[Head]:
    """A head that forgets fast, a medium one, and the slowest: their kind, layer and index.

    Args:
        decay_times: ``[L, H]`` tokens; may hold ``inf``.
    """
    order = np.argsort(decay_times, axis=None, kind="stable")
    picked = (("fast", len(order) // 4), ("medium", (3 * len(order)) // 4), ("slowest", len(order) - 1))
    found: dict[int, Head] = {}
    for kind, place in picked:
        layer, head = divmod(int(order[place]), decay_times.shape[1])
        # With few heads two kinds may be one; the last name says more.
        found[int(order[place])] = (kind, layer, head)
    return list(found.values())


def _kept_region(
    text: Sequence[Findings], plan: Plan, heads: Sequence[Head], times: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "layer": layer,
            "head": head,
            "decay_time": times[layer, head],
            "queries": plan.shown,
            **{grain: text[layer].kept[grain][head] for grain in GRAINS},
        }
        for kind, layer, head in heads
    ]


def jsonable(value: Any) -> Any:
    """``value`` of what JSON has: arrays as lists, numbers to five digits, what is not finite as text."""
    if isinstance(value, dict):
        return {key: jsonable(one) for key, one in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [jsonable(one) for one in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return float(f"{value:.{_DIGITS}g}")
    return value
