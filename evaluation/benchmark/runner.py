"""How every benchmark measures: each variant is checked before it is timed, and each row shown and kept at once.

All variants are timed in a first pass, right after their checks, and once more in a second one, so that drifting clocks
show as a spread. What interrupts a run leaves the rows that were measured before.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .results import PASSES, Report, Row
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


def run(variants: Iterable[Variant], report: Report, rounds: int, device: str, collective: bool = False) -> None:
    """Check and time ``variants``; their rows go to ``report`` as soon as they are known.

    Args:
        variants: made one by one, each when the one before it has been timed once.
        report: where rows are shown and kept.
        rounds: timed calls in each pass.
        device: ``"cuda"`` or ``"cpu"``.
        collective: whether several ranks run this together: an error on one of them then ends all.
    """
    measurements = []
    for variant in variants:
        one = _Measurement(variant, report.new_row(variant.facts), rounds, device, collective)
        one.guarded(first=True)
        report.show(one.row)
        measurements.append(one)
    for _ in range(PASSES - 1):
        for one in measurements:
            if one.row["status"] == "measured":
                one.guarded(first=False)
                report.save()


@dataclass
class _Measurement:
    variant: Variant
    row: Row
    rounds: int
    device: str
    collective: bool
    passes: list[dict[str, list[float]]] = field(default_factory=list)

    def guarded(self, first: bool) -> None:
        """Measure once; what that raises becomes part of the row, so that the other variants are still measured."""
        try:
            self._measure(first)
        except MissingError as error:
            self.row |= {"status": "missing", "reason": str(error)}
        except Exception as error:
            if self.collective:
                raise
            self.row |= failure(error)
        release_memory(self.device)

    def _measure(self, first: bool) -> None:
        fault = self.variant.check(self.row) if first else None
        if fault is not None:
            self.row |= {"status": "wrong", "reason": fault}
            return
        release_memory(self.device)
        self.passes.append(self.variant.time(self.rounds))
        self.row |= {part: asdict(timing_of([one[part] for one in self.passes])) for part in self.passes[0]}
        self.row.pop("reason", None)
        self.row["status"] = "measured"
        self.variant.derive(self.row)


def failure(error: BaseException) -> dict[str, Any]:
    """The part of a row that describes an error."""
    detail = f"{type(error).__name__}: {error}".strip()
    return {"status": "failed", "reason": detail.splitlines()[0], "detail": detail[:_MAX_DETAIL]}
