"""Write model folders atomically."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Tokenizer, chat template and generation settings, which are copied unchanged. None of them is code.
TEXT_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*.json",
    "chat_template*.jinja",
    "generation_config.json",
)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``out`` at the end of the block, and removed if the block fails.

    A process that is killed inside leaves a hidden folder ``.NAME-*`` beside ``out``, and no ``out``.

    Raises:
        ValueError: ``out`` exists already.
    """
    out = Path(out)
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        folder = Path(unfinished) / out.name
        folder.mkdir()
        yield folder
        folder.rename(out)


def check_new(out: Path, source: Path | None = None) -> None:
    """Raise a `ValueError` if ``out`` exists (even as a dangling link) or lies in ``source``."""
    if os.path.lexists(out):
        raise ValueError(f"OUT must be a new folder, got {out}, which is there already")
    if source is not None and source.resolve() in out.resolve().parents:
        raise ValueError(f"OUT must not lie in the source, got {out}")


def copy_text_files(source: str | Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings from a model's folder to another, over what is there.

    Links are followed: `check_links` comes first.
    """
    for pattern in TEXT_FILES:
        for file in filter(Path.is_file, Path(source).glob(pattern)):
            shutil.copy2(file, folder / file.name)
