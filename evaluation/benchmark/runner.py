"""How every benchmark measures: each variant is checked before it is timed, and each row shown and kept at once.

All variants are timed in a first pass, right after their checks, and once more in a second one, so that drifting clocks
show as a spread. An interrupted run keeps the rows measured so far.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from ..results import write_whole
from .results import PASSES, Results, Row, add_ratios, to_json
from .tables import line
from .timing import release_memory, timing_of

# Compilers' errors can quote whole programs.
_MAX_DETAIL = 4000


class MissingError(RuntimeError):
    """A variant cannot run here, for example for lack of a package."""


class Variant(Protocol):
    """What one row measures.

    Attributes:
        facts: of the row, with ``name``.
    """

    facts: Row

    def check(self, row: Row) -> str | None:
        """Add errors, limits and memory to ``row``; returns what is wrong with the results, None if nothing is.

        Raises:
            MissingError: it cannot run here.
        """

    def time(self, rounds: int) -> dict[str, list[float]]:
        """Milliseconds of each round, by the name under which they are recorded."""

    def derive(self, row: Row) -> None:
        """Add what follows from the times."""


class Report:
    """Results that are written whenever a row changes.

    Args:
        results: ``schema``, ``kind``, ``run``, ``settings`` and ``rows``.
        out: where they are kept; None on ranks that write and show nothing.
    """

    def __init__(self, results: Results, out: Path | None) -> None:
        self.results, self._out = results, out

    def new_row(self, facts: Row) -> Row:
        """A row, kept from now on, that is to be filled in."""
        row = {**facts, "status": "unfinished", "reason": "the run ended before it was measured"}
        self.results["rows"].append(row)
        self.save()
        return row

    def save(self, row: Row | None = None) -> None:
        """Keep what is known, and show ``row`` on stderr."""
        add_ratios(self.results["rows"])
        if self._out is not None:
            write_whole(self._out, to_json(self.results) + "\n")
            if row is not None:
                print(line(self.results["kind"], row), file=sys.stderr, flush=True)


def run(
    variants: Iterable[Variant],
    report: Report,
    rounds: int,
    device: str,
    collective: bool = False,
    passes: int = PASSES,
) -> None:
    """Check and time ``variants``; their rows go to ``report`` as soon as they are known.

    Args:
        variants: made one by one, each when the one before it has been timed once.
        report: where rows are shown and kept.
        rounds: timed calls in each pass.
        device: ``"cuda"`` or ``"cpu"``.
        collective: whether several ranks run this together: an error on one of them then ends all.
        passes: how often each is timed.
    """
    measurements: list[tuple[Variant, Row, list[dict[str, list[float]]]]] = []
    for variant in variants:
        measurements.append((variant, report.new_row(variant.facts), []))
        _measure(*measurements[-1], rounds, device, collective)
        report.save(measurements[-1][1])
    for _ in range(passes - 1):
        for one in measurements:
            if one[1]["status"] == "measured":
                _measure(*one, rounds, device, collective)
                report.save()


def _measure(
    variant: Variant, row: Row, passes: list[dict[str, list[float]]], rounds: int, device: str, collective: bool
) -> None:
    """Add a pass; what that raises becomes part of ``row``, so that the other variants are still measured."""
    try:
        fault = None if passes else variant.check(row)
        if fault is None:
            release_memory(device)
            passes.append(variant.time(rounds))
            row |= {part: timing_of([one[part] for one in passes]) for part in passes[0]}
            row.pop("reason", None)
            row["status"] = "measured"
            variant.derive(row)
        else:
            row |= {"status": "wrong", "reason": fault}
    except MissingError as error:
        row |= {"status": "missing", "reason": str(error)}
    except Exception as error:
        if collective:
            raise
        row |= failure(error)
    release_memory(device)


def failure(error: BaseException) -> dict[str, Any]:
    """The part of a row that describes an error."""
    detail = f"{type(error).__name__}: {error}".strip()
    return {"status": "failed", "reason": detail.splitlines()[0], "detail": detail[:_MAX_DETAIL]}
