"""Real text as tokens: documents of a file, one at a time, and rows of a wanted length made of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from foxlm.kernels.argument_types import typed

# Tokens of a row. Nothing that runs takes in as many; more are a slip of the hand, refused before memory is asked for.
LONGEST = 2**27


@typed
def documents(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[np.ndarray]:
    """Tokens of each document of a file or folder, ``[N]`` int64, read one at a time.

    Args:
        path: ``.npy`` with token numbers (``[N]``, one document, or ``[rows, length]``, one each; read as they are
            needed); ``.jsonl`` with a field ``text`` in each line, a document each; any other file is UTF-8 text, one
            document. A folder holds such files, taken in the order of their names.
        tokenizer: of the model. Not needed for ``.npy``.

    Raises:
        ValueError: a file holds something else; the message names it.
        OSError: it cannot be read.
    """
    for file in files(path):
        if file.suffix == ".npy":
            yield from _saved_tokens(file)
        elif tokenizer is None:
            raise ValueError(f"{file} is text, which needs a model with a tokenizer; without one give .npy tokens")
        else:
            yield from (token_ids(tokenizer, text) for text in _texts(file))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Tokens of a text, ``[N]`` int64, without those that a tokenizer puts before or behind it."""
    # Longer than the model was trained at is what is wanted here, and no reason for a warning.
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def _saved_tokens(path: Path) -> Iterator[np.ndarray]:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no array of numbers: {error}") from None
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold whole numbers [N] or [rows, length], got {tokens.dtype} {tokens.shape}")
    if tokens.dtype == np.uint64 and tokens.size and tokens.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{path} must hold token numbers, got {tokens.max()}")
    yield from (np.asarray(row, dtype=np.int64) for row in np.atleast_2d(tokens))


def texts(path: Path) -> Iterator[str]:
    """Each document of a file or folder as text, as `documents` has them and with its errors; ``.npy`` holds none."""
    for file in files(path):
        if file.suffix == ".npy":
            raise ValueError(f"{file} holds token numbers; text is needed here")
        yield from _texts(file)


def files(path: Path) -> list[Path]:
    """``path``, or the files that are read of a folder: hidden ones and folders in it are left out."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if not found:
        raise ValueError(f"{path} holds no files")
    return found


def _texts(path: Path) -> Iterator[str]:
    where, wanted = str(path), "UTF-8 text"
    try:
        # Some editors begin a file with a byte order mark.
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    where, wanted = f"{path}, line {number}", 'a JSON object with a string "text"'
                    text = json.loads(line)["text"]
                    # Fails for half of a surrogate pair, which JSON can write and no tokenizer reads.
                    text.encode()
                    yield text
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: must be {wanted} ({error})") from None


@typed
def rows(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, length: int, count: int, join: bool = False
) -> Iterator[np.ndarray]:
    """Up to ``count`` rows of ``length`` consecutive tokens, ``[length]`` int64.

    A row lies within one document, so that what is far back really precedes it; a long document gives several.

    Args:
        path, tokenizer: as of `documents`.
        length: tokens of a row, at least 2.
        count: rows, at least 1.
        join: put documents that are too short after each other, with the end-of-text token between them if the
            tokenizer has one. Without it they are left out.

    Raises:
        ValueError: not one row is long enough; the message has the longest there is.
    """
    if not 2 <= length <= LONGEST or count < 1:
        raise ValueError(f"length must be from 2 to {LONGEST:,} and count at least 1, got {length} and {count}")
    end = getattr(tokenizer, "eos_token_id", None)
    separator = np.array([] if end is None else [end], dtype=np.int64)
    waiting = np.array([], dtype=np.int64)
    found = longest = 0
    for document in documents(path, tokenizer):
        if join:
            document = np.concatenate([waiting, document, separator])
        longest = max(longest, len(document))
        for start in range(0, len(document) - length + 1, length):
            yield document[start : start + length]
            found += 1
            if found == count:
                return
        if join:
            waiting = document[len(document) // length * length :]
    if not found:
        hint = "" if join else "; joining documents may give longer rows"
        raise ValueError(f"{path} has no {length} tokens in a row, at most {longest}{hint}")


def check_tokens(low: int, high: int, vocabulary: int, what: str) -> None:
    """Raise a `ValueError` that begins with ``what`` unless token numbers from ``low`` to ``high`` are a model's."""
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{what} must hold tokens in [0, {vocabulary}), as the model has them, got {low} to {high}")
