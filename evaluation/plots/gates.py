"""Decay times, what pruning skips, and attention maps."""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figure import RULE_STYLES, STYLE, new_figure


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


def plot_skipped(log_eps: Sequence[float], shares: Mapping[str, np.ndarray], length: int) -> Figure:
    """Share of the pairs of query and key that pruning skips, by ``eps``.

    Args:
        log_eps: natural logs of ``eps``.
        shares: by rule, ``[len(log_eps), L, H]`` shares in ``[0, 1]``.
        length: tokens per sequence.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        for rule, values in shares.items():
            color, marker, below = RULE_STYLES[rule]
            mean = 100 * values.mean((1, 2))
            axes.plot(log_eps, mean, color=color, marker=marker, label=f"rule {rule}")
            for x, y in zip(log_eps, mean, strict=True):
                axes.annotate(f"{y:.0f}%", (x, y), (0, below), textcoords="offset points", ha="center", color=color)
        axes.set_xticks(log_eps, [f"$e^{{{value:g}}}$" for value in log_eps])
        axes.invert_xaxis()
        axes.set_ylim(0, 100)
        axes.set_xlabel("eps, attention weight that a row may lose (smaller to the right)")
        axes.set_ylabel("skipped pairs (%)")
        axes.set_title(f"Attention skipped at {length:,} tokens, mean over heads")
        axes.legend()
    return figure


def plot_attention_maps(maps: Sequence[tuple[str, np.ndarray, np.ndarray]], rule: str, log_eps: float) -> Figure:
    """Attention weights of some heads, with what pruning skips.

    Args:
        maps: for each head its title, weights ``[T, T]`` and first kept key per query ``[T]``.
        rule: the rule that gave the first kept keys.
        log_eps: natural log of its ``eps``.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, all_axes = new_figure(rows=len(maps), height=4.2 * len(maps))
        faintest = 1e-6
        norm = LogNorm(faintest, 1.0)
        for axes, (title, weights, first) in zip(all_axes, maps, strict=True):
            shown = np.ma.masked_less(weights, faintest)
            image = axes.imshow(shown, norm=norm, cmap="magma_r", interpolation="nearest")
            rows = np.arange(len(first) + 1) - 0.5
            edge = np.append(first, first[-1]) - 0.5
            axes.fill_betweenx(rows, -0.5, edge, step="post", facecolor="#1f5fa822", edgecolor="#1f5fa8", linewidth=1.0)
            axes.set_title(title)
            axes.set_xlabel("key (byte of the snippet)")
            axes.set_ylabel("query (byte)")
            figure.colorbar(image, ax=axes, label="attention weight (white: below $10^{-6}$)", shrink=0.85)
        figure.suptitle(f"Shaded: skipped by rule {rule} at eps = $e^{{{log_eps:g}}}$", fontsize=10.5)
    return figure


def _short(time: float) -> str:
    if not math.isfinite(time):
        return "∞"
    if time < 10:
        return f"{time:.1f}"
    if time < 10_000:
        return f"{time:.0f}"
    return f"{time / 1e3:.0f}k" if time < 1e6 else f"{time / 1e6:.0f}M"
