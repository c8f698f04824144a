"""The evaluation commands of ``foxlm``: what they take and print. Each imports what only it needs when it runs."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer()

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face Hub.")]
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Models' folders, or their names on the Hugging Face Hub.")
]
_TEXT_HELP = (
    'Text to measure on: a UTF-8 file, .jsonl with a "text" in each line, .npy token numbers, or a folder of such '
    "files."
)
Text = Annotated[Path, typer.Option(help=_TEXT_HELP)]
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


@app.command()
def loss(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Models' folders, or their names on the Hugging Face Hub."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help=_TEXT_HELP)] = None,
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
    from .loss_report import LossOptions, draw_losses, loss_table, measure_losses, read_losses

    try:
        if redraw is not None:
            if models or text or length:
                raise ValueError("--redraw measures nothing: give it no models, --text or --length")
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
        typer.echo(loss_table(report))
        _save_figure("loss", results, lambda: draw_losses(report))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _fail(error)


@app.command()
def needle(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face Hub.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompt and answer, such as 1024,2048; default: an eighth to twice what it is made for."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where the needle is: from 0, the beginning, to 1.")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Different needles for each length and depth.")] = 4,
    mode: Annotated[
        str,
        typer.Option(
            help="easy: question and answer are hidden together (base models); standard: only the answer; chat: the "
            "same, asked by the chat template."
        ),
    ] = "easy",
    text: Annotated[Path | None, typer.Option(help="Text to hide it in, as of foxlm loss; default: made up.")] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens that are written; default: as the longest answer has, twice that in mode chat."),
    ] = None,
    score_only: Annotated[
        bool,
        typer.Option(
            "--score-only",
            help="Write nothing: found is then whether greedy decoding gives the answer's very tokens. Faster.",
        ),
    ] = False,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Prompts at a time; fewer need less memory.")] = 4,
    chunk: Annotated[int, typer.Option(help="Tokens of a prompt taken in at once; 0: all.")] = 0,
    trained_length: Annotated[
        int | None, typer.Option(help="Mark this length; default: max_position_embeddings of the model.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for needle.json, needle.svg and needle.png; cells measured there are kept.")
    ] = Path("foxlm-needle"),
    redraw: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Draw the plots anew from a needle.json, or its folder; nothing is measured."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    eps: Eps = "model",
    rule: Rule = "model",
    overwrite: Overwrite = False,
) -> None:
    """Find needles in a haystack: does a model find one sentence in a long text, by length and depth.

    Decoding is greedy. A needle is found if its words are in what the model writes; the loss of the answer shows what
    small models know of it before they can write it. An interrupted run goes on when it is started again.

    foxlm needle my-fox --lengths 4096,8192,16384,32768
    """
    from .needle import NeedleOptions, draw_needle_map, measure_needle, needle_table, read_needle
    from .needle_prompts import parse_numbers

    try:
        if redraw is not None:
            if model is not None:
                raise ValueError("--redraw measures nothing: give it no model")
            results = redraw / "needle.json" if redraw.is_dir() else redraw
            report = read_needle(results)
        else:
            if model is None:
                raise ValueError("a model to measure must be given, or --redraw")
            results = out / "needle.json"
            report = measure_needle(
                NeedleOptions(
                    model=model,
                    out=out,
                    lengths=parse_numbers("lengths", lengths, int) if lengths is not None else (),
                    depths=parse_numbers("depths", depths, float),
                    samples=samples,
                    mode=mode,
                    text=text,
                    answer_tokens=answer_tokens,
                    score_only=score_only,
                    seed=seed,
                    batch=batch,
                    chunk=chunk,
                    trained_length=trained_length,
                    device=device,
                    dtype=dtype,
                    eps=eps,
                    rule=rule,
                    overwrite=overwrite,
                )
            )
        typer.echo(needle_table(report))
        _save_figure("needle", results, lambda: draw_needle_map(report))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _fail(error)


def _save_figure(command: str, results: Path, draw: "Callable[[], Figure]") -> None:
    """Draw ``results`` beside them, as SVG and PNG, or say how to do so where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        typer.echo(f"no plot, since matplotlib is not installed; where it is: foxlm {command} --redraw {results}")
        return
    from .plots.figure import save_plot

    figure, names = draw(), [results.with_suffix(suffix) for suffix in (".svg", ".png")]
    for name in names:
        save_plot(figure, name)
    typer.echo(f"wrote {results}, {names[0].name} and {names[1].name}")


@app.command()
def report(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A FoX model's folder, or its name on the Hugging Face Hub.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help='Text to measure on: a UTF-8 file, .jsonl with a "text" in each line, .npy token numbers, or a folder '
            "of such files."
        ),
    ] = None,
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
    bench: Annotated[
        Path | None, typer.Option(help="JSON of foxlm bench attention: predict times by the rates measured there.")
    ] = None,
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

    try:
        if redraw is not None:
            if model is not None or text is not None:
                raise ValueError("--redraw measures nothing: give it neither MODEL nor --text")
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
                count=rows,
                join=join,
                eps=eps,
                rule=rule,
                device=device,
                dtype=dtype,
                bench=bench,
                sampled=sampled,
                seed=seed,
                overwrite=overwrite,
            )
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _fail(error)
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


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)
