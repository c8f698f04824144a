"""`foxlm bench train --gpus N`: the training step with FSDP2 on several GPUs of this host, one sequence on each.

Before it is timed, gradients of a shallow model of the same sizes are compared with the mean of what single GPUs
compute, each weight by itself.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from foxlm import FoxForCausalLM

from .models import computed_tiles, fault_of, set_pruning
from .ranks import gathered, slowest
from .results import Results, Row
from .runner import Report, Variant, run
from .timing import release_memory
from .train import GradientCheck, MeasuredStep, Recipe, Step, Trainer, compile_regions, facts_of

# Layers of the model whose gradients are checked: enough that one waits for another.
_CHECKED_LAYERS = 2


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


def measure_on_rank(
    rank: int,
    recipe: tuple[Recipe, int],
    results: Results,
    out: Path,
    shard: Callable[[FoxForCausalLM, DeviceMesh], None] = fully_sharded,
) -> None:
    """Measure with all other ranks; rank 0 adds rows to ``results`` and keeps them in ``out``.

    Args:
        rank: of this process.
        recipe: what is trained, and the timed steps in each pass.
        results: without rows of these steps.
        out: JSON file.
        shard: shards a model, in place, over a one-dimensional mesh; importable by name.
    """
    step, rounds = recipe
    report = Report(results, out if rank == 0 else None)
    run(_variants(rank, step, shard), report, rounds, step.workload.device, collective=True)


def _variants(rank: int, recipe: Recipe, shard: Callable[[FoxForCausalLM, DeviceMesh], None]) -> Iterator[Variant]:
    device, gpus = recipe.workload.device, dist.get_world_size()
    mesh = init_device_mesh(device, (gpus,))

    def trainer_of(model: FoxForCausalLM) -> Trainer:
        shard(model, mesh)
        if recipe.compiled:
            compile_regions(model)
        return Trainer(model, ids, autocast=False)

    model = recipe.build()
    ids = recipe.workload.ids(model.config.vocab_size, gpus, recipe.tokens)[rank : rank + 1]
    facts = facts_of(model, recipe) | {"gpus": gpus, "layout": "FSDP2"}
    # The slowest rank's, so that all have the same.
    facts["matmul_tflops"] = min(gathered(facts["matmul_tflops"]))
    with torch.autocast(device, torch.bfloat16):
        tiles = {one: gathered(computed_tiles(model, ids, one.rule)) for one in recipe.steps(model.config)}

    layers = model.model.layers
    model.model.layers, model.config.num_hidden_layers = layers[:_CHECKED_LAYERS], min(_CHECKED_LAYERS, len(layers))
    reference = _mean_check(model, ids, mesh)
    shallow = trainer_of(model)
    del layers, model
    checks = {one: _check(one, shallow, reference) for one in tiles}
    # Before the whole model is built: they would count as its memory.
    del shallow, reference
    release_memory(device)
    trainer: list[Trainer] = []
    for one, shares in tiles.items():
        fault, found = checks[one]
        if fault is None and not trainer:
            trainer.append(trainer_of(recipe.build()))
        of_step = facts | found | {"computed_tiles": sum(shares) / len(shares)}
        yield _ShardedStep(one, fault, trainer, recipe, of_step)


def _check(step: Step, shallow: Trainer, reference: GradientCheck) -> tuple[str | None, Row]:
    """What is wrong with the gradients of a step, in words, and the part of its row that says how far they are off."""
    set_pruning(shallow.model, step.rule)
    shallow.backward(step.compiled, shallow.ids)
    errors, limits = reference.compare(gradients_of(shallow.model), step.rule)
    shallow.model.zero_grad(set_to_none=True)
    # A NaN is worse than anything.
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / limits[name])
    # All ranks have compared the same whole gradients: all go the same way.
    faults = gathered(fault_of(f"gradient of {worst} is", errors[worst], limits[worst]))
    row = {"worst_gradient": {"weight": worst, "error": errors[worst], "limit": limits[worst]}}
    return next((one for one in faults if one is not None), None), row


class _ShardedStep(MeasuredStep):
    """A training step on all ranks; ``trainer`` holds that of the whole model unless all steps are wrong."""

    def __init__(self, step: Step, fault: str | None, trainer: list[Trainer], recipe: Recipe, facts: Row) -> None:
        super().__init__(step, recipe, facts)
        self._fault, self._trainer = fault, trainer

    def check(self, row: Row) -> str | None:
        if self._fault is None:
            cuda = self.recipe.workload.device == "cuda"
            # The first call compiles, and makes the optimizer's state.
            self._trainer[0].step(self.step)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self._trainer[0].step(self.step)
            row["peak_bytes"] = max(gathered(torch.cuda.max_memory_allocated())) if cuda else None
        return self._fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        return {"step": slowest(gathered(self.times(self._trainer[0], rounds)))}


def _mean_check(model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh) -> GradientCheck:
    """Of each weight, where the loss is the mean over ranks, each of which computes that of its tokens by itself."""
    set_pruning(model, None)
    exact = _mean_gradients(model, ids, mesh)
    # A copy as FSDP2 computes with it: in bfloat16, gates in float32.
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if ".forget_gate." not in name:
            parameter.data = parameter.data.bfloat16()
    return GradientCheck(exact, _mean_gradients(rounded, ids, mesh), {name: [name] for name in exact})


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
