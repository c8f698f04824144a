"""What a FoX layer remembers beside keys and values, as cache layers of transformers' own caches.

Decoding needs the running sum of log gates of every key, the first key that is still visible, with token shift the
last unshifted key and value, and, where kernels run, what they need to find the keys worth reading
(`..kernels.summary`). transformers' caches hold one layer object per model layer and build them by layer type; the two
classes here are what they build for a `FoxConfig`, so that ``DynamicCache(config=...)``, ``StaticCache(config=...)``
and ``generate`` work as for any model. Every operation moves the extra state too, except offloading: it is read before
the layer's turn to be fetched back, and is a twentieth of the keys and values. Static layers have the operations of
transformers' `StaticLayer`: no cropping, repeating or selecting. A third kind, which frees memory, is in
`paged_cache_fox`.

transformers' exporters take for the state of a cache what ``vars(layer)`` holds, and want it alike after every step.
What is derived from it, or lives for one forward pass, is in slots.
"""

import copy
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    DynamicLayer,
)
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting

from ...kernels.decay import Decay, accumulate
from ...kernels.pruning.key_stats import KeySummary, Running, empty_summary, extend_summary, running_before
from ...kernels.tiles import PRUNED_KEYS
from ..configuration_fox import LAYER_TYPE, FoxConfig
from ..token_layout import TokenLayout
from ..versions import CACHE
from .paged import FoxPagedCache, PagedForgettingLayer
from .static import StaticForgettingLayer, check_gates, state_sizes
from .view import CacheView

if TYPE_CHECKING:
    from ...kernels.backends import Backend

_ACCEPTED = (
    "DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=...) "
    "or FoxPagedCache(model.config, max_cache_len=...)"
)

_NOT_EXPORTED = ("_new", "_reordered", "_rooms", "summarized", "summary")


