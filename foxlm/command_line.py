"""How every command of foxlm ends: with its result, or with one line that says what is wrong."""

import os
from typing import Any

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand

TRACEBACK = "FOXLM_TRACEBACK"
# What files, options and the machine lead to, whose messages are written for whoever runs a command.
_SAID = (ValueError, OSError, ImportError, RuntimeError, MemoryError, SafetensorError)
# typer's own way to end a command; a closed pipe is the reader's wish.
_PASSED_ON = (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError)
_LONGEST = 600


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # A shell's variable that is not set. As a path it would be the current folder.
        for before, argument in zip(["", *args], args, strict=False):
            option = before if argument == "" else argument.removesuffix("=")
            if argument == "" or (argument.startswith("--") and option != argument):
                after = f" after {option}" if option.startswith("-") else ""
                typer.echo(f"error: an argument{after} is empty; for the current folder give .", err=True)
                raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            # `import foxlm` leaves this to the commands, so that their help does not wait for transformers.
            from foxlm.modeling.registration import register_fox

            register_fox()
            return super().invoke(ctx)
        except _PASSED_ON:
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK, "0") not in ("", "0"):
                raise
            typer.echo(f"error: {describe(error)}", err=True)
            raise typer.Exit(1) from error


class CommandLine(typer.Typer):
    """An application whose commands end in one line and exit status 1 where they fail, whatever the reason.

    With ``FOXLM_TRACEBACK=1`` in the environment they end in Python's traceback.
    """

    def __init__(self, help: str) -> None:
        super().__init__(help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def command(self, *args: Any, **kwargs: Any) -> Any:
        return super().command(*args, cls=_Command, **kwargs)


def describe(error: BaseException) -> str:
    """One printable line of an error; what nobody foresaw is said to be a fault of foxlm's own."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"not enough memory ({error})" if str(error) else "not enough memory"
    else:
        text = str(error) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        text = f"not enough memory; fewer tokens at a time, or a smaller type of numbers, need less: {text}"
    text = _in_a_line(text)
    if not isinstance(error, _SAID) or isinstance(error, NotImplementedError | RecursionError):
        text = f"{type(error).__name__}: {text}; a fault of foxlm: please report it with what {TRACEBACK}=1 shows"
    return text


def _in_a_line(text: str) -> str:
    line = " ".join(text.split()) if "\n" in text else text
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    # Half a surrogate pair of a file's name, and what would move a terminal's cursor.
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in line)
