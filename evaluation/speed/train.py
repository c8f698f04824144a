"""`foxlm bench train`: a whole training step of a FoX, with pruning and without.

Every step sees the same weights (the learning rate is zero), so that pruning skips the same at each. The gates of a new
model forget as fast as those of the attention benchmark, by their biases; what they read from the hidden states makes
them noisy.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.pruning.rules import Rule

from .bars import train_bars
from .implementations import EPS, with_names
from .models import set_pruning
from .observed import tiles_kept
from .own import own_name
from .runner import Record, failure
from .timing import interleaved, peak_bytes, progress, release_memory
from .workload import Workload, rules_of

TOKENS, CPU_TOKENS = 16384, 256

_CHECKED_TOKENS = 512
# How much worse than bfloat16 with dense attention a step's gradients may be.
FACTOR = 4.0

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to run a step.

    Attributes:
        rule: of pruning; None without.
        compiled: whether layers and loss are compiled.
    """

    rule: Rule | None
    compiled: bool

    @property
    def name(self) -> str:
        """As it appears in tables."""
        return own_name(self.rule) + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Recipe:
    """What is trained and how it is measured.

    Attributes:
        workload: model and tokens.
        tokens: tokens of the one sequence in a step.
        compiled: whether steps with compiled layers and loss are measured too.
        rounds: timed steps in each of two passes.
        checkpointing: whether backward computes the layers' forward pass again instead of keeping what it made.
        only: parts of the names of what is measured; all for none.
    """

    workload: Workload
    tokens: int = TOKENS
    compiled: bool = False
    rounds: int = 5
    checkpointing: bool = False
    only: tuple[str, ...] = ()

    def variants(self, config: FoxConfig) -> list[Variant]:
        """What is measured of a model.

        Raises:
            ValueError: a name in ``only`` is part of none.
        """
        compiled = (False, True) if self.compiled else (False,)
        return with_names([Variant(rule, one) for one in compiled for rule in rules_of(config)], self.only)

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.workload.device


def run_training(recipe: Recipe) -> Record:
    """Check and time training steps.

    Returns:
        What `Workload.facts` has, ``parameters``, ``tokens``; ``steps``, a record for each combination of rule and
        compilation, with ``tiles_kept``, and ``step`` (milliseconds), ``tokens_per_second`` and ``peak_bytes`` where it
        was measured; ``bars``.

    Raises:
        ValueError, OSError: model or text cannot be read, or the model has dropout, by which no two steps are alike.
    """
    model = trainable(recipe)
    variants = recipe.variants(model.config)
    ids = recipe.workload.ids(model.config.vocab_size, 1, recipe.tokens)
    bench = _Bench(model, ids, recipe)
    if recipe.compiled:
        compile_regions(model)
    for variant in progress(variants, "checking"):
        bench.admit(variant)
    for name, timing in interleaved(bench.steps, recipe.rounds, recipe.device).items():
        record = next(one for one in bench.records if one["name"] == name)
        record |= {"step": asdict(timing), "tokens_per_second": 1e3 * recipe.tokens / timing.ms}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = recipe.workload.facts() | {"parameters": parameters, "tokens": recipe.tokens}
    return facts | {"steps": bench.records, "bars": train_bars(bench.records)}


def trainable(recipe: Recipe) -> FoxForCausalLM:
    """The model in float32, as it is trained.

    Raises:
        ValueError, OSError: it cannot be read, or has dropout, by which no two steps are alike.
    """
    model = recipe.workload.build(torch.float32).train()
    if model.config.attention_dropout:
        raise ValueError(f"--model must have no attention_dropout to be checked, got {model.config.attention_dropout}")
    if recipe.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def compile_regions(model: FoxForCausalLM) -> None:
    """Compile each layer and the loss, in place: layers are alike, so one of them is compiled for all.

    After sharding: that gives layers another class, and transformers checkpoints nothing in the old one's forward pass.
    """
    # One shape for the check and one for the steps, neither of them dynamic. FSDP2's hooks stay outside.
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)


def as_compiled(compiled: bool) -> AbstractContextManager:
    """Use what is compiled, or leave it out: in backward too, where checkpointing computes layers again."""
    return nullcontext() if compiled else torch.compiler.set_stance("force_eager")


