"""The ``foxlm`` command. Each command imports what only it needs: lm-eval and matplotlib may not be installed."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    help="Forgetting Transformers (FoX) for the Hugging Face ecosystem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"foxlm {version('foxlm')}")
    except PackageNotFoundError:
        from foxlm import __version__

        typer.echo(f"foxlm {__version__}")
    raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for model/, report.html and report.json: new, empty, or of an earlier demo.")
    ] = Path("foxlm-demo"),
    minutes: Annotated[
        float, typer.Option(help="Training time aimed at; a busy machine may take up to three times as long.")
    ] = 2.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps instead of a time: repeats exactly on the same machine.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, training windows, questions and sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and 12 steps: shows that all parts work, nothing more.")
    ] = False,
) -> None:
    """Train a small FoX on Python's own sources, evaluate it, and write a page about it. No network needed."""
    from foxlm.evaluation.demo.run import Options, run_demo

    try:
        run_demo(Options(out=out, minutes=minutes, steps=steps, seed=seed, device=device, quick=quick))
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        _fail(error)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and *.safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        str, typer.Option(help="fox, from a checkpoint of others; or back: authors or fla, from one of a FoX model.")
    ] = "fox",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Where there are no *.safetensors, read pytorch_model*.bin.")
    ] = False,
) -> None:
    """Convert a checkpoint of the FoX authors' code, or of flash-linear-attention, for from_pretrained; or back."""
    from foxlm.conversion.convert import convert_to_folder

    try:
        convert_to_folder(source, out, to=to, allow_pickle=allow_pickle)
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(f"wrote {out}")


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``foxlm`` command and of ``python -m foxlm``."""
    app(prog_name="foxlm")
