"""Data of the tasks on the user's own text: `foxlm_bits.yaml` and `foxlm_next_lines.yaml`.

lm-eval calls these functions with its metadata: ``text``, the file or folder, and ``seed``.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foxlm.evaluation.text import texts

# A text is cut into pieces of so many bytes, so that a limit on questions limits the bits per byte too.
PIECE_BYTES, MAX_PIECES = 8192, 50
QUESTIONS, CHOICES = 200, 4
PREFIX_BYTES, CONTINUATION_BYTES = 192, 64


def pieces(text: str, **_: Any) -> dict[str, Any]:
    """Up to `MAX_PIECES`, evenly spread over the whole text."""
    found = []
    for document in texts(Path(text)):
        data = document.encode()
        cut = [data[i : i + PIECE_BYTES].decode(errors="ignore") for i in range(0, len(data), PIECE_BYTES)]
        found += [{"text": piece} for piece in cut if piece.strip()]
    return _data_set(found[:: -(-len(found) // MAX_PIECES)])


def next_lines(text: str, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Questions which of four continuations follows some lines."""
    return _data_set(next_lines_questions(list(texts(Path(text))), QUESTIONS, seed))


def next_lines_questions(documents: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Questions: a prefix that ends with a line, its real continuation and others from elsewhere.

    Args:
        documents: texts.
        count: number of questions wanted; there are fewer if there are fewer passages.
        seed: of the order and of the wrong answers.

    Raises:
        ValueError: there are too few passages for one question.
    """
    passages = [passage for document in documents for passage in _passages(document)]
    if len(passages) < CHOICES:
        raise ValueError(f"the text must have at least {CHOICES} passages, got {len(passages)}")
    rng = random.Random(seed)
    questions: list[dict[str, Any]] = []
    for index in rng.sample(range(len(passages)), min(count, len(passages))):
        prefix, real = passages[index]
        drawn = rng.sample(passages, min(4 * CHOICES, len(passages)))
        wrong = list(dict.fromkeys(other for _, other in drawn if other != real))[: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            answer = rng.randrange(CHOICES)
            choices = [*wrong[:answer], real, *wrong[answer:]]
            questions.append({"prefix": prefix, "choices": choices, "answer": answer})
    return questions


def _passages(text: str) -> list[tuple[str, str]]:
    """Consecutive, disjoint pairs of prefix and continuation, both of them whole in ``text``."""
    found: list[tuple[str, str]] = []
    start = 0
    while True:
        end = text.find("\n", start + PREFIX_BYTES) + 1
        if end == 0 or end + CONTINUATION_BYTES > len(text):
            return found
        continuation = text[end : end + CONTINUATION_BYTES]
        if continuation.strip():
            found.append((text[start:end], continuation))
        start = end + CONTINUATION_BYTES


def _data_set(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}
