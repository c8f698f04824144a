"""How near attention and decoding come to what the hardware can do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figure import COLORS, STYLE, WIDTH

if TYPE_CHECKING:
    from foxlm.evaluation.speed.roofline import Point, Rate, Roofline

# Color and marker are an implementation's, for those who cannot tell the colors; what is filled of it is a shape's.
_MARKERS = ("o", "s", "^", "D", "v", "p", "h", "<")
_FILLS: tuple[Literal["full", "none", "left", "right", "top", "bottom"], ...] = (
    "full",
    "none",
    "left",
    "right",
    "top",
    "bottom",
)
_PANEL_HEIGHT, _LEGEND_LINE, _BAR_HEIGHT = 3.3, 0.21, 0.42


def plot_roofline(found: "Roofline") -> Figure:
    """Attention over what it must move, a panel each for forward and for forward and backward; decoding as bars.

    Args:
        found: rates reached and the roofs, of a product and of a copy, measured in the same runs.
    """
    parts = [
        (part, [x for x in found.points if x.part == part]) for part in dict.fromkeys(x.part for x in found.points)
    ]
    names = list(dict.fromkeys(point.name for point in found.points))
    cases = list(dict.fromkeys(point.case for point in found.points))
    heights = [_PANEL_HEIGHT] * len(parts)
    if names:
        heights.append(0.3 + _LEGEND_LINE * (len(names) + len(cases)))
    if found.rates:
        heights.append(1.3 + _BAR_HEIGHT * len(found.rates))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
        panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        for axes, (part, points) in zip(panels, parts, strict=False):
            _draw_points(axes, points, found, names, cases)
            axes.set_title(part)
        if names:
            _draw_legend(panels[len(parts)], names, cases)
        if found.rates:
            _draw_rates(panels[-1], found.rates, found.bytes_per_second)
        figure.suptitle(found.device, fontsize=10.5)
    return figure


def _draw_points(
    axes: Axes, points: Sequence["Point"], found: "Roofline", names: Sequence[str], cases: Sequence[str]
) -> None:
    work = np.array([point.flops_per_byte for point in points])
    low, high = work.min() / 2.5, work.max() * 2.5
    if found.bytes_per_second is not None:
        # So that the slope of the memory is seen, if the product's roof is known.
        ridge = 1e12 * (found.tflops or 0.0) / found.bytes_per_second
        low, high = min(low, ridge / 4) if ridge else low, max(high, 2 * ridge)
    x = np.geomspace(low, high, 200)
    roof = np.full_like(x, np.inf if found.tflops is None else found.tflops)
    if found.bytes_per_second is not None:
        roof = np.minimum(roof, x * found.bytes_per_second / 1e12)
    axes.plot(x, roof, color="#1b1f24", linewidth=1.2)
    for point in points:
        number = names.index(point.name)
        axes.plot(point.flops_per_byte, point.tflops, **_marker(number, cases.index(point.case)))
    lowest = min(point.tflops for point in points)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(lowest / 3, 2.2 * max(roof[np.isfinite(roof)].max(initial=0.0), *(point.tflops for point in points)))
    axes.set_xlabel("FLOP of the tiles kept, per byte moved")
    axes.set_ylabel("TFLOP/s of the tiles kept")
    _name_roofs(axes, found, low, high)


def _marker(implementation: int, case: int) -> dict[str, Any]:
    color = COLORS[implementation % len(COLORS)]
    return {
        "linestyle": "none",
        "marker": _MARKERS[implementation % len(_MARKERS)],
        "fillstyle": _FILLS[case % len(_FILLS)],
        "color": color,
        "markerfacecoloralt": "white",
        "markersize": 7,
        "markeredgecolor": color,
    }


def _name_roofs(axes: Axes, found: "Roofline", low: float, high: float) -> None:
    """What the lines stand for, with their rates."""
    style: dict[str, Any] = {"va": "bottom", "textcoords": "offset points", "fontsize": 9}
    if found.tflops is not None:
        text = f"matrix product {found.tflops:.3g} TFLOP/s"
        axes.annotate(text, (high, found.tflops), (-2, 4), ha="right", **style)
    if found.bytes_per_second is not None and found.tflops is not None:
        axes.annotate(f"copy {_rate(found.bytes_per_second)}", (low, found.tflops), (3, 4), ha="left", **style)


def _draw_legend(axes: Axes, names: Sequence[str], cases: Sequence[str]) -> None:
    """Below the panels, where it covers nothing."""
    axes.set_axis_off()
    handles = [Line2D([], [], **_marker(number, 0), label=name) for number, name in enumerate(names)]
    for number, case in enumerate(cases):
        style = _marker(0, number) | {"color": "#5f6b76", "markeredgecolor": "#5f6b76"}
        handles.append(Line2D([], [], **style, label=_shape(case)))
    axes.legend(handles=handles, loc="center left", fontsize=9, borderaxespad=0.0, labelspacing=0.25)


def _draw_rates(axes: Axes, rates: Sequence["Rate"], copy: float | None) -> None:
    for number, rate in enumerate(rates):
        axes.barh(number, rate.bytes_per_second / 1e12, height=0.36, color=COLORS[0])
        # Above its bar: beside it, long names would leave no room for the bars.
        text = f"batch {rate.batch}, {rate.name}: {_rate(rate.bytes_per_second)}"
        axes.annotate(text, (0.0, number - 0.22), (3, 1), textcoords="offset points", va="bottom", fontsize=9)
    if copy is not None:
        axes.axvline(copy / 1e12, color="#1b1f24", linewidth=1.2)
    axes.set_yticks([])
    axes.set_ylim(len(rates) - 0.5, -0.9)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("bytes read of weights and kept keys and values (TB/s)")
    axes.set_title("decoding" + ("" if copy is None else f"; line: a large copy, {_rate(copy)}"))


def _shape(case: str) -> str:
    shape, comma, model = case.partition(",")
    return f"{shape.replace('x', ' x ')}{comma}{model}"


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e12:
        return f"{bytes_per_second / 1e12:.3g} TB/s"
    return f"{bytes_per_second / 1e9:.3g} GB/s"
