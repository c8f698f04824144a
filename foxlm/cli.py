"""The ``foxlm`` command. Each command imports what only it needs: lm-eval and matplotlib may not be installed."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from foxlm.command_line import CommandLine
from foxlm.evaluation.commands.eval import evaluate
from foxlm.evaluation.commands.loss import loss
from foxlm.evaluation.commands.needle import needle
from foxlm.evaluation.commands.report import report

app = CommandLine(
    help="Forgetting Transformers (FoX) for the Hugging Face ecosystem.\n\n"
    "FOXLM_TRACEBACK=1 in the environment shows where in the code an error is from."
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"foxlm {version('foxlm')}")
    except PackageNotFoundError:
        from foxlm import __version__

        typer.echo(f"foxlm {__version__}")
    raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for model/, report.html and report.json: new, empty, or of an earlier demo.")
    ] = Path("foxlm-demo"),
    minutes: Annotated[
        float, typer.Option(help="Training time aimed at; a busy machine may take up to three times as long.")
    ] = 2.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps instead of a time: repeats exactly on the same machine.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, training windows, questions and sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and 12 steps: shows that all parts work, nothing more.")
    ] = False,
) -> None:
    """Train a small FoX on Python's own sources, evaluate it, and write a page about it. No network needed."""
    from foxlm.evaluation.demo.run import Options, run_demo

    run_demo(Options(out=out, minutes=minutes, steps=steps, seed=seed, device=device, quick=quick))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and *.safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        str, typer.Option(help="fox, from a checkpoint of others; or back: authors or fla, from one of a FoX model.")
    ] = "fox",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Where there are no *.safetensors, read pytorch_model*.bin.")
    ] = False,
) -> None:
    """Convert a checkpoint of the FoX authors' code, or of flash-linear-attention, for from_pretrained; or back."""
    from foxlm.conversion.convert import convert_to_folder

    convert_to_folder(source, out, to=to, allow_pickle=allow_pickle)
    typer.echo(f"wrote {out}")


@app.command()
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


_ModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A model's folder, as save_pretrained makes it.")]


@app.command()
def card(
    folder: _ModelFolder,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, as the Hub writes it: apache-2.0, mit, ...")
    ] = None,
    training_data: Annotated[str | None, typer.Option(help="What the model was trained on, in words.")] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Results: of foxlm eval or lm-eval, of foxlm report or the demo, JSON as {task: {metric: number}}, or "
            "a folder to search for all but the last. Repeatable.",
        ),
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="Such as en, or code. Repeatable.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="On the Hub, that it was trained on. Repeatable.")] = None,
    base_model: Annotated[str | None, typer.Option(help="On the Hub, if it was made from another model.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model; the folder's by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that is there.")] = False,
) -> None:
    """Write a model card, README.md, into a model's folder, from its configuration and results at hand.

    What only you know and did not give is marked in the text, to be filled in.
    """
    from foxlm.conversion.hub.model_card import MISSING, write_model_card

    written = write_model_card(
        folder,
        name=name,
        license=license,
        languages=language or (),
        base_model=base_model,
        datasets=dataset or (),
        training_data=training_data,
        evaluations=evaluation or (),
        overwrite=overwrite,
    )
    missing = written.read_text(encoding="utf-8").count(MISSING)
    typer.echo(f"wrote {written}" + (f"; places to fill in: {missing}" if missing else ""))


@app.command()
def bundle(folder: _ModelFolder) -> None:
    """Write the model's code into its folder anew, so that it loads where foxlm is not installed.

    save_pretrained does so by itself; this is for folders saved by another version of foxlm.
    """
    from foxlm.conversion.hub.links import check_links
    from foxlm.modeling.remote_code import write_bundle

    check_links(folder)
    write_bundle(folder)
    typer.echo(f"wrote the code into {folder}")


@app.command()
def publish(
    folder: _ModelFolder,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", help="Upload to this repository on the Hub (NAME or OWNER/NAME) if all is well."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    allow_code: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Code beside foxlm's own that is meant to be there: a file of the folder, or a reference such as "
            "OWNER/NAME--module.Class. Loading the model may run it. Repeatable.",
        ),
    ] = None,
) -> None:
    """Check that a model's folder is ready for others: that it is whole, holds nothing else, and loads everywhere.

    Uploads nothing without --push.
    """
    from huggingface_hub.utils import validate_repo_id

    from foxlm.conversion.hub.publish import check_folder, push_folder

    if private and push is None:
        raise ValueError("--private needs --push REPO_ID")
    if push is not None:
        validate_repo_id(push)
    failed = []
    for check in check_folder(folder, allow_code or ()):
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:13}  {check.found}")
        if not check.passed:
            failed.append(check.name)
    if failed:
        raise ValueError(f"{folder} is not ready ({', '.join(failed)}); nothing was uploaded")
    if push is None:
        typer.echo("ready; --push REPO_ID uploads it")
    else:
        typer.echo(f"uploaded to {push_folder(folder, push, private)}")


app.command("eval")(evaluate)
app.command()(loss)
app.command()(needle)
app.command()(report)


# Of commands that have their own options and help.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Answer requests in OpenAI's protocol with models, FoX and others, by transformers' own server: serve --help."""
    from foxlm.serving import serve as run

    run(context.args)


# Imported only when it is asked for.
@app.command(context_settings=_PASSED_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure the speed of attention, prompts, decoding and training here, of your model too: bench --help."""
    from foxlm.evaluation.speed.__main__ import app as speed

    speed(context.args, prog_name="foxlm bench")


def main() -> None:
    """Entry point of the ``foxlm`` command and of ``python -m foxlm``."""
    app(prog_name="foxlm")
