"""``foxlm convert``."""

from pathlib import Path
from typing import Annotated

import typer


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

    convert_to_folder(source, out, to=to, allow_pickle=allow_pickle)
    typer.echo(f"wrote {out}")
