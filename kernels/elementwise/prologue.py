"""What `triton_prologue` takes. Its definition are the modules of a model whose place it takes."""

from typing import NamedTuple

from torch import Tensor


class PrologueInputs(NamedTuple):
    """What an attention layer has computed of its input, and what it does with it before attention.

    Attributes:
        q: ``[B, T, H, D]``; k and v, ``[B, T, G, D]``. Of any strides.
        key_logits, value_logits: ``[B, T, G]``, of alpha in ``alpha_t x_{t-1} + (1 - alpha_t) x_t``; None for no shift.
        key_past, value_past: ``[B, G, D]``, unshifted, of the token before the first; None for zero. With ``past_slot``
            ``[B, S, G, D]``, of several tokens. Without one ``[B, T, G, D]``, of the token before each, for inference
            alone: then there are neither ``starts`` nor ``last_real``.
        q_weight, k_weight: of QK-norm, ``[D]`` for all heads or ``[heads * D]``; both or none.
        cos, sin: ``[B or 1, T, R]`` of RoPE, which rotates the first ``R`` dimensions of a head; both or none.
        starts: ``[B, T]`` bool, True where the state before is zero; None for nowhere.
        last_real: ``[B, 1 + T]`` int64, of padding: index of the last real token before the first and up to each, -1
            for the past, which takes the place of the token before; None without padding.
        past_slot: ``[1 or more]`` int64, whose first value is the index in ``S`` of the token before the first; or None
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_logits: Tensor | None = None
    value_logits: Tensor | None = None
    key_past: Tensor | None = None
    value_past: Tensor | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    starts: Tensor | None = None
    last_real: Tensor | None = None
    past_slot: Tensor | None = None

    @property
    def past_of_each(self) -> bool:
        """Whether the pasts are those of each token."""
        past = self.value_past if self.key_past is None else self.key_past
        return self.past_slot is None and past is not None and past.ndim == 4
