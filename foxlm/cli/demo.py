"""``foxlm demo``."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder for model/, report.html, eval/, demo.json: new, empty, or of an earlier demo."),
    ] = Path("foxlm-demo"),
    minutes: Annotated[
        float, typer.Option(help="Training time aimed at; a busy machine may take up to three times as long.")
    ] = 2.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps instead of a time: repeats exactly on the same machine.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and 12 steps: shows that all parts work, nothing more.")
    ] = False,
) -> None:
    """Train a small FoX on Python's own sources, then evaluate it and report on it. No network needed."""
    from foxlm.evaluation.demo.run import run_demo

    run_demo(out, minutes=minutes, steps=steps, seed=seed, device=device, quick=quick)
