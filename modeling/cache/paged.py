"""A cache that gives back the memory of what can never be attended to again.

Keys and values lie in pages of 64 tokens of one key/value head. A page is *dead* once no query to come could give its
keys a weight that counts: the rule of Adaptive Computation Pruning (`..kernels.pruning`), with what is known of queries
that are not there yet. Running sums of log gates never rise, so with ``c`` of a token every later query keeps at least
what it keeps; its length, and its logit with its own key, are bounded by the weights (`FoxDecoderLayer.logit_bounds`).
A freed page therefore changes no row by more than ``acp_eps`` of its weight, however long the sequence grows.

Pages are handed out and taken back between steps, every 256 tokens or so, by `FoxPagedCache.reserve`; a step itself
only reads the table of pages, so a CUDA graph can replay it.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...kernels.decay import Decay, accumulate
from ...kernels.pruning.key_stats import KeySummary, Running, empty_summary, extend_summary, running_before
from ...kernels.pruning.rounding import logit_margin
from ...kernels.pruning.rules import Rule, bounds_to_come, first_dead_block
from ...kernels.tiles import PRUNED_KEYS as PAGE
from ..configuration_fox import FoxConfig
from ..token_layout import TokenLayout, refuse_overflow
from ..versions import CACHE
from .static import StateSizes, state_sizes
from .view import CacheView

if TYPE_CHECKING:
    from ...kernels.backends import Backend

# How many of each head are handed out in advance: looking for dead ones takes as long as several steps.
_PAGES_AHEAD = 4

LogitBounds = tuple[Tensor, Tensor]
"""Of any query: ``scale |q|`` and ``|scale q . k|`` with any key are at most these, ``[H]`` or ``[1]`` float32 each."""


class PagedForgettingLayer(CacheLayerMixin):
    """One layer of `FoxPagedCache`.

    Attributes:
        keys, values: ``[P, 64, D]`` pages; page 0 takes what has no place. None before any token.
        c: ``[P, R, 64]`` float64 running sums of log gates, of the ``R`` gates of a page's key/value head.
        pages: ``[B, G, N]`` int32 page of each 64 tokens, -1 where there is none.
        start: ``[B, G]`` int32 first block of tokens that is still held.
        summary: of all keys so far, those in freed pages included.
        recent: of the last 64 tokens, by index modulo 64: ``c`` ``[B, Hf, 64]`` float64, ``first`` ``[B, Hf, 64]``
            int64, and with token shift the unshifted ``key`` and ``value``, ``[B, 64, G, D]``.
        cumulative_length: int64 number of tokens, on the device.
    """

    is_compileable = True
    is_croppable = True

    # How many tokens can be taken back: what is freed must be dead for queries from there on.
    rollback_window: ClassVar[int] = 32

    # Set by the first token.
    keys: Any
    values: Any
    c: Any
    pages: Tensor
    start: Tensor
    summary: KeySummary
    running: Running
    _free: Any
    _new: Any

    def __init__(self, max_cache_len: int, made_for: StateSizes, group: int, eps: float | None, rule: Rule) -> None:
        super().__init__()
        self.max_cache_len, self.made_for = max_cache_len, made_for
        self.group, self.eps, self.rule = group, eps, rule
        self.bounds: LogitBounds | None = None
        # The same as the rules read them, on the device.
        self._bounds_to_come: LogitBounds | None = None
        self._forget()

    @property
    def batch_size(self) -> int:
        return self.pages.shape[0]

    def _forget(self) -> None:
        self.keys = self.values = self.c = self._free = self._new = None
        self.is_initialized = False
        self.recent: dict[str, Tensor] = {}
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self._gathered: Decay | None = None
        # Tokens before this pass, if `FoxPagedCache.reserve` has read their number.
        self.known_length: int | None = None
        # No crop may go below either of these lengths: what is freed counts on the one, `recent` on the other.
        self._swept_length = self._furthest = 0

    def take_bounds(self, bounds: LogitBounds | None) -> None:
        """As `FoxPagedCache.take_bounds`, of this layer."""
        if self._swept_length > 0:
            # What is freed is dead for shorter queries too.
            old, new = (None if x is None else torch.cat(x).cpu() for x in (self.bounds, bounds))
            if old is None or new is None or new.shape != old.shape or (new > old).any():
                raise ValueError(
                    f"{CACHE} was filled by a model with other weights, for whose queries keys are freed that this one "
                    "may need: reset() it, or make another"
                )
            # Those that pages were freed for.
            return
        self.bounds, self._bounds_to_come = bounds, None

    # ---- What a forward pass does

    def append_gates(self, log_f: Tensor, layout: TokenLayout, backend: "Backend") -> None:
        """As `StaticForgettingLayer.append_gates`."""
        batch, _, gates = log_f.shape
        if "c" not in self.recent:
            self.cumulative_length = _fixed(self.cumulative_length.to(log_f.device))
            self.recent["c"] = _fixed(torch.zeros(batch, gates, PAGE, dtype=torch.float64, device=log_f.device))
            self.recent["first"] = _fixed(torch.zeros(batch, gates, PAGE, dtype=torch.int64, device=log_f.device))
        last_c, last_first = (self.recent[name].index_select(-1, layout.slots[:1])[..., 0] for name in ("c", "first"))
        carry = last_c, last_first
        c, first = accumulate(log_f, self.cumulative_length, carry, layout.starts, backend.sum_gates)
        self._write_recent("c", c, -1, layout)
        self._write_recent("first", first, -1, layout)
        self._new = Decay(c, c, first, layout.positions)

    def before(self, name: str, layout: TokenLayout) -> Tensor | None:
        """As `StaticForgettingLayer.before`."""
        if name not in self.recent:
            return None
        return self.recent[name].index_select(1, layout.slots[:1])

    def remember(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        """As `StaticForgettingLayer.remember`."""
        batch, _, heads, size = states.shape
        if name not in self.recent:
            self.cumulative_length = _fixed(self.cumulative_length.to(states.device))
            self.recent[name] = _fixed(states.new_zeros(batch, PAGE, heads, size))
        self._write_recent(name, states[:, 1:], 1, layout)

    def _write_recent(self, name: str, new: Tensor, dim: int, layout: TokenLayout) -> None:
        count, dim = min(PAGE, len(layout.positions)), dim % new.ndim
        new = new.narrow(dim, new.shape[dim] - count, count)
        self.recent[name].index_copy_(dim, layout.slots[-count:], new)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        gates = self.recent["c"]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_zeros(1, PAGE, x.shape[-1]) for x in (key_states, value_states))
        rows = max(1, gates.shape[1] // heads)
        self.c = torch.zeros(1, rows, PAGE, dtype=torch.float64, device=self.device)
        blocks = -(-self.max_cache_len // PAGE)
        self.pages = _fixed(torch.full((batch, heads, blocks), -1, dtype=torch.int32, device=self.device))
        self.start = _fixed(torch.zeros(batch, heads, dtype=torch.int32, device=self.device))
        self._free = torch.empty(0, dtype=torch.int64, device=self.device)
        self.summary, self.running = empty_summary(gates, key_states, self.max_cache_len)
        for x in (*self.summary, *self.running):
            _fixed(x)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, few: bool = False) -> tuple[Tensor, Tensor]:
        """Take in keys and values, ``[B, G, T, D]``.

        Args:
            few: whether the kernels of decoding will read the pages.

        Returns:
            The pages, or without ``few`` all keys and values, ``[B, G, Tk, D]``, zero where they are freed.

        Raises:
            RuntimeError: gradients are wanted, or a long prompt is compiled.
            ValueError: they do not fit into ``max_cache_len``.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("FoxPagedCache is for inference: run the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if few:
            self._write_tokens(key_states, value_states)
            result = self.keys, self.values
        else:
            if is_torchdynamo_compiling():
                raise RuntimeError("FoxPagedCache takes prompts outside of torch.compile: compile a step of one token")
            result = self._take_in(key_states, value_states)
        self.cumulative_length.add_(key_states.shape[2])
        return result

    def decay(self, few: bool, own_block: bool = False) -> tuple[Decay, CacheView | None]:
        """As `DynamicForgettingLayer.decay`."""
        decay, self._new = self._new, None
        gathered, self._gathered = self._gathered, None
        if not few:
            assert gathered is not None, "called once after append_gates and update"
            return gathered, None
        return decay._replace(key=self.c), CacheView(self.summary, self.pages, self.start)

    def _summarize(self, c: Tensor, key_states: Tensor, position: int | Tensor) -> None:
        for held, new in zip(
            self.running, extend_summary(self.summary, self.running, c, key_states, position), strict=True
        ):
            held.copy_(new)

    def _write_tokens(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write a few tokens into pages that are there."""
        c, positions = self._new.query, self._new.last
        slot = positions.remainder(PAGE)
        page = self.pages.index_select(-1, positions // PAGE).clamp(min=0).long()
        self.keys[page, slot] = key_states
        self.values[page, slot] = value_states
        rows = torch.arange(self.c.shape[1], device=c.device)
        self.c[page[:, :, None], rows[:, None], slot] = self._by_head(c)
        self._summarize(c, key_states, positions[0])

    def _by_head(self, c: Tensor) -> Tensor:
        """``[B, Hf, T] -> [B, G, R, T]``: the gates of each key/value head."""
        heads = self.pages.shape[1]
        return c[:, None].expand(-1, heads, -1, -1) if c.shape[1] == 1 else c.unflatten(1, (heads, -1))

    def _by_gate(self, c: Tensor) -> Tensor:
        """``[B, G, R, T] -> [B, Hf, T]``, the reverse; a gate that all heads share is held once for each of them."""
        return c[:, 0] if self.recent["c"].shape[1] == 1 else c.flatten(1, 2)

    def _take_in(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Join what is held with many tokens, and hold of both what is not dead."""
        new = self._new
        # To read it here would wait for the device once for each layer.
        past = int(self.cumulative_length) if self.known_length is None else self.known_length
        self.known_length = None
        tokens = key_states.shape[2]
        length = past + tokens
        if length > self.max_cache_len:
            refuse_overflow(past, self.max_cache_len, tokens)
        heads = self.pages.shape[1]
        keys, values, c = key_states, value_states, self._by_head(new.query)
        if past > 0:
            held_keys, held_values, held_c = self._read(past)
            keys, values = torch.cat([held_keys, keys], dim=2), torch.cat([held_values, values], dim=2)
            c = torch.cat([held_c, c], dim=-1)
        # Rows that may not see what is freed; those of the new tokens see all of the new tokens.
        first = new.kv_start
        freed = self.start.long() * PAGE
        if first.shape[1] not in (1, heads):
            freed = freed.repeat_interleave(first.shape[1] // heads, dim=1)
        first = torch.maximum(first, freed[..., None])
        flat = self._by_gate(c)
        self._gathered = Decay(new.query, flat, first, new.last)

        self._summarize(new.query, key_states, past)
        self.sweep(length, c=flat)
        blocks = -(-length // PAGE)
        self._cover(blocks)
        # From the block of the first new token on; what is dead already goes to page 0. Not by a mask of what is
        # written: to find out how many that are would wait for the device.
        begin = past // PAGE
        pages = self.pages[..., begin:blocks].clamp(min=0).long()
        for held, x in ((self.keys, keys), (self.values, values), (self.c.mT, c.mT)):
            held[pages] = _in_blocks(x[:, :, begin * PAGE :], blocks - begin)
        return keys, values

    def _read(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[B, G, length, D]`` and running sums ``[B, G, R, length]``.

        Nobody sees those that are freed, but pruning must count them: there, all keys of a block are as long as the
        longest so far, and decay alike, as much together as the true ones did.
        """
        blocks = -(-length // PAGE)
        pages = self.pages[..., :blocks]
        missing = (pages < 0)[..., None, None]
        pages = pages.clamp(min=0).long()
        size = self.keys.shape[-1]
        # As rounded to the type of the keys.
        margin = torch.finfo(self.keys.dtype).eps + logit_margin(size, torch.float32)
        largest = torch.nn.functional.pad(
            self.summary.largest[..., :blocks, None, None] * (1.0 + margin), (0, size - 1)
        )
        keys = torch.where(missing, largest.to(self.keys.dtype), self.keys[pages])
        values = self.values[pages].masked_fill(missing, 0.0)
        log_decays = self._by_head(self.summary.log_decays[..., :blocks])
        before = torch.nn.functional.pad(log_decays, (1, 0), value=float("-inf"))[..., :blocks]
        alike = math.log(PAGE) - log_decays - torch.log1p(-torch.exp(before - log_decays))
        c = torch.where(missing, alike.mT[..., None], self.c[pages]).mT
        keys, values, c = (x.flatten(2, 3)[:, :, :length] for x in (keys, values, c))
        return keys, values, c.mT

    # ---- What is done between steps

    def cover(self, length: int) -> None:
        """See that there are pages for all tokens up to ``length``."""
        self._cover(-(-length // PAGE))

    def _cover(self, blocks: int) -> None:
        index = torch.arange(blocks, device=self.device)
        wanted = (self.pages[..., :blocks] < 0) & (index >= self.start[..., None])
        count = int(wanted.sum())
        if count == 0:
            return
        if (missing := count - len(self._free)) > 0:
            self._grow(missing)
        # Of the ranges held, all of them beginning somewhere: in the order of the table.
        self.pages[..., :blocks].masked_scatter_(wanted, self._free[:count].int())
        self._free = self._free[count:]

    def _grow(self, missing: int) -> None:
        held, row_blocks = len(self.keys), self.pages[..., 0].numel()
        # Larger steps are fewer copies, and fewer times that a captured graph must be captured anew.
        more = missing + max(4 * row_blocks, held // 16)
        for name in ("keys", "values", "c"):
            old = getattr(self, name)
            grown = old.new_zeros(held + more, *old.shape[1:])
            grown[:held] = old
            torch._dynamo.mark_dynamic(_fixed(grown), 0)
            setattr(self, name, grown)
        self._free = torch.cat([self._free, torch.arange(held, held + more, device=self.device)])

    def sweep(self, length: int, c: Tensor | None = None) -> None:
        """Take back the pages that no query from ``length - rollback_window`` on needs.

        Args:
            length: tokens so far.
            c: ``[B, Hf, length]`` running sums; None if the last 64 tokens will do.
        """
        # The running sum that later queries do not exceed, even after a crop.
        token = length - 1 - self.rollback_window
        # After a crop, that token may not be among the recent ones.
        if self.bounds is None or self.eps is None or token < PAGE or (c is None and token < self._furthest - PAGE):
            return
        c_then = self.recent["c"][..., token % PAGE] if c is None else c[..., token]
        first_then = self.recent["first"][..., token % PAGE] if c is None else None
        if self._bounds_to_come is None:
            query, logit = (x.to(c_then.device) for x in self.bounds)
            heads = self.group * self.pages.shape[1]
            self._bounds_to_come = bounds_to_come((query, logit), heads, self.keys.shape[-1])
        dead = first_dead_block(
            c_then,
            self.summary,
            self._bounds_to_come,
            token // PAGE,
            eps=self.eps,
            rule=self.rule,
            keys=self.max_cache_len,
        )
        if first_then is not None:
            hidden = (first_then // PAGE).int()
            if hidden.shape[1] not in (1, dead.shape[1]):
                hidden = hidden.unflatten(1, (dead.shape[1], -1)).amin(2)
            dead = torch.maximum(dead, hidden)
        dead = torch.maximum(dead, self.start)
        freed = (torch.arange(self.pages.shape[-1], device=self.device) < dead[..., None]) & (self.pages >= 0)
        self._free = torch.cat([self._free, self.pages[freed].long()])
        self.pages.masked_fill_(freed, -1)
        self.start.copy_(dead)
        self._swept_length = token + 1

    def held_bytes(self) -> int:
        """Bytes of keys, values and running sums of gates, pages that wait to be used included."""
        return sum(x.nbytes for x in (self.keys, self.values, self.c) if x is not None)

    # ---- Operations of caches

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        self._forget()

    def activate_past_recording(self) -> None:
        """Nothing to do: the last ``rollback_window`` tokens can always be taken back, and no more."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: ``tokens_to_remove`` is positive or drops more than there is.
            RuntimeError: it drops more than what is freed allows.
        """
        count, held = -tokens_to_remove, int(self.get_seq_length())
        if not 0 <= count <= held:
            raise ValueError(
                f"tokens_to_remove must be in [-{held}, 0] (the cache holds {held} tokens), got {tokens_to_remove}"
            )
        if count == 0:
            return
        if count == held:
            self.reset()
            return
        length = held - count
        self._furthest = max(self._furthest, held)
        least = max(self._swept_length, self._furthest - self.rollback_window)
        if length < least:
            raise RuntimeError(
                f"tokens_to_remove is {tokens_to_remove}, but pages are freed, and recent tokens kept, for a length of "
                f"at least {least}: {held - least} tokens at most can be taken back now. For assisted decoding with "
                "more draft tokens use DynamicCache(config=model.config)"
            )
        self.cumulative_length.fill_(length)
        start = length // PAGE * PAGE
        for held_now, before in zip(self.running, running_before(self.summary, start // PAGE), strict=True):
            held_now.copy_(before)
        if length > start:
            page = self.pages[..., start // PAGE].long()
            keys = self.keys[page][:, :, : length - start]
            c = self._by_gate(self.c[page][..., : length - start])
            self._summarize(c, keys, start)

    def _select(self, rows: Tensor) -> None:
        """Make the sequences those at ``rows``, each with pages of its own."""
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        pages = self.pages.index_select(0, rows)
        held = pages >= 0
        used = pages[held].long()
        # Page 0 stays; the others follow in the order of the table, without gaps.
        order = torch.cat([used.new_zeros(1), used])
        self.keys, self.values, self.c = (_fixed(x.index_select(0, order)) for x in (self.keys, self.values, self.c))
        pages[held] = torch.arange(1, len(order), device=self.device, dtype=torch.int32)
        self.pages, self.start = _fixed(pages), _fixed(self.start.index_select(0, rows))
        self._free = self._free[:0]
        self.recent = {name: _fixed(x.index_select(0, rows)) for name, x in self.recent.items()}
        self.summary = KeySummary(*(_fixed(x.index_select(0, rows)) for x in self.summary))
        log_decays, largest = self.running
        self.running = _fixed(log_decays.index_select(0, rows)), _fixed(largest.index_select(0, rows))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self.pages), device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self.pages), device=self.device)[indices])


def _fixed(x: Tensor) -> Tensor:
    """Tell torch.compile that ``x`` keeps its address: CUDA graphs take in-place writes then."""
    if not is_torchdynamo_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def _in_blocks(x: Tensor, blocks: int) -> Tensor:
    """``[B, G, T, D] -> [B, G, blocks, 64, D]``, filled up with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, blocks * PAGE - x.shape[2])).unflatten(2, (blocks, PAGE))


class FoxPagedCache(Cache):
    """A cache whose memory follows what the gates leave of the context, for `generate` and for loops of one's own.

    For inference. What is freed has at most ``acp_eps`` of the attention weight of any later query; with
    ``acp_eps=None`` nothing is freed. The last 32 tokens can be cropped; to crop more raises.

    In a loop of one's own with a compiled step, call `reserve` before each step, outside of what is compiled;
    `generate` and the model itself do where they are not compiled. A step without room gives NaN.

    Args:
        config: of the model.
        max_cache_len: most tokens of a sequence; costs 40 bytes per gate for 64 of them, not the memory of their keys.

    Raises:
        ValueError: ``max_cache_len`` is not positive.

    Example:
        >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2)).eval()
        >>> cache = FoxPagedCache(model.config, max_cache_len=4096)
        >>> tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, cache=cache)
    """

    def __init__(self, config: FoxConfig, max_cache_len: int) -> None:
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be a positive integer, got {max_cache_len!r}")
        eps = None if config.forget_gate == "none" else config.acp_eps
        heads, kv_heads, _ = config.heads
        options = (max_cache_len, state_sizes(config), heads // kv_heads, eps, config.acp_rule)
        layers = [PagedForgettingLayer(*options) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers)
        self._ahead = 0
        # The weights that bounds are known of, with how often each had been written to, and the type they are used in.
        self._bounded: tuple[list[tuple[weakref.ref, int]], torch.dtype | None] = [], None

    def take_bounds(
        self,
        weights: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        bounds: Callable[[], Sequence[LogitBounds | None]],
    ) -> None:
        """Learn what is known of any query of the model that is about to use the cache; the model calls this.

        Looks at no value where all weights are the same as the last time. One written to through ``.data`` is the same.

        Args:
            weights: of each layer, those that its bounds rest on.
            dtype: what queries and keys are computed in.
            bounds: computes those of each layer; where there are none (None) nothing is freed.

        Raises:
            ValueError: a layer has freed what this model's queries may need.
        """
        now = [(x, 0 if x.is_inference() else x._version) for of_layer in weights for x in of_layer]
        known, known_dtype = self._bounded
        same = len(now) == len(known) and dtype == known_dtype
        if same and all(x() is y and n == m for (x, n), (y, m) in zip(known, now, strict=True)):
            return
        for layer, new in zip(self.layers, bounds(), strict=True):
            layer.take_bounds(new)
        self._bounded = [(weakref.ref(x), count) for x, count in now], dtype

    def __getstate__(self) -> dict:
        return vars(self) | {"_bounded": ([], None)}

    def reserve(self, tokens: int) -> None:
        """Make room for the next ``tokens``, and now and then take back what is dead.

        Waits for the device every 256 tokens or so.

        Raises:
            ValueError: they do not fit into ``max_cache_len``.
        """
        self._ahead -= tokens
        length = None if self._ahead >= 0 else int(self.get_seq_length())
        for layer in self.layers:
            layer.known_length = length
        if length is None:
            return
        room = self.get_max_length()
        if length + tokens > room:
            refuse_overflow(length, room, tokens)
        if length == 0 or tokens > PAGE:
            # A prompt makes room for itself: only for what it needs.
            return
        covered = min(-(-(length + tokens) // PAGE) + _PAGES_AHEAD, -(-room // PAGE)) * PAGE
        for layer in self.layers:
            layer.sweep(length)
            layer.cover(covered)
        self._ahead = min(covered, room) - length - tokens

    def held_bytes(self) -> int:
        """Bytes of keys and values, and of running sums of gates, in all layers."""
        return sum(layer.held_bytes() for layer in self.layers)

    def reset(self) -> None:
        super().reset()
        self._ahead = 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._ahead = 0


__all__ = ["FoxPagedCache", "PagedForgettingLayer"]
