"""What a FoX layer remembers beside keys and values, as cache layers of transformers' own caches.

Decoding needs the running sum of log gates of every key, the first key that is still visible, and, with token shift,
the last unshifted key and value. transformers' caches hold one layer object per model layer and build them by layer
type; the two classes here are what they build for ``"forgetting_attention"``, so that ``DynamicCache(config=...)``,
``StaticCache(config=...)`` and ``generate`` work as for any model. Every operation moves the extra state too, except
offloading: it is read before the layer's turn to be fetched back, and is a twentieth of the keys and values. Static
layers have the operations of transformers' `StaticLayer`: no cropping, repeating or selecting.
"""

from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..kernels.decay import Decay, accumulate

_ACCEPTED = "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)"


class DynamicForgettingLayer(DynamicLayer):
    """Grows with the sequence.

    Attributes:
        gates: ``c``, the running sum of log gates at each key, ``[B, Hf, T]`` float64, and ``first``, the first key
            visible from each token, ``[B, Hf, T]`` int32; None before any token.
        unshifted: by name, ``[B, W, G, D]`` keys and values of the latest tokens before token shift; ``W`` is up to
            twice `rollback_window`.
    """

    _layer_type = "forgetting_attention"

    # Token shift needs the unshifted key before the next token. Keeping this many of them makes any shorter rollback
    # exact, at the memory of 2 x this many tokens; a longer one must be announced by `activate_past_recording`.
    rollback_window: ClassVar[int] = 64

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.gates: tuple[Tensor, Tensor] | None = None
        self.unshifted: dict[str, Tensor] = {}
        self.record_past = False

    def append_gates(self, log_f: Tensor, starts: Tensor | None = None) -> Decay:
        """Take in the gates of new tokens (before their keys); returns what their queries need.

        Args:
            log_f: ``[B, T, Hf]`` log gates of the new tokens.
            starts: ``[B, T]`` bool, True where a packed sequence begins.
        """
        past, carry = 0, None
        if self.gates is not None:
            old_c, old_first = self.gates
            past, carry = old_c.shape[-1], (old_c[..., -1], old_first[..., -1].long())
        c, first = accumulate(log_f, past, carry, starts)
        if self.gates is None:
            self.gates = c, first.int()
        else:
            self.gates = torch.cat([old_c, c], dim=-1), torch.cat([old_first, first.int()], dim=-1)
        last = torch.arange(past, past + c.shape[-1], device=c.device)
        return Decay(c, self.gates[0], first, last)

    def before(self, name: str) -> Tensor | None:
        """``[B, 1, G, D]`` unshifted ``name`` of the last token, or None at the start."""
        states = self.unshifted.get(name)
        return None if states is None or states.shape[1] == 0 else states[:, -1:]

    def remember(self, name: str, states: Tensor) -> None:
        """Take in the unshifted ``name`` of new tokens, ``[B, T, G, D]``."""
        if (old := self.unshifted.get(name)) is not None:
            states = torch.cat([old, states], dim=1)
        # Trimmed at twice the window, so that a step of decoding seldom copies it.
        if not self.record_past and states.shape[1] > 2 * self.rollback_window:
            states = states[:, -self.rollback_window :].clone()
        self.unshifted[name] = states

    def activate_past_recording(self) -> None:
        """From now on keep the unshifted states of all tokens, and trim them only at each `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: ``tokens_to_remove`` is positive or drops more than there is.
            RuntimeError: with token shift, the state before the dropped tokens is no longer there.
        """
        count, length = -tokens_to_remove, self.get_seq_length()
        if not 0 <= count <= length:
            raise ValueError(
                f"tokens_to_remove must be in [-{length}, 0] (the cache holds {length} tokens), got {tokens_to_remove}"
            )
        if count == length:
            self.reset()
            return
        for name, states in self.unshifted.items():
            if count >= states.shape[1]:
                raise RuntimeError(
                    f"tokens_to_remove is {tokens_to_remove}, but token shift needs the unshifted {name} of the token "
                    f"before, and only the last {states.shape[1]} are kept. Call activate_past_recording() on the "
                    "cache before the tokens that may be rolled back, or start again from the prompt."
                )
        if count:
            super().crop(tokens_to_remove)
            if self.gates is not None:
                c, first = self.gates
                self.gates = c[..., :-count], first[..., :-count]
            self.unshifted = {name: states[:, :-count] for name, states in self.unshifted.items()}
        if self.record_past:
            window = self.rollback_window
            self.unshifted = {name: states[:, -window:].clone() for name, states in self.unshifted.items()}

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def _select_batch(self, select) -> None:
        """Apply ``select`` to everything whose first dimension is the batch."""
        if self.gates is not None:
            c, first = self.gates
            self.gates = select(c), select(first)
        self.unshifted = {name: select(states) for name, states in self.unshifted.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_batch(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices, ...])


