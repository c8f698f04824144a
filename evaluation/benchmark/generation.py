"""`foxlm bench prefill` and `foxlm bench decode`: a whole model generates, beside a plain Llama of the same sizes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.generation import decoding_mode
from foxlm.modeling.versions import CACHE

from .models import CHECKED_TOKENS, LogitsCheck, Workload, build_llama, computed_tiles, ours, set_pruning
from .results import Row
from .runner import Variant
from .timing import peak_bytes, release_memory, wall_times

DTYPE = torch.bfloat16

PREFILL_TOKENS, CPU_PREFILL_TOKENS = (4096, 16384), (256,)
PREFILL_BATCHES, CPU_PREFILL_BATCHES = (1, 8), (1,)
CHUNK, CPU_CHUNK = 4096, 64
# Chunks that the check's tokens are divided into.
_CHECKED_CHUNKS = 4

DECODE_TOKENS, CPU_DECODE_TOKENS = 14336, 256
DECODE_BATCHES = (1, 8)
CHECKED_STEPS = 4
_WARM_UP_STEPS = 4
# Tokens of all sequences together, and of one, that fill a cache at a time: enough to be fast, and bounded memory.
_TOKENS_AT_ONCE, _LONGEST_CHUNK = 32768, 4096
# The length of a static cache is a multiple of this, as PyTorch's kernels need for their masks.
_LENGTH_MULTIPLE = 64

Models = dict[str, PreTrainedModel]
Step = Callable[[PreTrainedModel, Cache, Tensor], tuple[Tensor, Tensor]]
"""Logits ``[B, 1, V]`` and the likeliest next tokens ``[B, 1]`` from a model, its cache and tokens ``[B, 1]``."""


@dataclass(frozen=True)
class Generator:
    """A model, cache and rule.

    Attributes:
        family: ``"foxlm"`` or ``"Llama"``, which is transformers' own.
        cache: ``"dynamic"`` grows and decodes eagerly; ``"static"`` has a fixed length, ``"paged"`` evicts pages of
            keys that no query can attend to again, and both decode compiled on a GPU.
        rule: of pruning, None without.
        chunked: of a prompt: chunked prefill, which bounds the memory.
        compiled: of a prompt: whether the model is compiled, for one shape.
    """

    family: Literal["foxlm", "Llama"]
    cache: Literal["dynamic", "static", "paged"]
    rule: Rule | None = None
    chunked: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """As it appears in tables."""
        parts = [ours(self.rule) if self.family == "foxlm" else self.family]
        parts += [f"{self.cache} cache"] if self.cache != "dynamic" else []
        parts += ["chunked prefill"] if self.chunked else []
        return ", ".join([*parts, *(["compiled"] if self.compiled else [])])

    def new_cache(self, config: Any, length: int) -> Cache:
        """An empty cache for a model of ``config`` and sequences of up to ``length`` tokens."""
        if self.cache == "dynamic":
            return DynamicCache(config=config)
        if self.cache == "static":
            return StaticCache(config=config, max_cache_len=length)
        return FoxPagedCache(config, max_cache_len=length)


_WHOLE = (
    Generator("foxlm", "dynamic"),
    Generator("foxlm", "dynamic", "paper"),
    Generator("foxlm", "dynamic", "tight"),
    Generator("Llama", "dynamic"),
)
PREFILLERS = (
    *_WHOLE,
    Generator("foxlm", "dynamic", chunked=True),
    Generator("foxlm", "dynamic", "tight", chunked=True),
    Generator("foxlm", "paged", "tight", chunked=True),
    Generator("Llama", "dynamic", chunked=True),
)
COMPILED_PREFILLERS = tuple(Generator(one.family, one.cache, one.rule, compiled=True) for one in _WHOLE)
DECODERS = (
    Generator("foxlm", "dynamic"),
    Generator("foxlm", "dynamic", "tight"),
    Generator("foxlm", "static"),
    Generator("foxlm", "static", "paper"),
    Generator("foxlm", "static", "tight"),
    Generator("foxlm", "paged", "tight"),
    Generator("Llama", "dynamic"),
    Generator("Llama", "static"),
)


def build_models(workload: Workload, generators: Sequence[Generator]) -> Models:
    """The models for inference in bfloat16, by family: the FoX always, a Llama of its sizes if one is asked for."""
    fox = workload.build(DTYPE).eval()
    models: Models = {"foxlm": fox}
    if any(one.family == "Llama" for one in generators):
        models["Llama"] = build_llama(fox.config, workload.device, DTYPE).eval()
    return models


def usable(fox: PreTrainedModel, generators: Sequence[Generator]) -> list[Generator]:
    """Those of ``generators`` that ``fox`` can be measured with: without forget gates nothing is pruned.

    Raises:
        ValueError: none is left.
    """
    found = [one for one in generators if one.rule is None or fox.config.forget_gate != "none"]
    if not found:
        raise ValueError("--model has no forget gates (forget_gate is none), so nothing is left of --only to measure")
    return found


def rounded_up(tokens: int) -> int:
    """A cache's length with room for ``tokens``."""
    return -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def greedy_step(model: PreTrainedModel, cache: Cache, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The `Step` without compilation."""
    logits = model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
    return logits, logits.argmax(-1)


class Session:
    """Sequences in a cache, extended by greedy decoding. A model serves one session at a time.

    Attributes:
        cache: holds their keys and values.
        ids: ``[B, 1]`` int64 tokens of the next step.
    """

    def __init__(self, generator: Generator, model: PreTrainedModel, step: Step, batch: int, length: int) -> None:
        if isinstance(model, FoxForCausalLM):
            set_pruning(model, generator.rule)
        self.cache = generator.new_cache(model.config, length)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._model, self._step = model, step

    @torch.no_grad()
    def fill(self, ids: Tensor, chunk: int | None = None, forward: Callable | None = None) -> Tensor:
        """Take in the context ``ids``, ``[B, T]``; returns the last logits, ``[B, V]``.

        Args:
            ids: the tokens.
            chunk: how many of each sequence at a time; by default what is fast and bounds the memory.
            forward: the model itself by default, or compiled.
        """
        forward = self._model if forward is None else forward
        chunk = max(1, min(_LONGEST_CHUNK, _TOKENS_AT_ONCE // len(ids))) if chunk is None else chunk
        for part in ids.split(chunk, dim=1):
            logits = forward(input_ids=part, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits
        self.ids.copy_(logits.argmax(-1))
        return logits[:, -1]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Decode one token; returns logits ``[B, V]``, valid until the next step."""
        if isinstance(self.cache, FoxPagedCache):
            # A compiled step cannot make room itself.
            self.cache.reserve(1)
        # The outputs of the step before may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        logits, following = self._step(self._model, self.cache, self.ids)
        self.ids.copy_(following)
        return logits[:, -1]

    def advance(self, count: int = 1) -> None:
        """Decode ``count`` tokens."""
        for _ in range(count):
            self.step()

    def stored_bytes(self) -> int:
        """Memory of all keys and values, with that reserved for tokens to come."""
        if isinstance(self.cache, FoxPagedCache):
            return self.cache.held_bytes()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class _Batch:
    """Sequences that several models and caches take in, and what their check and rows have in common."""

    def __init__(self, models: Models, workload: Workload, batch: int, tokens: int) -> None:
        # What was compiled for other shapes would count against the limit of recompilations.
        torch.compiler.reset()
        self.models, self.device, self.check = models, workload.device, LogitsCheck()
        self.ids = workload.ids(models["foxlm"].config.vocab_size, batch, tokens)
        self.facts: Row = {"batch": batch, "text_rows": len(torch.unique(self.ids, dim=0))}


class _Generation:
    """What a prompt and a decoding step have in common."""

    def __init__(self, one: Generator, batch: _Batch, facts: Row) -> None:
        self.facts = (
            {"name": one.name, "family": one.family, "cache": one.cache, "rule": one.rule} | batch.facts | facts
        )
        self._one, self._model, self._ids, self._device = one, batch.models[one.family], batch.ids, batch.device
        self._weights = sum(parameter.nbytes for parameter in self._model.parameters())
        self._fault = partial(batch.check.fault, one.family, self._model, rule=one.rule)


def prefill_variants(
    batch: int, tokens: int, models: Models, generators: Sequence[Generator], workload: Workload, chunk: int
) -> Iterator[Variant]:
    """Ways to take in ``batch`` prompts of ``tokens`` tokens; chunked ones only where a prompt has several chunks."""
    prompts = _Batch(models, workload, batch, tokens)
    tiles: dict[Rule | None, float] = {}
    for one in generators:
        if not one.chunked or tokens > chunk:
            if one.family == "foxlm" and one.rule not in tiles:
                tiles[one.rule] = computed_tiles(models["foxlm"], prompts.ids, one.rule)
            facts = {"tokens": tokens, "computed_tiles": tiles[one.rule] if one.family == "foxlm" else None}
            yield _Prefill(one, prompts, facts, chunk)


class _Prefill(_Generation):
    """From an empty cache until the first token is there, as the first step of `generate`."""

    def __init__(self, one: Generator, batch: _Batch, facts: Row, chunk: int) -> None:
        super().__init__(one, batch, facts)
        self._chunk = chunk
        self._forward = torch.compile(self._model, dynamic=False) if one.compiled else self._model

    def _fill(self, ids: Tensor, chunk: int) -> tuple[Tensor, Session]:
        batch, tokens = ids.shape
        session = Session(self._one, self._model, greedy_step, batch, rounded_up(tokens))
        return session.fill(ids, chunk if self._one.chunked else tokens, self._forward), session

    def check(self, row: Row) -> str | None:
        ids = self._ids[:, :CHECKED_TOKENS]
        found, _ = self._fill(ids, min(self._chunk, max(1, ids.shape[1] // _CHECKED_CHUNKS)))
        fault = self._fault(ids, found[:, None], row=row)
        if fault is None:
            # The first call compiles.
            row["stored_bytes"] = self._fill(self._ids, self._chunk)[1].stored_bytes()
            release_memory(self._device)
            row["peak_bytes"] = peak_bytes(lambda: self._fill(self._ids, self._chunk), self._device, self._weights)
        return fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        fill = partial(self._fill, self._ids, self._chunk)
        return {"first_token": wall_times(fill, rounds, self._device, warm_up=1)}

    def derive(self, row: Row) -> None:
        row["tokens_per_second"] = 1e3 * self._ids.numel() / row["first_token"]["ms"]


def decode_variants(
    batch: int, models: Models, generators: Sequence[Generator], workload: Workload, tokens: int, new: int, rounds: int
) -> Iterator[Variant]:
    """Ways to decode ``batch`` sequences after ``tokens`` tokens, by ``rounds`` timed rounds of ``new`` steps."""
    contexts = _Batch(models, workload, batch, tokens + CHECKED_STEPS)
    # One length for check and timing: steps are compiled for one shape.
    length = rounded_up(tokens + max(CHECKED_STEPS, _WARM_UP_STEPS + 1 + rounds * new))
    for one in generators:
        yield _Decode(one, contexts, new, length)


class _Decode(_Generation):
    """One more token after a context. Each pass fills a new cache: two may not fit side by side."""

    def __init__(self, one: Generator, batch: _Batch, new: int, length: int) -> None:
        compiled = one.cache != "dynamic" and batch.device == "cuda"
        super().__init__(one, batch, {"compiled": compiled})
        self._new, self._length = new, length
        # One graph of one shape, replayed as a CUDA graph.
        options: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        self._step: Step = torch.compile(greedy_step, **options) if compiled else greedy_step

    def _session(self) -> Session:
        return Session(self._one, self._model, self._step, len(self._ids), self._length)

    def check(self, row: Row) -> str | None:
        context = min(CHECKED_TOKENS, self._ids.shape[1] - CHECKED_STEPS)
        ids = self._ids[:, : context + CHECKED_STEPS]
        with decoding_mode(self._model):
            session = self._session()
            found = [session.fill(ids[:, :context]).clone()]
            for token in ids[:, context:].split(1, dim=1):
                session.ids.copy_(token)
                found.append(session.step().clone())
        return self._fault(ids, torch.stack(found, dim=1), row=row)

    def time(self, rounds: int) -> dict[str, list[float]]:
        before = torch.cuda.memory_allocated() if self._device == "cuda" else 0
        # As `generate` does.
        with decoding_mode(self._model):
            session = self._session()
            session.fill(self._ids[:, :-CHECKED_STEPS])
            session.advance(_WARM_UP_STEPS)
            after = torch.cuda.memory_allocated() if self._device == "cuda" else 0
            stored = session.stored_bytes()
            # Capturing a graph frees cuBLAS's workspace, 32 MiB on Hopper, which may have been allocated before.
            resident = self._weights + max(after - before, stored)
            self._memory = {
                "peak_bytes": peak_bytes(session.advance, self._device, resident),
                "stored_bytes": stored,
            }
            steps = wall_times(lambda: session.advance(self._new), rounds, self._device, warm_up=0)
        return {"step": [ms / self._new for ms in steps]}

    def derive(self, row: Row) -> None:
        row |= self._memory
        row["tokens_per_second"] = 1e3 * len(self._ids) / row["step"]["ms"]
