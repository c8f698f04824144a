"""`foxlm bench train --gpus N`: the training step with FSDP2 on several GPUs of this host, one sequence on each.

Before it is timed, gradients of a shallow model of the same sizes are compared with the mean of what single GPUs
compute, each weight by itself.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from foxlm import FoxForCausalLM

from .inputs import EPS
from .models import FACTOR, computed_tiles, set_pruning
from .ranks import gathered
from .results import Report, Results, Row
from .runner import Variant, run
from .tables import show_on_stderr
from .timing import device_times, release_memory
from .train import Recipe, Step, Trainer, compile_regions, derive_rates, distance, facts_of

# Layers of the model whose gradients are checked: enough that one waits for another.
_CHECKED_LAYERS = 2


@dataclass(frozen=True)
class MultiRecipe:
    """What is trained on how many GPUs.

    Attributes:
        step: what is trained.
        gpus: ranks.
        rounds: timed steps in each pass.
        shard: shards a model, in place, over a one-dimensional mesh; importable by name.
    """

    step: Recipe
    gpus: int
    rounds: int
    shard: Callable[[FoxForCausalLM, DeviceMesh], None]


def measure_on_rank(rank: int, recipe: MultiRecipe, results: Results, out: Path) -> None:
    """Measure with all other ranks; rank 0 adds rows to ``results`` and keeps them in ``out``."""
    report = Report(results, out if rank == 0 else None, show_on_stderr(results["kind"]) if rank == 0 else None)
    run(_variants(rank, recipe), report, recipe.rounds, recipe.step.workload.device, collective=True)


def fully_sharded(model: FoxForCausalLM, mesh: DeviceMesh) -> None:
    """FSDP2 as accelerate applies it: each layer a group, and embeddings; bfloat16 weights, float32 sums of gradients.

    Forget gates are left to the outermost group, which computes in float32 and gathers its few weights once a step: a
    gate's bias sets its decay time, which bfloat16 would move by percents. A group for each gate would do the same
    with a collective for each, and with hooks in the middle of what is compiled.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    others = {parameter for parameter in model.parameters() if parameter not in _gates(model)}
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=others)
    # Anew: sharding has replaced them.
    gates = _gates(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=gates)
    embeddings, head = model.model.embed_tokens, [model.model.norm, model.lm_head]
    if model.config.tie_word_embeddings:
        head.insert(0, embeddings)
    else:
        fully_shard(embeddings, mesh=mesh, mp_policy=policy)
    # Needed again as soon as backward begins.
    fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def _gates(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for name, parameter in model.named_parameters() if ".forget_gate." in name}


def _variants(rank: int, recipe: MultiRecipe) -> Iterator[Variant]:
    step = recipe.step
    mesh = init_device_mesh(step.workload.device, (recipe.gpus,))
    model = step.build()
    ids = step.workload.ids(model.config.vocab_size, recipe.gpus, step.tokens)[rank : rank + 1]
    facts = facts_of(model, step) | {"gpus": recipe.gpus, "layout": "FSDP2"}
    # The slowest rank's, so that all have the same.
    facts["matmul_tflops"] = min(gathered(facts["matmul_tflops"]))
    with torch.autocast(step.workload.device, torch.bfloat16):
        tiles = {one: gathered(computed_tiles(model, ids, one.rule)) for one in step.steps(model.config)}

    layers = model.model.layers
    model.model.layers, model.config.num_hidden_layers = layers[:_CHECKED_LAYERS], min(_CHECKED_LAYERS, len(layers))
    reference = _Reference(model, ids, mesh)
    shallow = Trainer(_distributed(model, recipe, mesh), ids, autocast=False)
    del layers, model
    checks = {one: _check(one, shallow, reference) for one in tiles}
    # Before the whole model is built: they would count as its memory.
    del shallow, reference
    release_memory(step.workload.device)
    trainer: list[Trainer] = []
    for one, shares in tiles.items():
        fault, found = checks[one]
        if fault is None and not trainer:
            trainer.append(Trainer(_distributed(step.build(), recipe, mesh), ids, autocast=False))
        of_step = facts | found | {"computed_tiles": sum(shares) / len(shares)}
        yield _ShardedStep(one, fault, trainer, step, of_step)


