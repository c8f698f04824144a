"""Tables as Markdown, which terminals show well too."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left and all others to the right."""
    drawn = Table(box=box.MARKDOWN, show_edge=True)
    for number, name in enumerate(columns):
        drawn.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    # As wide as it needs to be: a wrapped line would end the table.
    Console(file=out, width=10_000, color_system=None).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def digits(x: float) -> str:
    """Three significant digits without an exponent."""
    decimals = next((n for n, least in enumerate((100.0, 10.0, 1.0)) if abs(x) >= least), 3)
    return f"{x:.{decimals}f}"


def percent(x: float) -> str:
    """Without decimals from 10% on."""
    return f"{100 * x:.0f}%" if abs(x) >= 0.1 else f"{100 * x:.1f}%"
