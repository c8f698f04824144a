"""The layer of a growing cache: what a FoX layer keeps beside keys and values.

transformers' exporters take ``vars(layer)`` for the state of a cache, and want it alike after every step. So what is
derived from that state, or lives for one forward pass, is in slots.
"""

import copy
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting

from ...kernels.decay import Decay
from ...kernels.pruning.key_stats import KeySummary, Running, empty_summary, running_before
from ...kernels.tiles import PRUNED_KEYS
from ..token_layout import TokenLayout
from .static import check_gates, decodes_nothing, extend_summary, latest_states
from .view import CacheView

if TYPE_CHECKING:
    from ...kernels.backends import Backend

# See above: what exporters find in ``vars(layer)`` is the state of a cache.
_DYNAMIC_NOT_EXPORTED = ("_buffers", "_new", "_reordered", "expected", "summarized", "summary")

# What `_append` keeps in buffers.
_BUFFERED = ("keys", "values", "c", "kv_start")


class DynamicForgettingLayer(DynamicLayer):
    """Grows with the sequence: in place while its buffers have room, else into buffers an eighth larger.

    Attributes:
        keys, values: ``[B, G, T, D]``.
        gates: running sum ``c`` of log gates at each key, ``[B, Hf, T]`` float64, and the first key visible from each
            token, ``[B, Hf, T]`` int32; None before any token.
        unshifted: by name, ``[B, W, G, D]`` keys and values of the latest tokens before token shift; ``W`` is up to
            twice `rollback_window`.
        summary: of the first `summarized` keys, by block and in total; None before the decode kernels need it.
        expected: tokens that are known to come, those held included: the first buffer that is made has room for them.
    """

    __slots__ = _DYNAMIC_NOT_EXPORTED

    keys: Any
    values: Any
    summary: tuple[KeySummary, Running] | None
    summarized: int
    expected: int
    is_initialized: bool
    # By name, a larger tensor that begins with what is held, and how many of its tokens are taken.
    _buffers: dict[str, tuple[Tensor, int]]
    _reordered: bool
    _new: Decay | None

    # Token shift needs the unshifted key before the next token. Keeping so many makes any shorter rollback exact, for
    # the memory of twice as many tokens; a longer one must be announced by `activate_past_recording`.
    rollback_window: ClassVar[int] = 64
    # Tokens by which a buffer grows at least.
    least_growth: ClassVar[int] = 256

    def __new__(cls, *args: Any, **kwargs: Any) -> "DynamicForgettingLayer":
        # Not in __init__, which exporters do not call.
        layer = super().__new__(cls)
        layer._clear_derived()
        return layer

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.gates: tuple[Tensor, Tensor] | None = None
        self.unshifted: dict[str, Tensor] = {}
        self.record_past = False
        self._clear_derived()

    def _clear_derived(self) -> None:
        self.summary, self.summarized = None, 0
        self._buffers, self._reordered, self._new = {}, False, None
        self.expected = 0

    def __deepcopy__(self, memo: dict) -> "DynamicForgettingLayer":
        """A copy without the unused part of buffers, each tensor contiguous, as a traced step makes them."""
        layer = copy.copy(self)
        layer._clear_derived()
        layer.unshifted = {name: _compact(x) for name, x in self.unshifted.items()}
        if self.gates is not None:
            layer.gates = _compact(self.gates[0]), _compact(self.gates[1])
        if self.is_initialized:
            layer.keys, layer.values = _compact(self.keys), _compact(self.values)
        return layer

    @property
    def batch_size(self) -> int | None:
        """How many sequences it holds; None before any token."""
        return self.keys.shape[0] if self.get_seq_length() else None

    def signature_for(self, tokens: int) -> Hashable:
        """What, beside `state`, decides how it takes in a prompt or a chunk of so many tokens; None where more does."""
        length = self.get_seq_length()
        is_whole = (self.gates is None) == (length == 0) and self.summary is None
        if not is_whole or self.record_past or self._reordered or not decodes_nothing(length, tokens):
            return None
        # Else a tensor may lie behind what is held.
        fits = all(taken == length for _, taken in self._buffers.values())
        return ("growing", self.expected) if fits else None

    def state(self, names: Collection[str]) -> tuple[Tensor | None, ...]:
        """Keys, values and gates, unshifted states by ``names``, and the buffers that the former begin."""
        keys, values = (self.keys, self.values) if self.is_initialized else (None, None)
        buffers = (self._buffers.get(name, (None, 0))[0] for name in _BUFFERED)
        return (keys, values, *(self.gates or (None, None)), *map(self.unshifted.get, names), *buffers)

    def take_state(self, state: Sequence[Any], names: Collection[str]) -> None:
        """Hold the `state` that taking in a prompt has left, there or in a call that did the same."""
        self.keys, self.values, c, kv_start, *rest = state
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.gates = c, kv_start
        self.unshifted = dict(zip(names, rest, strict=False))
        for name, x in zip(_BUFFERED, rest[len(names) :], strict=True):
            # In place: a shallow copy of this layer learns from it that the room is taken.
            if x is None:
                self._buffers.pop(name, None)
            else:
                self._buffers[name] = x, c.shape[-1]

    def append_gates(
        self, log_f: Tensor, layout: TokenLayout, backend: "Backend", use_decode_kernel: bool = False
    ) -> None:
        """Take in the gates of new tokens, before their keys and values.

        Args:
            log_f: ``[B, T, Hf]`` log gates of the new tokens; those of padding do not count.
            layout: of the new tokens.
            backend: that of the layer's queries.
            use_decode_kernel: whether the decode kernels take these queries; they may take in the gates with the keys.
        """
        past, carry = 0, None
        if self.gates is not None:
            old_c, old_kv_start = self.gates
            past, carry = old_c.shape[-1], (old_c[..., -1], old_kv_start[..., -1])
        c, kv_start = layout.accumulate(log_f, backend, past, carry)
        if self.gates is None:
            self.gates = c, kv_start.int()
        else:
            self.gates = self._append("c", old_c, c, -1), self._append("kv_start", old_kv_start, kv_start.int(), -1)
        self._new = Decay(c, self.gates[0], kv_start, layout.positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, use_decode_kernel: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`, for keys whose gates `append_gates` has taken in.

        Raises:
            ValueError: it has not, since the keys do not come from a model's forward.
        """
        check_gates(self._new)
        if not self.is_initialized:
            # As `lazy_initialization`, without tensors that would not be read.
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = None
            self.is_initialized = True
        if self.keys is None or self.keys.numel() == 0:
            # A graph is traced for the strides of its inputs, so a step must return the strides that it takes.
            if is_torchdynamo_compiling():
                key_states, value_states = key_states.contiguous(), value_states.contiguous()
            self.keys, self.values = key_states, value_states
        else:
            self.keys = self._append("keys", self.keys, key_states, -2)
            self.values = self._append("values", self.values, value_states, -2)
        self._reordered = False
        return self.keys, self.values

    def decay(self, use_decode_kernel: bool, own_block: bool = False) -> tuple[Decay, CacheView | None]:
        """The decay of the tokens taken in last over all keys; with ``use_decode_kernel`` also what these kernels read.

        Args:
            use_decode_kernel: whether the decode kernels take these queries.
            own_block: whether what they read includes the block of 64 keys of the last of them.
        """
        decay, self._new = self._new, None
        assert decay is not None, "called once after append_gates and update"
        if not use_decode_kernel or is_torchdynamo_compiling():
            return decay, None
        length = decay.key.shape[-1]
        # No query drops its own block. So a step seldom has to summarize, and a prompt, which reads its keys, never.
        summarized = length if own_block else (length - 1) // PRUNED_KEYS * PRUNED_KEYS
        return decay, CacheView(self._summarize(summarized))

    def _append(self, name: str, held: Tensor, new: Tensor, dim: int) -> Tensor:
        """``held`` followed by ``new``, written behind it where ``held`` is the beginning of a buffer."""
        length = held.shape[dim]
        total = length + new.shape[dim]
        # Autograd keeps what was returned before, and beam search makes new tensors at each step.
        if torch.is_grad_enabled() or is_torchdynamo_compiling() or self._reordered or held.dtype != new.dtype:
            self._buffers.pop(name, None)
            return torch.cat([held, new], dim=dim)
        buffer, taken = self._buffers.get(name, (held, 0))
        # After a crop, or in a copy of this layer, another tensor may still read what lies behind ``held``.
        if taken != length or not _is_beginning(held, buffer, dim) or buffer.shape[dim] < total:
            shape = list(held.shape)
            shape[dim] = max(total + max(self.least_growth, total // 8), self.expected)
            buffer = held.new_empty(shape)
            buffer.narrow(dim, 0, length).copy_(held)
        buffer.narrow(dim, length, new.shape[dim]).copy_(new)
        self._buffers[name] = buffer, total
        return buffer.narrow(dim, 0, total)

    def _summarize(self, length: int) -> KeySummary:
        """The summary of the first ``length`` keys at least."""
        assert self.gates is not None
        c, keys, start = self.gates[0].detach(), self.keys.detach(), self.summarized
        summary, running = self.summary or empty_summary(c, keys, 0)
        if length > start:
            missing = -(-length // PRUNED_KEYS) - summary.c.shape[-1]
            if missing > 0:
                more = max(missing, summary.c.shape[-1] // 8, self.least_growth // PRUNED_KEYS)
                summary = KeySummary(*(nn.functional.pad(x, (0, more)) for x in summary))
            running = extend_summary(summary, running, c[..., start:length], keys[..., start:length, :], start)
            self.summarized = length
        self.summary = summary, running
        return summary

    def previous_unshifted(self, name: str, layout: TokenLayout) -> Tensor | None:
        """``[B, W, G, D]`` unshifted ``name`` of the last token and some before it, or None at the start."""
        states = self.unshifted.get(name)
        return None if states is None or states.shape[1] == 0 else states

    @property
    def unshifted_buffer(self) -> dict[str, Tensor]:
        """By name, ``[B, 64, G, D]`` unshifted states by index modulo 64, where a layer keeps them so; else empty."""
        return {}

    def append_unshifted(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        """Keep the unshifted ``name`` of new tokens, ``[B, T, G, D]``."""
        is_long = states.shape[1] > 2 * self.rollback_window and layout.last_real is None and not self.record_past
        if is_long and not is_torchdynamo_exporting():
            # Of long prompts none of the past.
            self.unshifted = self.unshifted | {name: states[:, -self.rollback_window :].clone()}
            return
        past, exporting = self.previous_unshifted(name, layout), is_torchdynamo_exporting()
        count = states.shape[1] + (1 if past is None else past.shape[1])
        # Trimmed only at twice the window, so that a decoding step seldom copies it.
        trims = not exporting and not self.record_past and count > 2 * self.rollback_window
        if past is None:
            # Not read where the last tokens are new and none of them is padding: no zeros for those.
            unread = trims and layout.last_real is None
            past = states[:, :1] if unread else states.new_zeros(states.shape[0], 1, *states.shape[2:])
        if exporting:
            # The same size at any length, and not one, which would be specialized. Exported programs do not crop.
            kept = latest_states(past, states, layout, 2)
        elif trims:
            kept = latest_states(past, states, layout, self.rollback_window).clone()
        else:
            kept = latest_states(past, states, layout, count)
        # Not in place: a shallow copy of this layer may have the same dictionary.
        self.unshifted = self.unshifted | {name: kept}

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
                c, kv_start = self.gates
                self.gates = c[..., :-count], kv_start[..., :-count]
            self.unshifted = {name: states[:, :-count] for name, states in self.unshifted.items()}
            self._rewind_summary(length - count)
        if self.record_past:
            window = self.rollback_window
            self.unshifted = {name: states[:, -window:].clone() for name, states in self.unshifted.items()}

    def _rewind_summary(self, length: int) -> None:
        """Make the summary one of no more than the first ``length`` keys: those of their whole blocks."""
        if self.summary is None or length >= self.summarized:
            return
        summary, _ = self.summary
        blocks = length // PRUNED_KEYS
        self.summary, self.summarized = (summary, running_before(summary, blocks)), blocks * PRUNED_KEYS

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def offload(self) -> None:
        super().offload()
        for name in ("keys", "values"):
            self._buffers.pop(name, None)

    def _select_batch(self, select) -> None:
        """Apply ``select`` to everything whose first dimension is the batch."""
        self._buffers.clear()
        self._reordered = True
        if self.gates is not None:
            c, kv_start = self.gates
            self.gates = select(c), select(kv_start)
        self.unshifted = {name: select(states) for name, states in self.unshifted.items()}
        if self.summary is not None:
            summary, (log_decays, largest) = self.summary
            self.summary = KeySummary(*map(select, summary)), (select(log_decays), select(largest))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_batch(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices, ...])


def _compact(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _is_beginning(x: Tensor, whole: Tensor, dim: int) -> bool:
    """Whether ``x`` is the first part of ``whole`` along ``dim``, and ``whole`` may be written to."""
    same_place = x.data_ptr() == whole.data_ptr() and x.stride() == whole.stride() and x.dtype == whole.dtype
    same_size = all(a == b for i, (a, b) in enumerate(zip(x.shape, whole.shape, strict=True)) if i != x.ndim + dim)
    writable = torch.is_inference_mode_enabled() or not whole.is_inference()
    return same_place and same_size and writable


__all__ = ["DynamicForgettingLayer"]
