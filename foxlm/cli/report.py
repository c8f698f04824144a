"""``foxlm report``."""

from pathlib import Path
from typing import Annotated

import typer

from foxlm.cli.options import Device, Dtype, Eps, Join, OptionalModel, Overwrite, Rule, Seed, Text, require_nothing_else


def report(
    context: typer.Context,
    model: OptionalModel = None,
    text: Text = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("foxlm-report"),
    length: Annotated[
        int | None, typer.Option(help="Tokens of a row of text. Default: as many as the text has, up to 2048.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of text to measure on.")] = 1,
    join: Join = False,
    eps: Eps = "model",
    rule: Rule = "model",
    device: Device = "auto",
    dtype: Dtype = "auto",
    sampled: Annotated[
        int, typer.Option(help="Rows of attention of each head whose dropped weight is computed, beside the worst.")
    ] = 128,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    redraw: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Draw report.html anew from a report.json, or its folder; nothing is measured."
        ),
    ] = None,
) -> None:
    """What a FoX model's forget gates do on real text, and what pruning gains: report.html, for any browser.

    Also checks on that text, exactly, that no row of attention loses more than eps of its weight, and exits with 1 if
    one does. Where matplotlib is missing report.json is written; draw it elsewhere with --redraw.
    """
    from foxlm.evaluation.pruning_report.run import Options, draw, read_report, run_report

    if redraw is not None:
        require_nothing_else(context)
        typer.echo(f"wrote {draw(read_report(redraw), redraw if redraw.is_dir() else redraw.parent)}")
        return
    if model is None or text is None:
        raise ValueError("MODEL and --text are needed, or --redraw with a report that is there")
    found = run_report(
        Options(
            model=model,
            text=text,
            out=out,
            length=length,
            rows=rows,
            join=join,
            eps=eps,
            rule=rule,
            device=device,
            dtype=dtype,
            sampled=sampled,
            seed=seed,
            overwrite=overwrite,
        )
    )
    try:
        typer.echo(f"wrote {out / 'report.json'} and {draw(found, out)}")
    except ImportError as error:
        typer.echo(f"wrote {out / 'report.json'}, without a page: {error}; or elsewhere: foxlm report --redraw {out}")
    check = found["check"]
    if not check["passed"]:
        typer.echo(
            f"error: THE BOUND IS VIOLATED: {check['violations']} times a row of attention lost more than eps; see "
            f"{out / 'report.json'}",
            err=True,
        )
        raise typer.Exit(1)
    typer.echo(f"checked {check['rows']:,} rows of attention: none loses more than eps")
