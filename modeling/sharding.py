"""Data parallelism by torch's FSDP2, with what must not be rounded in float32.

FSDP2 gathers each group of weights in one type. Mixed precision makes that bfloat16, and would round a forget gate's
bias, so that heads forget faster or slower by percents. A group of its own keeps each gate in float32.
"""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .gates_fox import FoxConstantGate, FoxForgetGate


def shard_forget_gates(
    model: nn.Module, mesh: DeviceMesh | None = None, offload_policy: OffloadPolicy | None = None
) -> None:
    """Make each forget gate an FSDP2 group that is gathered, and whose gradient is summed, in float32.

    To be called before `fully_shard` of the layers that hold them. It also lets a model in half precision be sharded,
    whose gates are float32: FSDP2 refuses two types in one group.

    Args:
        model: any module with forget gates; those that are sharded already are left as they are.
        mesh: over which the rest will be sharded; FSDP2's default without.
        offload_policy: that of the rest.
    """
    # Of torch 2.13, about outputs that are views, as those of a linear layer are: nothing is written into gate logits.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPFox\w+Gate\) returned a view")
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, FoxForgetGate | FoxConstantGate) and not isinstance(module, FSDPModule):
            # Kept until backward: a gate has a thousandth of its layer's weights, and gathering it twice takes longer.
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=False,
                offload_policy=offload_policy or OffloadPolicy(),
            )


def prepare_fsdp2(accelerator: Accelerator, model: nn.Module) -> None:
    """What FSDP2 through accelerate needs besides its configuration; does nothing where another engine was chosen.

    Forget gates in float32 (`shard_forget_gates`). With bfloat16 as mixed precision, gradients are summed over ranks in
    float32 and outputs keep their type: accelerate's own policy sums in bfloat16 and rounds even the loss to it.

    Call it between `Trainer(...)` and `trainer.train()`, as ``prepare_fsdp2(trainer.accelerator, trainer.model)``, or
    before `Accelerator.prepare`.

    Raises:
        ValueError: FSDP was asked for and accelerate left it out, as it does on CPU processes; or the plugin has
            `cpu_ram_efficient_loading`, by which weights are loaded once more after they were sharded.
    """
    if not accelerator.is_fsdp2:
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asked and accelerator.distributed_type != DistributedType.FSDP:
            raise ValueError(
                "FSDP was asked for, but accelerate shards over accelerators (GPUs) only and would train "
                f"{accelerator.num_processes} whole copies: distributed_type must be FSDP, got "
                f"{accelerator.distributed_type.value} on {accelerator.device.type}"
            )
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("fsdp_cpu_ram_efficient_loading must be false with FoX's gates in float32, got true")
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, reduce_dtype=torch.float32)
    mesh = accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    shard_forget_gates(model, mesh, plugin.cpu_offload)
