"""What pruning skips, by eps, length and position; the weight it drops; and what a cache holds."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from .figure import COLORS, RULE_STYLES, STYLE, new_figure

# Of queries and keys one by one, and in the kernels' tiles.
_GRAIN_STYLES = {"pairs": ("-", "pairs"), "tiles": ("--", "tiles")}
_LOG10 = math.log(10.0)

Shares = Mapping[str, Mapping[str, np.ndarray]]
"""By grain (``pairs``, ``tiles``) and rule."""


def plot_skipped_by_eps(log_eps: Sequence[float], shares: Shares, length: int) -> Figure:
    """Share of attention skipped, mean over heads.

    Args:
        log_eps: natural logs of ``eps``, descending.
        shares: ``[len(log_eps)]`` in ``[0, 1]`` by grain and rule.
        length: tokens of the text.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(height=3.8)
        _lines(axes, log_eps, shares)
        figure.legend(ncols=2, fontsize=9, loc="outside lower center")
        axes.set_xticks(log_eps, [f"$e^{{{value:.3g}}}$" for value in log_eps])
        axes.invert_xaxis()
        axes.set_xlabel("eps, attention weight that a row may lose (smaller to the right)")
        axes.set_title(f"Attention skipped at {length:,} tokens, mean over heads")
    return figure


def plot_skipped_by_length(lengths: Sequence[int], shares: Shares, log_eps: float) -> Figure:
    """Share of attention skipped, mean over heads, of the first tokens of the text.

    Args:
        lengths: tokens.
        shares: ``[len(lengths)]`` in ``[0, 1]`` by grain and rule.
        log_eps: natural log of ``eps``.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(height=3.8)
        _lines(axes, lengths, shares)
        figure.legend(ncols=2, fontsize=9, loc="outside lower center")
        _length_axis(axes, lengths)
        axes.set_title(f"Attention skipped by length, eps = $e^{{{log_eps:.3g}}}$")
    return figure


def _lines(axes: Axes, x: Sequence[float], shares: Shares) -> None:
    for grain, of_rule in shares.items():
        style, name = _GRAIN_STYLES[grain]
        for rule, values in of_rule.items():
            color, marker = RULE_STYLES[rule]
            label = f"rule {rule}, {name}"
            axes.plot(x, 100 * np.asarray(values), style, color=color, marker=marker, markersize=5, label=label)
    axes.set_ylim(0, 100)
    axes.set_ylabel("skipped (%)")


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of the text")


def plot_gate_spread(quantiles: np.ndarray, at: Sequence[float]) -> Figure:
    """How much the decay times of each head change from token to token; heads sorted by their medians.

    Args:
        quantiles: ``[5, L, H]`` of ``-1 / log f`` over tokens, ascending; may hold ``inf``.
        at: the five shares.
    """
    flat = quantiles.reshape(len(quantiles), -1)
    flat = flat[:, np.argsort(flat[2], kind="stable")]
    finite = flat[np.isfinite(flat)]
    top = 2.0 * finite.max() if finite.size else 10.0
    flat = np.minimum(flat, top)
    heads = np.arange(flat.shape[1])
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        shades = ("#1f5fa840", "#1f5fa890")
        for (low, high), shade in zip(((0, 4), (1, 3)), shades, strict=True):
            label = f"{100 * at[low]:g}% to {100 * at[high]:g}% of tokens"
            axes.bar(heads, flat[high] - flat[low], bottom=flat[low], width=0.9, color=shade, label=label)
        axes.plot(
            heads, flat[2], "_", color="#b5651d", markersize=max(2.0, min(12.0, 250 / len(heads))), label="median"
        )
        axes.set_yscale("log")
        axes.set_ylim(flat.min() / 2.0, 2.0 * flat.max())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
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
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(height=4.6)
        low = log_eps
        for rule, (proven, lost) in points.items():
            color, marker = RULE_STYLES[rule]
            x, y = np.asarray(proven) / _LOG10, np.asarray(lost) / _LOG10
            axes.plot(x, y, marker, color=color, markersize=3, alpha=0.4, markeredgewidth=0, label=f"rule {rule}")
            if len(x):
                low = min(low, float(x.min()) * _LOG10, float(y.min()) * _LOG10)
        own, bottom = log_eps / _LOG10, max(low / _LOG10, -60.0) - 1.0
        axes.plot([bottom, own + 1.0], [bottom, own + 1.0], color="#5f6b76", linewidth=1.2, label="lost = proven")
        axes.axhline(own, color="#c23b4b", linestyle="--", linewidth=1.2, label="eps: no row may lose more")
        left = min((np.quantile(x, 0.01) / _LOG10 for x, _ in points.values() if len(x)), default=own - 3.0)
        axes.set_xlim(max(bottom, left - 0.2), own + 0.3)
        axes.set_ylim(bottom, own + 2.0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.3g}}}$"))
            axis.set_major_locator(MaxNLocator(6, integer=axis is axes.yaxis))
        axes.set_xlabel("proven: a row loses at most this weight")
        axes.set_ylabel("weight that it loses")
        axes.set_title("Attention weight dropped, exact, for sampled rows")
        figure.legend(ncols=2, fontsize=9, loc="outside lower center")
    return figure


def plot_kept_region(heads: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], length: int) -> Figure:
    """Which keys each query may still see, of some heads.

    Args:
        heads: of each its title, queries ``[P]``, and the first key they keep ``[P]``: by the rule, and as read in
            tiles.
        length: tokens of the text.
    """
    with matplotlib.rc_context(STYLE):
        figure, all_axes = new_figure(rows=len(heads), height=0.4 + 2.6 * len(heads), sharex=True)
        for index, (axes, (title, queries, first, read)) in enumerate(zip(all_axes, heads, strict=True)):
            axes.fill_between(
                queries, first, queries, color="#1f5fa8", alpha=0.75, linewidth=0, label="kept by the rule"
            )
            axes.fill_between(
                queries,
                read,
                first,
                where=read < first,
                color="#b5651d",
                alpha=0.55,
                linewidth=0,
                label="read in tiles too",
            )
            axes.plot(queries, queries, color="#1f5fa8", linewidth=1.0)
            axes.fill_between(queries, 0, read, color="#d9dee3", alpha=0.7, linewidth=0, label="skipped")
            axes.set_title(title)
            axes.set_ylabel("key")
            axes.set_xlim(0, length)
            axes.set_ylim(0, length)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            if index == 0:
                axes.legend(loc="upper left", fontsize=9)
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


def _tokens(value: float) -> str:
    if value < 10_000:
        return f"{value:g}"
    return f"{value / 1e3:.0f}k" if value < 1e6 else f"{value / 1e6:.0f}M"
