"""lm-eval tasks made of the user's own text, held in memory: the same two that the demo asks of held-out files.

``foxlm_bits``: bits per byte, by lm-eval's rolling windows. ``foxlm_next_lines``: which of four continuations follows
some lines; chance is 25%.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..demo.corpus import SourceFile
from ..demo.lm_eval_tasks import BITS, BITS_TASK, NEXT_LINES, NEXT_LINES_TASK, next_lines_questions
from ..text import texts
from .suites import Unit

# A text is cut into pieces of so many bytes, so that a limit on questions limits the bits per byte too.
PIECE_BYTES = 8192
PIECES = 50
QUESTIONS = 200


def own_text_units(path: Path, seed: int) -> tuple[list[Unit], str]:
    """The two tasks of a file or folder, and a checksum of its text.

    Args:
        path: as of `foxlm.evaluation.text.texts`.
        seed: of the questions and their wrong answers.

    Raises:
        ValueError, OSError: it holds no text.
    """
    documents = [text for text in texts(path) if text.strip()]
    if not documents:
        raise ValueError(f"--text: {path} holds no text")
    checksum = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
    sources = {
        BITS: (BITS_TASK, partial(_pieces, documents)),
        NEXT_LINES: (NEXT_LINES_TASK, partial(_questions, documents, seed)),
    }
    shared = {"test_split": "test", "metadata": {"version": 1.0}}
    units = [
        Unit(name, config=task | shared | {"custom_dataset": _data_set(rows)}) for name, (task, rows) in sources.items()
    ]
    return units, checksum


def _data_set(rows: Callable[[], list[dict[str, Any]]]) -> Callable[..., Any]:
    def custom_dataset(**_: Any) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list(rows())}

    return custom_dataset


def _pieces(documents: Sequence[str]) -> list[dict[str, str]]:
    """Up to `PIECES`, evenly spread over the whole text."""
    pieces = []
    for document in documents:
        data = document.encode()
        cut = [data[i : i + PIECE_BYTES].decode(errors="ignore") for i in range(0, len(data), PIECE_BYTES)]
        pieces += [{"text": piece} for piece in cut if piece.strip()]
    return pieces[:: -(-len(pieces) // PIECES)]


def _questions(documents: Sequence[str], seed: int) -> list[dict[str, Any]]:
    files = [SourceFile(str(index), document.encode()) for index, document in enumerate(documents)]
    return next_lines_questions(files, QUESTIONS, seed)
