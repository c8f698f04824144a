"""The layer of a static cache, for compiled decoding and exported programs; and what all kinds of layers share."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting

from ...kernels.decay import Decay
from ...kernels.operators import may_launch
from ...kernels.pruning.key_stats import KeySummary, Running, empty_summary
from ...kernels.tiles import LARGEST_DECODED_QUERIES
from ..token_layout import TokenLayout
from ..versions import CACHE
from .view import CacheView

if TYPE_CHECKING:
    from ...kernels.backends import Backend
    from ..configuration_fox import FoxConfig


# See `dynamic`: what exporters find in ``vars(layer)`` is the state of a cache.
_STATIC_NOT_EXPORTED = ("_new", "_states", "summary", "was_reset")


class GateSums(tuple):
    """Tensors, of which floating-point ones are converted to float64.

    transformers' exporters rebuild a cache with all tensors in the model's dtype, in which a sum over a long context
    cannot resolve a gate.
    """

    def __new__(cls, tensors: Iterable[Tensor]) -> "GateSums":
        return super().__new__(cls, [x.double() if x.is_floating_point() else x for x in tensors])


StateSizes = tuple[int, int, tuple[str, ...]]
"""Gates and key/value heads of a layer (on all ranks), and which of ``key`` and ``value`` go through token shift."""


def state_sizes(config: "FoxConfig") -> StateSizes:
    """Sizes of a layer's state, from the configuration of its model."""
    switches = {"key": config.use_key_shift, "value": config.use_value_shift}
    # Also of a configuration that is not valid: it is read before it is checked.
    heads = cast(int, config.num_key_value_heads)
    return config.num_forget_gates, heads, tuple(name for name, used in switches.items() if used)


