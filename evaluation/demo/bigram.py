"""The baseline of the demo: a bigram model over bytes, ``P(b | a)`` from counts."""

import numpy as np

from .corpus import SEPARATOR


class BigramModel:
    """Byte bigrams with Laplace's rule: ``P(b | a) = (n(a, b) + 1) / (n(a) + 256)``.

    Args:
        tokens: ``[N]`` integers to count, bytes and `SEPARATOR`. Of pairs that end in a separator none is counted.

    Attributes:
        bits: ``[257, 256]`` float64, what byte ``b`` costs after ``a``; the last row is the start of a file.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        scored = after != SEPARATOR
        pairs = before[scored] * 256 + after[scored]
        counts = np.bincount(pairs, minlength=257 * 256).reshape(257, 256) + 1
        self.bits = -np.log2(counts / counts.sum(1, keepdims=True))

    def bits_per_byte(self, windows: np.ndarray) -> float:
        """Mean cost of every byte that has one before it, over ``[N, T]`` windows of tokens."""
        before, after = windows[:, :-1].ravel(), windows[:, 1:].ravel()
        scored = after != SEPARATOR
        return float(self.bits[before[scored], after[scored]].mean())
