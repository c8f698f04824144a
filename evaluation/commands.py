"""The evaluation commands of ``foxlm``: what they take and print. Each imports what only it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face Hub.")]
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Models' folders, or their names on the Hugging Face Hub.")
]
Text = Annotated[
    Path,
    typer.Option(
        help='Text to measure on: a UTF-8 file, .jsonl with a "text" in each line, .npy token numbers, or a folder '
        "of such files."
    ),
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
Rule = Annotated[str, typer.Option(help="How that is proven: paper, tight, or model.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn at random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results of an earlier run in that folder.")]
