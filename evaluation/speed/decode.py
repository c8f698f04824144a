"""`python -m foxlm.evaluation.speed decode`: decoding with a whole model, beside a plain Llama of the same sizes.

Caches are too large to lie side by side: each way to decode fills its own with the same random context, is timed and
gives it back, and all are measured once more in a second pass. The context grows by the tokens that are decoded.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foxlm import FoxForCausalLM
from foxlm.kernels.pruning import Rule, prune
from foxlm.modeling.attention_fox import ALL_ATTENTION_FUNCTIONS

from .bars import decode_bars, largest_batch_bars
from .implementations import EPS, RULES
from .models import Sizes, build_fox, build_llama
from .runner import Record, failure
from .sessions import DECODERS, Decoder, Session, Step, compiled_step, greedy_step
from .timing import PASSES, device_ms, peak_bytes, release_memory, synchronize, timing_of, wall_ms

TOKENS, CPU_TOKENS = 14336, 256
BATCHES = (1, 8)
DTYPE = torch.bfloat16

# Context and steps of the check, which has a dense reference.
_CHECKED_TOKENS, _CHECKED_STEPS = 512, 4
# How much worse than bfloat16 with dense attention and without a cache a step's logits may be.
_FACTOR = 4.0
_WARM_UP_STEPS = 4
_DEVICE_STEPS = 3
# A static cache is a multiple of this long, as PyTorch's kernels want their masks.
_LENGTH_MULTIPLE = 64
# A step that keeps the device busy for less of its time waits for the host.
_BUSY = 0.9

_LARGEST_BATCH = {"cuda": 256, "cpu": 2}
_LARGEST_BATCH_STEPS = 8

Models = dict[str, PreTrainedModel]


@dataclass(frozen=True)
class DecodeRecipe:
    """What decodes and how it is measured.

    Attributes:
        device: ``"cuda"``, or ``"cpu"``, where nothing is compiled.
        preset: of `FoxConfig.preset`.
        sizes: fields of the configuration that differ from the preset.
        tokens: tokens of each sequence before the first step.
        new: steps in a timed round.
        rounds: rounds in each of two passes.
        seed: of weights and tokens.
    """

    device: str
    preset: str = "pro-760m"
    sizes: Sizes = ()
    tokens: int = TOKENS
    new: int = 32
    rounds: int = 3
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens that a cache must have room for."""
        steps = _WARM_UP_STEPS + 1 + self.rounds * self.new + _DEVICE_STEPS
        return _rounded_up(self.tokens + max(steps, _CHECKED_STEPS))


def build_models(recipe: DecodeRecipe, decoders: Sequence[Decoder]) -> Models:
    """The models of ``decoders``, by family, for inference in bfloat16."""
    torch.manual_seed(recipe.seed)
    fox = build_fox(recipe.preset, recipe.sizes, recipe.device, DTYPE).eval()
    models: Models = {"foxlm": fox}
    if any(one.family == "Llama" for one in decoders):
        models["Llama"] = build_llama(fox.config, recipe.device, DTYPE).eval()
    return models


