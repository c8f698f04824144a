"""Results of an evaluation on disk: a file of lm-eval's form for each task, kept by a rerun with the same settings."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ..results import parse_json, require_folder, write_whole
from ..tables import table as markdown_table
from .suites import Unit

SUMMARY = "evaluation.json"
LOG = "lm_eval.log"

# Settings that belong to a task; all others must be the same for all results in a folder.
OF_A_TASK = ("max_length", "limit", "shots", "text")


@dataclass(frozen=True)
class Row:
    """A line of the table: one number of a task, or why there is none.

    Attributes:
        task: its name, or that of a part of a group.
        metric: as lm-eval has it, with the filter that answers passed unless there is none.
        value: nan for a task that failed.
        stderr: standard error, or None where lm-eval has none.
        n: questions.
        failed: why, in a line.
    """

    task: str
    metric: str = ""
    value: float = math.nan
    stderr: float | None = None
    n: int | None = None
    failed: str | None = None


def earlier_results(folder: Path, overwrite: bool) -> dict[str, dict[str, Any]]:
    """What earlier runs left in a folder, by file name; with ``overwrite`` it is removed.

    Raises:
        ValueError: there is a file, or results that `foxlm eval` did not write.
    """
    require_folder(folder)
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("results_*.json")):
        try:
            content = parse_json(path)
            content["foxlm"]["settings"], content["results"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"out: {path} was not written by foxlm eval; take another folder, or move it away"
            ) from None
        found[path.name] = content
    if overwrite:
        samples = [name.replace("results_", "samples_", 1) + "l" for name in found]
        for name in [*found, *samples, SUMMARY, LOG]:
            (folder / name).unlink(missing_ok=True)
        return {}
    return found


def check_same_settings(earlier: dict[str, dict[str, Any]], unit: Unit, settings: dict[str, Any]) -> None:
    """Raise `ValueError`, naming what differs, unless results of earlier runs may stand beside a new one's.

    Args:
        earlier: as of `earlier_results`.
        unit: about to be run. Settings of a task are compared only with its own earlier result.
        settings: its settings.
    """
    for name, content in earlier.items():
        before = content["foxlm"]["settings"]
        differing = [
            f"{key} was {before.get(key)} and is {settings.get(key)}"
            for key in before | settings
            if before.get(key) != settings.get(key) and (key not in OF_A_TASK or name == unit.file)
        ]
        if differing:
            raise ValueError(
                f"out holds {name} of other settings ({'; '.join(differing)}): take another folder, or --overwrite"
            )


def rows_of(content: dict[str, Any]) -> list[Row]:
    """All numbers in lm-eval's results."""
    rows = []
    for task, values in content["results"].items():
        samples = (content.get("n-samples", {}).get(task) or {}).get("effective")
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = values.get(f"{metric}_stderr,{kept}")
            name = metric if kept == "none" else f"{metric} ({kept})"
            rows.append(Row(task, name, float(value), float(stderr) if isinstance(stderr, Real) else None, samples))
    return rows


def check_finite(content: dict[str, Any]) -> None:
    """Raise `ValueError` if lm-eval found no number for a task, or the model gave what is none."""
    rows = rows_of(content)
    if not rows:
        raise ValueError("lm-eval returned no numbers")
    answers = [sample["filtered_resps"] for samples in content.get("samples", {}).values() for sample in samples]
    broken = sum(_has_nan(answer) for answer in answers)
    if broken:
        raise ValueError(f"the model's likelihoods are NaN in {broken} of {len(answers)} questions")
    for row in rows:
        if not math.isfinite(row.value):
            raise ValueError(f"{row.metric} of {row.task} is {row.value}")


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, list | tuple) and any(map(_has_nan, value))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, default=_plain) + "\n")


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Questions with the model's answers, an object in each line, whole or not at all."""
    write_whole(path, "".join(json.dumps(sample, default=_plain) + "\n" for sample in samples))


def _plain(value: Any) -> Any:
    """numpy's and torch's numbers as Python's; all else, such as a task's functions, in words."""
    return value.item() if getattr(value, "size", None) == 1 and hasattr(value, "item") else str(value)


def table(rows: Sequence[Row]) -> str:
    """Rows as a table; tasks that failed come after it."""
    cells = []
    for row in rows:
        if row.failed is None:
            value = f"{row.value:.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.4f}")
            cells.append((row.task, row.metric, value, "" if row.n is None else str(row.n)))
    shown = [markdown_table(("task", "metric", "value", "n"), cells)] if cells else []
    return "\n".join([*shown, *(f"failed: {row.task}: {row.failed}" for row in rows if row.failed is not None)])
