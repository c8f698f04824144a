"""`foxlm bench decode`: decoding with a whole model, beside a plain Llama of the same sizes.

Caches are too large to lie side by side: each way to decode fills its own with the same context, is timed and gives it
back, and all are measured once more in a second pass. The context grows by the tokens that are decoded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from foxlm import FoxForCausalLM
from foxlm.modeling.generation import decoding_mode

from .bars import decode_bars
from .logits import CHECKED_TOKENS, DTYPE, LogitsCheck
from .models import build_llama
from .observed import keys_kept
from .runner import Record, failure
from .sessions import Decoder, Session, Step, compiled_step, greedy_step
from .timing import PASSES, copy_rate, device_ms, peak_bytes, progress, release_memory, timing_of, wall_ms
from .workload import Workload, distinct_rows

TOKENS, CPU_TOKENS = 14336, 256
BATCHES = (1, 8)

_CHECKED_STEPS = 4
_WARM_UP_STEPS = 4
_DEVICE_STEPS = 3
# A static cache is a multiple of this long, as PyTorch's kernels want their masks.
_LENGTH_MULTIPLE = 64
# A step that keeps the device busy for less of its time waits for the host.
_BUSY = 0.9

Models = dict[str, PreTrainedModel]


@dataclass(frozen=True)
class DecodeRecipe:
    """What decodes and how it is measured.

    Attributes:
        workload: model and tokens. On a CPU nothing is compiled.
        tokens: tokens of each sequence before the first step.
        new: steps in a timed round.
        rounds: rounds in each of two passes.
    """

    workload: Workload
    tokens: int = TOKENS
    new: int = 32
    rounds: int = 3

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.workload.device

    @property
    def read(self) -> int:
        """Tokens of each sequence that are given, those of the check's steps included."""
        return self.tokens + _CHECKED_STEPS

    @property
    def length(self) -> int:
        """Tokens that a cache must have room for."""
        steps = _WARM_UP_STEPS + 1 + self.rounds * self.new + _DEVICE_STEPS
        return rounded_up(self.tokens + max(steps, _CHECKED_STEPS))


def build_models(workload: Workload, families: Sequence[str]) -> Models:
    """The models for inference in bfloat16, by family: the FoX always, a Llama of its sizes if that is asked for."""
    fox = workload.build(DTYPE).eval()
    models: Models = {"foxlm": fox}
    if "Llama" in families:
        models["Llama"] = build_llama(fox.config, workload.device, DTYPE).eval()
    return models


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step reads: all but the embeddings of other tokens."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    table = model.get_input_embeddings().weight
    return total if model.get_output_embeddings().weight is table else total - table.nbytes


def run_batch(batch: int, models: Models, decoders: Sequence[Decoder], recipe: DecodeRecipe) -> Record:
    """Check and time decoders on ``batch`` sequences.

    Returns:
        ``batch``; ``text_rows``, how many sequences differ; ``kv_bytes``, those of FoX's keys and values for all
        tokens; ``copy_rate``, bytes per second of a large copy; ``decoders``, a record of each, with ``status`` as in
        `runner.Bench`, and where it was measured ``step``, milliseconds until the next token is there, ``device_ms``,
        those that the device is busy, ``host_bound``, ``tokens_per_second``, ``peak_bytes`` (with the weights),
        ``stored_bytes`` of keys and values, ``weight_bytes``, and of FoX ``keys_kept``, the share of keys that a query
        may attend to, and ``read_bytes``, which follow from it; ``bars``. An ``error`` says what ended it early.
    """
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    record: Record = {"batch": batch, "decoders": []}
    try:
        bench = _Bench(batch, models, recipe)
        record |= {"text_rows": bench.text_rows, "kv_bytes": bench.kv_bytes}
        record["decoders"] = [bench.add(one) for one in decoders]
        for number in range(PASSES):
            for one in progress(decoders, f"batch {batch}, pass {number + 1} of {PASSES}"):
                bench.measure(one, first=number == 0)
        bench.finish()
        record["copy_rate"] = copy_rate(recipe.device)
    except Exception as error:
        # Of any kind: one batch that does not fit must not end the others.
        record["error"] = failure(error)["detail"]
    release_memory(recipe.device)
    return record | {"bars": decode_bars(record)}


