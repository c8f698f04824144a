"""Read evaluation results for a model card: lm-eval's files, pruning reports, reports of the demo, plain scores."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        task, metric: what was measured.
        value: as lm-eval gives it.
        stderr: standard error, if known.
        shots, samples: examples per prompt and number of questions, if known.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    shots: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Pruning:
    """The share of attention that pruning skips, averaged over layers and heads.

    Attributes:
        tokens, length: tokens measured, and tokens of a window.
        tile: queries and keys of a tile.
        shares: skipped shares of pairs and of tiles, by log eps and rule.
    """

    tokens: int
    length: int
    tile: tuple[int, int]
    shares: dict[tuple[float, str], tuple[float, float]]


@dataclass(frozen=True)
class Results:
    """The results that `read_results` found.

    Attributes:
        scores: by task and metric; of the same task the latest.
        pruning: from ``foxlm report`` or the demo, or None.
        sources: the programs that measured, for the card.
    """

    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    pruning: Pruning | None = None
    sources: list[str] = field(default_factory=list)


def read_results(paths: Iterable[str | Path]) -> Results:
    """Collect results.

    Args:
        paths: files, or folders to be searched for lm-eval's ``results_*.json`` and the ``report.json`` of ``foxlm
            report`` or the demo. A file may also hold scores as ``{"task": {"metric": number}}``.

    Raises:
        ValueError: a path is missing, holds nothing of this kind, or a score is not a finite number.
    """
    scores: dict[tuple[str, str], Score] = {}
    pruning, sources = None, []
    for file, content in _contents(paths):
        new: list[Score] = []
        try:
            if "lm_eval_version" in content:
                new = _lm_eval_scores(content)
                sources.append(f"lm-evaluation-harness {content['lm_eval_version']}")
            elif content.get("kind") == "pruning-report" or "pruning" in content:
                pruning = _reported_pruning(content) if "kind" in content else _pruning(content["pruning"])
                sources.append(f"foxlm {content['run']['foxlm']}, `{content['run']['command']}`")
            else:
                new = _written_scores(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} must be of lm-eval, a report or {{task: {{metric: number}}}}: {error!r}"
            ) from error
        for score in new:
            if not math.isfinite(score.value):
                raise ValueError(f"{file} must hold finite numbers, got {score.value} for {score.task}, {score.metric}")
            scores[score.task, score.metric] = score
    return Results(dict(sorted(scores.items())), pruning, list(dict.fromkeys(sources)))


def _contents(paths: Iterable[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = [*path.rglob("results_*.json"), *path.rglob("report.json")]
        if not found or not found[0].is_file():
            raise ValueError(
                f"evaluation must be a JSON file, or a folder that holds results_*.json or report.json, got {path}"
            )
        files += found
    contents = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} must be JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
        if content.get("complete") is False:
            raise ValueError(f"{file} must be of a demo that has ended; this one was interrupted")
        contents.append((file, content))
    return sorted(contents, key=lambda found: _date(found[1]))


def _date(content: dict[str, Any]) -> float:
    date = content.get("date")
    return date if _is_number(date) else 0.0


def _lm_eval_scores(content: dict[str, Any]) -> list[Score]:
    scores = []
    for task, values in content["results"].items():
        for name, value in values.items():
            # "acc,none": a metric and the filter that the answers passed; all else is about the task.
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{kept}")
            samples = content.get("n-samples", {}).get(task) or {}
            scores.append(
                Score(
                    task=task,
                    metric=_metric_name(metric, kept),
                    value=value,
                    stderr=stderr if _is_number(stderr) else None,
                    shots=content.get("n-shot", {}).get(task),
                    samples=samples.get("effective"),
                )
            )
    if not scores:
        raise ValueError("no results")
    return scores


def _metric_name(metric: str, kept: str) -> str:
    """RULER's metrics are lengths."""
    name = f"score at {int(metric):,} tokens" if metric.isdecimal() else metric
    return name if kept == "none" else f"{name} ({kept})"


def _written_scores(content: dict[str, Any]) -> list[Score]:
    scores = [Score(task, metric, value) for task, values in content.items() for metric, value in values.items()]
    if not scores or not all(_is_number(score.value) for score in scores):
        raise ValueError("no numbers" if not scores else "not all are numbers")
    return scores


def _pruning(measured: dict[str, Any]) -> Pruning:
    """From ``pruning`` of a report, which holds one share for each eps."""
    shares = {
        (log_eps, rule): (pairs, measured["skipped_tiles"][rule][index])
        for rule, every in measured["skipped_pairs"].items()
        for index, (log_eps, pairs) in enumerate(zip(measured["log_eps"], every, strict=True))
    }
    block_q, block_k = measured["tile"]
    return Pruning(measured["tokens"], measured["length"], (block_q, block_k), shares)


def _reported_pruning(report: dict[str, Any]) -> Pruning:
    """From ``foxlm report``, which holds the shares of each layer and head."""
    settings, skipped = report["settings"], report["skipped"]
    shares = {
        (log_eps, rule): (_mean(skipped["pairs"][rule][index]), _mean(skipped["tiles"][rule][index]))
        for rule in skipped["pairs"]
        for index, log_eps in enumerate(settings["log_eps"])
    }
    return Pruning(settings["tokens"], settings["length"], (PRUNED_QUERIES, PRUNED_KEYS), shares)


def _mean(shares: list[list[float]]) -> float:
    heads = [share for layer in shares for share in layer]
    return sum(heads) / len(heads)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