class StaticForgettingLayer(StaticLayer):
    """Buffers of a fixed length, written in place, for compiled decoding.

    Attributes:
        gates: running sum of log gates at each key, ``[B, Hf, max_cache_len]`` float64 (keys to come are hidden by
            causality), that at the last token, ``[B, Hf]`` float64, and the first key visible from the last token,
            ``[B, Hf]`` int64; None before any token.
        unshifted: by name, ``[B, 1, G, D]`` key and value of the last token before token shift.
    """

    _layer_type = "forgetting_attention"

    def __init__(self, max_cache_len: int, **kwargs) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.gates: tuple[Tensor, Tensor, Tensor] | None = None
        self.unshifted: dict[str, Tensor] = {}

    def append_gates(self, log_f: Tensor, starts: Tensor | None = None) -> Decay:
        """As `DynamicForgettingLayer.append_gates`, and before `update` too: it reads the length that `update` moves.

        The keys of the result are the whole buffer.
        """
        if self.gates is None:
            batch, _, gates = log_f.shape
            self.gates = (
                self._buffer(log_f, (batch, gates, self.max_cache_len), torch.float64),
                self._buffer(log_f, (batch, gates), torch.float64),
                self._buffer(log_f, (batch, gates), torch.int64),
            )
        past = self.cumulative_length.to(log_f.device)
        all_c, last_c, last_first = self.gates
        c, first = accumulate(log_f, past, (last_c, last_first), starts)
        last = torch.arange(c.shape[-1], device=c.device) + past
        # transformers' exporters hand the cache over in the type of the model.
        all_c.index_copy_(2, last, c.to(all_c.dtype))
        last_c.copy_(c[..., -1])
        last_first.copy_(first[..., -1])
        return Decay(c, all_c, first, last)

    def before(self, name: str) -> Tensor | None:
        """``[B, 1, G, D]`` unshifted ``name`` of the last token (zeros at the start), or None before any token."""
        states = self.unshifted.get(name)
        # The buffer is written in place below, while the caller still reads what was there.
        return None if states is None else states.clone()

    def remember(self, name: str, states: Tensor) -> None:
        """Take in the unshifted ``name`` of new tokens, ``[B, T, G, D]``."""
        if name not in self.unshifted:
            self.unshifted[name] = self._buffer(states, (states.shape[0], 1, *states.shape[2:]), states.dtype)
        self.unshifted[name].copy_(states[:, -1:])

    @staticmethod
    def _buffer(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = torch.zeros(shape, dtype=dtype, device=like.device)
        # A fixed address, so that CUDA graphs take in-place writes; not possible while tracing.
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(buffer)
        return buffer

    def _buffers(self) -> list[Tensor]:
        return [*(self.gates or ()), *self.unshifted.values()]

    def reset(self) -> None:
        super().reset()
        for buffer in self._buffers():
            buffer.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for buffer in self._buffers():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))


def check_cache(cache: Cache, num_layers: int) -> None:
    """Refuse a cache whose layers would drop the gates; give an empty `DynamicCache()` the right layers.

    Raises:
        ValueError: ``past_key_values`` cannot hold what ``num_layers`` layers of FoX need.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ValueError(f"past_key_values must be {_ACCEPTED}, got {type(cache).__name__}")
    if isinstance(cache, DynamicCache) and not layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = DynamicForgettingLayer
    grows = cache.layer_class_to_replicate is DynamicForgettingLayer
    foreign = {type(x).__name__ for x in layers if not isinstance(x, DynamicForgettingLayer | StaticForgettingLayer)}
    if foreign or not (layers or grows):
        raise ValueError(
            f"past_key_values must keep the forget gates: pass {_ACCEPTED}, got {type(cache).__name__} "
            f"of {sorted(foreign) or 'no layers'}"
        )
    if len(layers) < num_layers and not grows:
        raise ValueError(f"past_key_values must have the model's {num_layers} layers, got {len(layers)}")


def layer_of(cache: Cache, layer_idx: int) -> DynamicForgettingLayer | StaticForgettingLayer:
    """The cache's layer for ``layer_idx``, made now if the cache makes its layers as they are needed."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


__all__ = ["DynamicForgettingLayer", "StaticForgettingLayer"]
