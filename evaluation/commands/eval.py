"""``foxlm eval``."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Eps, Model, Overwrite, Rule, Seed


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
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Generate without a cache of keys and values: slow, for comparison.")
    ] = False,
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
    from ..harness.options import Options
    from ..harness.results import table
    from ..harness.suites import parse_lengths

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
        cache=not no_cache,
        seed=seed,
        include_path=include_path,
        samples=samples,
        overwrite=overwrite,
    ).checked()
    # Only now what takes seconds to import.
    from ..harness.run import evaluate as run

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
