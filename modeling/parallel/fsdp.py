"""FoX under accelerate: forget gates in float32 with FSDP2, and context parallelism by the model itself.

FSDP2 gathers each group of weights in one dtype. With mixed precision that is bfloat16, which would round a forget
gate's bias and change decay times by percents. A group of its own keeps each gate in float32.
"""

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ...kernels.argument_types import typed
from ..layers.forget_gate import FoxConstantGate, FoxForgetGate


@typed
def shard_forget_gates(
    model: nn.Module, mesh: DeviceMesh | None = None, offload_policy: OffloadPolicy | None = None
) -> None:
    """Make each forget gate an FSDP2 group that is gathered, and whose gradient is summed, in float32.

    To be called before `fully_shard` of the layers that hold them. It also lets a model in half precision be sharded,
    whose gates are float32: FSDP2 refuses two dtypes in one group.

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


@typed
def prepare_fsdp2(accelerator: Accelerator, model: nn.Module) -> None:
    """Set up FSDP2 through accelerate for FoX; does nothing with other engines.

    Forget gates stay in float32 (`shard_forget_gates`). With bfloat16 as mixed precision, gradients are summed over
    ranks in float32 and outputs keep their dtype: accelerate's own policy sums in bfloat16 and rounds even the loss.

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


def save_whole_model(trainer: Any) -> None:
    """`Trainer.save_model` of a whole model also where checkpoints are sharded; there it saves nothing by itself.

    Args:
        trainer: a `Trainer`, on all ranks.

    Raises:
        ValueError: it is none.
    """
    if not hasattr(trainer, "save_model"):
        raise ValueError(f"trainer must be a Trainer, got {trainer!r}")
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


class FoxParallelismConfig(ParallelismConfig):
    """accelerate's [`ParallelismConfig`], whose `cp_size` ranks split sequences by FoX's own context parallelism.

    accelerate gives these ranks the same batches, shards weights over them too (FSDP2), and averages gradients. But it
    splits sequences by ring attention for `scaled_dot_product_attention`, which has no gates, and it refuses FoX. With
    this class it leaves sequences whole, and the model takes its part:

        >>> args = TrainingArguments(..., parallelism_config=FoxParallelismConfig(cp_size=2))  # doctest: +SKIP
        >>> trainer = Trainer(model, args, ...)  # doctest: +SKIP
        >>> model.set_context_parallel(ContextParallel(trainer.accelerator.torch_device_mesh["cp"]))  # doctest: +SKIP

    Arguments are those of `ParallelismConfig`: `cp_size` and `dp_shard_size`, whose product is the number of processes;
    with FSDP2, or with DDP.
    """

    _counts_cp = False

    @property
    def cp_enabled(self) -> bool:
        """False, so that accelerate and Trainer do not split sequences."""
        return self._counts_cp and self.cp_size > 1

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Dimensions of the mesh whose ranks get the same batches."""
        return self._with_cp(super().non_dp_dim_names)

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Dimensions over which FSDP2 shards weights."""
        return self._with_cp(super().dp_shard_cp_dim_names)

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Dimensions over which losses are averaged."""
        return self._with_cp(super().dp_cp_dim_names)

    def _with_cp(self, names: list[str]) -> list[str]:
        return [*names, "cp"] if self.cp_size > 1 and "cp" not in names else names

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type == DistributedType.MULTI_CPU and self.total_size == accelerator.num_processes:
            # Replicas of the weights, to try things out; accelerate has its configuration for accelerators only.
            return
        # FSDP2 has the ranks of cp to shard over, even if there is no other dimension.
        self._counts_cp = True
        try:
            super()._validate_accelerator(accelerator)
        finally:
            self._counts_cp = False
