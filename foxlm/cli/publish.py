"""``foxlm card``, ``foxlm export-code`` and ``foxlm publish``: a model's folder made ready for others."""

from pathlib import Path
from typing import Annotated

import typer

_ModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A model's folder, as save_pretrained makes it.")]


def card(
    folder: _ModelFolder,
    license: Annotated[
        str | None, typer.Option(help="License of the weights, as the Hub writes it: apache-2.0, mit, ...")
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
    language: Annotated[
        list[str] | None, typer.Option(help="Language that the model writes: en, code, ... May be repeated.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data set on the Hub that it was trained on. May be repeated.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Model on the Hub that it was made from, if any.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the folder's.")] = None,
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


def export_code(folder: _ModelFolder) -> None:
    """Write the model's code into its folder anew, so that it loads where foxlm is not installed.

    save_pretrained does so by itself; this is for folders saved by another version of foxlm.
    """
    from foxlm.conversion.links import check_links
    from foxlm.modeling.remote_code import export_code as write

    check_links(folder)
    write(folder)
    typer.echo(f"wrote the code into {folder}")


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
