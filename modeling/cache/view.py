"""What the kernels of decoding read of a layer's cache beside its keys, its values and their `Decay`."""

from typing import NamedTuple

from torch import Tensor

from ...kernels.pruning.key_stats import KeySummary
from ...kernels.tiles import PRUNED_KEYS


class CacheView(NamedTuple):
    """A layer's cache as the kernels of decoding read it; the keys' running sums are `Decay.key`.

    Attributes:
        summary: of the keys; where heads share pages, of each page at its end, ``[P, Hf or G, 1]``.
        pages: ``[B, G, N]`` int32, the page that holds each 64 tokens of a key/value head; keys and values are then
            pools ``[P, 64, D]``. Or ``[B, N]`` and ``[P, G, 64, D]``, where heads share pages. None without pages.
        start: ``[B, G]`` int32, the first block of 64 tokens that is still held; those before are proven dead. With
            pages.
        counts: as for `decode_attention`; None counts nothing.
    """

    summary: KeySummary
    pages: Tensor | None = None
    start: Tensor | None = None
    counts: Tensor | None = None

    def largest(self, last: Tensor) -> Tensor:
        """``[B, G]``, largest length of the keys of each head up to ``last``, as of `Decay`."""
        block = last[..., -1:] // PRUNED_KEYS
        if self.pages is None or self.pages.ndim == 3:
            return self.summary.largest.index_select(-1, block)[..., 0]
        # A sequence without tokens has no last one.
        page = self.pages.gather(1, block.clamp(min=0))[:, 0].long()
        return self.summary.largest[page, :, 0].masked_fill(block < 0, 0.0)