class _Bench:
    """Measures decoders on the same sequences, and keeps a record of each."""

    def __init__(self, batch: int, models: Models, recipe: DecodeRecipe) -> None:
        self._batch, self._models, self._recipe = batch, models, recipe
        config = models["foxlm"].config
        self._ids = recipe.workload.ids(config.vocab_size, batch, recipe.read)
        self.text_rows = distinct_rows(self._ids)
        # The same for every model: a Llama is built with the sizes of the FoX.
        self.kv_bytes = kv_bytes(config, batch * recipe.tokens)
        self._records: dict[Decoder, Record] = {}
        self._steps: dict[Decoder, Step] = {}
        self._passes: dict[Decoder, list[list[float]]] = {}
        self._logits = LogitsCheck()

    def add(self, decoder: Decoder) -> Record:
        """The record of ``decoder``, to be filled in."""
        compiled = decoder.cache != "dynamic" and self._recipe.device == "cuda"
        record: Record = {"name": decoder.name, "family": decoder.family, "cache": decoder.cache}
        record |= {"rule": decoder.rule, "compiled": compiled}
        self._records[decoder], self._passes[decoder] = record, []
        self._steps[decoder] = compiled_step() if compiled else greedy_step
        return record

    def measure(self, decoder: Decoder, first: bool) -> None:
        """One pass; in the first it is checked before. What it raises becomes part of its record."""
        record = self._records[decoder]
        if "status" in record:
            return
        try:
            # As `generate` does.
            with decoding_mode(self._models[decoder.family]):
                fault = self._check(decoder, record) if first else None
                if fault is None:
                    self._passes[decoder].append(self._time(decoder, record, first))
                else:
                    record |= {"status": "wrong", "reason": fault}
        except Exception as error:
            # Of any kind: a decoder that does not compile or fit must not end the others.
            record |= failure(error)
        release_memory(self._recipe.device)

    def finish(self) -> None:
        """Complete the records of all that was measured."""
        measured = {one: record for one, record in self._records.items() if "status" not in record}
        for decoder, record in measured.items():
            timing = timing_of(self._passes[decoder])
            busy = record["device_ms"]
            record |= {
                "status": "measured",
                "step": asdict(timing),
                "tokens_per_second": 1e3 * self._batch / timing.ms,
                "host_bound": None if busy is None else busy < _BUSY * timing.ms,
                "weight_bytes": weight_bytes(self._models[decoder.family]),
            }
        if any(one.family == "foxlm" for one in measured):
            kept = keys_kept(self._models["foxlm"], self._ids[:, : self._recipe.tokens])
            for decoder, record in measured.items():
                share = kept.get(decoder.rule)
                record |= {"keys_kept": share, "read_bytes": None if share is None else share * self.kv_bytes}

    def _session(self, decoder: Decoder) -> Session:
        model = self._models[decoder.family]
        return Session(decoder, model, self._steps[decoder], self._batch, self._recipe.length)

    def _check(self, decoder: Decoder, record: Record) -> str | None:
        context = min(CHECKED_TOKENS, self._recipe.tokens)
        ids = self._ids[:, : context + _CHECKED_STEPS]
        session = self._session(decoder)
        found = [session.fill(ids[:, :context]).clone()]
        for token in ids[:, context:].split(1, dim=1):
            session.ids.copy_(token)
            session.reserve()
            found.append(session.step().clone())
        model, logits = self._models[decoder.family], torch.stack(found, dim=1)
        return self._logits.fault(decoder.family, model, ids, logits, decoder.rule, record)

    def _time(self, decoder: Decoder, record: Record, first: bool) -> list[float]:
        """Milliseconds of a step, for each round."""
        device, new = self._recipe.device, self._recipe.new
        # What the check left behind.
        release_memory(device)
        before = _allocated(device)
        session = self._session(decoder)
        session.fill(self._ids[:, : self._recipe.tokens])
        session.advance(_WARM_UP_STEPS)
        if first:
            weights = sum(parameter.nbytes for parameter in self._models[decoder.family].parameters())
            resident = weights + _allocated(device) - before
            record["peak_bytes"] = peak_bytes(session.advance, device, resident)
            record["stored_bytes"] = session.stored_bytes()
            record["device_ms"] = _device_ms(session) if device == "cuda" else None
        return [wall_ms(lambda: session.advance(new), device) / new for _ in range(self._recipe.rounds)]


def decoders_for(fox: FoxForCausalLM, decoders: Sequence[Decoder]) -> list[Decoder]:
    """Those of ``decoders`` that ``fox`` can be measured with: without forget gates nothing is pruned.

    Raises:
        ValueError: none is left.
    """
    usable = [one for one in decoders if one.rule is None or fox.config.forget_gate != "none"]
    if decoders and not usable:
        raise ValueError("--model has no forget gates (forget_gate is none), so nothing is left of --only to measure")
    return usable


def _device_ms(session: Session) -> float:
    times = []
    for _ in range(_DEVICE_STEPS):
        session.reserve()
        times.append(device_ms(session.step))
    return sorted(times)[_DEVICE_STEPS // 2]


def kv_bytes(config: Any, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` tokens in bfloat16."""
    _, kv_heads, head_dim = config.heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * DTYPE.itemsize * tokens


def rounded_up(tokens: int) -> int:
    """A cache's length with room for ``tokens``."""
    return -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0