def run_batch(batch: int, models: Models, decoders: Sequence[Decoder], recipe: DecodeRecipe) -> Record:
    """Check and time decoders on ``batch`` sequences.

    Returns:
        ``batch``; ``kv_bytes``, those of FoX's keys and values for all tokens; ``decoders``, a record of each, with
        ``status`` as in `runner.Bench`, and where it was measured ``step``, milliseconds until the next token is there,
        ``device_ms``, those that the device is busy, ``host_bound``, ``tokens_per_second``, ``peak_bytes`` (with the
        weights), ``stored_bytes`` of keys and values, and of FoX ``keys_kept``, the share of keys that a query may
        attend to, and ``read_bytes``, which follow from it; ``bars``. An ``error`` says what ended it early.
    """
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    record: Record = {"batch": batch, "decoders": []}
    try:
        bench = _Bench(batch, models, recipe)
        record["kv_bytes"] = bench.kv_bytes
        record["decoders"] = [bench.add(one) for one in decoders]
        for number in range(PASSES):
            for one in decoders:
                bench.measure(one, first=number == 0)
        bench.finish()
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
        self._ids = _random_ids(config.vocab_size, batch, recipe.length, recipe)
        # The same for every model: a Llama is built with the sizes of the FoX.
        self.kv_bytes = _kv_bytes(config, batch * recipe.tokens)
        self._records: dict[Decoder, Record] = {}
        self._steps: dict[Decoder, Step] = {}
        self._passes: dict[Decoder, list[list[float]]] = {}
        self._references: dict[str, tuple[Tensor, float]] = {}

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
            }
        if any(one.family == "foxlm" for one in measured):
            kept = {None: 1.0} | keys_kept(self._models["foxlm"], self._ids[:, : self._recipe.tokens])
            for decoder, record in measured.items():
                share = kept.get(decoder.rule)
                record |= {"keys_kept": share, "read_bytes": None if share is None else share * self.kv_bytes}

    def _session(self, decoder: Decoder) -> Session:
        model = self._models[decoder.family]
        return Session(decoder, model, self._steps[decoder], self._batch, self._recipe.length)

    def _check(self, decoder: Decoder, record: Record) -> str | None:
        context = min(_CHECKED_TOKENS, self._recipe.tokens)
        ids = self._ids[:, : context + _CHECKED_STEPS]
        session = self._session(decoder)
        found = [session.fill(ids[:, :context]).clone()]
        for token in ids[:, context:].split(1, dim=1):
            session.ids.copy_(token)
            session.reserve()
            found.append(session.step().clone())
        exact, rounding = self._reference(decoder.family, ids)
        error = largest_error(torch.stack(found, dim=1), exact)
        limit = _FACTOR * (rounding + (0.0 if decoder.rule is None else EPS))
        record |= {"error": error, "limit": limit}
        # Not the other way round: a NaN is within no limit.
        return None if error <= limit else f"logits are off by {error:.1e}, {limit:.1e} allowed"

    def _reference(self, family: str, ids: Tensor) -> tuple[Tensor, float]:
        if family not in self._references:
            self._references[family] = dense_logits(self._models[family], ids, _CHECKED_STEPS + 1)
        return self._references[family]

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


