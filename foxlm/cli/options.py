"""What several commands take, and how they end."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face Hub.")]
_TEXT_HELP = (
    'Text to measure on: a UTF-8 file, .jsonl with a "text" in each line, .npy token numbers, or a folder of such '
    "files."
)
Text = Annotated[Path | None, typer.Option(help=_TEXT_HELP)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="A model's folder, or its name on the Hugging Face Hub.")
]
Join = Annotated[bool, typer.Option("--join", help="Put documents that are too short for a row one after the other.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (as the weights were saved), bfloat16, float16 or float32.")]
Eps = Annotated[
    str,
    typer.Option(
        help="Attention weight that pruning may leave out of each row: a number below 1, 0 to prune nothing, or model, "
        "as its configuration says."
    ),
]
Rule = Annotated[
    str,
    typer.Option(help="Pruning rule: paper, tight, measured (of report alone), or model, as its configuration says."),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results of an earlier run in that folder.")]


def require_nothing_else(context: typer.Context) -> None:
    """With --redraw nothing is measured: refuse what would say how.

    Raises:
        ValueError: something besides --redraw was given; the message names it.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name != "redraw" and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--redraw measures nothing: leave out {parameter.opts[0]}")
