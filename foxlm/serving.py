"""transformers' own server, which speaks the protocol of OpenAI's, for FoX models too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foxlm.command_line import CommandLine
from foxlm.conversion.pretrained import check_files, read_config


def serve(arguments: Sequence[str]) -> None:
    """Run ``transformers serve`` with its own options; returns when the server has been stopped.

    Raises:
        ImportError: what the server needs is not installed.
        ValueError, OSError: the model named in ``arguments`` cannot be read.
    """
    server = fox_server()
    if arguments and not arguments[0].startswith("-"):
        read_config(arguments[0])
    for folder in filter(Path.is_dir, map(Path, arguments)):
        read_config(folder)
        check_files(folder)
    app = CommandLine(help="")
    app.command()(server)
    app(list(arguments), prog_name="foxlm serve")


def fox_server() -> Any:
    """The class of transformers' server, in a process where it finds our models.

    Raises:
        ImportError: what it needs is not installed.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("foxlm serve needs fastapi, uvicorn and openai: pip install 'foxlm[serve]'")
    import transformers
    from transformers.cli.serve import Serve

    import foxlm

    # It takes a model's class by its name from transformers, whatever the Auto classes know, and offers no other way.
    transformers.FoxForCausalLM = foxlm.FoxForCausalLM
    return Serve
