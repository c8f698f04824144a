"""Loss by position of several models, and what they differ by."""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..loss_report import summarize
from .figure import COLORS, STYLE, new_figure

_LINES = ("-", "--", "-.", ":")
# Of the losses within the trained length: what is higher leaves the picture, or nothing else could be seen.
_HEADROOM = 1.5
# The first tokens, whose losses are several times those of the rest, are left out: this share of the length.
_LEFT_OUT = 1 / 256


def plot_loss_by_position(report: dict[str, Any]) -> Figure:
    """What `measure_losses` returned: mean losses by position, below them the paired differences to the first model."""
    edges, models = report["settings"]["edges"], summarize(report)
    # Of short rows as many bins as can be told apart.
    from_token = max(_LEFT_OUT * edges[-1], min(16, edges[-1] / 8))
    first = min(bisect.bisect_left(edges, from_token), len(edges) - 2)
    edges = edges[first:]
    rows = 2 if len(models) > 1 else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(rows=rows, height=1.2 + 2.4 * rows, sharex=True, height_ratios=(3, 2)[:rows])
        inside = [0.0]
        for index, model in enumerate(models):
            bad = model["not_finite"]
            label = model["name"] + (f" ({bad['loss']} from position {bad['position']:,})" if bad else "")
            means = _draw(axes[0], edges, model["loss"], index, label)
            trained = np.array(edges[:-1]) < (model["trained_length"] or math.inf)
            inside += means[np.isfinite(means) & trained].tolist()
            if index:
                _draw(axes[1], edges, model["difference"], index)
        low, high = axes[0].get_ylim()
        if max(inside) > 0:
            high = min(high, _HEADROOM * max(inside))
        axes[0].set_ylim(low, high)
        axes[0].set_ylabel("loss (nats per token)")
        axes[0].set_title("Loss by position")
        lengths = [model["trained_length"] for model in models]
        for length in sorted({length for length in lengths if length and edges[0] < length < edges[-1]}):
            color = "#444444" if len(set(lengths)) == 1 else COLORS[lengths.index(length) % len(COLORS)]
            for one in axes:
                one.axvline(length, color=color, linestyle="--", label=f"trained length {short_length(length)}")
        axes[0].legend(fontsize=9, frameon=True, framealpha=0.85, edgecolor="none")
        if rows > 1:
            axes[1].axhline(0.0, color=COLORS[0], linewidth=1.2)
            axes[1].set_ylim(*np.clip(axes[1].get_ylim(), low - high, high - low))
            axes[1].set_ylabel("difference (nats)")
            axes[1].set_title(f"Difference to {models[0]['name']}, same rows")
        axes[-1].set_xscale("log", base=2)
        axes[-1].set_xlim(edges[0], edges[-1])
        axes[-1].set_xlabel("tokens before the predicted one")
        axes[-1].xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_length(x)))
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
    return figure


def short_length(tokens: float) -> str:
    """``65536`` as 64k, as lengths are spoken of."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size and tokens % (size / 2) == 0:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:,.0f}"


def _draw(
    axes: Axes, edges: Sequence[int], values: Mapping[str, Sequence[float | None]], index: int, label: str | None = None
) -> np.ndarray:
    """Draw the last bins of ``values``, those between ``edges``; their means."""
    bins = len(edges) - 1
    mean, low, high = (np.array(values[name][-bins:], dtype=float) for name in ("mean", "low", "high"))
    color, line = COLORS[index % len(COLORS)], _LINES[index // len(COLORS) % len(_LINES)]
    axes.stairs(mean, edges, baseline=None, color=color, linestyle=line, linewidth=1.7, label=label)
    if np.isfinite(low).any():
        axes.fill_between(edges, [*low, low[-1]], [*high, high[-1]], step="post", color=color, alpha=0.12, linewidth=0)
    return mean
