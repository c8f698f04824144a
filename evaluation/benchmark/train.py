"""`foxlm bench train`: a whole training step of a FoX, with pruning and without.

Every step has the same weights (the learning rate is zero), so that pruning skips the same at each. The gates of a new
model forget as fast as those of the attention benchmark, by their biases; what they read from the hidden states makes
them noisy.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.configuration_fox import DEFAULT_EPS

from ..flops import training_flops
from .attention.implementations import with_names
from .models import CHECKED_TOKENS, FACTOR, Workload, computed_tiles, fault_of, ours, rules_of, set_pruning
from .results import Row
from .runner import Variant
from .timing import Matmul, device_times, peak_bytes

TOKENS, CPU_TOKENS = 16384, 256
_MATMUL_ROUNDS = 5

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
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
        return ours(self.rule) + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Recipe:
    """What is trained and how it is measured.

    Attributes:
        workload: model and tokens.
        tokens: tokens of the one sequence in a step.
        compiled: whether steps with compiled layers and loss are measured too.
        checkpointing: whether backward recomputes the layers' activations instead of keeping them.
        only: parts of the names of what is measured; all for none.
    """

    workload: Workload
    tokens: int = TOKENS
    compiled: bool = False
    checkpointing: bool = False
    only: tuple[str, ...] = ()

    def steps(self, config: FoxConfig) -> list[Step]:
        """What is measured of a model.

        Raises:
            ValueError: a name in ``only`` is part of none.
        """
        compiled = (False, True) if self.compiled else (False,)
        return with_names([Step(rule, one) for one in compiled for rule in rules_of(config)], self.only)

    def build(self) -> FoxForCausalLM:
        """The model in float32, as it is trained.

        Raises:
            ValueError, OSError: it cannot be read, or has dropout, by which no two steps are alike.
        """
        model = self.workload.build(torch.float32).train()
        if model.config.attention_dropout:
            raise ValueError(
                f"--model must have no attention_dropout to be checked, got {model.config.attention_dropout}"
            )
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model


def variants(recipe: Recipe, steps: Sequence[Step] | None = None) -> Iterator[Variant]:
    """Training steps of one model on one device, by default all of the ``recipe``.

    Raises:
        ValueError, OSError: model or text cannot be read, or the model has dropout.
    """
    model = recipe.build()
    ids = recipe.workload.ids(model.config.vocab_size, 1, recipe.tokens)
    trainer = Trainer(model, ids, autocast=True)
    reference = _dense_check(trainer)
    facts = facts_of(model, recipe) | {"gpus": 1}
    if recipe.compiled:
        compile_regions(model)
    for step in recipe.steps(model.config) if steps is None else steps:
        with torch.autocast(recipe.workload.device, torch.bfloat16):
            tiles = {"computed_tiles": computed_tiles(model, ids, step.rule)}
        yield _SingleStep(step, trainer, reference, recipe, facts | tiles)


def facts_of(model: FoxForCausalLM, recipe: Recipe) -> Row:
    """``parameters``, ``model_flops`` of a sequence, and ``matmul_tflops``, the rate of a large matmul."""
    rate = Matmul(recipe.workload.device, torch.bfloat16).tflops(_MATMUL_ROUNDS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops(model.config, recipe.tokens)
    return {"parameters": parameters, "model_flops": flops, "matmul_tflops": rate}


def compile_regions(model: FoxForCausalLM) -> None:
    """Compile each layer and the loss, in place: layers are alike, so one of them is compiled for all.

    After sharding, which gives layers another class; transformers checkpoints nothing in the old one's forward pass.
    """
    # One shape for the check and one for the steps, neither of them dynamic. FSDP2's hooks stay outside.
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)


def as_compiled(compiled: bool) -> AbstractContextManager:
    """Use what is compiled, or leave it out: in backward too, where checkpointing recomputes layers."""
    return nullcontext() if compiled else torch.compiler.set_stance("force_eager")


class Trainer:
    """Training steps of one model, sharded or not.

    Args:
        model: what is trained.
        ids: ``[1, T]`` tokens of this rank.
        autocast: whether float32 weights compute under bfloat16 autocast; FSDP2 casts them itself.
    """

    def __init__(self, model: FoxForCausalLM, ids: Tensor, autocast: bool) -> None:
        self.model, self.ids, self._autocast = model, ids, autocast
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(self, step: Step) -> None:
        """Forward, backward and optimizer."""
        set_pruning(self.model, step.rule)
        self.backward(step.compiled, self.ids)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, compiled: bool, ids: Tensor, autocast: bool | None = None) -> None:
        """Leave the gradients of the loss on ``ids`` in the model."""
        enabled = self._autocast if autocast is None else autocast
        with as_compiled(compiled):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=enabled):
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()

    def resident_bytes(self) -> int:
        """Bytes of weights and of the optimizer's state."""
        state = [x for of_one in self._optimizer.state.values() for x in of_one.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*self.model.parameters(), *state))


