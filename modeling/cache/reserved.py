"""The layer of a growing cache while CUDA graphs decode with it.

A captured step reads and writes fixed addresses at a position that it finds on the device. So for the steps of
`generate` a `DynamicForgettingLayer` lends its state to a layer of static buffers with room for tokens to come, and
takes it back, as the beginning of these buffers, when `generate` returns.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...kernels.decay import Decay
from ...kernels.pruning.key_stats import empty_summary
from ...kernels.tiles import PRUNED_KEYS
from ..token_layout import TokenLayout
from .dynamic import DynamicForgettingLayer
from .static import (
    GateSums,
    NewGates,
    StateSizes,
    StaticForgettingLayer,
    extend_summary,
    gates_for_kernel,
    latest_states,
)

if TYPE_CHECKING:
    from ...kernels.backends import Backend


class ReservedForgettingLayer(StaticForgettingLayer):
    """Static buffers that hold what a `DynamicForgettingLayer` held, with room for more.

    Outside of a step it answers as a growing layer, by the number of tokens that the host knows (`tokens`); within one
    (`in_step`) as a static layer, by `cumulative_length` on the device. Whoever runs the step advances both.

    Attributes:
        grown: the layer whose place this one takes.
        tokens: held now.
        in_step: whether the model's forward is running, or being captured.
        gates: as in `StaticForgettingLayer`, and the first key visible from each token, ``[B, Hf, N]`` int32.
        unshifted: by name, ``[B, 64, G, D]`` unshifted states of the last 64 tokens, by index modulo 64.
        oldest: index of the first token whose unshifted states are held.
    """

    is_compileable = False
    is_croppable = True

    # Tokens whose unshifted states are kept; fewer can be cropped.
    window: ClassVar[int] = PRUNED_KEYS

    def __init__(self, grown: DynamicForgettingLayer, room: int, made_for: StateSizes, length: Tensor) -> None:
        """
        Args:
            grown: holds at least one token.
            room: tokens that there is room for, those held included.
            made_for: `state_sizes` of the model's configuration.
            length: int64 scalar on the layer's device; all layers of a cache on it share one.
        """
        super().__init__(room, made_for)
        self.cumulative_length = length
        self.in_step = False
        # Tensors that may be written to in any mode.
        with torch.inference_mode(False), torch.no_grad():
            self._make_buffers(grown)
        self.take(grown)

    def _make_buffers(self, grown: DynamicForgettingLayer) -> None:
        assert grown.gates is not None, "it holds tokens"
        keys, values = grown.keys, grown.values
        self.dtype, self.device = keys.dtype, keys.device
        # Zeros: what is hidden by causality is still multiplied, by a weight of zero.
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.max_cache_len, x.shape[3]) for x in (keys, values))
        c, kv_start = grown.gates
        batch, gates = c.shape[:2]
        shape = batch, gates, self.max_cache_len
        c, last_c = c.new_zeros(shape), c.new_zeros(batch, gates)
        last_kv_start = kv_start.new_zeros(batch, gates, dtype=torch.int64)
        self.gates = GateSums((c, last_c, last_kv_start, kv_start.new_zeros(shape)))
        self.unshifted = {name: x.new_zeros(batch, self.window, *x.shape[2:]) for name, x in grown.unshifted.items()}
        from ...kernels.backends import backend_of

        if backend_of(keys).decode is not None:
            self.summary = empty_summary(c, keys, self.max_cache_len)
        self.batch_size, self.is_initialized = batch, True

    def has_room(self, more: int) -> bool:
        """Whether ``more`` tokens fit."""
        return self.tokens + more <= self.max_cache_len

    def fits(self, grown: DynamicForgettingLayer, more: int) -> bool:
        """Whether `take` can take over from ``grown``, and ``more`` tokens then have room."""
        held = grown._buffers.get("keys")
        return held is not None and held[0] is self.keys and grown.get_seq_length() + more <= self.max_cache_len

    @torch.no_grad()
    def take(self, grown: DynamicForgettingLayer) -> None:
        """Take over the state of ``grown``, whose keys may already be the beginning of these buffers."""
        assert grown.gates is not None and self.gates is not None, "it holds tokens"
        self.grown, self.tokens = grown, grown.get_seq_length()
        c, kv_start = grown.gates
        all_c, last_c, last_kv_start, all_kv_start = self.gates
        for buffer, held, dim in (
            (self.keys, grown.keys, 2),
            (self.values, grown.values, 2),
            (all_c, c, 2),
            (all_kv_start, kv_start, 2),
        ):
            if held.data_ptr() != buffer.data_ptr() or held.stride() != buffer.stride():
                buffer.narrow(dim, 0, self.tokens).copy_(held)
        last_c.copy_(c[..., -1])
        last_kv_start.copy_(kv_start[..., -1])
        self.oldest = 0
        for name, states in grown.unshifted.items():
            count = min(self.window, self.tokens, states.shape[1])
            self.oldest = max(self.oldest, self.tokens - count)
            slots = torch.arange(self.tokens - count, self.tokens, device=self.device).remainder(self.window)
            self.unshifted[name].index_copy_(1, slots, states[:, -count:])
        if self.summary is not None:
            self._take_summary(grown)
        # Let go of what has been copied: a layer at a time, a cache is never held twice.
        grown.keys = grown.values = None
        grown._clear_derived()

    def _take_summary(self, grown: DynamicForgettingLayer) -> None:
        assert self.summary is not None and self.gates is not None
        summary, running = self.summary
        if grown.summary is not None:
            known, known_running = grown.summary
            blocks = -(-grown.summarized // PRUNED_KEYS)
            for held, x in zip((*summary, *running), (*(y[..., :blocks] for y in known), *known_running), strict=True):
                (held.narrow(-1, 0, blocks) if held.ndim == 3 else held).copy_(x)
        begin = grown.summarized
        if begin < self.tokens:
            c, keys = self.gates[0][..., begin : self.tokens], self.keys[:, :, begin : self.tokens]
            if begin == 0:
                empty = empty_summary(c, keys, 0)[1]
                for held, x in zip(running, empty, strict=True):
                    held.copy_(x)
            for held, x in zip(running, extend_summary(summary, running, c, keys, begin), strict=True):
                held.copy_(x)

    @torch.no_grad()
    def give_back(self) -> DynamicForgettingLayer:
        """The layer whose place this one took, holding all tokens so far; nothing but unshifted states is copied."""
        assert self.gates is not None
        grown, count = self.grown, self.tokens
        if count == 0:
            grown.reset()
            return grown
        c, _, _, kv_start = self.gates
        grown.keys, grown.values = (x.narrow(2, 0, count) for x in (self.keys, self.values))
        grown.gates = c.narrow(2, 0, count), kv_start.narrow(2, 0, count)
        grown._buffers = {
            "keys": (self.keys, count),
            "values": (self.values, count),
            "c": (c, count),
            "kv_start": (kv_start, count),
        }
        begin = max(self.oldest, count - self.window)
        slots = torch.arange(begin, count, device=self.device).remainder(self.window)
        grown.unshifted = {name: x.index_select(1, slots) for name, x in self.unshifted.items()}
        if self.summary is not None:
            summary, (log_decays, largest) = self.summary
            grown.summary, grown.summarized = (summary, (log_decays.clone(), largest.clone())), count
        return grown

    def append_gates(
        self, log_f: Tensor, layout: TokenLayout, backend: "Backend", use_decode_kernel: bool = False
    ) -> None:
        assert self.gates is not None
        states, self._states = self._states, {}
        self._new = gates_for_kernel(log_f, layout, backend, use_decode_kernel and self.summary is not None, states)
        if self._new is not None:
            return
        for name, x in states.items():
            self._keep_unshifted(name, x, layout)
        all_c, last_c, last_kv_start, all_kv_start = self.gates
        c, kv_start = layout.accumulate(log_f, backend, self.cumulative_length, (last_c, last_kv_start))
        all_c.index_copy_(2, layout.positions, c)
        all_kv_start.index_copy_(2, layout.positions, kv_start.int())
        last_c.copy_(c[..., -1])
        last_kv_start.copy_(kv_start[..., -1])
        self._new = Decay(c, all_c, kv_start, layout.positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, use_decode_kernel: bool = False
    ) -> tuple[Tensor, Tensor]:
        new = self._new
        assert new is not None and self.gates is not None, "called after append_gates"
        if isinstance(new, NewGates):
            _, last_c, last_kv_start, kv_start = self.gates
            buffers = {"last": (last_c, last_kv_start), "first": kv_start, "length": None}
            self._new = self._append_by_kernel(new, key_states, value_states, **buffers)
            return self.keys, self.values
        self.keys.index_copy_(2, new.last, key_states)
        self.values.index_copy_(2, new.last, value_states)
        self._summarize(new, key_states)
        return self.keys, self.values

    def previous_unshifted(self, name: str, layout: TokenLayout) -> Tensor:
        return self.unshifted[name].index_select(1, layout.slots[:1])

    @property
    def unshifted_buffer(self) -> dict[str, Tensor]:
        return self.unshifted

    def _keep_unshifted(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        count = min(self.window, len(layout.positions))
        held = self.unshifted[name]
        past = held if layout.last_real is None else self.previous_unshifted(name, layout)
        held.index_copy_(1, layout.slots[-count:], latest_states(past, states, layout, count))

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.in_step else self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if self.in_step else self.tokens + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.grown.activate_past_recording()

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """As `DynamicForgettingLayer.crop`, for fewer than `window` tokens.

        What pruning knows of keys is not taken back: it is then a bound of more keys than there are.
        """
        # A tensor in transformers 5.17.
        count = -int(tokens_to_remove)
        if not 0 <= count < self.tokens:
            raise ValueError(
                f"tokens_to_remove must be in (-{self.tokens}, 0] (the cache holds {self.tokens} tokens), got "
                f"{tokens_to_remove}"
            )
        if count == 0:
            return
        # The ring holds the last `window` tokens; those to come overwrite the oldest.
        self.oldest = max(self.oldest, self.tokens - self.window)
        left = self.tokens - count
        if self.unshifted and left <= self.oldest:
            raise RuntimeError(
                f"tokens_to_remove is {tokens_to_remove}, but token shift needs the unshifted states of the token "
                f"before, and only the last {self.tokens - self.oldest} are kept"
            )
        assert self.gates is not None
        c, last_c, last_kv_start, kv_start = self.gates
        last_c.copy_(c[..., left - 1])
        last_kv_start.copy_(kv_start[..., left - 1])
        self.tokens = left

    def reset(self) -> None:
        super().reset()
        self.tokens = self.oldest = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        assert self.gates is not None
        rows = beam_idx.to(self.device)
        summary, running = self.summary or ((), ())
        c, last_c, last_kv_start, kv_start = self.gates
        by_token = [x.narrow(2, 0, self.tokens) for x in (self.keys, self.values, c, kv_start)]
        for held in (*by_token, last_c, last_kv_start, *self.unshifted.values(), *summary, *running):
            held.copy_(held.index_select(0, rows))


__all__ = ["ReservedForgettingLayer"]
