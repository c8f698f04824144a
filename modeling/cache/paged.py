"""A cache that evicts the keys and values that no later query can need.

Keys and values lie in pages of 64 tokens of one key/value head (`page_pool`). A page is evictable once no query to come
could give its keys a weight that counts: the rule of Adaptive Computation Pruning (`..kernels.pruning`), with bounds in
place of what it reads of a query. Running sums of log gates never rise, so what the rule drops for a token's ``c`` it
drops for every later one; a query's length, and its diagonal logit, are bounded by the weights
(`FoxDecoderLayer.logit_bounds`). So eviction changes no row by more than ``acp_eps`` of its weight, however long the
sequence grows.

Pages are allocated and evicted between steps, every 256 tokens or so, by `FoxPagedCache.reserve`.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...kernels.decay import Decay
from ...kernels.operators import may_launch
from ...kernels.pruning.key_stats import KeySummary, Running, empty_summary, running_before
from ...kernels.pruning.later_queries import QueriesToCome, first_needed_block, future_query_bounds
from ...kernels.pruning.rules import Rule, check_rule
from ..token_layout import TokenLayout, refuse_overflow
from ..versions import CACHE
from .page_pool import PAGE, PagePool, fixed_address, in_blocks, move_pages
from .static import NewGates, StateSizes, extend_summary, gates_for_kernel, latest_states, state_sizes
from .view import CacheView

if TYPE_CHECKING:
    from ...kernels.backends import Backend
    from ...kernels.portable.paged_chunk import Recent
    from ..configuration_fox import FoxConfig

# Pages of each head that are allocated in advance: an eviction takes as long as several steps.
_PAGES_AHEAD = 4
# Tokens of all sequences whose keys and values are held for all layers, so that these synchronise only once.
_TOKENS_AT_ONCE = 8192

LogitBounds = tuple[Tensor, Tensor]
"""Upper bounds of ``scale |q|`` and ``|scale q . k|`` for any query and key, ``[H]`` or ``[1]`` float32 each."""


class _Pending(NamedTuple):
    """Many tokens that a layer has taken in and not yet written to pages.

    Attributes:
        start: as of `PagedForgettingLayer.first_needed`.
        length: tokens so far.
        write: writes them, once their pages are allocated.
    """

    start: Tensor | None
    length: int
    write: Callable[[], None]


class PagedForgettingLayer(PagePool, CacheLayerMixin):
    """One layer of `FoxPagedCache`.

    Attributes:
        summary: of all keys so far, evicted ones included.
        recent: of the last 64 tokens, by index modulo 64: ``c`` ``[B, Hf, 64]`` float64, ``kv_start`` ``[B, Hf, 64]``
            int64, and with token shift the unshifted ``key`` and ``value``, ``[B, 64, G, D]``.
        cumulative_length: int64 number of tokens, on the device.
        pending: tokens of a prompt until the end of the model's forward, where pages are allocated for all layers at
            once; None otherwise, and where they are so many that each layer writes its own.
    """

    is_compileable = True
    is_croppable = True

    # Tokens that can be cropped: what is evicted must be evictable for queries from there on too.
    rollback_window: ClassVar[int] = 32

    # Set by the first token.
    summary: KeySummary
    running: Running
    _new: Any
    known_length: Any

    def __init__(self, max_cache_len: int, made_for: StateSizes, group: int, eps: float | None, rule: Rule) -> None:
        super().__init__()
        self.max_cache_len, self.made_for = max_cache_len, made_for
        self.group, self.eps, self.rule = group, eps, rule
        self.bounds: LogitBounds | None = None
        # The same on the device, in the form that the pruning rules read.
        self._bounds_to_come: LogitBounds | None = None
        self._clear()

    @property
    def batch_size(self) -> int:
        return self.pages.shape[0]

    def _clear(self) -> None:
        self.drop_pool()
        self._new = None
        self.is_initialized = False
        self.recent: dict[str, Tensor] = {}
        # Unshifted states of new tokens, by name, until `append_gates`.
        self._states: dict[str, Tensor] = {}
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self._gathered: Decay | None = None
        self.pending: Any = None
        # From `append_gates` to `update`: that of new tokens, where its kernels may be launched, and their unshifted
        # states, if `recent` is yet to take in the new tokens.
        self._backend: Backend | None = None
        self._in_chunk: dict[str, Tensor] | None = None
        # Tokens before this pass, if `FoxPagedCache.reserve` has read their number.
        self.known_length = None
        # A crop must leave at least `_evicted_for` tokens, for which pages were evicted, and at least 32 less than the
        # longest length so far, since `recent` keeps the last 64.
        self._evicted_for = self._longest = 0

    def take_bounds(self, bounds: LogitBounds | None) -> None:
        """As `FoxPagedCache.take_bounds`, of this layer."""
        if self._evicted_for > 0:
            # Pages that are evictable under some bounds are so under smaller ones.
            old, new = (None if x is None else torch.cat(x).cpu() for x in (self.bounds, bounds))
            if old is None or new is None or new.shape != old.shape or (new > old).any():
                raise ValueError(
                    f"{CACHE} was filled by a model with other weights, for whose queries keys were evicted that this "
                    "one may need: reset() it, or make another"
                )
            return
        self.bounds, self._bounds_to_come = bounds, None

    def append_gates(
        self, log_f: Tensor, layout: TokenLayout, backend: "Backend", use_decode_kernel: bool = False
    ) -> None:
        """As `StaticForgettingLayer.append_gates`."""
        states, self._states = self._states, {}
        self._new = gates_for_kernel(log_f, layout, backend, use_decode_kernel, states)
        if self._new is not None:
            return
        launches = backend.take_chunk is not None and may_launch(log_f)
        self._backend = backend if launches else None
        # A kernel that takes the chunk keeps what follows from its last tokens; padding repeats what is kept.
        self._in_chunk = (
            states if launches and self.is_initialized and not use_decode_kernel and layout.last_real is None else None
        )
        if self._in_chunk is None:
            for name, x in states.items():
                self._keep_unshifted(name, x, layout)
        batch, _, gates = log_f.shape
        if "c" not in self.recent:
            self.cumulative_length = fixed_address(self.cumulative_length.to(log_f.device))
            self.recent["c"] = fixed_address(torch.zeros(batch, gates, PAGE, dtype=torch.float64, device=log_f.device))
            self.recent["kv_start"] = fixed_address(
                torch.zeros(batch, gates, PAGE, dtype=torch.int64, device=log_f.device)
            )
        carry = self._last("c", -1, layout)[..., 0], self._last("kv_start", -1, layout)[..., 0]
        # The device's own length for a step, which may be captured in a graph that serves any length.
        is_known = len(layout.positions) > PAGE and self.known_length is not None
        offset = self.known_length if is_known else self.cumulative_length
        c, kv_start = layout.accumulate(log_f, backend, offset, carry)
        if self._in_chunk is None:
            self._write_recent("c", c, -1, layout)
            self._write_recent("kv_start", kv_start, -1, layout)
        self._new = Decay(c, c, kv_start, layout.positions)

    def previous_unshifted(self, name: str, layout: TokenLayout) -> Tensor | None:
        """As `StaticForgettingLayer.previous_unshifted`."""
        if name not in self.recent:
            return None
        return self._last(name, 1, layout)

    @property
    def unshifted_buffer(self) -> dict[str, Tensor]:
        """As of `DynamicForgettingLayer`."""
        return {name: x for name, x in self.recent.items() if x.ndim == 4}

    def _last(self, name: str, dim: int, layout: TokenLayout) -> Tensor:
        """What is held of the token before the new ones."""
        # A step of a few tokens may be captured in a graph that serves any length.
        if self.known_length is None or len(layout.positions) <= PAGE:
            return self.recent[name].index_select(dim, layout.slots[:1])
        return self.recent[name].narrow(dim, (self.known_length - 1) % PAGE, 1)

    def append_unshifted(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        """As `StaticForgettingLayer.append_unshifted`."""
        if not self.is_initialized or is_torchdynamo_compiling():
            self._keep_unshifted(name, states, layout)
        else:
            self._states[name] = states

    def _keep_unshifted(self, name: str, states: Tensor, layout: TokenLayout) -> None:
        batch, _, heads, size = states.shape
        if name not in self.recent:
            self.cumulative_length = fixed_address(self.cumulative_length.to(states.device))
            self.recent[name] = fixed_address(states.new_zeros(batch, PAGE, heads, size))
        held = self.recent[name]
        past = held if layout.last_real is None else held.index_select(1, layout.slots[:1])
        new = latest_states(past, states, layout, min(PAGE, states.shape[1]))
        self._write_recent(name, new, 1, layout)

    def _write_recent(self, name: str, new: Tensor, dim: int, layout: TokenLayout) -> None:
        count, dim = min(PAGE, len(layout.positions)), dim % new.ndim
        new = new.narrow(dim, new.shape[dim] - count, count)
        self.recent[name].index_copy_(dim, layout.slots[-count:], new)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        gates = self.recent["c"]
        self.make_pool(key_states, value_states, gates.shape[1], -(-self.max_cache_len // PAGE))
        self.summary, self.running = empty_summary(gates, key_states, self.max_cache_len)
        for x in (*self.summary, *self.running):
            fixed_address(x)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, use_decode_kernel: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Take in keys and values, ``[B, G, T, D]``.

        Args:
            use_decode_kernel: whether the decode kernels will read the pages.

        Returns:
            The pages; without ``use_decode_kernel`` all keys and values, ``[B, G, Tk, D]``, values zero where evicted.

        Raises:
            RuntimeError: gradients are wanted, or a long prompt is compiled.
            ValueError: they do not fit into ``max_cache_len``.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("FoxPagedCache is for inference: run the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if isinstance(self._new, NewGates):
            self._new = self._append_by_kernel(self._new, key_states, value_states)
            return self.keys, self.values
        if use_decode_kernel:
            self.write_tokens(key_states, value_states, self._new.query, self._new.last)
            self._summarize(self._new.query, key_states, self._new.last[0])
            result = self.keys, self.values
        else:
            if is_torchdynamo_compiling():
                raise RuntimeError("FoxPagedCache takes prompts outside of torch.compile: compile a step of one token")
            result = self._append(key_states, value_states)
        self.cumulative_length.add_(key_states.shape[2])
        return result

    def _append_by_kernel(self, new: NewGates, key_states: Tensor, value_states: Tensor) -> Decay:
        layout = new.layout
        c, kv_start = new.append(
            key_states,
            value_states,
            new.log_f,
            layout.positions,
            layout.real,
            keys=self.keys,
            values=self.values,
            c=self.c,
            last=(self.recent["c"], self.recent["kv_start"]),
            summary=self.summary,
            running=self.running,
            length=self.cumulative_length,
            pages=self.pages,
            **new.unshifted(self.recent),
        )
        return Decay(c, c, kv_start, layout.positions)

    def decay(self, use_decode_kernel: bool, own_block: bool = False) -> tuple[Decay, CacheView | None]:
        """As `DynamicForgettingLayer.decay`."""
        decay, self._new = self._new, None
        gathered, self._gathered = self._gathered, None
        if not use_decode_kernel:
            assert gathered is not None, "called once after append_gates and update"
            return gathered, None
        decay = Decay(decay.query, self.c, decay.kv_start, decay.last)
        return decay, CacheView(self.summary, self.pages, self.start)

    def _summarize(self, c: Tensor, key_states: Tensor, position: int | Tensor) -> None:
        for held, new in zip(
            self.running, extend_summary(self.summary, self.running, c, key_states, position), strict=True
        ):
            held.copy_(new)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append many tokens to what is held, and evict of both what can be. Returns all keys and values."""
        new = self._new
        # Reading it here would synchronise once per layer.
        past = int(self.cumulative_length) if self.known_length is None else self.known_length
        self.known_length = None
        tokens = key_states.shape[2]
        length = past + tokens
        if length > self.max_cache_len:
            refuse_overflow(past, self.max_cache_len, tokens)
        keys, values, c_by_gate, kv_start, start, write = self._take_chunk(key_states, value_states, new, past)
        self._gathered = Decay(new.query, c_by_gate, kv_start, new.last)
        self.pending = _Pending(start, length, write)
        if len(keys) * tokens > _TOKENS_AT_ONCE:
            flush_pages([self])
        return keys, values

    def _take_chunk(
        self, key_states: Tensor, value_states: Tensor, decay: Decay, past: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Callable[[], None]]:
        """All keys, values and running sums by gate; the first key that each query may see; `first_needed` after the
        new tokens; what writes them to pages."""
        backend, self._backend = self._backend, None
        length, c_new = past + key_states.shape[2], decay.query
        if backend is not None:
            take_chunk, write_chunk = backend.take_chunk, backend.write_chunk
            assert take_chunk is not None and write_chunk is not None, "asked in append_gates"
            new, to_come = (key_states, value_states, c_new, past), self._queries_to_come(length, least=0)
            state = dict(start=self.start, summary=self.summary, running=self.running, to_come=to_come)
            taken = take_chunk(*new, first=decay.kv_start, **self._pools(), **state)
            kept = dict(first=decay.kv_start, recent=self._recent_to_write())
            if to_come is not None and to_come.token >= PAGE:
                self._evicted_for = to_come.token + 1
            return *taken, lambda: write_chunk(*new, **kept, **self._pools())
        # Queries must not attend to what is evicted; to each other's keys they may.
        kv_start, evicted = decay.kv_start, self.start * PAGE
        heads = evicted.shape[1]
        if kv_start.shape[1] not in (1, heads):
            evicted = evicted.repeat_interleave(kv_start.shape[1] // heads, dim=1)
        kv_start = torch.maximum(kv_start, evicted[..., None])
        keys, values, c = key_states, value_states, self.by_head(c_new)
        if past > 0:
            held_keys, held_values, held_c = self.read(past, self.summary)
            keys, values = torch.cat([held_keys, keys], dim=2), torch.cat([held_values, values], dim=2)
            c = torch.cat([held_c, c], dim=-1)
        c_by_gate = self.by_gate(c)
        self._summarize(c_new, key_states, past)
        begin = past // PAGE
        blocks = [in_blocks(x[:, :, begin * PAGE :]) for x in (keys, values, c.mT)]
        start, write = self.first_needed(length, c_by_gate), partial(self.write_blocks, begin, *blocks)
        return keys, values, c_by_gate, kv_start, start, write

    def _recent_to_write(self) -> "Recent":
        """`recent` and the unshifted states of new tokens; empty if it has taken them in."""
        from ...kernels.portable.paged_chunk import Recent

        states, self._in_chunk = self._in_chunk, None
        if states is None:
            return Recent()
        shifted = (x for name in ("key", "value") for x in (states.get(name), self.recent.get(name)))
        return Recent(self.recent["c"], self.recent["kv_start"], *shifted)

    def _pools(self) -> dict[str, Tensor]:
        # One page stands for all, so that launches are remembered however many there are.
        return dict(keys=self.keys[:1], values=self.values[:1], sums=self.c[:1], pages=self.pages)

    def first_needed(self, length: int, c: Tensor | None = None) -> Tensor | None:
        """The first block that some query from ``length - rollback_window`` on may need, ``[B, G]`` int32.

        Those before are then taken to be evicted. None if nothing can be.

        Args:
            length: tokens so far.
            c: ``[B, Hf, length]`` running sums; None if the last 64 tokens suffice.
        """
        to_come = self._queries_to_come(length)
        # After a crop, that token may not be among the recent ones.
        if to_come is None or (c is None and to_come.token < self._longest - PAGE):
            return None
        token = to_come.token
        start = first_needed_block(
            self.recent["c"][..., token % PAGE] if c is None else c[..., token],
            self.summary,
            (to_come.norm, to_come.diagonal),
            token // PAGE,
            eps=to_come.eps,
            rule=self.rule,
            keys=to_come.most_keys,
        )
        if c is None:
            # Blocks before a hard reset are hidden from all later queries.
            hidden = (self.recent["kv_start"][..., token % PAGE] // PAGE).int()
            if hidden.shape[1] not in (1, start.shape[1]):
                hidden = hidden.unflatten(1, (start.shape[1], -1)).amin(2)
            start = torch.maximum(start, hidden)
        self._evicted_for = token + 1
        return start

    def _queries_to_come(self, length: int, least: int = PAGE) -> QueriesToCome | None:
        """What `first_needed` reads of later queries; None where nothing can be evicted, or before token ``least``."""
        # Its running sum is one that later queries do not exceed, even after a crop.
        token = length - 1 - self.rollback_window
        if self.bounds is None or self.eps is None or token < least:
            return None
        if self._bounds_to_come is None:
            query, logit = (x.to(self.keys.device) for x in self.bounds)
            heads = self.group * self.pages.shape[1]
            norm, diagonal = future_query_bounds((query, logit), heads, self.keys.shape[-1])
            self._bounds_to_come = norm.contiguous(), diagonal.contiguous()
        return QueriesToCome(
            check_rule(self.eps, self.rule), self.eps, *self._bounds_to_come, token, self.max_cache_len
        )

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        self._clear()

    def activate_past_recording(self) -> None:
        """Nothing to do: the last ``rollback_window`` tokens can always be cropped, and no more."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: ``tokens_to_remove`` is positive or drops more than there is.
            RuntimeError: it drops more than what is evicted allows.
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
        self._longest = max(self._longest, held)
        least = max(self._evicted_for, self._longest - self.rollback_window)
        if length < least:
            raise RuntimeError(
                f"tokens_to_remove is {tokens_to_remove}, but pages are evicted, and recent tokens kept, for a length "
                f"of at least {least}: {held - least} tokens at most can be cropped now. For assisted decoding with "
                "more draft tokens use DynamicCache(config=model.config)"
            )
        self.cumulative_length.fill_(length)
        start = length // PAGE * PAGE
        for held_now, before in zip(self.running, running_before(self.summary, start // PAGE), strict=True):
            held_now.copy_(before)
        if length > start:
            page = self.pages[..., start // PAGE].long()
            keys = self.keys[page][:, :, : length - start]
            c = self.by_gate(self.c[page][..., : length - start])
            self._summarize(c, keys, start)

    def _select(self, rows: Tensor) -> None:
        """Make the sequences those at ``rows``, each with pages of its own."""
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        self.select_rows(rows)
        self.recent = {name: fixed_address(x.index_select(0, rows)) for name, x in self.recent.items()}
        self.summary = KeySummary(*(fixed_address(x.index_select(0, rows)) for x in self.summary))
        log_decays, largest = self.running
        self.running = fixed_address(log_decays.index_select(0, rows)), fixed_address(largest.index_select(0, rows))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self.pages), device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self.pages), device=self.device)[indices])


def flush_pages(layers: list[PagedForgettingLayer]) -> None:
    """Write what ``layers`` have taken in, all in the same pass, to pages, after freeing what can be evicted."""
    pending = [layer.pending for layer in layers]
    if not pending:
        return
    move_pages(layers, [x.start for x in pending], -(-pending[0].length // PAGE))
    for layer, x in zip(layers, pending, strict=True):
        x.write()
        layer.pending = None


class FoxPagedCache(Cache):
    """An evicting cache: its memory follows what the gates leave of the context; for `generate` and loops of your own.

    For inference. Evicted keys have at most ``acp_eps`` of the attention weight of any later query; with
    ``acp_eps=None`` nothing is evicted. The last 32 tokens can be cropped; cropping more raises.

    In a loop of your own with a compiled step, call `reserve` before each step, outside of what is compiled;
    `generate` and the model itself do where they are not compiled. A compiled step for which `reserve` made no room
    returns NaN.

    Args:
        config: of the model.
        max_cache_len: tokens of a sequence at most; 64 of them cost 40 bytes per gate, not the memory of their keys.

    Raises:
        ValueError: ``max_cache_len`` is not positive.

    Example:
        >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2)).eval()
        >>> cache = FoxPagedCache(model.config, max_cache_len=4096)
        >>> tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, cache=cache)
    """

    def __init__(self, config: "FoxConfig", max_cache_len: int) -> None:
        if not hasattr(config, "forget_gate"):
            raise ValueError(f"config must be the FoxConfig of the model, got {config!r}")
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be a positive integer, got {max_cache_len!r}")
        eps = None if config.forget_gate == "none" else config.acp_eps
        heads, kv_heads, _ = config.heads
        options = (max_cache_len, state_sizes(config), heads // kv_heads, eps, config.acp_rule)
        layers = [PagedForgettingLayer(*options) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers)
        self._ahead = 0
        # The weights that the bounds are of, with the version counter of each, and the dtype they are used in.
        self._bounded: tuple[list[tuple[weakref.ref, int]], torch.dtype | None] = [], None

    def take_bounds(
        self,
        weights: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        bounds: Callable[[], Sequence[LogitBounds | None]],
    ) -> None:
        """Take the bounds of queries of the model that is about to use the cache; the model calls this.

        Computes nothing if all weights are those of the last call and were not written to; writes through ``.data`` are
        not seen.

        Args:
            weights: of each layer, those that its bounds depend on.
            dtype: of queries and keys.
            bounds: computes those of each layer; a layer without bounds (None) evicts nothing.

        Raises:
            ValueError: a layer has evicted what this model's queries may need.
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
        """Make room for the next ``tokens``, and now and then evict what can be evicted.

        Synchronises every 256 tokens or so.

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
            # A prompt allocates its own pages, and only those that it needs.
            return
        blocks = min(-(-(length + tokens) // PAGE) + _PAGES_AHEAD, -(-room // PAGE))
        move_pages(self.layers, [layer.first_needed(length) for layer in self.layers], blocks)
        self._ahead = min(blocks * PAGE, room) - length - tokens

    def settle(self) -> None:
        """Write to pages what layers have taken in; the model calls this at the end of its forward. Synchronises."""
        flush_pages([layer for layer in self.layers if layer.pending is not None])

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
