"""Whether sharded gradients are those that single devices compute."""

import copy
import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from foxlm import FoxForCausalLM
from foxlm.kernels.pruning.rules import Rule

from .implementations import EPS
from .models import set_pruning
from .runner import Record
from .train import FACTOR, distance


@dataclass(frozen=True)
class Reference:
    """Gradients of a loss that is the mean over ranks, each of which computed that of its tokens by itself.

    Attributes:
        exact: by name, float32 and without pruning.
        rounding: by name, relative distance from them of gradients with weights and activations in bfloat16.
    """

    exact: dict[str, Tensor]
    rounding: dict[str, float]

    def compare(self, model: FoxForCausalLM, rule: Rule | None) -> Record:
        """Hold the gradients of ``model``, sharded or not, to these, each weight by itself, and forget them.

        Returns:
            ``worst_gradient``, the one that is furthest off for what rounding and pruning allow, with its ``weight``,
            ``error`` and ``limit``; a ``status`` and a ``reason`` where that is too far.
        """
        found = gradients_of(model)
        model.zero_grad(set_to_none=True)
        eps = 0.0 if rule is None else EPS
        errors = {name: distance(found, self.exact, [name]) for name in self.exact}
        limits = {name: FACTOR * (rounding + eps) for name, rounding in self.rounding.items()}
        # A NaN is worse than anything.
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / limits[name])
        error, limit = errors[worst], limits[worst]
        record: Record = {"worst_gradient": {"weight": worst, "error": error, "limit": limit}}
        # Not the other way round: a NaN is within no limit.
        if not error <= limit:
            record |= {"status": "wrong", "reason": f"gradient of {worst} is off by {error:.1e}, {limit:.1e} allowed"}
        return record


def reference_gradients(model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh) -> Reference:
    """The mean over ranks of what each computes of its ``ids`` by itself, of a model neither sharded nor compiled."""
    set_pruning(model, None)
    exact = _mean_gradients(model, ids, mesh)
    rounded = _mean_gradients(_in_bfloat16(model), ids, mesh)
    return Reference(exact, {name: distance(rounded, exact, [name]) for name in exact})


def _in_bfloat16(model: FoxForCausalLM) -> FoxForCausalLM:
    """A copy as FSDP2 computes with it: in bfloat16, gates in float32."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if ".forget_gate." not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def _mean_gradients(model: FoxForCausalLM, ids: Tensor, mesh: DeviceMesh) -> dict[str, Tensor]:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = {name: grad.float() for name, grad in gradients_of(model).items()}
    model.zero_grad(set_to_none=True)
    for grad in grads.values():
        dist.all_reduce(grad, group=mesh.get_group())
        grad /= mesh.size()
    return grads


def gradients_of(model: FoxForCausalLM) -> dict[str, Tensor]:
    """Whole gradients by name; all ranks must ask."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
