"""Evaluation results at hand, for a model card: lm-eval's files, the demo's report, or scores written down."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        task, metric: what was measured.
        value: as lm-eval gives it.
        stderr: its standard error, if known.
        shots, samples: examples in each prompt, and number of questions, if known.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    shots: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Results:
    """What `read_results` found.

    Attributes:
        scores: by task and metric; of the same task the latest.
        pruning: ``pruning`` of the demo's report, or None.
        sources: what measured, for the card.
    """

    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None
    sources: list[str] = field(default_factory=list)


def read_results(paths: Iterable[str | Path]) -> Results:
    """Collect results.

    Args:
        paths: files, or folders to be searched for lm-eval's ``results_*.json`` and the demo's ``report.json``. A file
            may also hold scores as ``{"task": {"metric": number}}``.

    Raises:
        ValueError: a path is missing, holds nothing of this kind, or a score is not a finite number.
    """
    scores: dict[tuple[str, str], Score] = {}
    pruning, sources = None, []
    for file, content in sorted(_contents(paths), key=lambda found: found[1].get("date") or 0):
        if "lm_eval_version" in content:
            new = _lm_eval_scores(content, file)
            sources.append(f"lm-evaluation-harness {content['lm_eval_version']}")
        elif "pruning" in content:
            pruning, new = content["pruning"], []
            sources.append(f"foxlm {content['run']['foxlm']}, `{content['run']['command']}`")
        else:
            new = _written_scores(content, file)
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
    return contents


def _lm_eval_scores(content: dict[str, Any], file: Path) -> list[Score]:
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
                    metric=metric if kept == "none" else f"{metric} ({kept})",
                    value=value,
                    stderr=stderr if _is_number(stderr) else None,
                    shots=content.get("n-shot", {}).get(task),
                    samples=samples.get("effective"),
                )
            )
    if not scores:
        raise ValueError(f"{file} must hold results of lm-eval, got none")
    return scores


def _written_scores(content: dict[str, Any], file: Path) -> list[Score]:
    scores = []
    for task, values in content.items():
        if not isinstance(values, dict) or not values or not all(_is_number(value) for value in values.values()):
            raise ValueError(
                f"{file} must be of lm-eval, a demo's report or {{task: {{metric: number}}}}, got {task!r}: {values!r}"
            )
        scores += [Score(task, metric, value) for metric, value in values.items()]
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
