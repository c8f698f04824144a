"""Heat maps of the needle-in-a-haystack test."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from .figure import STYLE, new_figure
from .position import short_length

# More than this in a row, and numbers do not fit into cells.
_MOST_NUMBERS = 12


def plot_needle(report: Mapping[str, Any]) -> Figure:
    """Share of needles found and loss of their answers, by length and depth, with the trained length marked.

    Args:
        report: as `measure_needle` returns it.
    """
    cells = {(cell["length"], cell["depth"]): cell for cell in report["cells"]}
    lengths, depths = (sorted({key[index] for key in cells}) for index in (0, 1))
    found, loss = (
        np.array([[_value(cells.get((x, y)), name) for x in lengths] for y in depths]) for name in ("found", "loss")
    )
    settings = report["settings"]
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        height = 1.6 + 0.28 * max(4, len(depths))
        figure, (upper, lower) = new_figure(rows=2, height=2 * height, sharex=True)
        _heat_map(figure, upper, 100 * found, Normalize(0, 100), "cividis", "{:.0f}", "needles found (%)")
        finite = loss[np.isfinite(loss)]
        top = max(1.0, finite.max()) if finite.size else 1.0
        _heat_map(figure, lower, loss, Normalize(0, top), "cividis_r", "{:.1f}", "loss (nats per token)")
        _labels((upper, lower), lengths, depths)
        beyond = _mark_trained_length((upper, lower), lengths, report["trained_length"])
        upper.set_title(f"{report['name']}\nneedles found, mode {settings['mode']}, {settings['samples']} a cell")
        lower.set_title("Loss of the hidden answer, given the question")
        lower.set_xlabel("length (tokens)" + beyond)
    return figure


def _value(cell: Mapping[str, Any] | None, name: str) -> float:
    return float("nan") if cell is None or cell[name] is None else cell[name]


def _heat_map(
    figure: Figure, axes: Axes, values: np.ndarray, norm: Normalize, colors: str | Colormap, form: str, label: str
) -> None:
    image = axes.imshow(values, norm=norm, cmap=colors, aspect="auto")
    axes.set_facecolor("#e4e7eb")
    # Cells of one value would run into each other.
    for edge in range(1, values.shape[1]):
        axes.axvline(edge - 0.5, color="white", linewidth=0.8)
    for edge in range(1, values.shape[0]):
        axes.axhline(edge - 0.5, color="white", linewidth=0.8)
    figure.colorbar(image, ax=axes, label=label)
    if values.shape[1] > _MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(norm(value)) if np.isfinite(value) else (1.0, 1.0, 1.0, 1.0)
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        text = form.format(value) if np.isfinite(value) else "-"
        color = "white" if dark else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8 if values.shape[1] > 7 else 9)


def _labels(all_axes: Sequence[Axes], lengths: Sequence[int], depths: Sequence[float]) -> None:
    step = 1 + len(lengths) // _MOST_NUMBERS
    down = 1 + len(depths) // 16
    for axes in all_axes:
        axes.set_xticks(
            range(0, len(lengths), step),
            [short_length(x) for x in lengths[::step]],
            rotation=45 if len(lengths) > 7 else 0,
        )
        axes.set_yticks(range(0, len(depths), down), [f"{depth:.0%}" for depth in depths[::down]])
        axes.set_ylabel("depth of the needle")


def _mark_trained_length(all_axes: Sequence[Axes], lengths: Sequence[int], trained: int | None) -> str:
    """A line between the last length within it and the first beyond; returns what the label of lengths says of it."""
    inside = sum(length <= trained for length in lengths) if trained else len(lengths)
    if not trained or inside == len(lengths):
        return ""
    if inside:
        for axes in all_axes:
            axes.axvline(inside - 0.5, color="#d4333f", linestyle=(0, (4, 2)), linewidth=2.0)
        return f"; right of the dashed line beyond the trained {short_length(trained)}"
    return f", all beyond the trained {short_length(trained)}"
