"""Draw docs/overview.svg, the README's figure, from docs/results/comparison: ``python docs/make_figure.py [IMAGE]``."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

HERE = Path(__file__).parent
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "foxlm",
}
COLORS = ("#b5651d", "#9dbfe0", "#1f5fa8")


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / "comparison" / name).read_text(encoding="utf-8"))


def bars(axes: Axes, title: str, values: dict[str, float], colors: tuple[str, ...] = COLORS) -> None:
    drawn = axes.barh(list(values), list(values.values()), color=colors, height=0.7)
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlim=(0, 1.18 * max(values.values())), xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def overview() -> Figure:
    [case] = read("speed/attention.json")["cases"]
    attention = {one["name"]: one["forward_backward"]["ms"] for one in case["implementations"]}
    [batch] = read("speed/decode.json")["batches"]
    decoding = {one["name"]: one["step"]["ms"] for one in batch["decoders"]}
    training = {arm: read(f"{arm}/training.json")["tokens_per_second"] / 1e3 for arm in ("transformer-pro", "fox-pro")}
    figure = Figure(figsize=(12, 2.1), layout=ConstrainedLayoutEngine(wspace=0.08), facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    bars(
        left,
        "attention of 12 layers, 16k tokens,\nforward and backward: ms, lower is better",
        {
            "cuDNN, no gates": attention["cuDNN, no gate"],
            "FoX, unpruned": attention["foxlm"],
            "FoX, pruned": attention["foxlm, ACP tight"],
        },
    )
    bars(
        middle,
        "decoding step, batch 8, 14k tokens\nin the cache: ms, lower is better",
        {
            "Llama": decoding["Llama, static cache"],
            "FoX, unpruned": decoding["foxlm, static cache"],
            "FoX, pruned": decoding["foxlm, ACP tight, static cache"],
        },
    )
    bars(
        right,
        "training at 16k tokens: thousand\ntokens/s, higher is better",
        {"Transformer": training["transformer-pro"], "FoX, pruned": training["fox-pro"]},
        (COLORS[0], COLORS[2]),
    )
    return figure


if __name__ == "__main__":
    image = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "overview.svg"
    with matplotlib.rc_context(STYLE):
        # Without a date, so that the same numbers give the same bytes.
        metadata = {"Date": None, "Creator": None} if image.suffix == ".svg" else None
        overview().savefig(image, dpi=110, metadata=metadata)
