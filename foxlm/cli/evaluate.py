"""``foxlm eval``, ``foxlm lm-eval``, ``foxlm loss`` and ``foxlm needle``."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from foxlm.cli.options import (
    Device,
    Dtype,
    Eps,
    Join,
    Model,
    OptionalModel,
    Overwrite,
    Rule,
    Seed,
    Text,
    require_nothing_else,
)


def evaluate(
    model: Model,
    suite: Annotated[
        str | None,
        typer.Option(
            help="paper: the tasks of the papers on FoX and ACP (wikitext, lambada_openai, hellaswag, ...). long: "
            "RULER and LongBench. quick: three of RULER's with 10 questions each; downloads nothing."
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Other tasks or groups of lm-eval's, with commas between.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help='Ask about your own text too (a UTF-8 file, .jsonl with a "text" in each line, or a folder of such): '
            "bits per byte, and which of four continuations fits."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of RULER's prompts, as 4096,8192. Default: 1024 in quick, 4096,8192,16384 in long."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer; lm-eval cuts what is longer on the left. Default: the model's "
            "max_position_embeddings, or more where --lengths asks for it."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples in each prompt. Default: 0 in paper, else as the task has it.")
    ] = None,
    eps: Eps = "model",
    rule: Rule = "model",
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_cache: Annotated[bool, typer.Option("--no-cache", hidden=True)] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: foxlm-eval/ and the model's name.")
    ] = None,
    overwrite: Overwrite = False,
    samples: Annotated[bool, typer.Option("--samples", help="Write each question and answer too.")] = False,
    seed: Seed = 0,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more task definitions of lm-eval's.")] = None,
) -> None:
    """Score a model on lm-evaluation-harness's tasks: --suite paper, long or quick, and others by name.

    Each task's results are written when it is done: the same command goes on where it was stopped. Tasks that fail are
    named at the end, and the exit status is then 1. `foxlm card --evaluation FOLDER` puts the results on a model card.
    """
    if no_cache:
        raise ValueError("--no-cache was removed; generation without a cache gives the same texts, more slowly")
    from foxlm.evaluation.lm_eval.options import Options
    from foxlm.evaluation.lm_eval.results import table
    from foxlm.evaluation.lm_eval.suites import parse_lengths

    folder = out or Path("foxlm-eval") / (Path(model).resolve() if Path(model).exists() else Path(model)).name
    options = Options(
        model=model,
        out=folder,
        suite=suite,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()) if tasks else (),
        text=text,
        lengths=parse_lengths(lengths) if lengths else None,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
        shots=shots,
        eps=eps,
        rule=rule,
        device=device,
        dtype=dtype,
        seed=seed,
        include_path=include_path,
        samples=samples,
        overwrite=overwrite,
    ).checked()
    # Only now what takes seconds to import.
    from foxlm.evaluation.lm_eval.run import evaluate as run

    outcome = run(options, say=lambda line: typer.echo(line, err=True))
    if outcome.rows:
        typer.echo(table(outcome.rows))
    typer.echo(f"results in {folder}", err=True)
    if outcome.interrupted:
        typer.echo("interrupted; the same command goes on with what is left", err=True)
        raise typer.Exit(130)
    if outcome.failed:
        typer.echo(
            f"error: {outcome.failed} of the tasks failed, as named above (more in {folder / 'lm_eval.log'}); "
            "the others are kept, and the same command tries these again",
            err=True,
        )
        raise typer.Exit(1)


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line in a process that knows FoX: foxlm lm-eval run --model hf ...

    Plain lm_eval loads a FoX folder only with trust_remote_code=True.
    """
    from foxlm.evaluation.requirements import require

    require("lm-eval")
    from lm_eval.__main__ import cli_evaluate

    # argparse names the program by argv[0].
    sys.argv = ["foxlm lm-eval", *context.args]
    cli_evaluate()


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
    name: Annotated[
        list[str] | None, typer.Option(help="Name of a model in tables and plots; give one for each model, in order.")
    ] = None,
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
    save_losses: Annotated[bool, typer.Option("--save-losses", hidden=True)] = False,
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
    from foxlm.evaluation.loss_report import LossOptions, loss_table, measure_losses
    from foxlm.evaluation.results import read_json, reading

    if save_losses:
        raise ValueError(
            "--save-losses was removed; foxlm.evaluation.loss_by_position.row_losses gives the loss of every token"
        )
    if redraw is not None:
        require_nothing_else(context)
        results = redraw / "loss.json" if redraw.is_dir() else redraw
        report = read_json(results, "loss")
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
                device=device,
                dtype=dtype,
                eps=eps,
                rule=rule,
                overwrite=overwrite,
            )
        )
    with reading(results):
        typer.echo(loss_table(report))
        _save_figure(results, report)


def needle(
    context: typer.Context,
    model: OptionalModel = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompt and answer, such as 1024,2048; default: an eighth to twice what it is made for."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Places of the needle in the text, from 0 (its beginning) to 1, with commas between.")
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
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", help="Prompts at a time; fewer need less memory.")
    ] = 4,
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
    from foxlm.evaluation.needle import NeedleOptions, measure_needle, needle_table
    from foxlm.evaluation.results import read_json, reading

    if redraw is not None:
        require_nothing_else(context)
        results = redraw / "needle.json" if redraw.is_dir() else redraw
        report = read_json(results, "needle")
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
                batch_size=batch_size,
                chunk=chunk,
                trained_length=trained_length,
                device=device,
                dtype=dtype,
                eps=eps,
                rule=rule,
                overwrite=overwrite,
            )
        )
    with reading(results):
        typer.echo(needle_table(report))
        _save_figure(results, report)


def parse_numbers(name: str, text: str, kind: type) -> list:
    """Numbers with commas between them, ascending and different.

    Raises:
        ValueError: they are something else; the message begins with ``name``.
    """
    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got {text!r}") from None


def _save_figure(results: Path, report: dict[str, Any]) -> None:
    """Draw a report beside its file, as SVG and PNG, or say how to do so where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        command = f"foxlm {report['kind']} --redraw {results}"
        typer.echo(f"no plot, since matplotlib is not installed; where it is: {command}")
        return
    from foxlm.evaluation.plots.figure import save_plot
    from foxlm.evaluation.plots.needle import plot_needle
    from foxlm.evaluation.plots.position import plot_loss_by_position

    draw = {"loss": plot_loss_by_position, "needle": plot_needle}[report["kind"]]
    figure, names = draw(report), [results.with_suffix(suffix) for suffix in (".svg", ".png")]
    for name in names:
        save_plot(figure, name)
    typer.echo(f"wrote {results}, {names[0].name} and {names[1].name}")
