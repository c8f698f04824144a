"""The demo's text: the sources of Python's standard library, which every machine that runs foxlm has.

Bytes are the tokens, so the text needs no vocabulary and the loss is in bits per byte. Files, not passages, are
held out: no line of a held-out file is trained on, unless another file has the same line.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Not program text a reader would write: tables that repeat each other across files (a held-out code page is
# all but a copy of a training one), generated files, other people's packages, and tests, which some systems
# leave out.
EXCLUDED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
EXCLUDED_PREFIXES = ("_sysconfigdata",)

HELD_OUT_ONE_IN = 12
SEPARATOR = 256  # token before each file; the byte values are the tokens 0..255


class SourceFile(NamedTuple):
    """A file of the corpus: its path below the standard library, with forward slashes, and its bytes."""

    name: str
    data: bytes


class Corpus(NamedTuple):
    """Files to train on and files held out, in order of their names."""

    train: list[SourceFile]
    held_out: list[SourceFile]

    def describe(self) -> dict[str, int]:
        """Numbers of files and bytes."""
        return {
            "train_files": len(self.train),
            "train_bytes": sum(len(file.data) for file in self.train),
            "held_out_files": len(self.held_out),
            "held_out_bytes": sum(len(file.data) for file in self.held_out),
        }


def is_held_out(name: str) -> bool:
    """Whether the file of this name is held out: one in `HELD_OUT_ONE_IN`, by a hash of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the ``*.py`` files below ``root``, by default of the running interpreter's standard library.

    Raises:
        ValueError: there is not at least one file of each kind (an interpreter whose library is in an archive).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    files = [SourceFile(name, (root / name).read_bytes()) for name in names if _wanted(name)]
    train = [file for file in files if not is_held_out(file.name)]
    corpus = Corpus(train, [file for file in files if is_held_out(file.name)])
    if not corpus.train or not corpus.held_out:
        raise ValueError(
            f"root must hold Python sources to train on and to hold out, got {len(corpus.train)} and "
            f"{len(corpus.held_out)} files in {root}"
        )
    return corpus


def _wanted(name: str) -> bool:
    *folders, file = name.split("/")
    return EXCLUDED_FOLDERS.isdisjoint(folders) and not file.startswith(EXCLUDED_PREFIXES)


def to_tokens(files: list[SourceFile]) -> np.ndarray:
    """``[N]`` uint16: the bytes of all files, `SEPARATOR` before each."""
    parts = [part for file in files for part in ([SEPARATOR], np.frombuffer(file.data, np.uint8))]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


def windows(files: list[SourceFile], length: int, count: int) -> np.ndarray:
    """Windows that lie within one file each, spread evenly over all of them.

    Args:
        files: where to cut from. A file's first window begins with its separator; each next one begins with the
            last token of the one before, so that every byte is to be predicted in one window.
        length: tokens per window, ``T``; the first is only looked at.
        count: number of windows wanted.

    Returns:
        ``[N, T]`` int64, ``N <= count``.

    Raises:
        ValueError: no file fills a window.
    """
    streams = [to_tokens([file]) for file in files]
    cut = [sliding_window_view(stream, length)[:: length - 1] for stream in streams if len(stream) >= length]
    if not cut:
        raise ValueError(f"length must be at most that of the longest file, got {length}")
    found = np.concatenate(cut)
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return found[chosen].astype(np.int64)


def bigram_costs(tokens: np.ndarray) -> np.ndarray:
    """The demo's baseline: bits that byte ``b`` costs after ``a``, by Laplace's rule ``(n(a, b) + 1) / (n(a) + 256)``.

    Args:
        tokens: ``[N]`` to count, bytes and `SEPARATOR`. Of pairs that end in a separator none is counted.

    Returns:
        ``[257, 256]`` float64; the last row is the start of a file.
    """
    before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    scored = after != SEPARATOR
    counts = np.bincount(before[scored] * 256 + after[scored], minlength=257 * 256).reshape(257, 256) + 1
    return -np.log2(counts / counts.sum(1, keepdims=True))
