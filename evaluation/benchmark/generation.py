"""`foxlm bench generate`: the calls that people write, of a FoX beside a plain Llama of the same sizes.

What is timed is ``model.generate`` and ``model(...)`` with their public arguments only. New processes are in
`cold_start`, training steps in `train`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from foxlm import FoxPagedCache
from foxlm.modeling.attention_settings import attention_settings
from foxlm.modeling.versions import cache_of

from ..skipped_share import skipped_share
from .models import CHECKED_TOKENS, LogitsCheck, Workload, build_llama
from .results import Row
from .runner import Variant
from .timing import allocated_bytes, peak_bytes, release_memory, synchronize, wall_times

DTYPE = torch.bfloat16
DECODE_TOKENS, CPU_TOKENS = 14336, 256
# Batch and tokens of prompts.
PROMPTS = ((1, 4096), (1, 16384), (8, 16384))
CHUNK, CPU_CHUNK = 4096, 64
NEW, QUICK_NEW, CPU_NEW = 64, 16, 4
# Tokens generated in the check, and chunks that its context is divided into.
CHECKED_NEW, _CHECKED_CHUNKS = 8, 4
# No further round of a pass begins after this: slow calls scatter less.
_SECONDS_OF_A_PASS = 2.0

Models = dict[str, PreTrainedModel]


@dataclass(frozen=True)
class Call:
    """A model and how it is called.

    Attributes:
        part: ``"decode"`` for the time of a token after a context, ``"prefill"`` for that of a prompt.
        family: ``"foxlm"`` or ``"Llama"``, which is transformers' own.
        cache: ``"dynamic"`` without options, ``"static"`` by ``cache_implementation``, ``"paged"`` by
            ``free_dead_cache=True`` in the configuration.
        pruned: whether a FoX prunes as its configuration says, or not at all.
        graphs: whether a FoX decodes by captured CUDA graphs as its configuration says, or not at all.
        chunked: whether a prompt is taken in by ``prefill_chunk_size``.
        batches: sequences that tokens are decoded for if the user names none.
    """

    part: Literal["decode", "prefill"]
    family: Literal["foxlm", "Llama"]
    cache: Literal["dynamic", "static", "paged"] = "dynamic"
    pruned: bool = True
    graphs: bool = True
    chunked: bool = False
    batches: tuple[int, ...] = (1, 8)

    @property
    def name(self) -> str:
        """As it appears in rows, after the part."""
        words = [self.family, *([f"{self.cache} cache"] if self.cache != "dynamic" else [])]
        named = {"not pruned": self.pruned, "no CUDA graphs": self.graphs, "chunked prefill": not self.chunked}
        return f"{self.part}: {', '.join(words + [word for word, usual in named.items() if not usual])}"

    @property
    def compiled(self) -> bool:
        """Whether transformers compiles it on a GPU, which takes its first call a minute."""
        return self.cache == "static" and (self.family == "Llama" or not self.graphs)

    @property
    def against(self) -> dict[str, str]:
        """Names of the rows that its rate is held against: Llama's, and of the same model another call's."""
        static = self.part == "decode" and self.cache != "dynamic"
        usual = replace(self, cache="static" if static else "dynamic", pruned=True, graphs=True)
        plain = replace(usual, chunked=False)
        found = {"llama": replace(usual, family="Llama").name} if self.family == "foxlm" else {}
        return found | ({"own": plain.name} if plain != self else {})

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of a FoX's configuration that the call changes."""
        fields: dict[str, Any] = {"free_dead_cache": self.cache == "paged"}
        fields |= {} if self.pruned else {"acp_eps": None}
        return fields | ({} if self.graphs else {"decoding_graphs": False})


CALLS = (
    Call("decode", "foxlm", batches=(1,)),
    Call("decode", "foxlm", graphs=False, batches=(1,)),
    Call("decode", "foxlm", "static"),
    Call("decode", "foxlm", "static", graphs=False),
    Call("decode", "foxlm", "paged", batches=(8,)),
    Call("decode", "Llama"),
    Call("decode", "Llama", "static"),
    Call("prefill", "foxlm"),
    Call("prefill", "foxlm", pruned=False),
    Call("prefill", "foxlm", chunked=True),
    Call("prefill", "foxlm", "paged", chunked=True),
    Call("prefill", "Llama"),
    Call("prefill", "Llama", chunked=True),
)


