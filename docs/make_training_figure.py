"""Draw docs/results/comparison/long-time.svg, loss over time: ``python docs/make_training_figure.py [IMAGE]``."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from foxlm.evaluation.plots.figure import COLORS, STYLE, new_figure, save_plot

FOLDER = Path(__file__).parent / "results" / "comparison"
NAMES = {"FoX (Pro)": "half-128m", "Transformer (Pro)": "transformer-pro-128m"}
# Steps whose losses are averaged: they go up and down with the text.
SMOOTHED = 75


def curve(arm: dict[str, Any]) -> dict[str, np.ndarray]:
    """Seconds of steps, millions of tokens, and loss, by the entries of a run's log."""
    history = arm["history"]
    loss, step = np.array(history["loss"]), np.array(history["step"])
    entries = -(-SMOOTHED // step[0])
    smoothed = [loss[max(0, i + 1 - entries) : i + 1].mean() for i in range(len(loss))]
    seconds = np.array(history["seconds_of_steps_so_far"])
    return {"seconds": seconds, "tokens": step * arm["recipe"]["batch"] / 1e6, "loss": np.array(smoothed)}


def main(image: Path) -> None:
    arms = json.loads((FOLDER / "long-pair.json").read_text(encoding="utf-8"))["arms"]
    curves = {name: curve(arms[run]) for name, run in NAMES.items()}
    goal = max(of["loss"][-1] for of in curves.values())
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(rows=2, height=5.2, sharey=True)
        labels = {"seconds": "seconds of training on one GPU", "tokens": "tokens (millions)"}
        for one, (x, label) in zip(axes, labels.items(), strict=True):
            for (name, of), color in zip(curves.items(), COLORS, strict=False):
                one.plot(of[x], of["loss"], color=color, linewidth=1.7, label=f"{name}: {of['loss'][-1]:.2f} at last")
                one.plot(of[x][-1], of["loss"][-1], "o", color=color, markersize=4)
            one.axhline(goal, color="#444444", linestyle=":", linewidth=1.0)
            one.set_xlabel(label)
            one.set_ylabel("loss (nats per token)")
            one.set_xlim(left=0)
        axes[0].set_ylim(top=6.5)
        axes[0].set_title(f"Training loss, the mean of the last {SMOOTHED} steps or more")
        axes[0].legend(fontsize=9)
    save_plot(figure, image)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "long-time.svg")
