"""What the kernels of decoding read of a layer's cache beside its keys, its values and their `Decay`."""

from typing import NamedTuple

from torch import Tensor

from ...kernels.pruning.key_stats import KeySummary


class CacheView(NamedTuple):
    """A layer's cache as the kernels of decoding read it; the keys' running sums are `Decay.key`.

    Attributes:
        summary: of the keys.
        pages: ``[B, G, N]`` int32, the page that holds each 64 tokens of a key/value head; keys and values are then
            pools ``[P, 64, D]``. None without pages.
        start: ``[B, G]`` int32, the first block of 64 tokens that is still held; those before are proven dead. With
            pages.
    """

    summary: KeySummary
    pages: Tensor | None = None
    start: Tensor | None = None
