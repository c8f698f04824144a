"""Heat maps of the needle-in-a-haystack test."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..needle import grid
from .figure import STYLE, new_figure
from .position import short_length

# More than this in a row, and numbers do not fit into cells.
_MOST_NUMBERS = 12


def plot_needle(report: Mapping[str, Any]) -> Figure:
    """What `measure_needle` returned: share of needles found and loss of their answers, by length and depth."""
    settings, trained = report["settings"], report["trained_length"]
    lengths, depths, found = grid(report["cells"], "found")
    loss = grid(report["cells"], "loss")[2]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        height = 1.6 + 0.28 * max(4, len(depths))
        figure, (upper, lower) = new_figure(rows=2, height=2 * height, sharex=True)
        _heat_map(upper, 100 * found, 100.0, "cividis", "{:.0f}", "needles found (%)")
        _heat_map(lower, loss, max(1.0, np.nanmax(loss, initial=0.0)), "cividis_r", "{:.1f}", "loss (nats per token)")
        upper.set_title(f"{report['name']}\nneedles found, mode {settings['mode']}, {settings['samples']} a cell")
        lower.set_title("Loss of the hidden answer, given the question")
        lower.set_xlabel("length (tokens)")
        if trained and lengths[-1] > trained:
            for axes in (upper, lower):
                axes.axvline(sum(x <= trained for x in lengths) - 0.5, color="#d4333f", linestyle="--", linewidth=2.0)
            lower.set_xlabel(f"length (tokens); right of the dashed line beyond the trained {short_length(trained)}")
        step, down = 1 + len(lengths) // _MOST_NUMBERS, 1 + len(depths) // 16
        names = [short_length(length) for length in lengths[::step]]
        lower.set_xticks(range(0, len(lengths), step), names, rotation=45 if len(lengths) > 7 else 0)
        for axes in (upper, lower):
            axes.set_yticks(range(0, len(depths), down), [f"{depth:.0%}" for depth in depths[::down]])
            axes.set_ylabel("depth of the needle")
    return figure


def _heat_map(axes: Axes, values: np.ndarray, top: float, colors: str, form: str, label: str) -> None:
    y, x = (np.arange(cells + 1) - 0.5 for cells in values.shape)
    image = axes.pcolormesh(x, y, values, vmin=0.0, vmax=top, cmap=colors, edgecolors="white", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_facecolor("#e4e7eb")
    axes.figure.colorbar(image, ax=axes, label=label)
    if values.shape[1] > _MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        missing = np.isnan(value)
        color = "black" if missing or sum(image.to_rgba(value)[:3]) > 1.5 else "white"
        text = "-" if missing else form.format(value)
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8 if values.shape[1] > 7 else 9)
