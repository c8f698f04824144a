"""``foxlm loss``."""

from pathlib import Path
from typing import Annotated

import typer

from .figures import save_figure
from .options import Device, Dtype, Eps, Join, Overwrite, Rule, Text, require_nothing_else


def loss(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Models' folders, or their names on the Hugging Face Hub."),
    ] = None,
    text: Text = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to measure; fewer if the text has no more.")] = 16,
    join: Join = False,
    name: Annotated[list[str] | None, typer.Option(help="Of a model in tables and plots; once for each model.")] = None,
    edges: Annotated[
        str,
        typer.Option(help="Bins of positions: log (two for each doubling), a width, or edges such as 1,1024,8192."),
    ] = "log",
    trained_length: Annotated[
        int | None, typer.Option(help="Mark this length; default: max_position_embeddings of each model.")
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(help="Tokens taken in at once, earlier ones in a cache. 0: a row in one pass, mostly smaller."),
    ] = 0,
    save_losses: Annotated[
        bool,
        typer.Option("--save-losses", help="Write the loss of every token too: losses-NAME.npy, rows x (length - 1)."),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for loss.json, loss.svg and loss.png; models measured there before are kept.")
    ] = Path("foxlm-loss"),
    redraw: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Draw the plots anew from a loss.json, or its folder; nothing is measured."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    eps: Eps = "model",
    rule: Rule = "model",
    overwrite: Overwrite = False,
) -> None:
    """Measure loss by position: how much a longer context helps each model, on any text, at any length.

    Rows of --length tokens are cut from the text, each within one document, and read one at a time. An interrupted
    run goes on where it stopped when it is started again.

    foxlm loss my-fox my-llama --text books.jsonl --length 65536
    """
    from ..loss_report import LossOptions, draw_losses, loss_table, measure_losses, read_losses
    from ..results import reading

    if redraw is not None:
        require_nothing_else(context)
        results = redraw / "loss.json" if redraw.is_dir() else redraw
        report = read_losses(results)
    else:
        if not models or text is None or length is None:
            raise ValueError("models to measure, --text and --length must be given, or --redraw")
        results = out / "loss.json"
        report = measure_losses(
            LossOptions(
                models=models,
                text=text,
                length=length,
                out=out,
                names=name or (),
                rows=rows,
                join=join,
                edges=edges,
                chunk=chunk,
                trained_length=trained_length,
                save_losses=save_losses,
                device=device,
                dtype=dtype,
                eps=eps,
                rule=rule,
                overwrite=overwrite,
            )
        )
    with reading(results):
        typer.echo(loss_table(report))
        save_figure("loss", results, lambda: draw_losses(report))
