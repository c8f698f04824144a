"""Maps of layers and heads: decay times, and any other number."""

import math
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figure import STYLE, new_figure


def plot_decay_times(times: np.ndarray, tokens: int, text: str = "tokens") -> Figure:
    """Heat map of decay times.

    Args:
        times: ``[L, H]`` decay time of each layer and head, in tokens; may hold ``inf``.
        tokens: how many tokens they were measured on.
        text: what these tokens are, for the title.
    """
    finite = times[np.isfinite(times)]
    low, high = (finite.min(), finite.max()) if finite.size else (1.0, 10.0)
    norm = LogNorm(low, max(high, 1.01 * low))
    title = f"Decay time, -1 / mean(log f), over {tokens:,} {text}"
    return plot_head_map(times, norm, title, "tokens", _short)


def plot_head_map(
    values: np.ndarray, norm: Normalize, title: str, unit: str, shown: Callable[[float], str], heads: str = "head"
) -> Figure:
    """Heat map of a number of each layer and head, written into its cells where they are wide enough.

    Args:
        values: ``[L, H]``; ``inf`` has the color of the largest.
        norm: of the colors.
        title, unit: of the plot and of the numbers.
        shown: makes the text of a cell.
        heads: what the columns are.
    """
    layers, count = values.shape
    low, high = norm.vmin, norm.vmax
    assert low is not None and high is not None, "given with its limits"
    tall = layers > 12
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, (axes,) = new_figure(height=1.4 + (0.2 if tall else 0.42) * max(layers, 4))
        image = axes.imshow(np.clip(values, low, high), norm=norm, cmap="viridis", aspect="auto")
        if count <= 12:
            for (layer, head), value in np.ndenumerate(values):
                dark = not np.isfinite(value) or norm(value) > 0.6
                axes.text(
                    head,
                    layer,
                    shown(value),
                    ha="center",
                    va="center",
                    color="black" if dark else "white",
                    fontsize=7.5 if tall or count > 9 else 10,
                )
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
        axes.set_xlabel(heads)
        axes.set_ylabel("layer")
        axes.set_title(title)
        figure.colorbar(image, label=unit)
    return figure


def _short(time: float) -> str:
    if not math.isfinite(time):
        return "∞"
    if time < 10:
        return f"{time:.1f}"
    if time < 10_000:
        return f"{time:.0f}"
    return f"{time / 1e3:.0f}k" if time < 1e6 else f"{time / 1e6:.0f}M"
