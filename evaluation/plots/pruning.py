"""Decay times; what pruning skips, by eps, length and position; the weight it drops; and what a cache holds."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from .figure import COLORS, RULE_STYLES, STYLE, new_figure

# Of queries and keys one by one, and in the kernels' tiles.
_GRAIN_STYLES = {"pairs": "-", "tiles": "--"}
_LOG10 = math.log(10.0)

Shares = Mapping[str, Mapping[str, np.ndarray]]
"""By grain (``pairs``, ``tiles``) and rule."""


def plot_skipped(x: Sequence[float], shares: Shares, by_length: bool = False) -> Figure:
    """Share of attention skipped, mean over heads.

    Args:
        x: natural logs of ``eps``, descending, or numbers of tokens.
        shares: ``[len(x)]`` in ``[0, 1]`` by grain and rule.
        by_length: whether ``x`` is numbers of tokens.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(height=3.8)
        for grain, of_rule in shares.items():
            for rule, values in of_rule.items():
                color, marker = RULE_STYLES[rule]
                style = _GRAIN_STYLES[grain]
                label = f"rule {rule}, {grain}"
                axes.plot(x, 100 * np.asarray(values), style, color=color, marker=marker, markersize=5, label=label)
        if by_length:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{length:,}" for length in x])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("tokens of the text")
        else:
            axes.set_xticks(x, [f"$e^{{{value:.3g}}}$" for value in x])
            axes.invert_xaxis()
            axes.set_xlabel("eps, attention weight that a row may lose (smaller to the right)")
        axes.set_ylim(0, 100)
        axes.set_ylabel("skipped (%)")
        axes.set_title(f"Attention skipped by {'length' if by_length else 'eps'}, mean over heads")
        figure.legend(ncols=2, fontsize=9, loc="outside lower center")
    return figure


def plot_gate_spread(quantiles: np.ndarray, at: Sequence[float]) -> Figure:
    """How much the decay times of each head change from token to token; heads sorted by their medians.

    Args:
        quantiles: ``[5, L, H]`` of ``-1 / log f`` over tokens, ascending; may hold ``inf``.
        at: the five shares.
    """
    flat = quantiles.reshape(len(quantiles), -1)
    flat = flat[:, np.argsort(flat[2], kind="stable")]
    flat = np.minimum(flat, 2.0 * flat[np.isfinite(flat)].max(initial=5.0))
    heads = np.arange(flat.shape[1])
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        for low, high, shade in ((0, 4, "#1f5fa840"), (1, 3, "#1f5fa890")):
            label = f"{100 * at[low]:g}% to {100 * at[high]:g}% of tokens"
            axes.bar(heads, flat[high] - flat[low], bottom=flat[low], width=0.9, color=shade, label=label)
        axes.plot(heads, flat[2], "_", color="#b5651d", markersize=np.clip(250 / len(heads), 2, 12), label="median")
        axes.set_yscale("log")
        axes.set_ylim(flat.min() / 2.0, 2.0 * flat.max())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("heads of all layers, sorted by their median")
        axes.set_ylabel("decay time at a token, -1 / log f (tokens)")
        axes.set_title("How the gates follow the text")
        axes.legend(loc="upper left")
    return figure


def plot_dropped(points: Mapping[str, tuple[np.ndarray, np.ndarray]], log_eps: float) -> Figure:
    """Attention weight that rows really lose, against what is proven of it.

    Args:
        points: by rule, natural logs of what is proven and of what is lost, ``[N]`` each.
        log_eps: natural log of ``eps``.
    """
    own = log_eps / _LOG10
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(height=4.6)
        for rule, (proven, lost) in points.items():
            color, marker = RULE_STYLES[rule]
            x, y = proven / _LOG10, lost / _LOG10
            axes.plot(x, y, marker, color=color, markersize=3, alpha=0.4, markeredgewidth=0, label=f"rule {rule}")
        axes.axline((own, own), slope=1, color="#5f6b76", linewidth=1.2, label="lost = proven")
        axes.axhline(own, color="#c23b4b", linestyle="--", linewidth=1.2, label="eps: no row may lose more")
        # A few rows of which nearly nothing is proven would leave no room for the others.
        every = np.concatenate([proven for proven, _ in points.values()]) / _LOG10
        axes.set_xlim(max(np.quantile(every, 0.01) if every.size else own - 3.0, -60.0) - 0.2, own + 0.3)
        axes.set_ylim(max(axes.get_ylim()[0], -60.0), own + 2.0)
        axes.set_xlabel("proven: log10 of the most weight that a row loses")
        axes.set_ylabel("log10 of the weight that it loses")
        axes.set_title("Attention weight dropped, exact, for sampled rows")
        figure.legend(ncols=2, fontsize=9, loc="outside lower center")
    return figure