class DynamicForgettingLayer(DynamicLayer):
    """Grows with the sequence, in place while there is room and by an eighth when there is none.

    Attributes:
        keys, values: ``[B, G, T, D]``.
        gates: ``c``, the running sum of log gates at each key, ``[B, Hf, T]`` float64, and ``first``, the first key
            visible from each token, ``[B, Hf, T]`` int32; None before any token.
        unshifted: by name, ``[B, W, G, D]`` keys and values of the latest tokens before token shift; ``W`` is up to
            twice `rollback_window`.
        summary: of the first `summarized` keys, and over them; None before the kernels of decoding need it.
    """

    __slots__ = _NOT_EXPORTED

    keys: Any
    values: Any
    summary: tuple[KeySummary, Running] | None
    summarized: int
    # Larger tensors that begin with what is held, and how much of them is taken.
    _rooms: dict[str, tuple[Tensor, int]]
    _reordered: bool
    _new: Decay | None

    # Token shift needs the unshifted key before the next token. Keeping this many of them makes any shorter rollback
    # exact, at the memory of 2 x this many tokens; a longer one must be announced by `activate_past_recording`.
    rollback_window: ClassVar[int] = 64
    # Least number of tokens to make room for.
    least_room: ClassVar[int] = 256

    def __new__(cls, *args: Any, **kwargs: Any) -> "DynamicForgettingLayer":
        # Not in __init__: exporters make a layer without it.
        layer = super().__new__(cls)
        layer._forget_derived()
        return layer

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.gates: tuple[Tensor, Tensor] | None = None
        self.unshifted: dict[str, Tensor] = {}
        self.record_past = False
        self._forget_derived()

    def _forget_derived(self) -> None:
        self.summary, self.summarized = None, 0
        self._rooms, self._reordered, self._new = {}, False, None

    def __deepcopy__(self, memo: dict) -> "DynamicForgettingLayer":
        """A copy of what is held without the room behind it, each tensor contiguous, as a traced step makes them."""
        layer = copy.copy(self)
        layer._forget_derived()
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

    def append_gates(self, log_f: Tensor, layout: TokenLayout, backend: "Backend") -> None:
        """Take in the gates of new tokens, before their keys and values.

        Args:
            log_f: ``[B, T, Hf]`` log gates of the new tokens.
            layout: where they stand.
            backend: that of the layer's queries.
        """
        past, carry = 0, None
        if self.gates is not None:
            old_c, old_first = self.gates
            past, carry = old_c.shape[-1], (old_c[..., -1], old_first[..., -1])
        c, first = accumulate(log_f, past, carry, layout.starts, backend.sum_gates)
        if self.gates is None:
            self.gates = c, first.int()
        else:
            self.gates = self._join("c", old_c, c, -1), self._join("first", old_first, first.int(), -1)
        self._new = Decay(c, self.gates[0], first, layout.positions)

    def update(self, key_states: Tensor, value_states: Tensor, few: bool = False) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`, for keys whose gates `append_gates` has taken in.

        Raises:
            ValueError: it has not: someone else than the model hands over keys.
        """
        check_gates(self._new)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.numel() == 0:
            # A graph is traced for the strides of what it is given, which must be those of what it returns.
            traced = is_torchdynamo_compiling()
            self.keys, self.values = (x.contiguous() if traced else x for x in (key_states, value_states))
        else:
            self.keys = self._join("keys", self.keys, key_states, -2)
            self.values = self._join("values", self.values, value_states, -2)
        self._reordered = False
        return self.keys, self.values

    def decay(self, few: bool, own_block: bool = False) -> tuple[Decay, CacheView | None]:
        """The decay of the tokens taken in last over all keys, and with ``few`` what the kernels of decoding read.

        Args:
            few: whether these kernels take so few queries.
            own_block: whether what they read includes the block of 64 keys of the last of them.
        """
        decay, self._new = self._new, None
        assert decay is not None, "called once after append_gates and update"
        if not few or is_torchdynamo_compiling():
            return decay, None
        length = decay.key.shape[-1]
        # No query drops its own block. So a step seldom has to summarize, and a prompt, which reads its keys, never.
        summarized = length if own_block else (length - 1) // PRUNED_KEYS * PRUNED_KEYS
        return decay, CacheView(self._summarize(summarized))

    def _join(self, name: str, held: Tensor, new: Tensor, dim: int) -> Tensor:
        """``held`` followed by ``new``: written behind it where it is the beginning of a larger tensor of our own."""
        length = held.shape[dim]
        total = length + new.shape[dim]
        # Autograd keeps what was returned before; and beam search brings new tensors at each step.
        if torch.is_grad_enabled() or is_torchdynamo_compiling() or self._reordered or held.dtype != new.dtype:
            self._rooms.pop(name, None)
            return torch.cat([held, new], dim=dim)
        room, taken = self._rooms.get(name, (held, 0))
        # What lies behind, after a crop or in a copy of this layer, may still be looked at by someone.
        if taken != length or not _is_beginning(held, room, dim) or room.shape[dim] < total:
            shape = list(held.shape)
            shape[dim] = total + max(self.least_room, total // 8)
            room = held.new_empty(shape)
            room.narrow(dim, 0, length).copy_(held)
        room.narrow(dim, length, new.shape[dim]).copy_(new)
        self._rooms[name] = room, total
        return room.narrow(dim, 0, total)

    def _summarize(self, length: int) -> KeySummary:
        """The summary of the first ``length`` keys at least."""
        assert self.gates is not None
        c, keys, start = self.gates[0].detach(), self.keys.detach(), self.summarized
        summary, running = self.summary or empty_summary(c, keys, 0)
        if length > start:
            missing = -(-length // PRUNED_KEYS) - summary.c.shape[-1]
            if missing > 0:
                more = max(missing, summary.c.shape[-1] // 8, self.least_room // PRUNED_KEYS)
                summary = KeySummary(*(nn.functional.pad(x, (0, more)) for x in summary))
            running = extend_summary(summary, running, c[..., start:length], keys[..., start:length, :], start)
            self.summarized = length
        self.summary = summary, running
        return summary

    def before(self, name: str, layout: TokenLayout) -> Tensor | None:
        """``[B, W, G, D]`` unshifted ``name`` of the last token and some before it, or None at the start."""
        states = self.unshifted.get(name)
        return None if states is None or states.shape[1] == 0 else states

    def remember(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        """Take in the unshifted ``name`` of new tokens, ``[B, W + T, G, D]``: behind what `before` gave."""
        if is_torchdynamo_exporting():
            # As many at any length: two, since a size of one would be a case of its own. Nobody crops there.
            states = states[:, -2:]
        # Trimmed at twice the window, so that a step of decoding seldom copies it once more.
        elif not self.record_past and states.shape[1] > 2 * self.rollback_window:
            states = states[:, -self.rollback_window :].clone()
        # Not in place: a shallow copy of this layer may have the same dictionary.
        self.unshifted = self.unshifted | {name: states}

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
        self._forget()

    def offload(self) -> None:
        super().offload()
        for name in ("keys", "values"):
            self._rooms.pop(name, None)

    def _select_batch(self, select) -> None:
        """Apply ``select`` to everything whose first dimension is the batch."""
        self._rooms.clear()
        self._reordered = True
        if self.gates is not None:
            c, first = self.gates
            self.gates = select(c), select(first)
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


def register_layer_type(config: FoxConfig) -> str:
    """Have transformers' caches build layers for ``config``; returns the layer type that they know them by.

    A type is all that they tell a layer, and a static one has to know how much state there will be.
    """
    sizes = state_sizes(config)
    gates, heads, shifted = sizes
    layer_type = "-".join(map(str, (LAYER_TYPE, gates, heads, *shifted)))
    if layer_type not in STATIC_LAYER_TYPE_MAPPING:
        DYNAMIC_LAYER_TYPE_MAPPING[layer_type] = DynamicForgettingLayer
        STATIC_LAYER_TYPE_MAPPING[layer_type] = functools.partial(StaticForgettingLayer, made_for=sizes)
    return layer_type


ForgettingLayer = DynamicForgettingLayer | StaticForgettingLayer | PagedForgettingLayer
_LAYERS = (DynamicForgettingLayer, StaticForgettingLayer, PagedForgettingLayer)


def _compact(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _is_beginning(x: Tensor, whole: Tensor, dim: int) -> bool:
    """Whether ``x`` is the first part of ``whole`` along ``dim``, and ``whole`` may be written to."""
    same_place = x.data_ptr() == whole.data_ptr() and x.stride() == whole.stride() and x.dtype == whole.dtype
    same_size = all(a == b for i, (a, b) in enumerate(zip(x.shape, whole.shape, strict=True)) if i != x.ndim + dim)
    writable = torch.is_inference_mode_enabled() or not whole.is_inference()
    return same_place and same_size and writable


def check_cache(cache: Cache, config: FoxConfig, batch: int, least: int | None = None) -> None:
    """Refuse a cache that does not fit; give an empty `DynamicCache()` the right layers.

    Args:
        cache: what the caller gave.
        config: of the model.
        batch: number of sequences.
        least: layers that the cache must have, for a layer without its model; by default those of the model.

    Raises:
        ValueError: the cache would drop the gates, is for other layers or heads, or holds another number of sequences.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ValueError(f"{CACHE} must be {_ACCEPTED}, got {type(cache).__name__}")
    if isinstance(cache, DynamicCache) and not layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = DynamicForgettingLayer
    grows = cache.layer_class_to_replicate is DynamicForgettingLayer
    foreign = {type(x).__name__ for x in layers if not isinstance(x, _LAYERS)}
    if foreign or not (layers or grows):
        raise ValueError(
            f"{CACHE} must keep the forget gates: pass {_ACCEPTED}, got {type(cache).__name__} "
            f"of {sorted(foreign) or 'no layers'} (such as prefix tuning makes: FoX trains with LoRA or prompt tuning)"
        )
    number = least or config.num_hidden_layers
    too_many = least is None and isinstance(cache, FoxPagedCache) and len(layers) > number
    if too_many or (len(layers) < number and not grows):
        raise ValueError(f"{CACHE} must have the model's {number} layers, got {len(layers)}")
    for layer in layers[:number]:
        if not isinstance(layer, DynamicForgettingLayer) and layer.made_for != (expected := state_sizes(config)):
            raise ValueError(
                f"{CACHE} must be made with the model's configuration: it is for (gates, key/value heads, shifted "
                f"states) of {layer.made_for}, and the model has {expected}"
            )
    held = layers[0].batch_size if layers and layers[0].is_initialized else None
    if held not in (None, batch):
        raise ValueError(f"{CACHE} holds a batch of {held} sequences, got one of {batch}: each cache is for one batch")


def layer_of(cache: Cache, layer_idx: int) -> ForgettingLayer:
    """The cache's layer for ``layer_idx``, made now if the cache makes its layers as they are needed."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


__all__ = ["DynamicForgettingLayer", "FoxPagedCache", "StaticForgettingLayer"]