class _Bench:
    """Training steps of one model: those found right wait in ``steps`` to be timed, and all have a record."""

    def __init__(self, model: FoxForCausalLM, ids: Tensor, recipe: Recipe) -> None:
        self.records: list[Record] = []
        self.steps: dict[str, Callable[[], object]] = {}
        self._model, self._ids, self._recipe = model, ids, recipe
        set_pruning(model, None)
        chosen = model.config._attn_implementation
        model.set_attn_implementation("eager")
        self._exact = self._gradients(compiled=False, autocast=False)
        self._rounding = _errors(self._gradients(compiled=False, autocast=True), self._exact)
        model.set_attn_implementation(chosen)
        with torch.autocast(recipe.device, torch.bfloat16):
            self._kept = tiles_kept(model, ids)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def admit(self, variant: Variant) -> None:
        """Check a step; if it is right, it will be timed. What it raises becomes part of its record."""
        name, rule = variant.name, variant.rule
        record: Record = {"name": name, "rule": rule, "compiled": variant.compiled, "tiles_kept": self._kept[rule]}
        self.records.append(record)
        try:
            set_pruning(self._model, rule)
            fault = self._check(variant, record)
            if fault is None:
                record["peak_bytes"] = self._try_out(lambda: self._step(variant))
                self.steps[name] = lambda: self._step(variant)
            record |= {"status": "measured"} if fault is None else {"status": "wrong", "reason": fault}
        except Exception as error:
            # Of any kind: steps that do not compile or fit must not end the others.
            record |= failure(error)
        self._model.zero_grad(set_to_none=True)
        release_memory(self._recipe.device)

    def _check(self, variant: Variant, record: Record) -> str | None:
        errors = _errors(self._gradients(variant.compiled, autocast=True), self._exact)
        eps = 0.0 if variant.rule is None else EPS
        limits = {part: FACTOR * (rounding + eps) for part, rounding in self._rounding.items()}
        record |= {"errors": errors, "limits": limits}
        for part, error in errors.items():
            # Not the other way round: a NaN is within no limit.
            if not error <= limits[part]:
                return f"gradients of the {part} are off by {error:.1e}, {limits[part]:.1e} allowed"
        return None

    def _try_out(self, step: Callable[[], object]) -> int | None:
        # The first one compiles, and makes the optimizer's state.
        step()
        state = [x for of_one in self._optimizer.state.values() for x in of_one.values() if isinstance(x, Tensor)]
        resident = sum(x.nbytes for x in (*self._model.parameters(), *state))
        return peak_bytes(step, self._recipe.device, resident)

    def _step(self, variant: Variant) -> None:
        set_pruning(self._model, variant.rule)
        self._backward(variant.compiled, self._ids, autocast=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, compiled: bool, ids: Tensor, autocast: bool) -> None:
        with as_compiled(compiled):
            with torch.autocast(self._recipe.device, torch.bfloat16, enabled=autocast):
                loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()

    def _gradients(self, compiled: bool, autocast: bool) -> Gradients:
        """Gradients of the attention layers' weights for the first tokens."""
        self._backward(compiled, self._ids[:, :_CHECKED_TOKENS], autocast)
        grads = {
            name: parameter.grad
            for name, parameter in self._model.named_parameters()
            if ".self_attn." in name and parameter.grad is not None
        }
        self._model.zero_grad(set_to_none=True)
        return grads


def _errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Relative distance of gradients, of the forget gates and of everything else; NaN where one is missing."""
    parts: dict[str, list[str]] = {}
    for name in exact:
        parts.setdefault("forget gates" if ".forget_gate." in name else "projections", []).append(name)
    return {part: distance(found, exact, names) for part, names in parts.items()}


def distance(found: Gradients, exact: Gradients, names: list[str]) -> float:
    """Relative distance of the named gradients together; NaN where one is missing."""
    if not all(name in found for name in names):
        return math.nan
    off = sum((found[name] - exact[name]).double().square().sum().item() for name in names)
    return math.sqrt(off / sum(exact[name].double().square().sum().item() for name in names))
