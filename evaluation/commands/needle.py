"""``foxlm needle``."""

from pathlib import Path
from typing import Annotated

import typer

from .figures import save_figure
from .options import Device, Dtype, Eps, OptionalModel, Overwrite, Rule, Seed, require_nothing_else


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
    from ..needle import NeedleOptions, draw_needle_map, measure_needle, needle_table, read_needle
    from ..needle_prompts import parse_numbers
    from ..results import reading

    if redraw is not None:
        require_nothing_else(context)
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
    with reading(results):
        typer.echo(needle_table(report))
        save_figure("needle", results, lambda: draw_needle_map(report))
