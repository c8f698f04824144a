"""``foxlm graft``."""

from pathlib import Path
from typing import Annotated

import typer


def graft(
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
    forget_gate: Annotated[str, typer.Option(help="full, bias_only, fixed or none: no gates.")] = "full",
    forget_gate_heads: Annotated[str, typer.Option(help="query or key_value: what has a gate of its own.")] = "query",
    output_gate: Annotated[
        bool, typer.Option("--output-gate", help="Add an output gate, which starts neutral.")
    ] = False,
    remove_rope: Annotated[
        bool, typer.Option("--remove-rope", help="Leave out rotary embeddings: it then needs finetuning.")
    ] = False,
) -> None:
    """Put forget gates on a pretrained Transformer, for finetuning: a FoX model of the same weights."""
    from foxlm.conversion.graft import graft_to_folder

    graft_to_folder(
        source,
        out,
        decay_times=_decay_times(decay_times),
        forget_gate=forget_gate,
        forget_gate_heads=forget_gate_heads,
        output_gate=output_gate,
        keep_rope=not remove_rope,
    )
    typer.echo(f"wrote {out}")


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
