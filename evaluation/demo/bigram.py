"""The baseline of the demo: a bigram model over bytes, ``P(b | a)`` from counts."""

import numpy as np

from .corpus import SEPARATOR


class BigramModel:
    """Byte bigrams with add-``k`` smoothing: ``P(b | a) = (n(a, b) + k) / (n(a) + 256 k)``.

    Args:
        tokens: ``[N]`` integers to count, bytes and `SEPARATOR`. Of pairs that end in a separator none is counted.
        k: added to every count, > 0; 1 is Laplace's rule.

    Attributes:
        bits: ``[257, 256]`` float64, what byte ``b`` costs after ``a``; the last row is the start of a file.
    """

    def __init__(self, tokens: np.ndarray, k: float = 1.0) -> None:
        if not k > 0:
            raise ValueError(f"k must be positive, got {k}")
        before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        scored = after != SEPARATOR
        pairs = before[scored] * 256 + after[scored]
        counts = np.bincount(pairs, minlength=257 * 256).reshape(257, 256) + k
        self.bits = -np.log2(counts / counts.sum(1, keepdims=True))

    def bits_per_byte(self, windows: np.ndarray) -> float:
        """Mean cost of every byte that has one before it, over ``[N, T]`` windows of tokens."""
        before, after = windows[:, :-1].ravel(), windows[:, 1:].ravel()
        scored = after != SEPARATOR
        return float(self.bits[before[scored], after[scored]].mean())
