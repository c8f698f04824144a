"""Data-dependent token shift of keys and values (Forgetting Transformer, arXiv 2503.02130)."""

import torch
from torch import Tensor, nn

from ...kernels.elementwise.gated_norm import recompute_if_large
from ..cache.layer_types import ForgettingLayer
from ..token_layout import TokenLayout, last_real_tokens


class FoxTokenShift(nn.Module):
    """Data-dependent token shift: ``alpha_t x_{t-1} + (1 - alpha_t) x_t``, ``alpha_t = sigmoid(w . h_t)`` per head.

    The state before the first token of each (packed) sequence is zero; padding is skipped.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, heads, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        states: Tensor,
        layout: TokenLayout,
        cache_layer: ForgettingLayer | None,
        name: str,
        logits: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: ``[B, T, hidden]`` input of the layer.
            states: ``[B, T, G, D]`` keys or values.
            layout: positions, padding and packing of the tokens.
            cache_layer: the layer's cache, or None.
            name: by which `cache_layer` keeps the unshifted states.
            logits: ``[B, T, G]`` logits of alpha, if they are computed already.

        Returns:
            ``[B, T, G, D]``.
        """
        if layout.shards is not None:
            before = layout.shards.states_before(states, layout.real_of_all_ranks)
            real = layout.real
            parts = [
                _previous(
                    before[:, i : i + 1], states[:, rows], None if real is None else last_real_tokens(real[:, rows])
                )
                for i, rows in enumerate(layout.shards.rows)
            ]
            previous = torch.cat(parts, dim=1)
        else:
            past = None if cache_layer is None else cache_layer.previous_unshifted(name, layout)
            if past is None:
                past = states.new_zeros(states.shape[0], 1, *states.shape[2:])
            previous = _previous(past, states, layout.last_real)
        if layout.starts is not None:
            previous = previous.masked_fill(layout.starts[..., None, None], 0.0)
        mixed = self.mix(hidden_states, states, previous, logits)
        # After the state that it may write over has been read.
        if cache_layer is not None and layout.shards is None:
            cache_layer.append_unshifted(name, states, layout)
        return mixed

    def mix(self, hidden_states: Tensor, states: Tensor, previous: Tensor, logits: Tensor | None = None) -> Tensor:
        """``states`` mixed with ``previous``, the state before each, ``[B, T, G, D]``; the rest as for `forward`."""
        logits = self.proj(hidden_states) if logits is None else logits
        return recompute_if_large(_mix, states, previous, logits)


def _previous(past: Tensor, states: Tensor, last_real: Tensor | None) -> Tensor:
    """The state before each of ``states``, ``[B, T, G, D]``: that of the last real token; ``past`` is before all."""
    # Else it is copied: autograd may keep it, and a traced program must not be specialized for one token.
    in_place = last_real is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if in_place and states.shape[1] == 1:
        return past[:, -1:]
    # Cut afterwards: an exported program must not be specialized for one token less.
    extended = torch.cat([past[:, -1:], states], dim=1)
    if last_real is None:
        return extended[:, :-1]
    return extended.gather(1, (last_real[:, :-1] + 1)[..., None, None].expand_as(states))


def _mix(states: Tensor, previous: Tensor, logits: Tensor) -> Tensor:
    """``alpha previous + (1 - alpha) states`` with ``alpha = sigmoid(logits)`` per head, in float32."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    alpha = logits.to(dtype).sigmoid()[..., None]
    return torch.lerp(states.to(dtype), previous.to(dtype), alpha).to(states.dtype)
