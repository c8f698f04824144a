"""``foxlm graft``."""

import math
from pathlib import Path
from typing import Annotated

import typer

from foxlm.cli.options import Device, Join, Seed


def graft(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(help="Folder, or name on the Hugging Face Hub: llama, mistral, qwen2, qwen3, smollm3 or olmo2."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    decay_times: Annotated[
        str | None,
        typer.Option(
            help="Tokens after which a head starts to forget: MIN:MAX, log-spaced over the heads, or one number; inf "
            "changes nothing. Default: 64 to 16 times the model's context."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Set decay times and attention sinks by what forgetting costs on this text: a UTF-8 file, .jsonl with "
            'a "text" in each line, .npy token numbers, or a folder of such files. What was found is written to OUT.',
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TEXT",
            help="With --calibrate: another text, to compare the graft's loss with the source's on; may be repeated.",
        ),
    ] = None,
    skip: Annotated[
        float, typer.Option(help="With --calibrate: share of attention to skip on rows of --length tokens.")
    ] = 0.5,
    longest: Annotated[
        float,
        typer.Option(
            help="With --calibrate: longest decay time in tokens that a head starts with. Default: heads may never "
            "forget."
        ),
    ] = math.inf,
    recall: Annotated[
        float,
        typer.Option(
            help="With --calibrate: share of each row, at its end, that repeats passages of it, so that heads which "
            "find things in the context go on doing so; 0 to 0.5."
        ),
    ] = 0.25,
    separator: Annotated[
        str | None,
        typer.Option(
            help="With --calibrate: the token that texts begin with. Default: the tokenizer's beginning-of-text token, "
            "else its end-of-text token."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="With --calibrate: tokens of a row. Default: the model's context, at most 8192."),
    ] = None,
    rows: Annotated[int, typer.Option(help="With --calibrate: rows of each text.")] = 4,
    join: Join = False,
    device: Device = "auto",
    seed: Seed = 0,
    forget_gate: Annotated[str, typer.Option(help="full, bias_only, fixed or none: no gates.")] = "full",
    forget_gate_heads: Annotated[str, typer.Option(help="query or key_value: what has a gate of its own.")] = "query",
    output_gate: Annotated[
        bool, typer.Option("--output-gate", help="Add an output gate, which starts neutral.")
    ] = False,
    remove_rope: Annotated[
        bool, typer.Option("--remove-rope", help="Leave out rotary embeddings: it then needs finetuning.")
    ] = False,
    rope_factor: Annotated[
        float | None,
        typer.Option(
            help="Stretch rotary embeddings to so many times the model's context, for longer texts: YaRN with an "
            "attention_factor of 1."
        ),
    ] = None,
) -> None:
    """Put forget gates on a pretrained Transformer, for finetuning: a FoX model of the same weights."""
    others = tuple(held_out or ())
    if calibrate is None:
        _require_calibrate(context)
    elif decay_times is not None:
        raise ValueError("--calibrate sets decay times: leave out --decay-times")
    else:
        for name, path in [("calibrate", calibrate), *(("held-out", other) for other in others)]:
            if not path.exists():
                raise ValueError(f"--{name} must be a file or a folder, {path} does not exist")
    from foxlm.conversion.graft import graft_to_folder

    text = None
    if calibrate is not None:
        from foxlm.conversion.calibrated_graft import CalibrationText

        text = CalibrationText(
            calibrate,
            skip=skip,
            longest=longest,
            recall=recall,
            separator=separator,
            length=length,
            rows=rows,
            join=join,
            device=device,
            seed=seed,
            held_out=others,
        )
    graft_to_folder(
        source,
        out,
        calibrate=text,
        decay_times=_decay_times(decay_times),
        forget_gate=forget_gate,
        forget_gate_heads=forget_gate_heads,
        output_gate=output_gate,
        keep_rope=not remove_rope,
        rope_factor=rope_factor,
    )
    if text is not None:
        typer.echo((out / "calibration.md").read_text(encoding="utf-8"))
    typer.echo(f"wrote {out}")


def _require_calibrate(context: typer.Context) -> None:
    """Refuse options that say how to calibrate where nothing is calibrated."""
    for name in ("held_out", "skip", "longest", "recall", "separator", "length", "rows", "join", "device", "seed"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} needs --calibrate TEXT")


def _decay_times(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        times = [float(part) for part in text.split(":")]
    except ValueError:
        times = []
    if len(times) not in (1, 2):
        raise ValueError(f"--decay-times must be a number or MIN:MAX, got {text!r}")
    return times if len(times) == 2 else times[0]