@torch.no_grad()
def dense_logits(model: PreTrainedModel, ids: Tensor, count: int) -> tuple[Tensor, float]:
    """Logits of the last ``count`` tokens from float32 and dense attention, without a cache.

    Args:
        model: in bfloat16.
        ids: ``[B, T]`` tokens.
        count: of logits.

    Returns:
        ``[B, count, V]`` float32, and `largest_error` of the same in bfloat16.
    """
    results = []
    for dtype in (torch.float32, DTYPE):
        # A copy in the latter case too: FoX keeps its gates in float32, and `to` would not.
        dense = copy.deepcopy(model)
        if dtype == torch.float32:
            dense.float()
        dense.set_attn_implementation("eager")
        if isinstance(dense, FoxForCausalLM):
            dense.config.acp_eps = None
        results.append(dense(input_ids=ids, use_cache=False, logits_to_keep=count).logits)
        del dense
    exact, rounded = results
    return exact, largest_error(rounded, exact)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest ``|found - exact| / |exact|`` of any token, over logits ``[B, T, V]``; NaN if ``found`` has one."""
    exact = exact.double()
    return ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


@torch.no_grad()
def keys_kept(model: PreTrainedModel, ids: Tensor) -> dict[Rule | None, float]:
    """Share of keys that the step after ``ids``, ``[B, T]``, may attend to by each rule, over all layers and heads.

    An estimate of what it reads: kernels skip keys in blocks, and finding the first one may read more.
    """
    decoder = Decoder("foxlm", "dynamic", "tight")
    session = Session(decoder, model, greedy_step, len(ids), ids.shape[1])
    session.fill(ids)
    with _observed(model) as shares:
        session.step()
    return {rule: torch.stack(values).mean().item() for rule, values in shares.items() if values}


@contextmanager
def _observed(model: PreTrainedModel) -> Iterator[dict[Rule | None, list[Tensor]]]:
    """Collect, of every layer's attention, the share of keys that each rule keeps."""
    shares: dict[Rule | None, list[Tensor]] = {rule: [] for rule in RULES}
    name = model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def observing(module, query, key, value, attention_mask, *, decay, scaling, **kwargs):
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        for rule in RULES:
            bound = module.logit_bound() if rule == "paper" else None
            first = prune(decay, q, k, eps=EPS, rule=rule, scale=scaling, logit_bound=bound).first
            shares[rule].append(1.0 - (first / (decay.last + 1)).double().mean())
        return attend(module, query, key, value, attention_mask, decay=decay, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = observing
    try:
        yield shares
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend


def run_largest_batch(models: Models, recipe: DecodeRecipe) -> Record:
    """The largest batches, up to 256 and to within 1/16, that fit the device with a static and with a paged cache.

    Returns:
        ``most``, where the search stops; ``static`` and ``paged``, each with ``status`` and where it was measured
        ``batch``; ``bars``.
    """
    # Only pages that pruning frees can save memory: both prune alike.
    static, paged = (one for one in DECODERS if one.cache in ("static", "paged") and one.rule == "tight")
    record: Record = {"tokens": recipe.tokens, "most": _LARGEST_BATCH[recipe.device]}
    guess = _static_batch(models["foxlm"].config, recipe)
    for decoder in (static, paged):
        record[decoder.cache] = _largest_batch(decoder, models["foxlm"], recipe, record["most"], guess)
        guess = 2 * record[decoder.cache].get("batch", guess)
    return record | {"bars": largest_batch_bars(*(record[one.cache].get("batch", 0) for one in (paged, static)))}


def _static_batch(config: Any, recipe: DecodeRecipe) -> int:
    """How many sequences' keys and values would fill what is free of the device."""
    if recipe.device == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info()
    return max(1, free // _kv_bytes(config, recipe.tokens))


def _largest_batch(decoder: Decoder, model: PreTrainedModel, recipe: DecodeRecipe, most: int, guess: int) -> Record:
    record: Record = {"name": decoder.name}

    def fits(batch: int) -> bool:
        done = _survives(decoder, model, batch, recipe)
        release_memory(recipe.device)
        return done

    try:
        record |= {"status": "measured", "batch": largest(fits, most, guess)}
    except Exception as error:
        record |= failure(error)
    release_memory(recipe.device)
    return record


def largest(fits: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest number up to ``most`` that ``fits``, to within 1/16, searched for from ``guess``; 0 for none."""
    low, high = 0, min(guess, most)
    while fits(high):
        low = high
        if low == most:
            return low
        high = min(2 * low, most)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _survives(decoder: Decoder, model: PreTrainedModel, batch: int, recipe: DecodeRecipe) -> bool:
    """Whether a context and some steps fit into memory; not compiled, which would take longer and needs no less."""
    try:
        length = _rounded_up(recipe.tokens + _LARGEST_BATCH_STEPS)
        session = Session(decoder, model, greedy_step, batch, length)
        session.fill(_random_ids(model.config.vocab_size, batch, recipe.tokens, recipe))
        session.advance(_LARGEST_BATCH_STEPS)
        synchronize(recipe.device)
    except torch.OutOfMemoryError:
        return False
    return True


def _device_ms(session: Session) -> float:
    times = []
    for _ in range(_DEVICE_STEPS):
        session.reserve()
        times.append(device_ms(session.step))
    return sorted(times)[_DEVICE_STEPS // 2]


def _random_ids(vocabulary: int, batch: int, tokens: int, recipe: DecodeRecipe) -> Tensor:
    generator = torch.Generator(recipe.device).manual_seed(recipe.seed)
    return torch.randint(vocabulary, (batch, tokens), generator=generator, device=recipe.device)


def _kv_bytes(config: Any, tokens: int) -> int:
    _, kv_heads, head_dim = config.heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * DTYPE.itemsize * tokens


def _rounded_up(tokens: int) -> int:
    return -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0
