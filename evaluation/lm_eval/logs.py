"""lm-eval's messages: into a file, but for the few that a user must see."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

# Of lm-eval and all its modules.
LOGGER = logging.getLogger("lm_eval")
_REASON_LENGTH = 240


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append what lm-eval and the tasks' own code log and print to a file, and nowhere else. Progress bars stay."""
    before = LOGGER.handlers, LOGGER.propagate, LOGGER.level
    with path.open("a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.handlers, LOGGER.propagate = [handler], False
        LOGGER.setLevel(logging.INFO)
        try:
            with redirect_stdout(file):
                yield
        finally:
            LOGGER.handlers, LOGGER.propagate = before[:2]
            LOGGER.setLevel(before[2])


class _CutPrompts(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        # "Left truncation applied" of a batch to be continued, "Truncating 7 tokens from the left" of a likelihood.
        self.count += any(word in record.getMessage().lower() for word in ("truncation", "truncating"))


@contextmanager
def cut_prompts() -> Iterator[_CutPrompts]:
    """Count, in ``count``, lm-eval's warnings that a prompt was longer than it may be."""
    handler = _CutPrompts()
    LOGGER.addHandler(handler)
    try:
        yield handler
    finally:
        LOGGER.removeHandler(handler)


def in_a_line(error: BaseException) -> str:
    """What went wrong, with the kind of error where the message alone would not tell."""
    message = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | ImportError) or not message:
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= _REASON_LENGTH else f"{message[: _REASON_LENGTH - 3]}..."
