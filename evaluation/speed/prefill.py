"""`foxlm bench prefill`: taking in a prompt with a whole model, until the first token is there, beside a plain Llama.

Every call starts with an empty cache and fills it, as the first step of `generate` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foxlm import FoxForCausalLM

from .bars import prefill_bars
from .decode import Models, kv_bytes, rounded_up
from .logits import CHECKED_TOKENS, LogitsCheck
from .observed import tiles_kept
from .runner import Record, failure
from .sessions import Decoder, Session, greedy_step
from .timing import interleaved, peak_bytes, progress, release_memory
from .workload import Workload, distinct_rows

TOKENS, CPU_TOKENS = (4096, 16384), (256,)
BATCHES, CPU_BATCHES = (1, 8), (1,)
CHUNK, CPU_CHUNK = 4096, 64

# Parts in which the check takes its tokens in, where a prompt is taken in by parts.
_CHECKED_PARTS = 4


@dataclass(frozen=True)
class Prefiller:
    """One way to take in a prompt.

    Attributes:
        decoder: which model, cache and rule of pruning.
        chunked: whether the prompt is taken in part by part, which bounds the memory.
        compiled: whether the model is compiled, for one shape.
    """

    decoder: Decoder
    chunked: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """As it appears in tables."""
        decoder = self.decoder
        name = decoder.name if decoder.cache == "paged" else decoder.who
        return name + (", in parts" if self.chunked else "") + (", compiled" if self.compiled else "")


_WHOLE = (
    Decoder("foxlm", "dynamic"),
    Decoder("foxlm", "dynamic", "paper"),
    Decoder("foxlm", "dynamic", "tight"),
    Decoder("Llama", "dynamic"),
)
PREFILLERS = (
    *(Prefiller(one) for one in _WHOLE),
    Prefiller(Decoder("foxlm", "dynamic"), chunked=True),
    Prefiller(Decoder("foxlm", "dynamic", "tight"), chunked=True),
    Prefiller(Decoder("foxlm", "paged", "tight"), chunked=True),
    Prefiller(Decoder("Llama", "dynamic"), chunked=True),
)
COMPILED = tuple(Prefiller(one, compiled=True) for one in _WHOLE)


@dataclass(frozen=True)
class PrefillRecipe:
    """What is measured and how.

    Attributes:
        workload: model and tokens.
        chunk: tokens of each sequence in a part, where the prompt is taken in by parts.
        rounds: timed prompts in each of two passes.
    """

    workload: Workload
    chunk: int = CHUNK
    rounds: int = 3

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.workload.device


def prefillers_for(fox: FoxForCausalLM, prefillers: Sequence[Prefiller]) -> list[Prefiller]:
    """Those of ``prefillers`` that ``fox`` can be measured with: without forget gates nothing is pruned.

    Raises:
        ValueError: none is left.
    """
    usable = [one for one in prefillers if one.decoder.rule is None or fox.config.forget_gate != "none"]
    if not usable:
        raise ValueError("--model has no forget gates (forget_gate is none), so nothing is left of --only to measure")
    return usable


def run_prompts(batch: int, tokens: int, models: Models, ways: Sequence[Prefiller], recipe: PrefillRecipe) -> Record:
    """Check and time ways to take in ``batch`` prompts of ``tokens`` tokens.

    Ways that take a prompt in by parts are left out where it is no longer than one part.

    Returns:
        ``batch``, ``tokens``, ``text_rows``, how many prompts differ, ``kv_bytes``, those of FoX's keys and values;
        ``ways``, a record of each, with ``status`` as in `runner.Bench`, ``tiles_kept`` (those of whole prompts), and
        where it was measured ``first_token``, milliseconds until the first token is there, ``tokens_per_second`` of
        all prompts together, ``peak_bytes`` (with the weights) and ``stored_bytes`` of keys and values; ``bars``. An
        ``error`` says what ended it early.
    """
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    record: Record = {"batch": batch, "tokens": tokens, "ways": []}
    try:
        bench = _Bench(batch, tokens, models, recipe)
        record |= {"text_rows": bench.text_rows, "kv_bytes": kv_bytes(models["foxlm"].config, batch * tokens)}
        # The same list: what ends it early leaves what is known.
        record["ways"] = bench.records
        for way in progress([one for one in ways if not one.chunked or tokens > recipe.chunk], "checking"):
            bench.admit(way)
        bench.finish()
    except Exception as error:
        # Of any kind: one size that does not fit must not end the others.
        record["error"] = failure(error)["detail"]
    release_memory(recipe.device)
    return record | {"bars": prefill_bars(record["ways"])}


class _Bench:
    """Ways to take in the same prompts: those found right wait to be timed, and all have a record."""

    def __init__(self, batch: int, tokens: int, models: Models, recipe: PrefillRecipe) -> None:
        self.records: list[Record] = []
        self._models, self._recipe = models, recipe
        fox = models["foxlm"]
        self._ids = recipe.workload.ids(fox.config.vocab_size, batch, tokens)
        self.text_rows = distinct_rows(self._ids)
        assert isinstance(fox, FoxForCausalLM)
        self._kept = tiles_kept(fox, self._ids)
        self._logits = LogitsCheck()
        self._calls: dict[str, Callable[[], object]] = {}

    def admit(self, way: Prefiller) -> None:
        """Check a way; if it is right, it will be timed. What it raises becomes part of its record."""
        decoder = way.decoder
        record: Record = {"name": way.name, "family": decoder.family, "cache": decoder.cache, "rule": decoder.rule}
        record |= {"chunked": way.chunked, "compiled": way.compiled, "tiles_kept": self._kept[decoder.rule]}
        self.records.append(record)
        try:
            forward = self._forward(way)
            fault = self._check(way, forward, record)
            if fault is None:
                self._try_out(way, forward, record)
                self._calls[way.name] = lambda: self._fill(way, forward, self._ids, self._recipe.chunk)
            record |= {"status": "measured"} if fault is None else {"status": "wrong", "reason": fault}
        except Exception as error:
            # Of any kind: what does not compile or fit must not end the others.
            record |= failure(error)
        release_memory(self._recipe.device)

    def finish(self) -> None:
        """Time all that is right, and complete their records."""
        count = self._ids.numel()
        for name, timing in interleaved(self._calls, self._recipe.rounds, self._recipe.device, wall=True).items():
            record = next(one for one in self.records if one["name"] == name)
            record |= {"first_token": asdict(timing), "tokens_per_second": 1e3 * count / timing.ms}

    def _forward(self, way: Prefiller) -> Callable:
        model = self._model(way)
        return torch.compile(model, dynamic=False) if way.compiled else model

    def _model(self, way: Prefiller) -> PreTrainedModel:
        return self._models[way.decoder.family]

    def _fill(self, way: Prefiller, forward: Callable, ids: Tensor, chunk: int) -> tuple[Tensor, Session]:
        """Logits ``[B, V]`` after the prompt, and what holds its keys and values."""
        batch, tokens = ids.shape
        session = Session(way.decoder, self._model(way), greedy_step, batch, rounded_up(tokens))
        return session.fill(ids, chunk if way.chunked else tokens, forward), session

    def _check(self, way: Prefiller, forward: Callable, record: Record) -> str | None:
        ids = self._ids[:, :CHECKED_TOKENS]
        chunk = min(self._recipe.chunk, max(1, ids.shape[1] // _CHECKED_PARTS))
        found, _ = self._fill(way, forward, ids, chunk)
        family, rule = way.decoder.family, way.decoder.rule
        return self._logits.fault(family, self._model(way), ids, found[:, None], rule, record)

    def _try_out(self, way: Prefiller, forward: Callable, record: Record) -> None:
        def fill() -> None:
            _, session = self._fill(way, forward, self._ids, self._recipe.chunk)
            record["stored_bytes"] = session.stored_bytes()

        # The first one compiles.
        fill()
        release_memory(self._recipe.device)
        weights = sum(parameter.nbytes for parameter in self._model(way).parameters())
        record["peak_bytes"] = peak_bytes(fill, self._recipe.device, weights)
