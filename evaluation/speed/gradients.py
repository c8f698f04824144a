"""Whether sharded gradients are those that single devices compute."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from foxlm import FoxForCausalLM
from foxlm.kernels.pruning import Rule

from .implementations import EPS
from .models import set_pruning
from .runner import Record
from .train import FACTOR, distance, uncompiled


@dataclass(frozen=True)
class Reference:
    """Gradients of a loss that is the mean over ranks, each of which computed that of its tokens by itself.

    Attributes:
        exact: by name, float32 and without pruning.
        rounding: relative distance that bfloat16 makes from them, by part of the model.
    """

    exact: dict[str, Tensor]
    rounding: dict[str, float]

    def compare(self, model: FoxForCausalLM, rule: Rule | None) -> Record:
        """Hold the gradients of ``model``, sharded or not, to these, and forget them.

        Returns:
            ``errors`` and ``limits`` by part; with a ``status`` and a ``reason`` where they are wrong.
        """
        errors = distances(gradients_of(model), self.exact)
        model.zero_grad(set_to_none=True)
        eps = 0.0 if rule is None else EPS
        limits = {part: FACTOR * (rounding + eps) for part, rounding in self.rounding.items()}
        record: Record = {"errors": errors, "limits": limits}
        for part, error in errors.items():
            # Not the other way round: a NaN is within no limit.
            if not error <= limits[part]:
                reason = f"gradients of the {part} are off by {error:.1e}, {limits[part]:.1e} allowed"
                return record | {"status": "wrong", "reason": reason}
        return record


def reference_gradients(model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh) -> Reference:
    """What each rank computes of its ``ids`` by itself, then averaged over the ranks; ``model`` is not sharded yet."""
    set_pruning(model, None)
    exact = _mean_gradients(model, ids, mesh, autocast=False)
    return Reference(exact, distances(_mean_gradients(model, ids, mesh, autocast=True), exact))


def _mean_gradients(model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh, autocast: bool) -> dict[str, Tensor]:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        loss = uncompiled(model)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = gradients_of(model)
    model.zero_grad(set_to_none=True)
    for grad in grads.values():
        dist.all_reduce(grad, group=mesh.get_group())
        grad /= mesh.size()
    return grads


def gradients_of(model: FoxForCausalLM) -> dict[str, Tensor]:
    """Whole gradients by name; all ranks must ask."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def distances(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of gradients by part of the model; NaN where one is missing."""
    parts: dict[str, list[str]] = {}
    for name in exact:
        parts.setdefault(_part(name), []).append(name)
    return {part: distance(found, exact, names) for part, names in parts.items()}


def _part(name: str) -> str:
    if ".forget_gate." in name:
        return "forget gates"
    return "rest of attention" if ".self_attn." in name else "other weights"