def build_models(workload: Workload, calls: Sequence[Call]) -> Models:
    """The models for inference in bfloat16, by family: the FoX always, a Llama of its sizes if one is asked for."""
    fox = workload.build(DTYPE).eval()
    models: Models = {"foxlm": fox}
    if any(one.family == "Llama" for one in calls):
        models["Llama"] = build_llama(fox.config, workload.device, DTYPE).eval()
    for model in models.values():
        # Greedy, and always as many tokens as asked for.
        model.generation_config = GenerationConfig(do_sample=False)
    return models


def stored_bytes(cache: Cache) -> int:
    """Memory of all keys and values, with that reserved for tokens to come."""
    if isinstance(cache, FoxPagedCache):
        return cache.held_bytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def generation_fault(
    check: LogitsCheck, family: str, model: PreTrainedModel, ids: Tensor, row: Row, **options: Any
) -> str | None:
    """What is wrong with the logits of tokens that `generate` gives after ``ids``; None if nothing is.

    They are held against those of the whole sequence by dense attention without a cache; see `LogitsCheck`.
    """
    options = {"max_new_tokens": CHECKED_NEW, "return_dict_in_generate": True, "output_logits": True, **options}
    out = model.generate(ids, **options)
    eps = getattr(model.config, "acp_eps", None) or 0.0
    return check.fault(family, model, out.sequences[:, :-1], torch.stack(out.logits, dim=1), eps=eps, row=row)


def call_variants(
    calls: Sequence[Call], models: Models, workload: Workload, batch: int, tokens: int, new: int, chunk: int
) -> Iterator[Variant]:
    """The ``calls`` on ``batch`` sequences of ``tokens`` tokens; chunked ones only where there are several chunks."""
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    ids, check = workload.ids(models["foxlm"].config.vocab_size, batch, tokens), LogitsCheck()
    for one in calls:
        if one.part == "decode":
            yield _Decode(one, models[one.family], ids, check, new)
        elif not one.chunked or tokens > chunk:
            yield _Prefill(one, models[one.family], ids, check, chunk)


def _rounds_of_a_pass(rounds: int) -> Iterator[int]:
    began = time.perf_counter()
    for count in range(rounds):
        if count == 0 or time.perf_counter() - began < _SECONDS_OF_A_PASS:
            yield count