class GradientCheck:
    """How far gradients are from exact ones, relative to their norm.

    Args:
        exact: gradients by name of the weight.
        rounded: the same with weights and matmuls in bfloat16: their errors give the limits.
        groups: names of weights whose gradients are taken together, by what the group is called.
    """

    def __init__(self, exact: Gradients, rounded: Gradients, groups: dict[str, list[str]]) -> None:
        self._exact, self._groups = exact, groups
        self._rounding = self._errors(rounded)

    def compare(self, found: Gradients, rule: Rule | None) -> tuple[dict[str, float], dict[str, float]]:
        """Errors and limits by group; an error is NaN where a gradient is missing."""
        eps = 0.0 if rule is None else DEFAULT_EPS
        return self._errors(found), {group: FACTOR * (rounding + eps) for group, rounding in self._rounding.items()}

    def _errors(self, found: Gradients) -> dict[str, float]:
        return {group: self._distance(found, names) for group, names in self._groups.items()}

    def _distance(self, found: Gradients, names: list[str]) -> float:
        if not all(name in found for name in names):
            return math.nan
        off = sum((found[name] - self._exact[name]).double().square().sum().item() for name in names)
        return math.sqrt(off / sum(self._exact[name].double().square().sum().item() for name in names))


def _dense_check(trainer: Trainer) -> GradientCheck:
    """Of the attention layers' weights, for the first tokens, by dense attention in float32."""
    model = trainer.model
    set_pruning(model, None)
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    exact, rounded = (_gradients(trainer, compiled=False, autocast=autocast) for autocast in (False, True))
    model.set_attn_implementation(chosen)
    gates = [name for name in exact if ".forget_gate." in name]
    groups = {"projections": [name for name in exact if name not in gates], "forget gates": gates}
    return GradientCheck(exact, rounded, {part: names for part, names in groups.items() if names})


class MeasuredStep:
    """What steps on one device and on several have in common."""

    def __init__(self, step: Step, recipe: Recipe, facts: Row) -> None:
        self.facts = {"name": step.name, "rule": step.rule, "compiled": step.compiled} | facts
        self.step, self.recipe = step, recipe

    def times(self, trainer: Trainer, rounds: int) -> list[float]:
        """Milliseconds of each of ``rounds`` steps on this device."""
        return device_times(partial(trainer.step, self.step), rounds, self.recipe.workload.device, warm_up=1)

    def derive(self, row: Row) -> None:
        """``tokens_per_second`` of all GPUs, each with a sequence, and ``mfu``, from the time of a step."""
        seconds = row["step"]["ms"] / 1e3
        row["tokens_per_second"] = row["gpus"] * self.recipe.tokens / seconds
        row["mfu"] = row["model_flops"] / seconds / row["matmul_tflops"] / 1e12


class _SingleStep(MeasuredStep):
    """A training step on one device."""

    def __init__(self, step: Step, trainer: Trainer, reference: GradientCheck, recipe: Recipe, facts: Row) -> None:
        super().__init__(step, recipe, facts)
        self._trainer, self._reference = trainer, reference

    def check(self, row: Row) -> str | None:
        set_pruning(self._trainer.model, self.step.rule)
        found = _gradients(self._trainer, self.step.compiled, autocast=True)
        errors, limits = self._reference.compare(found, self.step.rule)
        row |= {"errors": errors, "limits": limits}
        faults = [fault_of(f"gradients of the {part} are", error, limits[part]) for part, error in errors.items()]
        fault = next((one for one in faults if one is not None), None)
        del found
        if fault is None:
            call = partial(self._trainer.step, self.step)
            # The first call compiles, and makes the optimizer's state.
            call()
            row["peak_bytes"] = peak_bytes(call, self.recipe.workload.device, self._trainer.resident_bytes())
        return fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        return {"step": self.times(self._trainer, rounds)}


def _gradients(trainer: Trainer, compiled: bool, autocast: bool) -> Gradients:
    model = trainer.model
    trainer.backward(compiled, trainer.ids[:, :CHECKED_TOKENS], autocast)
    named = ((name, parameter.grad) for name, parameter in model.named_parameters() if ".self_attn." in name)
    grads = {name: grad for name, grad in named if grad is not None}
    model.zero_grad(set_to_none=True)
    return grads