class NewGates(NamedTuple):
    """Gates that `append_gates` leaves to `update`, which takes them in by one kernel with keys and values.

    Attributes:
        log_f, layout: as given to `append_gates`.
        append: that of the `Backend`.
        states: by name, the unshifted states that `append_unshifted` was given.
    """

    log_f: Tensor
    layout: TokenLayout
    append: Callable[..., tuple[Tensor, Tensor]]
    states: dict[str, Tensor]

    def unshifted(self, held: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of ``append`` that keep `states` in the buffers ``held``."""
        states = {f"{name}_states": (x, held[name]) for name, x in self.states.items()}
        return states | ({"last_real": self.layout.last_real} if states else {})


def gates_for_kernel(
    log_f: Tensor, layout: TokenLayout, backend: "Backend", use_decode_kernel: bool, states: dict[str, Tensor]
) -> NewGates | None:
    """The gates, and unshifted ``states``, of a decoding step, if a kernel is to take them in.

    Compiled steps take the operators, which torch.compile fuses with what is around them.
    """
    if not use_decode_kernel or backend.append is None or not may_launch(log_f):
        return None
    return NewGates(log_f, layout, backend.append, states)


def extend_summary(summary: KeySummary, running: Running, c: Tensor, k: Tensor, position: int | Tensor) -> Running:
    """`kernels.pruning.key_stats.extend_summary`, by kernels where they run."""
    from ...kernels.backends import backend_of

    return backend_of(k).extend_summary(summary, running, c, k, position)


def decodes_nothing(held: int, tokens: int) -> bool:
    """Whether so many tokens after those ``held`` are none that the kernels of decoding take, whatever the heads."""
    return held == 0 or tokens > LARGEST_DECODED_QUERIES


def check_gates(new: Decay | NewGates | None) -> None:
    """Refuse keys without gates: ``new`` is what `append_gates` has left, or None.

    Raises:
        ValueError: there are none.
    """
    if new is None:
        raise ValueError(
            f"{CACHE} takes in keys and values only in the model's forward, which knows their forget gates: "
            f"instead of calling update, call model(input_ids, {CACHE}=...)"
        )


def latest_states(past: Tensor, states: Tensor, layout: TokenLayout, count: int) -> Tensor:
    """The last ``count`` of ``past`` followed by ``states``, ``[B, any, G, D]``; padding repeats the last real state.

    Args:
        past: of earlier tokens, at least one.
        states: of the ``T`` tokens of ``layout``.
        layout: of the tokens of ``states``.
        count: at least 1. No more than the tokens of both.
    """
    if is_torchdynamo_exporting():
        # An exported program takes any number of tokens, and must not be specialized on one side of ``count``.
        new = _repeat_real(past, states, states, layout)
        return torch.cat([past, new], dim=1)[:, -count:]
    earlier = count - states.shape[1]
    new = _repeat_real(past, states, states[:, -count:], layout)
    return new if earlier <= 0 else torch.cat([past[:, past.shape[1] - earlier :], new], dim=1)


def _repeat_real(past: Tensor, states: Tensor, new: Tensor, layout: TokenLayout) -> Tensor:
    """``new``, the last of ``states``, with the last real state in place of padding."""
    if layout.last_real is None:
        return new
    source = layout.last_real[:, -new.shape[1] :, None, None]
    return torch.where(source < 0, past[:, -1:], states.gather(1, source.clamp(min=0).expand_as(new)))


class StaticForgettingLayer(StaticLayer):
    """Buffers of a fixed length, written in place, for compiled decoding.

    Attributes:
        gates: running sum of log gates at each key, ``[B, Hf, max_cache_len]`` float64 (keys to come are hidden by
            causality), that at the last token, ``[B, Hf]`` float64, and the first key visible from the last token,
            ``[B, Hf]`` int64; None before any token.
        unshifted: by name, ``[B, 1, G, D]`` key and value of the last token before token shift.
        summary: of the keys, and over all of them; None before any token and where no kernels run.
    """

    __slots__ = _STATIC_NOT_EXPORTED

    # transformers' static layers can be cropped from 5.24 on: their length is set back.
    is_croppable = False

    summary: tuple[KeySummary, Running] | None
    _new: Decay | NewGates | None
    # Whether the host knows that the buffers hold nothing: packed sequences may begin, and a sink stand for a token.
    was_reset: bool
    # Unshifted states of new tokens, by name, until `append_gates`.
    _states: dict[str, Tensor]

    def __new__(cls, *args: Any, **kwargs: Any) -> "StaticForgettingLayer":
        # Not in __init__, which exporters do not call.
        layer = super().__new__(cls)
        layer.summary = layer._new = None
        layer._states, layer.was_reset = {}, False
        return layer

    def __init__(self, max_cache_len: int, made_for: StateSizes) -> None:
        """
        Args:
            max_cache_len: tokens there is room for.
            made_for: `state_sizes` of the model's configuration.
        """
        super().__init__(max_cache_len=max_cache_len)
        self.made_for = made_for
        self.gates: GateSums | None = None
        self.unshifted: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make all buffers, for keys and values like these, ``[B, G, any, D]``."""
        super().lazy_initialization(key_states, value_states)
        batch, heads = key_states.shape[:2]
        all_gates, all_heads, shifted = self.made_for
        # Of this rank's heads; a gate shared by all heads is on every rank.
        gates = heads * all_gates // all_heads or 1
        c = key_states.new_zeros(batch, gates, self.max_cache_len, dtype=torch.float64)
        last_c = key_states.new_zeros(batch, gates, dtype=torch.float64)
        last_kv_start = key_states.new_zeros(batch, gates, dtype=torch.int64)
        self.gates = GateSums((c, last_c, last_kv_start))
        states = {"key": key_states, "value": value_states}
        self.unshifted = {name: states[name].new_zeros(batch, 1, heads, states[name].shape[-1]) for name in shifted}
        from ...kernels.backends import backend_of

        if backend_of(key_states).decode is not None:
            self.summary = empty_summary(c, key_states, self.max_cache_len)
        # So that CUDA graphs take in-place writes; not possible while tracing.
        if not is_torchdynamo_compiling():
            for buffer in self._buffers():
                torch._dynamo.mark_static_address(buffer)

    def make_buffers(self, like: Tensor, heads: int, head_dim: int) -> None:
        """Make all buffers before the first tokens, whose keys are of ``heads`` of ``head_dim`` on this rank.

        Args:
            like: of the batch, dtype and device of the keys.
        """
        states = like.new_empty(()).expand(len(like), heads, 1, head_dim)
        self.lazy_initialization(states, states)
        self.was_reset = True

    def signature_for(self, tokens: int) -> Hashable:
        """As of `DynamicForgettingLayer`; its buffers, once they are made, are all that it holds."""
        if tokens <= LARGEST_DECODED_QUERIES or (self.is_initialized and self.summary is None):
            return None
        return ("static", self.was_reset or not self.is_initialized)

    def state(self, names: Collection[str]) -> tuple[Tensor, ...]:
        """All buffers."""
        return (self.keys, self.values, self.cumulative_length, *self._buffers())

    def take_state(self, state: Sequence[Any], names: Collection[str]) -> None:
        """Note that they have taken in a prompt."""
        self.was_reset = False

    def append_gates(
        self, log_f: Tensor, layout: TokenLayout, backend: "Backend", use_decode_kernel: bool = False
    ) -> None:
        """As `DynamicForgettingLayer.append_gates`: before `update`, which moves the length that is read here."""
        assert self.gates is not None, "called after lazy_initialization"
        states, self._states = self._states, {}
        self._new = gates_for_kernel(log_f, layout, backend, use_decode_kernel and self.summary is not None, states)
        if self._new is not None:
            return
        for name, x in states.items():
            self._keep_unshifted(name, x, layout)
        all_c, last_c, last_kv_start = self.gates
        if is_torchdynamo_exporting():
            last_c, last_kv_start = self._unless_restarted(last_c), self._unless_restarted(last_kv_start)
        carry = last_c, last_kv_start
        c, kv_start = layout.accumulate(log_f, backend, self.cumulative_length, carry)
        all_c.index_copy_(2, layout.positions, c)
        for held, new in zip(self.gates[1:], (c, kv_start), strict=True):
            held.copy_(new[..., -1])
        self._new = Decay(c, all_c, kv_start, layout.positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, use_decode_kernel: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `DynamicForgettingLayer.update`."""
        new = self._new
        check_gates(new)
        holds_none, self.was_reset = self.was_reset, False
        if isinstance(new, NewGates):
            self._new = self._append_by_kernel(new, key_states, value_states)
            return self.keys, self.values
        keys, values = super().update(key_states, value_states)
        self._summarize(new, key_states, 0 if holds_none else None)
        return keys, values

    def _summarize(self, new: Decay | None, key_states: Tensor, position: int | None = None) -> None:
        """Take in new keys; ``position`` is the index of the first of them, if the host knows it."""
        if self.summary is not None and new is not None:
            summary, running = self.summary
            tokens = new.query, key_states.detach(), new.last[0] if position is None else position
            for held, x in zip(running, extend_summary(summary, running, *tokens), strict=True):
                held.copy_(x)

    def _append_by_kernel(self, new: NewGates, key_states: Tensor, value_states: Tensor, **buffers: Any) -> Decay:
        """Take in the tokens of a decoding step.

        Args:
            new: their gates.
            key_states, value_states: ``[B, G, T, D]``.
            buffers: beside or instead of those of this class, as `Backend.append` takes them.
        """
        assert self.gates is not None and self.summary is not None, "asked in append_gates"
        all_c, last_c, last_kv_start = self.gates[:3]
        summary, running = self.summary
        given = {"keys": self.keys, "values": self.values, "c": all_c, "last": (last_c, last_kv_start)}
        given |= {"summary": summary, "running": running, "length": self.cumulative_length, **buffers}
        given |= new.unshifted(self.unshifted)
        layout = new.layout
        c, kv_start = new.append(key_states, value_states, new.log_f, layout.positions, layout.real, **given)
        return Decay(c, all_c, kv_start, layout.positions)

    def decay(self, use_decode_kernel: bool, own_block: bool = False) -> tuple[Decay, CacheView | None]:
        """As `DynamicForgettingLayer.decay`; the keys are the whole buffer."""
        decay, self._new = self._new, None
        assert isinstance(decay, Decay), "called once after append_gates and update"
        if not use_decode_kernel or self.summary is None:
            return decay, None
        return decay, CacheView(self.summary[0])

    def previous_unshifted(self, name: str, layout: TokenLayout) -> Tensor:
        """``[B, 1, G, D]`` unshifted ``name`` of the last token, zeros at first; `append_unshifted` overwrites it."""
        state = self.unshifted[name]
        return self._unless_restarted(state) if is_torchdynamo_exporting() else state

    @property
    def unshifted_buffer(self) -> dict[str, Tensor]:
        """As of `DynamicForgettingLayer`."""
        return {}

    def append_unshifted(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        """Keep the unshifted ``name`` of the last token of ``[B, T, G, D]``; seen to by `append_gates`."""
        if self.summary is None or is_torchdynamo_compiling():
            self._keep_unshifted(name, states, layout)
        else:
            self._states[name] = states

    def _keep_unshifted(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        held = self.unshifted[name]
        held.copy_(latest_states(held, states, layout, 1))

    def _unless_restarted(self, state: Tensor) -> Tensor:
        """``state`` of the last token, or zero if there is none.

        An exported program begins a new sequence by setting the length back to 0: it cannot call `reset`.
        """
        return state.masked_fill(self.cumulative_length == 0, 0)

    def _buffers(self) -> list[Tensor]:
        summary, running = self.summary or ((), ())
        return [*(self.gates or ()), *self.unshifted.values(), *summary, *running]

    def get_seq_length(self) -> Tensor | int:
        return 0 if self.was_reset else super().get_seq_length()

    def reset(self) -> None:
        super().reset()
        self.was_reset = True
        for buffer in self._buffers():
            buffer.zero_()
        if self.summary is not None:
            self.summary[1][0].fill_(float("-inf"))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the gates and unshifted states of earlier tokens are not kept.

        Raises:
            NotImplementedError: there is something to remove.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                "a static cache of FoX cannot be cropped: use DynamicCache(config=model.config), or FoxPagedCache"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for buffer in self._buffers():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))


__all__ = ["StaticForgettingLayer"]