class _Called:
    """What decoding and prompts have in common."""

    def __init__(self, one: Call, model: PreTrainedModel, ids: Tensor, check: LogitsCheck) -> None:
        self.facts: Row = {"part": one.part, "name": one.name, "family": one.family, "cache": one.cache}
        self.facts |= {"batch": len(ids), "tokens": ids.shape[1], "text_rows": len(torch.unique(ids, dim=0))}
        self.facts |= {"compiled": one.compiled and ids.is_cuda, "against": one.against}
        self._one, self._model, self._ids, self._check, self._device = one, model, ids, check, ids.device.type
        self._options: dict[str, Any] = {"cache_implementation": "static"} if one.cache == "static" else {}
        self._weights = sum(parameter.nbytes for parameter in model.parameters())

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """The configuration as the call has it."""
        config = self._model.config
        fields = self._one.settings if self._one.family == "foxlm" else {}
        before = {name: getattr(config, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(config, name, value)
            with torch.no_grad():
                yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    def _generate(self, new: int, **more: Any) -> Any:
        out = self._model.generate(self._ids, max_new_tokens=new, **self._options, **more)
        found = getattr(out, "sequences", out).shape[1] - self._ids.shape[1]
        if found != new:
            raise RuntimeError(f"generate gave {found} tokens, asked for {new}")
        return out

    def _first_call(self, row: Row, call: Any) -> Any:
        """The first call, which compiles; adds its seconds and what its cache stores to ``row``."""
        self._before = allocated_bytes(self._device)
        began = time.perf_counter()
        out = call()
        synchronize(self._device)
        row |= {"first_call_seconds": time.perf_counter() - began, "stored_bytes": stored_bytes(cache_of(out))}
        return out

    def _peak_bytes(self, call: Any) -> int | None:
        """With the weights, and with what earlier calls of this variant have left allocated."""
        release_memory(self._device)
        left = max(0, allocated_bytes(self._device) - self._before)
        return peak_bytes(call, self._device, self._weights + left)


class _Decode(_Called):
    """Tokens after a context, from calls of `generate` that give 1, N and 2N of them."""

    def __init__(self, one: Call, model: PreTrainedModel, ids: Tensor, check: LogitsCheck, new: int) -> None:
        super().__init__(one, model, ids, check)
        self._new = new

    def check(self, row: Row) -> str | None:
        with self._configured():
            # The longest first: shorter ones then use the length that was compiled, reserved or captured for it.
            call = partial(self._generate, 2 * self._new, return_dict_in_generate=True)
            out = self._first_call(row, call)
            given = set(out.sequences[:, self._ids.shape[1] :].flatten().tolist())
            del out
            fault = generation_fault(
                self._check, self._one.family, self._model, self._ids[:, :CHECKED_TOKENS], row, **self._options
            )
            if fault is None:
                row["peak_bytes"] = self._peak_bytes(partial(self._generate, 2))
        # An end of text that does not come: what looks for it is part of a call.
        end = next(token for token in range(len(given) + 1) if token not in given)
        self._options |= {"eos_token_id": end, "pad_token_id": end}
        return fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        taken: dict[int, list[float]] = {1: [], self._new: [], 2 * self._new: []}
        with self._configured():
            self._generate(2)
            for _ in _rounds_of_a_pass(rounds):
                for new, of_calls in taken.items():
                    of_calls += wall_times(partial(self._generate, new), 1, self._device, warm_up=0)
        first, whole, twice = (taken[new] for new in (1, self._new, 2 * self._new))
        steps = [(longer - shorter) / self._new for shorter, longer in zip(whole, twice, strict=True)]
        return {"step": steps, "first_token": first, "call": whole, "longest_call": twice}

    def derive(self, row: Row) -> None:
        row["tokens_per_second"] = 1e3 * len(self._ids) / row["step"]["ms"]
        row["call_ms_a_token"] = row["call"]["ms"] / self._new
        row["compile_seconds"] = max(0.0, row["first_call_seconds"] - row["longest_call"]["ms"] / 1e3)


class _Prefill(_Called):
    """A prompt until its last logits are there: by the model itself, or by `generate` in chunks."""

    def __init__(self, one: Call, model: PreTrainedModel, ids: Tensor, check: LogitsCheck, chunk: int) -> None:
        super().__init__(one, model, ids, check)
        self._chunk = chunk
        if one.family == "foxlm" and not one.chunked:
            with self._configured():
                settings = attention_settings(model.config, learns=False)
                pruned = settings.prunes(len(ids) * model.config.num_attention_heads, ids.shape[1], ids.shape[1])
                # One sequence stands for all.
                skipped = skipped_share(model, {"input_ids": ids[:1]}) if pruned else None
            self.facts["computed_tiles"] = 1.0 if skipped is None else 1.0 - skipped.item()

    def _fill(self) -> Any:
        if self._one.chunked:
            return self._generate(1, prefill_chunk_size=self._chunk, return_dict_in_generate=True)
        return self._model(self._ids, use_cache=True, logits_to_keep=1)

    def check(self, row: Row) -> str | None:
        ids = self._ids[:, :CHECKED_TOKENS]
        with self._configured():
            self._first_call(row, self._fill)
            if self._one.chunked:
                chunk = min(self._chunk, max(1, ids.shape[1] // _CHECKED_CHUNKS))
                options: dict[str, Any] = {"prefill_chunk_size": chunk, "max_new_tokens": 1}
                fault = generation_fault(self._check, self._one.family, self._model, ids, row, **options)
            else:
                logits = self._model(ids, use_cache=True, logits_to_keep=1).logits
                eps = getattr(self._model.config, "acp_eps", None) or 0.0
                fault = self._check.fault(self._one.family, self._model, ids, logits, eps=eps, row=row)
            if fault is None:
                row["peak_bytes"] = self._peak_bytes(self._fill)
        return fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        taken: list[float] = []
        with self._configured():
            self._fill()
            for _ in _rounds_of_a_pass(rounds):
                taken += wall_times(self._fill, 1, self._device, warm_up=0)
        return {"first_token": taken}

    def derive(self, row: Row) -> None:
        row["tokens_per_second"] = 1e3 * self._ids.numel() / row["first_token"]["ms"]
        row["compile_seconds"] = max(0.0, (row["first_call_seconds"] - row["first_token"]["ms"] / 1e3))
