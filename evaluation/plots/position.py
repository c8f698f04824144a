"""Loss by position of several models, and what they differ by."""

import bisect
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .figure import COLORS, STYLE, new_figure

_Interval = dict[str, np.ndarray]
"""``mean``, ``low`` and ``high`` of each bin, NaN where there is none."""

_LINES = ("-", "--", "-.", ":")
# Of the losses within the trained length: what is higher leaves the picture, or nothing else could be seen.
_HEADROOM = 1.5
# The first tokens, whose losses are several times those of the rest, are left out: this share of the length.
_LEFT_OUT = 1 / 256


def plot_loss_by_position(edges: Sequence[int], models: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean loss in bins of positions with 95% intervals, below it the paired differences to the first model.

    Args:
        edges: of the bins, numbers of tokens before the predicted one, ascending from 1.
        models: as `summarize` returns them.
    """
    # Of short rows as many bins as can be told apart.
    from_token = max(_LEFT_OUT * edges[-1], min(16, edges[-1] / 8))
    first = min(bisect.bisect_left(edges, from_token), len(edges) - 2)
    edges = edges[first:]
    losses = [_shown(model["loss"], first) for model in models]
    differences = [_shown(model["difference"], first) if "difference" in model else None for model in models]
    limits = _limits(edges, models, losses)
    with matplotlib.rc_context(STYLE):
        compared = {"gridspec_kw": {"height_ratios": (3, 2)}} if len(models) > 1 else {}
        rows = 1 + bool(compared)
        figure, axes = new_figure(rows=rows, height=1.2 + 2.4 * rows, sharex=True, **compared)
        for index, (model, loss) in enumerate(zip(models, losses, strict=True)):
            _draw(axes[0], edges, loss, index, _label(model))
        axes[0].set_ylim(*limits)
        axes[0].set_ylabel("loss (nats per token)")
        axes[0].set_title("Loss by position")
        axes[0].legend(fontsize=9, frameon=True, framealpha=0.85, edgecolor="none")
        if compared:
            _draw_differences(axes[1], edges, differences, limits[1] - limits[0], models[0]["name"])
        _mark_trained_lengths(axes, edges, models)
        axes[-1].set_xscale("log", base=2)
        axes[-1].set_xlim(edges[0], edges[-1])
        axes[-1].set_xlabel("tokens before the predicted one")
        axes[-1].xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_length(x)))
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
    return figure


def _draw_differences(
    axes: Axes, edges: Sequence[int], differences: Sequence[_Interval | None], most: float, first: str
) -> None:
    found = [0.0]
    for index, difference in enumerate(differences):
        if difference is not None:
            _draw(axes, edges, difference, index, None)
            ends = np.concatenate([difference[name] for name in ("mean", "low", "high")])
            found += np.clip(ends[np.isfinite(ends)], -most, most).tolist()
    axes.axhline(0.0, color=COLORS[0], linewidth=1.2)
    margin = 0.08 * max(max(found) - min(found), 0.02)
    axes.set_ylim(min(found) - margin, max(found) + margin)
    axes.set_ylabel("difference (nats)")
    axes.set_title(f"Difference to {first}, same rows")


def short_length(tokens: float) -> str:
    """``65536`` as 64k, as lengths are spoken of."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size and tokens % (size / 2) == 0:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:,.0f}"


def _shown(values: Mapping[str, Sequence[float | None]], first: int) -> _Interval:
    return {name: np.array(values[name][first:], dtype=float) for name in ("mean", "low", "high")}


def _draw(axes: Axes, edges: Sequence[int], values: _Interval, index: int, label: str | None) -> None:
    color, line = COLORS[index % len(COLORS)], _LINES[index // len(COLORS) % len(_LINES)]
    low, high = values["low"], values["high"]
    axes.stairs(values["mean"], edges, baseline=None, color=color, linestyle=line, linewidth=1.7, label=label)
    if np.isfinite(low).any():
        axes.fill_between(edges, [*low, low[-1]], [*high, high[-1]], step="post", color=color, alpha=0.12, linewidth=0)


def _label(model: Mapping[str, Any]) -> str:
    bad = model["not_finite"]
    return model["name"] + (f" ({bad['loss']} from position {bad['position']:,})" if bad else "")


def _mark_trained_lengths(axes: Sequence[Axes], edges: Sequence[int], models: Sequence[Mapping[str, Any]]) -> None:
    """A line at each, in the color of its model where they differ; what is beyond the longest is shaded."""
    found = {model["trained_length"] for model in models} - {None}
    shown = sorted(x for x in found if edges[0] < x < edges[-1])
    if not shown:
        return
    names = []
    for x in shown:
        owners = [index for index, model in enumerate(models) if model["trained_length"] == x]
        color = "#444444" if len(found) == 1 else COLORS[owners[0] % len(COLORS)]
        names.append(short_length(x) + ("" if len(found) == 1 else f" ({models[owners[0]]['name']})"))
        for one in axes:
            one.axvline(x, color=color, linestyle=(0, (4, 3)), linewidth=1.2)
    beyond = max(found) < edges[-1]
    for one in axes if beyond else ():
        one.axvspan(max(found), edges[-1], color="#000000", alpha=0.06, linewidth=0)
    note = f"dashed: trained length {', '.join(names)}" + ("; shaded: beyond it" if beyond else "")
    axes[-1].annotate(
        "\n".join(textwrap.wrap(note, 62)),
        (0.0, 0.0),
        (0, -38),
        xycoords="axes fraction",
        textcoords="offset points",
        verticalalignment="top",
        fontsize=8.5,
        color="#444444",
    )


def _limits(
    edges: Sequence[int], models: Sequence[Mapping[str, Any]], losses: Sequence[_Interval]
) -> tuple[float, float]:
    inside, everything = [], []
    for model, loss in zip(models, losses, strict=True):
        trained = np.array(edges[:-1]) < (model["trained_length"] or math.inf)
        for values in loss.values():
            everything += values[np.isfinite(values)].tolist()
            inside += values[np.isfinite(values) & trained].tolist()
    if not everything:
        return 0.0, 1.0
    low, high = min(everything), max(everything)
    if inside:
        high = min(high, _HEADROOM * max(inside))
    margin = 0.06 * max(high - low, 0.05)
    return low - margin, high + margin
