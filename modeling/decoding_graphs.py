"""Decoding by CUDA graphs: `generate` captures its own steps, so that a step is one launch instead of hundreds.

A step of a few tokens runs hundreds of small kernels, which the GPU finishes long before the host has launched them.
Within `generate` a model's first step of each shape runs as always; the next is captured, and from then on replayed.
This needs no compilation. A captured step reads and writes fixed addresses:

- its tokens, padding mask and positions are copied to buffers,
- a growing cache lends its state to layers of fixed size (`cache.reserved`); other caches have theirs fixed,
- weights stay where they are during `generate`.

Graphs belong to a cache and die with it. If a caller passes the same cache to `generate` again, they serve as long as
the model is what it was: see `_fingerprint`.
"""

import contextlib
import contextvars
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache.dynamic import DynamicForgettingLayer
from .cache.paged import PagedForgettingLayer
from .cache.reserved import ReservedForgettingLayer
from .cache.static import StaticForgettingLayer, state_sizes
from .configuration_fox import DEFAULT_IMPLEMENTATION
from .layers.known_modules import KnownModules
from .parallel.tensor_parallel import is_sharded, modules_of
from .token_layout import LAYER_TYPE, padding_mask
from .versions import CACHE

logger = logging.get_logger(__name__)

# A growing cache gets room for so many more tokens, or an eighth of what it holds, but not beyond what `generate` may
# produce; and at least for `_LEAST_ROOM`. Each time it is used up, steps are captured anew.
_ROOM, _LEAST_ROOM, _ROOM_MULTIPLE = 2048, 256, 64
# Captures that must pay off by so many replays each, or no more are made: one takes as long as an eager step.
_CAPTURES, _REPLAYS = 4, 4
# Their states have fixed addresses.
_FIXED_LAYERS = (StaticForgettingLayer, PagedForgettingLayer)
# Modules that do nothing but what their parameters, buffers and configuration say.
_KNOWN_MODULES = ("torch.nn.modules.", "transformers.activations", __package__ or "")
_INERT_HOOKS = "transformers.utils.output_capturing"

# One capture at a time in a process.
_CAPTURING = threading.Lock()
# What `generate` calls are running in this thread, by the id of their model.
_RUNNING: contextvars.ContextVar[dict[int, "DecodingGraphs"]] = contextvars.ContextVar("decoding_graphs")


