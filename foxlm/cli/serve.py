"""``foxlm serve``: transformers' own server, which speaks OpenAI's protocol, for FoX models too."""

from pathlib import Path
from typing import Any

import typer

from foxlm.cli.errors import CommandLine


def serve(context: typer.Context) -> None:
    """Answer requests in OpenAI's protocol with models, FoX and others, by transformers' own server: serve --help."""
    from foxlm.modeling.model_files import check_files, read_config

    server = fox_server()
    arguments = context.args
    if arguments and not arguments[0].startswith("-"):
        read_config(arguments[0])
    for folder in filter(Path.is_dir, map(Path, arguments)):
        read_config(folder)
        check_files(folder)
    app = CommandLine(help="")
    app.command()(server)
    app(arguments, prog_name="foxlm serve")


def fox_server() -> Any:
    """The class of transformers' server, in a process where it finds FoX models.

    Raises:
        ImportError: what it needs is not installed.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("foxlm serve needs fastapi, uvicorn and openai: pip install 'foxlm[serve]'")
    import transformers
    from transformers.cli.serve import Serve

    import foxlm

    # The server takes a model's class by its name from transformers, whatever the Auto classes know.
    transformers.FoxForCausalLM = foxlm.FoxForCausalLM
    return Serve
