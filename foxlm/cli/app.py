"""The ``foxlm`` command: what it is made of. No command imports torch or transformers before it runs."""

from typing import Annotated

import typer

from foxlm import __version__
from foxlm.cli.bench import app as bench
from foxlm.cli.convert import convert
from foxlm.cli.demo import demo
from foxlm.cli.errors import PASS_THROUGH, CommandLine
from foxlm.cli.evaluate import evaluate, lm_eval, loss, needle
from foxlm.cli.graft import graft
from foxlm.cli.publish import card, export_code, publish
from foxlm.cli.report import report
from foxlm.cli.serve import serve
from foxlm.cli.warmup import warmup

app = CommandLine(
    help="Forgetting Transformers (FoX) for the Hugging Face ecosystem.\n\n"
    "FOXLM_TRACEBACK=1 in the environment shows the traceback of an error."
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"foxlm {__version__}")
    raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``foxlm`` itself."""


app.command()(demo)
app.command()(convert)
app.command()(graft)
app.command()(card)
app.command()(export_code)
app.command()(publish)
app.command("eval")(evaluate)
app.command("lm-eval", context_settings=PASS_THROUGH, add_help_option=False)(lm_eval)
app.command()(loss)
app.command()(needle)
app.command()(report)
app.command()(warmup)
app.command(context_settings=PASS_THROUGH, add_help_option=False)(serve)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the ``foxlm`` command and of ``python -m foxlm``."""
    app(prog_name="foxlm")
