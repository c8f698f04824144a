"""Plots that a command leaves beside its results."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(command: str, results: Path, draw: "Callable[[], Figure]") -> None:
    """Draw ``results`` beside them, as SVG and PNG, or say how to do so where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        typer.echo(f"no plot, since matplotlib is not installed; where it is: foxlm {command} --redraw {results}")
        return
    from ..plots.figure import save_plot

    figure, names = draw(), [results.with_suffix(suffix) for suffix in (".svg", ".png")]
    for name in names:
        save_plot(figure, name)
    typer.echo(f"wrote {results}, {names[0].name} and {names[1].name}")
