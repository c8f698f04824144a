"""Findings of all layers and texts, put together as the report's JSON: all that its page needs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from foxlm.modeling.cache.paged import PAGE

from .measure import GRAINS, Case, Findings, Plan

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

    def means(name: str) -> dict[str, dict[str, np.ndarray]]:
        """``[N, L, H]`` by grain and rule, of a field of `Case`."""
        shares = _each(findings, lambda layer: [[getattr(layer.cases[g, r], name) for r in plan.rules] for g in GRAINS])
        by_grain = np.moveaxis(shares.mean(0), 0, 3)
        return {
            grain: dict(zip(plan.rules, by_rule, strict=True)) for grain, by_rule in zip(GRAINS, by_grain, strict=True)
        }

    by_length = means("by_length")
    with np.errstate(divide="ignore"):
        times = 1.0 / np.abs(_each(findings, lambda layer: layer.log_f_mean).mean(0))
    return {
        "gates": _gates(findings, times),
        "skipped": means("skipped"),
        "by_length": {"lengths": plan.lengths}
        | {grain: {rule: by_length[grain][rule].mean((1, 2)) for rule in plan.rules} for grain in GRAINS},
        "check": _check(findings, plan),
        "cache": _cache(findings, plan),
        "kept_region": [
            {
                "kind": kind,
                "layer": layer,
                "head": head,
                "decay_time": times[layer, head],
                "queries": plan.shown,
                **{grain: findings[0][layer].kept[grain][head] for grain in GRAINS},
            }
            for kind, layer, head in choose_heads(times)
        ],
    }


def _each(findings: Sequence[Sequence[Findings]], value: Callable[[Findings], Any]) -> np.ndarray:
    """``value`` of each text and layer, ``[texts, L, ...]``."""
    return np.array([[value(layer) for layer in text] for text in findings])


def _gates(findings: Sequence[Sequence[Findings]], times: np.ndarray) -> dict[str, Any]:
    """Decay times: ``-1 / mean(log f)`` of each head, and quantiles of ``-1 / log f`` over tokens."""
    log_f = np.concatenate(_each(findings, lambda layer: layer.log_f), axis=1)
    with np.errstate(divide="ignore"):
        quantiles = np.quantile(1.0 / np.abs(log_f), QUANTILES, axis=1, method="nearest")
    return {"decay_times": times, "quantiles_at": QUANTILES, "quantiles": quantiles}


def _check(findings: Sequence[Sequence[Findings]], plan: Plan) -> dict[str, Any]:
    """Whether any row lost more than ``eps``; figures are natural logs of attention weights."""
    every = [layer for text in findings for layer in text]
    cases = []
    for rule in plan.rules:
        for grain in GRAINS:
            largest = np.max([layer.cases[grain, rule].largest for layer in every], (0, 2))
            violations = np.sum([layer.cases[grain, rule].violations for layer in every], (0, 2))
            cases += [
                {"rule": rule, "grain": grain, "log_eps": value, "largest": most, "violations": int(count)}
                for value, most, count in zip(plan.log_eps, largest, violations, strict=True)
            ]
    violations = sum(one["violations"] for one in cases)
    return {
        "passed": violations == 0,
        "violations": violations,
        "rows": sum(layer.rows for layer in every),
        "cases": cases,
        "scatter": {rule: _scatter([layer.cases["pairs", rule] for layer in every]) for rule in plan.rules},
        "largest": _each(findings, lambda layer: layer.cases["tiles", plan.rule].largest[plan.own]).max(0),
    }


def _scatter(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """``proven`` and ``lost`` of rows that drop something: those that lost most, and others evenly."""
    proven = np.concatenate([case.proven.ravel() for case in cases])
    lost = np.concatenate([case.lost.ravel() for case in cases])
    order = np.argsort(-lost, kind="stable")
    order = order[np.isfinite(proven[order]) & ~np.isneginf(lost[order])]
    top, rest = order[: _DRAWN // 4], order[_DRAWN // 4 :]
    chosen = np.concatenate([top, rest[:: max(1, len(rest) // (_DRAWN - _DRAWN // 4))]])
    return {"proven": proven[chosen], "lost": lost[chosen]}


def _cache(findings: Sequence[Sequence[Findings]], plan: Plan) -> dict[str, Any]:
    """What a freeing cache holds; ``pages`` is ``[L, G]`` at the end, all others are of all layers."""
    pages = _each(findings, lambda layer: layer.pages).mean(0)
    page_bytes = findings[0][0].page_bytes
    full = np.array([-(-length // PAGE) for length in plan.cache_lengths])
    return {
        "page": PAGE,
        "page_bytes": page_bytes,
        "lengths": plan.cache_lengths,
        "held_bytes": pages.sum((0, 2)) * page_bytes,
        "full_bytes": full * pages[:, 0].size * page_bytes,
        "full_pages": int(full[-1]),
        "pages": pages[:, -1],
    }


def choose_heads(decay_times: np.ndarray) -> list[tuple[str, int, int]]:
    """A head that forgets fast, a medium one, and the slowest: their kind, layer and index.

    Args:
        decay_times: ``[L, H]`` tokens; may hold ``inf``.
    """
    order = np.argsort(decay_times, axis=None, kind="stable").tolist()
    # With few heads two kinds may be one; the last name says more.
    kinds = {order[len(order) // 4]: "fast", order[3 * len(order) // 4]: "medium", order[-1]: "slowest"}
    return [(kind, *divmod(place, decay_times.shape[1])) for place, kind in kinds.items()]


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