def _check(step: Step, shallow: Trainer, reference: "_Reference") -> tuple[str | None, Row]:
    """What is wrong with the gradients of a step, in words, and the part of its row that says how far they are off."""
    row: Row = {}
    set_pruning(shallow.model, step.rule)
    shallow.backward(step.compiled, shallow.ids)
    # All ranks have compared the same whole gradients: all go the same way.
    faults = gathered(reference.fault(shallow.model, step, row))
    return next((one for one in faults if one is not None), None), row


def _distributed(model: FoxForCausalLM, recipe: MultiRecipe, mesh: DeviceMesh) -> FoxForCausalLM:
    recipe.shard(model, mesh)
    if recipe.step.compiled:
        compile_regions(model)
    return model


class _ShardedStep:
    """A training step on all ranks; ``trainer`` holds that of the whole model unless all steps are wrong."""

    def __init__(self, step: Step, fault: str | None, trainer: list[Trainer], recipe: Recipe, facts: Row) -> None:
        self.facts = {"name": step.name, "rule": step.rule, "compiled": step.compiled} | facts
        self._step, self._fault, self._trainer, self._recipe = step, fault, trainer, recipe

    def check(self, row: Row) -> str | None:
        if self._fault is None:
            cuda = self._recipe.workload.device == "cuda"
            # The first call compiles, and makes the optimizer's state.
            self._trainer[0].step(self._step)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self._trainer[0].step(self._step)
            row["peak_bytes"] = max(gathered(torch.cuda.max_memory_allocated())) if cuda else None
        return self._fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        trainer = self._trainer[0]
        own = device_times(lambda: trainer.step(self._step), rounds, self._recipe.workload.device, warm_up=1)
        # A step takes as long as the rank that is done last.
        return {"step": [max(of_round) for of_round in zip(*gathered(own), strict=True)]}

    def derive(self, row: Row) -> None:
        derive_rates(row, self._recipe.tokens)


class _Reference:
    """Gradients of a loss that is the mean over ranks, each of which computes that of its tokens by itself."""

    def __init__(self, model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh) -> None:
        set_pruning(model, None)
        self._exact = _mean_gradients(model, ids, mesh)
        # A copy as FSDP2 computes with it: in bfloat16, gates in float32.
        rounded = copy.deepcopy(model)
        for name, parameter in rounded.named_parameters():
            if ".forget_gate." not in name:
                parameter.data = parameter.data.bfloat16()
        found = _mean_gradients(rounded, ids, mesh)
        self._rounding = {name: distance(found, self._exact, [name]) for name in self._exact}

    def fault(self, model: FoxForCausalLM, step: Step, row: Row) -> str | None:
        """What is wrong with the gradients in ``model``, which are freed; adds the ``worst_gradient`` to ``row``."""
        found = gradients_of(model)
        model.zero_grad(set_to_none=True)
        eps = 0.0 if step.rule is None else EPS
        errors = {name: distance(found, self._exact, [name]) for name in self._exact}
        limits = {name: FACTOR * (rounding + eps) for name, rounding in self._rounding.items()}
        # A NaN is worse than anything.
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / limits[name])
        error, limit = errors[worst], limits[worst]
        row["worst_gradient"] = {"weight": worst, "error": error, "limit": limit}
        # Not the other way round: a NaN is within no limit.
        return None if error <= limit else f"gradient of {worst} is off by {error:.1e}, {limit:.1e} allowed"


def _mean_gradients(model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh) -> dict[str, Tensor]:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = {name: grad.float() for name, grad in gradients_of(model).items()}
    model.zero_grad(set_to_none=True)
    for grad in grads.values():
        dist.all_reduce(grad, group=mesh.get_group())
        grad /= mesh.size()
    return grads


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name; all ranks must ask."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
