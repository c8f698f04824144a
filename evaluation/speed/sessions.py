"""Decoding with a whole model: which model, which cache, which pruning; and a cache filled with a context."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.versions import CACHE

from .models import set_pruning
from .own import own_name

# Tokens of all sequences together, and of one, that a model is given at a time: enough to be fast, and bounded memory.
_TOKENS_AT_ONCE, _LONGEST_CHUNK = 32768, 4096

Step = Callable[[PreTrainedModel, Cache, Tensor], tuple[Tensor, Tensor]]
"""Logits ``[B, 1, V]`` and the likeliest next tokens ``[B, 1]`` from a model, its cache and tokens ``[B, 1]``."""


@dataclass(frozen=True)
class Decoder:
    """One way to decode.

    Attributes:
        family: ``"foxlm"`` or ``"Llama"``, which is transformers' own.
        cache: ``"dynamic"`` grows and runs eagerly; ``"static"`` has a fixed length, ``"paged"`` frees pages of keys
            that no query can attend again, and both run compiled on a GPU.
        rule: of pruning, None without.
    """

    family: Literal["foxlm", "Llama"]
    cache: Literal["dynamic", "static", "paged"]
    rule: Rule | None = None

    @property
    def name(self) -> str:
        """As it appears in tables."""
        return f"{self.who}, {self.cache} cache"

    @property
    def who(self) -> str:
        """Model and rule, as they appear in tables."""
        return own_name(self.rule) if self.family == "foxlm" else self.family

    def new_cache(self, config: Any, length: int) -> Cache:
        """An empty cache for a model of ``config`` and sequences of up to ``length`` tokens."""
        if self.cache == "dynamic":
            return DynamicCache(config=config)
        if self.cache == "static":
            return StaticCache(config=config, max_cache_len=length)
        return FoxPagedCache(config, max_cache_len=length)


DECODERS = (
    Decoder("foxlm", "dynamic"),
    Decoder("foxlm", "dynamic", "tight"),
    Decoder("foxlm", "static"),
    Decoder("foxlm", "static", "paper"),
    Decoder("foxlm", "static", "tight"),
    Decoder("foxlm", "paged", "tight"),
    Decoder("Llama", "dynamic"),
    Decoder("Llama", "static"),
)


def greedy_step(model: PreTrainedModel, cache: Cache, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The `Step` without compilation."""
    logits = model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
    return logits, logits.argmax(-1)


def compiled_step() -> Step:
    """The `Step` as one graph of one shape, replayed as a CUDA graph."""
    return torch.compile(greedy_step, mode="reduce-overhead", fullgraph=True, dynamic=False)


class Session:
    """Sequences in a cache, extended by greedy decoding. A model serves one session at a time.

    Attributes:
        cache: what it says.
        ids: ``[B, 1]`` int64 tokens of the next step.
    """

    def __init__(self, decoder: Decoder, model: PreTrainedModel, step: Step, batch: int, length: int) -> None:
        if isinstance(model, FoxForCausalLM):
            set_pruning(model, decoder.rule)
        self.cache = decoder.new_cache(model.config, length)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._model, self._step = model, step

    @torch.no_grad()
    def fill(self, ids: Tensor, chunk: int | None = None, forward: Callable | None = None) -> Tensor:
        """Take in the context ``ids``, ``[B, T]``, part by part; returns the last logits, ``[B, V]``.

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

    def reserve(self) -> None:
        """Make room for the next token, which a compiled step cannot do itself."""
        if isinstance(self.cache, FoxPagedCache):
            self.cache.reserve(1)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Decode one token, for which there must be room; returns logits ``[B, V]``, valid until the next step."""
        # Said at each step: the outputs of the one before may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        logits, following = self._step(self._model, self.cache, self.ids)
        self.ids.copy_(following)
        return logits[:, -1]

    def advance(self, count: int = 1) -> None:
        """Decode ``count`` tokens."""
        for _ in range(count):
            self.reserve()
            self.step()

    def stored_bytes(self) -> int:
        """Memory of all keys and values, that of tokens to come included where it is already taken."""
        if isinstance(self.cache, FoxPagedCache):
            return self.cache.held_bytes()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
