"""How every command of foxlm ends: with its result, or with one line that says what is wrong."""

import os
from typing import Any

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand

TRACEBACK = "FOXLM_TRACEBACK"
# Errors that files, options or the machine cause. Their messages are written for the user.
_EXPECTED = (ValueError, OSError, ImportError, RuntimeError, MemoryError, SafetensorError)
# How typer itself ends a command, and a reader that closed the pipe.
_NOT_OURS = (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError)
_MAX_LENGTH = 600
# Settings of commands that leave their arguments to another parser.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Empty arguments come from unset shell variables. As a path, one would mean the current folder.
        for before, argument in zip(["", *args], args, strict=False):
            option = before if argument == "" else argument.removesuffix("=")
            if argument == "" or (argument.startswith("--") and option != argument):
                after = f" after {option}" if option.startswith("-") else ""
                typer.echo(f"error: an argument{after} is empty; for the current folder give .", err=True)
                raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            # Importing foxlm does not register FoX in a process of this command, so that --help is quick.
            from foxlm.modeling.registration import register_fox

            register_fox()
            return super().invoke(ctx)
        except _NOT_OURS:
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK, "0") not in ("", "0"):
                raise
            options = {x.name: x.opts[0] for x in ctx.command.params if x.param_type_name == "option"}
            typer.echo(f"error: {_with_dashes(describe(error), options)}", err=True)
            raise typer.Exit(1) from error


class CommandLine(typer.Typer):
    """An application whose commands end with one line on stderr and exit status 1 on any error.

    With ``FOXLM_TRACEBACK=1`` in the environment they end with Python's traceback.
    """

    def __init__(self, help: str) -> None:
        super().__init__(help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def command(self, *args: Any, **kwargs: Any) -> Any:
        return super().command(*args, cls=_Command, **kwargs)


def deprecated(old: str, new: str) -> None:
    """Warn on stderr that ``old`` is replaced by ``new``."""
    typer.echo(f"warning: {old} is deprecated and will be removed in the next release; use {new}", err=True)


def describe(error: BaseException) -> str:
    """One printable line for an error. An unexpected one is described as a bug in foxlm."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"not enough memory ({error})" if str(error) else "not enough memory"
    else:
        text = str(error) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        text = f"not enough memory; fewer tokens at a time or a smaller dtype need less: {text}"
    text = _in_a_line(text)
    if not isinstance(error, _EXPECTED) or isinstance(error, NotImplementedError | RecursionError):
        text = f"{type(error).__name__}: {text}; a bug in foxlm: please report it with the traceback of {TRACEBACK}=1"
    return text


def _with_dashes(message: str, options: dict[str, str]) -> str:
    """``message`` with the argument that it is about, its first word, as the command's option is written."""
    name, _, rest = message.partition(" ")
    bare = name.removesuffix(":")
    return f"{options[bare]}{name[len(bare) :]} {rest}" if bare in options else message


def _in_a_line(text: str) -> str:
    line = " ".join(text.split()) if "\n" in text else text
    if len(line) > _MAX_LENGTH:
        line = f"{line[: _MAX_LENGTH // 2]} ... {line[-_MAX_LENGTH // 2 :]}"
    # Lone surrogates in file names, and characters that would move a terminal's cursor.
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in line)