class StepGraph:
    """A CUDA graph of one call."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        """
        Args:
            device: of all tensors.
            pool: memory of intermediate results, from `new_pool`; graphs that are not replayed at once may share one.
        """
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    @staticmethod
    def new_pool() -> Any:
        """Memory for intermediate results, freed with its last graph."""
        return torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], Tensor]) -> Tensor:
        """Record ``call`` without running it; returns its result, which every `replay` overwrites.

        Unlike `torch.cuda.graph`, it does not give cached memory back, which would take longer than a step.
        """
        current, stream = torch.cuda.current_stream(self._device), _capture_stream(self._device)
        stream.wait_stream(current)
        # cuBLAS keeps a workspace for each stream: that of a graph must be the graph's own, and freed with it.
        torch._C._cuda_clearCublasWorkspaces()
        with _CAPTURING, torch.cuda.stream(stream):
            # Other threads may go on using the device.
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = call()
            finally:
                self._graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(stream)
        return result

    def replay(self) -> None:
        """Run it on the current stream."""
        self._graph.replay()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Step(NamedTuple):
    """The inputs of a captured step, at fixed addresses, and its logits."""

    graph: StepGraph
    inputs: dict[str, Tensor | None]
    logits: Tensor


def _unsupported(model: Any, modules: list[nn.Module], weights: list[Tensor]) -> str | None:
    """Why steps of ``model``, which has these parts, cannot be captured; None if they can."""
    if any(is_sharded(x) for x in weights):
        return "its weights are sharded"
    devices = {x.device for x in weights}
    if len(devices) != 1:
        return f"its weights are on several devices, {sorted(map(str, devices))}"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "hooks are registered for all modules"
    for module in modules:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # Those of the model itself run before and after a step.
        if hooks and module is not model and any(getattr(x, "__module__", None) != _INERT_HOOKS for x in hooks):
            return f"{_name_of(module, model)} has hooks, which a captured step would not call"
        if "_hf_hook" in vars(module):
            return f"{_name_of(module, model) or 'the model'} is moved to its device as it runs (accelerate)"
    return None


def _parts_of(model: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """Its `modules_of`, and their parameters and buffers, each once."""
    modules = modules_of(model)
    weights: dict[int, Tensor] = {}
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            weights.update((id(x), x) for x in tensors.values() if x is not None)
    return modules, list(weights.values())


def _name_of(module: nn.Module, model: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def runs_decode_kernels(model: Any, tokens: int = 1) -> bool:
    """Whether a step of ``tokens`` tokens runs on decode kernels, where ``model`` is."""
    from ..kernels.backends import backend_of

    heads, kv_heads, head_dim = model.config.heads
    q = torch.empty((), dtype=model.dtype, device=model.device).expand(1, tokens, heads, head_dim)
    return backend_of(q).can_decode(q, kv_heads)


class CacheGraphs:
    """The captured steps of one cache, by shape.

    Attributes:
        reserved: layers that take the place of those of a growing cache, while its steps are captured.
    """

    def __init__(self, model: Any) -> None:
        self.reserved: list[ReservedForgettingLayer] = []
        self._sizes = state_sizes(model.config)
        self._pool: Any = None
        self._steps: dict[tuple, _Step] = {}
        self._buffers: list[Any] = []
        self._captures = self._replays = 0
        self._gave_up = False
        # The length on the device, of a growing cache, and what the host knows it to be.
        self._length: Tensor | None = None
        self._known_length = -1

    def step(self, run: "DecodingGraphs", cache: Cache, ids: Tensor, **options: Any) -> Tensor | None:
        """Logits of a step; None where it must run as always.

        Args:
            run: the `generate` call.
            cache: that these graphs are of.
            ids: ``[B, T]`` int64 tokens.
            options: ``attention_mask``, ``position_ids`` and ``logits_to_keep``.
        """
        if self._gave_up or not run.takes(ids.shape[1]) or not self._prepare(cache, ids.shape[1], run.longest):
            self.give_back(cache)
            return None
        inputs = self._inputs(cache, ids, options["attention_mask"], options["position_ids"])
        shapes = tuple(None if x is None else x.shape for x in inputs.values())
        key = (type(cache.layers[0]), *shapes, options["logits_to_keep"])
        logits: Tensor | None
        with torch.cuda.device_of(ids):
            if key in self._steps:
                logits = self._replay(self._steps[key], inputs)
            elif key in run.seen:
                logits = self._capture(run, cache, key, inputs)
            else:
                run.seen.add(key)
                logits = self._call(run, cache, inputs, options["logits_to_keep"])
        if logits is None:
            self.give_back(cache)
            return None
        for layer in self.reserved:
            layer.tokens += ids.shape[1]
        self._known_length += ids.shape[1]
        return logits

    def give_back(self, cache: Cache) -> None:
        """Give a growing cache its layers back, if reserved ones stand in their place; graphs stay."""
        if self.reserved and cache.layers[0] is self.reserved[0]:
            cache.layers[: len(self.reserved)] = [layer.give_back() for layer in self.reserved]

    def _prepare(self, cache: Cache, tokens: int, longest: int) -> bool:
        """Have the cache's state at addresses that stay; False if that cannot be."""
        layers = cache.layers
        if self.reserved and layers[0] is self.reserved[0] and not self.reserved[0].has_room(tokens):
            self.give_back(cache)
        kinds = {type(x) for x in layers}
        if kinds == {DynamicForgettingLayer}:
            if cache.offloading or not all(x.is_initialized and x.get_seq_length() for x in layers):
                return False
            self._lend(cache, tokens, longest)
        elif not all(issubclass(x, _FIXED_LAYERS) for x in kinds) or False in [x.is_initialized for x in layers]:
            return False
        if self.reserved and self._known_length != self.reserved[0].tokens:
            assert self._length is not None, "made with the layers"
            self._known_length = self.reserved[0].tokens
            self._length.fill_(self._known_length)
        # Objects, not addresses, which may be used again; a graph of other buffers is never right again.
        buffers = [x for layer in cache.layers for x in (layer.keys, layer.values, getattr(layer, "pages", None))]
        if len(buffers) != len(self._buffers) or any(map(operator.is_not, buffers, self._buffers)):
            self._buffers = buffers
            self._steps.clear()
            # Memory that its last graph has given back cannot be captured in again.
            self._pool = None
        return True

    def _lend(self, cache: Cache, tokens: int, longest: int) -> None:
        """Put layers with room for more in the place of growing ones."""
        held = cache.get_seq_length()
        if len(self.reserved) != len(cache.layers) or not all(
            layer.fits(grown, tokens) for layer, grown in zip(self.reserved, cache.layers, strict=True)
        ):
            wanted = min(longest - held, max(_ROOM, held // 8))
            room = -(-(held + max(wanted, tokens, _LEAST_ROOM)) // _ROOM_MULTIPLE) * _ROOM_MULTIPLE
            if self._length is None:
                with torch.inference_mode(False):
                    self._length = torch.zeros((), dtype=torch.int64, device=cache.layers[0].keys.device)
            self.reserved = []
            for i, grown in enumerate(cache.layers):
                self.reserved.append(ReservedForgettingLayer(grown, room, self._sizes, self._length))
                cache.layers[i] = self.reserved[-1]
            self._known_length = -1
            return
        for i, layer in enumerate(self.reserved):
            layer.take(cache.layers[i])
            cache.layers[i] = layer

    def _inputs(
        self, cache: Cache, ids: Tensor, attention_mask: Tensor | dict | None, position_ids: Tensor | None
    ) -> dict[str, Tensor | None]:
        """What a step reads beside the cache: tokens, the padding mask over the whole buffers, positions."""
        past = self.reserved[0].tokens if self.reserved else cache.get_seq_length()
        keys = self.reserved[0].max_cache_len if self.reserved else cache.get_mask_sizes(ids.shape[1], 0)[0]
        mask = padding_mask(attention_mask, ids.shape[0], past, ids.shape[1], keys, ids.device)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}

    def _replay(self, step: _Step, inputs: dict[str, Tensor | None]) -> Tensor:
        for name, buffer in step.inputs.items():
            if buffer is not None:
                buffer.copy_(cast(Tensor, inputs[name]))
        step.graph.replay()
        self._replays += 1
        # The next replay overwrites them.
        return step.logits.clone()

    def _capture(
        self, run: "DecodingGraphs", cache: Cache, key: tuple, inputs: dict[str, Tensor | None]
    ) -> Tensor | None:
        if self._captures >= _CAPTURES and self._replays < _REPLAYS * self._captures:
            self._gave_up = True
            return None
        with torch.inference_mode(False):
            buffers = {name: None if x is None else x.clone() for name, x in inputs.items()}
        if self._pool is None:
            self._pool = StepGraph.new_pool()
        graph = StepGraph(run.device, self._pool)
        try:
            logits = graph.capture(lambda: self._call(run, cache, buffers, key[-1]))
        except RuntimeError as error:
            self._gave_up = True
            run.seen.discard(key)
            run.say(f"capturing a step failed: {str(error).splitlines()[0]}")
            return None
        self._captures += 1
        self._steps[key] = _Step(graph, buffers, logits)
        return self._replay(self._steps[key], inputs)

    def _call(
        self, run: "DecodingGraphs", cache: Cache, inputs: dict[str, Tensor | None], logits_to_keep: int
    ) -> Tensor:
        """Run the model's forward on the device's own length."""
        mask = {LAYER_TYPE: inputs["attention_mask"]}
        for layer in self.reserved:
            layer.in_step = True
        try:
            logits = run.forward(**(inputs | {"attention_mask": mask}), cache=cache, logits_to_keep=logits_to_keep)
        finally:
            for layer in self.reserved:
                layer.in_step, layer._new = False, None
        if self.reserved:
            cast(Tensor, self._length).add_(cast(Tensor, inputs["input_ids"]).shape[1])
        return logits


class DecodingGraphs:
    """One running call of `generate`, and the graphs of the caches that it uses.

    Attributes:
        device: of the model.
        longest: tokens that a sequence may have when the call ends.
        seen: shapes of which a step has run, so that its kernels are compiled and loaded.
        unpadded: the cache of the sequences to come, if it is known that none of their tokens is padding.
    """

    def __init__(
        self, model: Any, graphs: "weakref.WeakKeyDictionary[Cache, CacheGraphs]", seen: set[tuple], own_masks: bool
    ) -> None:
        self.device, self.longest, self.seen = model.device, 0, seen
        self.unpadded: Cache | None = None
        self._own_masks = own_masks
        self._model, self._graphs, self._in_step = model, graphs, False
        self._forward: Callable[..., Any] = model.forward
        self._taken: dict[int, bool] = {}
        self._stands_aside = False

    def stand_aside(self) -> None:
        """Capture nothing in this call: its steps are compiled, and torch captures those."""
        self._stands_aside = True

    def takes(self, tokens: int) -> bool:
        """Whether a step of so many tokens can be captured."""
        if tokens not in self._taken:
            self._taken[tokens] = runs_decode_kernels(self._model, tokens)
        return self._taken[tokens]

    def step(
        self, forward: Callable[..., Any], cache: Cache | None, input_ids: Tensor | None, plain: bool, **options: Any
    ) -> Tensor | None:
        """Logits of a step, ``[B, kept, V]``; None where it must run as always.

        Args:
            forward: the model's, which calls this.
            cache, input_ids: its arguments.
            plain: whether it has no others than these, the options, and ``use_cache=True``.
            options: ``attention_mask``, ``position_ids`` and ``logits_to_keep``, likewise.
        """
        if self._in_step or self._stands_aside or not getattr(cache, "layers", None):
            return None
        assert cache is not None, "it has layers"
        graphs = self._graphs.get(cache)
        plain = plain and input_ids is not None and isinstance(options["logits_to_keep"], int)
        if torch.is_autocast_enabled(self.device.type):
            self.say("autocast casts weights at each step")
            plain = False
        if not plain or torch.is_grad_enabled() or cast(Tensor, input_ids).device != self.device:
            if graphs is not None:
                graphs.give_back(cache)
            return None
        if cache is self.unpadded:
            options["attention_mask"] = None
        if graphs is None:
            graphs = self._graphs[cache] = CacheGraphs(self._model)
        self._forward = forward
        return graphs.step(self, cache, cast(Tensor, input_ids), **options)

    def take_prompt(self, cache: Any, attention_mask: Any) -> None:
        """Learn of the cache of the sequences to come whether a mask hides any of their tokens.

        If it does not, no step reads one: what `generate` adds to it is not padding. Waits for the device, once.
        """
        if self._own_masks or not isinstance(cache, Cache):
            return
        if attention_mask is None or (isinstance(attention_mask, Tensor) and bool(attention_mask.all())):
            self.unpadded = cache

    def forward(self, cache: Cache, **inputs: Any) -> Tensor:
        """The model's forward, which does not come back here; returns logits."""
        self._in_step = True
        try:
            return self._forward(**{CACHE: cache}, use_cache=True, **inputs).logits
        finally:
            self._in_step = False

    def say(self, reason: str) -> None:
        """Warn, once, that steps run as always."""
        _say(reason)

    def end(self) -> None:
        """Give all caches that outlive the call their own layers."""
        for cache, graphs in list(self._graphs.items()):
            graphs.give_back(cache)


def _say(reason: str) -> None:
    logger.warning_once(
        f"decoding runs without CUDA graphs, and slower: {reason}. Set decoding_graphs=False in the configuration if "
        "that is meant"
    )


class _Kept(NamedTuple):
    """What one call of `generate` leaves to the next: graphs of caches that callers keep, and `DecodingGraphs.seen`."""

    fingerprint: Any
    graphs: "weakref.WeakKeyDictionary[Cache, CacheGraphs]"
    seen: set[tuple]


_KEPT: "weakref.WeakKeyDictionary[nn.Module, _Kept]" = weakref.WeakKeyDictionary()


def _fingerprint(modules: list[nn.Module], weights: list[Tensor]) -> Any:
    """All of a model that a captured step depends on, beside values of weights and its configuration.

    None if there may be more: modules of other libraries, such as adapters, have state of their own.
    """
    if any(not x.__module__.startswith(_KNOWN_MODULES) for x in set(map(type, modules))):
        return None
    return (
        tuple((id(x), x.training, "forward" in vars(x)) for x in modules),
        tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in weights),
    )


def _reason_and_fingerprint(model: Any, known: KnownModules | None) -> tuple[str | None, Any]:
    """`_unsupported` and `_fingerprint`; what has been found of modules that are known holds."""
    if known is not None and known.graphs is not None:
        return known.graphs
    parts = _parts_of(model)
    reason = _unsupported(model, *parts)
    found = reason, None if reason else _fingerprint(*parts)
    if known is not None:
        known.graphs = found
    return found


@contextlib.contextmanager
def decoding_graphs(model: Any, known: KnownModules | None = None, own_masks: bool = True) -> Iterator[None]:
    """Within it, steps of ``model`` with a cache are captured and replayed, where they can be; `generate` enters it.

    Args:
        known: its modules, if these are as they were at an earlier call.
        own_masks: whether padding masks may be any; else `DecodingGraphs.take_prompt` sees all padding that there is.
    """
    if not model.config.decoding_graphs or not runs_decode_kernels(model):
        yield
        return
    from .attention_implementations import runs_own_attention

    config = model.config
    reason, fingerprint = _reason_and_fingerprint(model, known)
    if config._attn_implementation != DEFAULT_IMPLEMENTATION:
        reason = f"attn_implementation is {config._attn_implementation!r}, which has no decode kernel"
    elif not runs_own_attention(config._attn_implementation):
        reason = "another function was put in the place of attention, which a captured step would not call"
    if reason is not None:
        _say(reason)
        yield
        return
    if fingerprint is not None:
        settings = config.acp_eps, config.acp_rule, torch.get_float32_matmul_precision()
        fingerprint = (fingerprint, settings)
    kept = _KEPT.get(model)
    if kept is None or fingerprint is None or kept.fingerprint != fingerprint:
        kept = _Kept(fingerprint, weakref.WeakKeyDictionary(), set())
    run = DecodingGraphs(model, kept.graphs, kept.seen, own_masks)
    token = _RUNNING.set(_RUNNING.get({}) | {id(model): run})
    try:
        yield
    finally:
        _RUNNING.reset(token)
        run.end()
        if fingerprint is None:
            _KEPT.pop(model, None)
        else:
            _KEPT[model] = kept


def running(model: Any) -> DecodingGraphs | None:
    """The call of `generate` that runs ``model``, in this thread, with graphs; None without."""
    return _RUNNING.get({}).get(id(model))


def holds_no_padding(cache: Cache | None) -> bool:
    """Whether a running `generate` knows that no token of ``cache``, now or to come, is padding."""
    return cache is not None and any(run.unpadded is cache for run in _RUNNING.get({}).values())


__all__ = ["CacheGraphs", "DecodingGraphs", "StepGraph", "decoding_graphs", "holds_no_padding", "running"]
