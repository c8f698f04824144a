"""Forget gates in float32 under FSDP2, whatever precision the rest of a model is gathered in."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
import torch

from .gates_fox import FoxConstantGate, FoxForgetGate


def shard_forget_gates(model: nn.Module, mesh: DeviceMesh | None = None, **options) -> int:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    gates = [x for x in model.modules() if isinstance(x, FoxForgetGate | FoxConstantGate)]
    for gate in gates:
        if not isinstance(gate, FSDPModule):
            fully_shard(gate, mesh=mesh, mp_policy=policy, reshard_after_forward=False, **options)
    return len(gates)
