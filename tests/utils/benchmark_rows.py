"""Rows of a benchmark, measured without a file."""

from collections.abc import Iterable
from typing import Any

from foxlm.evaluation.benchmark.runner import Report, Variant, run


def rows_of(variants: Iterable[Variant], rounds: int = 1) -> list[dict[str, Any]]:
    """What `run` makes of ``variants`` on the CPU."""
    report = Report({"rows": []}, None)
    run(variants, report, rounds, "cpu")
    return report.results["rows"]
