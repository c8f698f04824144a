"""What the options of the speed commands must be, and how their results are shown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import typer

from . import report, tables
from .inputs import Case
from .models import CPU_SIZES, Sizes
from .runner import Record
from .several import SeveralRecipe
from .train import Recipe
from .workload import Workload

PRESET = "pro-760m"
# Processes that are started at most where there are no GPUs to count.
CPU_RANKS = 8


def workload(
    device: str,
    seed: int,
    preset: str | None,
    layers: int | None,
    model: str | None,
    text: Path | None,
    join: bool,
    hidden_size: int | None = None,
    heads: int | None = None,
) -> Workload:
    """What a command was told to measure.

    Raises:
        ValueError: options that contradict each other, or are not as they must be.
    """
    given = {"--preset": preset, "--layers": layers, "--hidden-size": hidden_size, "--heads": heads}
    of_new = next((name for name, value in given.items() if value is not None), None)
    if model is not None and of_new is not None:
        raise ValueError(f"{of_new} is of new models, got it with --model {model}")
    if join and text is None:
        raise ValueError("--join is of --text, got it without")
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads}
    for name, value in (("--layers", layers), ("--hidden-size", hidden_size), ("--heads", heads)):
        if value is not None:
            require_positive(name, value)
    if model is not None or text is not None:
        return Workload(device, model=model, text=text, join=join, seed=seed)
    return Workload(device, preset or PRESET, _sizes(device, sizes), seed=seed)


def _sizes(device: str, given: Mapping[str, int | None]) -> Sizes:
    """What differs from a preset: all of it on a CPU."""
    sizes = dict(CPU_SIZES) if device == "cpu" else {}
    return tuple((sizes | {name: value for name, value in given.items() if value is not None}).items())


def several(recipe: Recipe, gpus: int, host_gpus: int, host_bandwidth: float) -> SeveralRecipe:
    """The same step on several GPUs.

    Raises:
        ValueError: there are not so many, or a host of the predictions is none.
    """
    require_gpus(recipe.device, gpus)
    require_positive("--host-gpus", host_gpus)
    bandwidth = 1e9 * positive_bandwidth(host_bandwidth)
    return SeveralRecipe(recipe, gpus, host_gpus=host_gpus, host_bandwidth=bandwidth)


def positive_bandwidth(host_bandwidth: float) -> float:
    """The argument; raises a `ValueError` unless it is one."""
    if not 0.0 < host_bandwidth < math.inf:
        raise ValueError(f"--host-bandwidth must be a positive number of GB/s, got {host_bandwidth}")
    return host_bandwidth


def require_device(device: str) -> None:
    """Raise a `ValueError` unless ``device`` is there."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA GPU; --device cpu shows that all parts work")


def require_gpus(device: str, gpus: int) -> None:
    """Raise a `ValueError` unless ``device`` has so many for as many ranks."""
    on_cpu = device == "cpu"
    there = CPU_RANKS if on_cpu else torch.cuda.device_count()
    if gpus > there:
        of = f"{there} processes with --device cpu" if on_cpu else f"the {there} that torch sees"
        raise ValueError(f"--gpus must be at most {of}, got {gpus}")


def require_positive(name: str, *values: int) -> None:
    """Raise a `ValueError` unless all ``values`` of the option ``name`` are positive."""
    for value in values:
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")


def require_writable(out: Path) -> None:
    """Raise an error now rather than after the measurement, if the results could not be written to ``out``."""
    if out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {out}")
    out.parent.mkdir(parents=True, exist_ok=True)


def show(results: report.Results, as_json: bool) -> None:
    """Print the results, and nothing else, on stdout."""
    typer.echo(report.to_json(results) if as_json else tables.render(results))


def finish(records: Sequence[Record], complete: bool) -> None:
    """Exit with 1 unless all ``records`` were measured."""
    if not complete or any(one["status"] != "measured" for one in records):
        raise typer.Exit(1)


def shared_case(text: str, gpus: int) -> Case:
    """A case of a sequence that several GPUs share; raises a `ValueError` if it has too few tokens."""
    case = Case.parse(text)
    if case.tokens < gpus:
        raise ValueError(f"--case must have a token for each of {gpus} GPUs, got {text!r} with {case.tokens}")
    return case
