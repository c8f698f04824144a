"""Parts of tables as Markdown: rows, figures, and notes on what was not measured."""

from collections.abc import Mapping, Sequence
from typing import Any


def subject(facts: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    if facts.get("model") is not None:
        return f"`{facts['model']}`, with the gates that it has"
    return f"`{facts['preset']}`" + (" in another shape" if facts.get("changed") else "")


def shape_of(case: Mapping[str, Any]) -> str:
    """Of a case, with room to be read."""
    return case["case"].replace("x", " x ")


def note(where: str, record: Mapping[str, Any]) -> str:
    """Why something has no row."""
    words = {"wrong": "failed its check and was not timed", "missing": "not run", "failed": "failed"}
    words["unfinished"] = "not measured"
    return f"{where}, {record['name']}: {words[record['status']]}: {record['reason']}"


def noted(notes: Sequence[str]) -> list[str]:
    """Notes as a list, in a list of its own; empty without notes."""
    return ["\n".join(f"* {note}" for note in notes)] if notes else []


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(x: float) -> str:
    """Three significant digits, none of them in an exponent."""
    decimals = next((n for n, least in enumerate((100.0, 10.0, 1.0)) if abs(x) >= least), 3)
    return f"{x:.{decimals}f}"


def percent(x: float) -> str:
    """Without decimals from 10% on."""
    return f"{100 * x:.0f}%" if abs(x) >= 0.1 else f"{100 * x:.1f}%"


def gigabytes(count: float | None) -> str:
    """A dash where it was not measured."""
    return "-" if count is None else f"{count / 1e9:.1f}"
