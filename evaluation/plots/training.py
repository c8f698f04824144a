"""Loss during training."""

import math
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from .figure import STYLE, new_figure


def plot_losses(train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], bigram: float) -> Figure:
    """Training and held-out loss by step, with the bigram model as a line.

    Args:
        train, held_out: pairs of step and bits per byte.
        bigram: bits per byte on the held-out text.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        axes.plot(*zip(*train, strict=True), color="#9db7d5", linewidth=1.3, label="FoX, training batches")
        axes.plot(*zip(*held_out, strict=True), color="#1f5fa8", marker="o", markersize=4, label="FoX, held-out files")
        axes.axhline(bigram, color="#b5651d", linestyle="--", label="byte bigrams, held-out files")
        lowest = min(loss for _, loss in (*train, *held_out))
        axes.set_ylim(math.floor(2 * min(lowest, bigram)) / 2, 8.2)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (bits per byte)")
        axes.set_title("Loss")
        axes.legend()
    return figure