def plot_kept_region(heads: Sequence[tuple[str, np.ndarray]], length: int) -> Figure:
    """Which keys each query may still see, of some heads.

    Args:
        heads: of each its title, and ``[3, P]``: queries, the first key they keep by the rule, and as read in tiles.
        length: tokens of the text.
    """
    with matplotlib.rc_context(STYLE):
        figure, all_axes = new_figure(rows=len(heads), height=0.4 + 2.6 * len(heads), sharex=True)
        for axes, (title, (queries, first, read)) in zip(all_axes, heads, strict=True):
            labels = ("skipped", "read in tiles too", "kept by the rule")
            edges = (np.zeros_like(read), np.minimum(read, first), first)
            colors = ("#d9dee3", "#d39a6b", "#5787be")
            axes.stackplot(queries, *np.diff([*edges, queries], axis=0), labels=labels, colors=colors)
            axes.set_title(title)
            axes.set_ylabel("key")
            axes.set_xlim(0, length)
            axes.set_ylim(0, length)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        all_axes[0].legend(loc="upper left", fontsize=9)
        all_axes[-1].set_xlabel("query (token of the text)")
    return figure


def plot_cache(lengths: Sequence[int], held: np.ndarray, full: np.ndarray) -> Figure:
    """Memory of keys and values while a text is taken in.

    Args:
        lengths: tokens so far.
        held, full: bytes that an evicting cache holds, and one that keeps all.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(height=3.0)
        axes.plot(lengths, full / 1e6, "--", color=COLORS[1], label="all keys and values")
        axes.plot(lengths, held / 1e6, color=COLORS[0], label="evicting cache")
        axes.set_xlim(0, lengths[-1])
        axes.set_ylim(0, 1.08 * full[-1] / 1e6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("tokens so far")
        axes.set_ylabel("MB")
        axes.set_title("Memory of a sequence's keys and values")
        axes.legend()
    return figure


def plot_head_map(values: np.ndarray, title: str, heads: str = "head", unit: str = "%") -> Figure:
    """Heat map of a number of each layer and head, written into its cells where they are wide enough.

    Args:
        values: ``[L, H]`` percentages, or by ``unit="tokens"`` decay times, which may be ``inf``.
        title: of the plot.
        heads: what the columns are.
        unit: of the numbers.
    """
    norm, shown = Normalize(0, 100), lambda value: f"{value:.0f}"
    if unit == "tokens":
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (1.0, 10.0)
        norm, shown = LogNorm(low, max(high, 1.01 * low), clip=True), short_time
    layers, count = values.shape
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, (axes,) = new_figure(height=1.4 + (0.2 if layers > 12 else 0.42) * max(layers, 4))
        image = axes.imshow(np.nan_to_num(values), norm=norm, cmap="viridis", aspect="auto")
        if count <= 12:
            size = 7.5 if layers > 12 or count > 9 else 10
            for (layer, head), value in np.ndenumerate(values):
                color = "black" if norm(value) > 0.6 else "white"
                axes.text(head, layer, shown(value), ha="center", va="center", color=color, fontsize=size)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
        axes.set_xlabel(heads)
        axes.set_ylabel("layer")
        axes.set_title(title)
        figure.colorbar(image, label=unit)
    return figure


def short_time(tokens: float) -> str:
    """A decay time in few characters, as ``2.5``, ``730`` or ``12k``."""
    if not math.isfinite(tokens):
        return "∞"
    if tokens < 10_000:
        return f"{tokens:.1f}" if tokens < 10 else f"{tokens:.0f}"
    return f"{tokens / 1e3:.0f}k" if tokens < 1e6 else f"{tokens / 1e6:.0f}M"
