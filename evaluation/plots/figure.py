"""What all plots share: their size, style, and how they get into a page or a file."""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Narrow enough that the text stays readable when a phone scales the image to its width.
WIDTH = 5.2
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "foxlm",
}
# Color and marker of each rule of pruning, in every plot.
RULE_STYLES = {"paper": ("#b5651d", "o"), "tight": ("#1f5fa8", "s"), "measured": ("#3a8f5c", "^")}
# Of lines that stand for models, in the order in which they are given.
COLORS = ("#1f5fa8", "#b5651d", "#3a8f5c", "#8a4fa3", "#c23b4b", "#5f6b76")


def new_figure(rows: int = 1, height: float = 3.4, **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure of `WIDTH` inches and ``rows`` axes below each other; call it and draw within ``rc_context(STYLE)``."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, **kwargs)[:, 0])


def data_uri(figure: Figure) -> str:
    """The figure as an SVG ``data:`` address, without a date, so that the same numbers give the same bytes."""
    return "data:image/svg+xml;base64," + base64.b64encode(_rendered(figure, "svg")).decode()


def save_plot(figure: Figure, path: Path) -> None:
    """Write the figure as the kind of image that ``path`` ends in: ``.svg``, ``.png``."""
    path.write_bytes(_rendered(figure, path.suffix.lstrip(".")))


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else None
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=160)
    return buffer.getvalue()
