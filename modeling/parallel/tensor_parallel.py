"""Tensor parallelism: what layers do where a weight is sharded, and what `from_pretrained` refuses before it shards.

Each rank has whole heads, by the plan in `FoxConfig.base_model_tp_plan`, and transformers carries it out. It cuts
projections into as many rows as it likes; half a head would then show as a shape that does not fit, somewhere in the
first forward pass.
"""

import contextlib
import math
import os
import platform
import weakref
from typing import Any, cast

import torch
from torch import Tensor

from ...kernels.backends import NAMESPACE
from ..configuration_fox import SHARED_BY_HEADS, SUMMED_OVER_RANKS, FoxConfig

_SHARDED: tuple[type, ...] = ()

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel, TensorParallelLayer

    _SHARDED = (DTensor,)

    class _SharedByHeads(TensorParallelLayer):
        """A norm whose weight all ranks hold, each for heads of its own: its gradient is the sum over ranks.

        transformers' "replicated_with_grad_allreduce" sums what has accumulated, once more at each backward pass, which
        is wrong from the second on.
        """

        def install_forward(self, module, mesh):
            module.ranks = mesh.get_group()
            return module

    class _SummedOverRanks(RowwiseParallel):
        """transformers' "rowwise"; within `decoding_weights` small outputs are summed by `sum_small`."""

        def install_forward(self, module, mesh):
            # Name of the group that shares memory, while it is to be used.
            module.sums_through = None
            return super().install_forward(module, mesh)

        def transform_output_post_forward(self, module, output, mesh):
            if module.sums_through is None or not _is_small(output):
                return super().transform_output_post_forward(module, output, mesh)
            total = sum_small(output, module.sums_through)
            bias = module._parameters.get("bias")
            return total if bias is None else total + local_part(bias)

    ALL_PARALLEL_STYLES.register(SHARED_BY_HEADS, _SharedByHeads())
    ALL_PARALLEL_STYLES.register(SUMMED_OVER_RANKS, _SummedOverRanks())

_SIZES = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size")


def is_sharded(weight: Any) -> bool:
    """Whether this rank holds a part of ``weight`` only, or a copy that it shares."""
    return isinstance(weight, _SHARDED)


def held_tensor(weight: Tensor) -> Tensor:
    """What a weight that may be sharded holds its values in here: the very tensor, where `local_part` may be a view."""
    return cast(Any, weight)._local_tensor if is_sharded(weight) else weight


def hold(weight: Tensor, values: Tensor) -> None:
    """Let a weight that may be sharded have its values, which stay the same, in the memory of ``values``."""
    if is_sharded(weight):
        mesh, placements = cast(Any, weight).device_mesh, cast(Any, weight).placements
        sizes: dict[str, Any] = {"shape": weight.shape, "stride": weight.stride()}
        # Both what it says of its memory and what it holds: setting one leaves the other.
        weight.data = DTensor.from_local(values, mesh, placements, run_check=False, **sizes)
        cast(Any, weight)._local_tensor = values
    else:
        weight.data = values


def local_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight that may be sharded over the heads."""
    # By its class: in torch.compile a sharded weight seems to have no method of its own.
    return cast(Any, weight).to_local() if isinstance(weight, _SHARDED) else weight


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.ranks)
        return total, None


def sum_gradients(weight: Tensor, ranks: Any) -> Tensor:
    """``weight``; its gradient is summed over ``ranks``, a process group, if that is not None."""
    if ranks is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return _SumGradients.apply(weight, ranks)


# Bytes. Above, a sum is bound by what it moves, and NCCL moves less.
_SMALL = 128 * 1024
# By a group's name: the group, and this rank's part of the memory that its GPUs share, None where they cannot.
_SHARED_MEMORY: dict[str, tuple[weakref.ref, Tensor | None]] = {}


def _is_small(x: Tensor) -> bool:
    """Whether `sum_small` takes ``x``."""
    size = x.numel() * x.element_size()
    fits = 0 < size <= _SMALL and size % 16 == 0 and x.dtype in (torch.bfloat16, torch.float32)
    return fits and type(x) is Tensor and x.is_contiguous() and not x.requires_grad


@torch.library.custom_op(f"{NAMESPACE}::sum_small", mutates_args=())
def sum_small(x: Tensor, group: str) -> Tensor:
    """Sum of ``x``, for which `_is_small`, over the ranks of a group that shares memory: one kernel, no NCCL.

    An operator of our own, so that a captured step finds the shared memory where it is: an argument would be copied.
    """
    memory = _SHARED_MEMORY[group][1]
    assert memory is not None, "share_memory has said so"
    part = memory.view(x.dtype)[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(part, x, "sum", group)


@sum_small.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _may_share(mesh: Any) -> bool:
    return mesh.ndim == 1 and mesh.device_type == "cuda"


def share_memory(weight: Tensor) -> str | None:
    """The name of a sharded weight's group, if its GPUs can map each other's memory for `sum_small`.

    The first call for a group asks all ranks, which must be here together, and they decide alike.
    """
    mesh = cast(Any, weight).device_mesh
    if not _may_share(mesh):
        return None
    group = mesh.get_group()
    name = group.group_name
    known, memory = _SHARED_MEMORY.get(name, (lambda: None, None))
    # Names are used again once a group is gone.
    if known() is not group:
        memory = _map_memory(group, held_tensor(weight).device)
        _SHARED_MEMORY[name] = weakref.ref(group), memory
    return None if memory is None else name


def _map_memory(group: Any, device: torch.device) -> Tensor | None:
    """``[_SMALL]`` uint8 that all ranks of ``group`` have mapped, or None on all of them."""
    here: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(here, (platform.node(), device.index), group=group)
    hosts, devices = (set(x) for x in zip(*here, strict=True))
    if len(hosts) > 1 or len(devices) < len(here):
        return None
    # A failure of any kind, on any rank, leaves sums to NCCL. All take a step or none: they wait for each other.
    memory: Any = None
    for step in (_allocate, _meet):
        done = False
        with contextlib.suppress(Exception):
            memory = step(memory, group, device)
            done = True
        if not _all_agree(done, group, device):
            return None
    return memory


def _allocate(memory: None, group: Any, device: torch.device) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric

    return symmetric.empty(_SMALL, dtype=torch.uint8, device=device)


def _meet(memory: Tensor, group: Any, device: torch.device) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric

    symmetric.rendezvous(memory, group.group_name)
    return memory


def _all_agree(done: bool, group: Any, device: torch.device) -> bool:
    flag = torch.tensor(int(done), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag)


def check_processes(distributed_config: Any) -> None:
    """Refuse sizes that are not together those of the processes that were started.

    Args:
        distributed_config: transformers' `DistributedConfig`.

    Raises:
        ValueError: they are not.
    """
    sizes = {name: getattr(distributed_config, name, None) or 1 for name in _SIZES}
    wanted = math.prod(sizes.values())
    if wanted == 1:
        return
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", 1))
    if processes != wanted:
        asked = " and ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"distributed_config must be for the number of processes, got {asked} with {processes} "
            f"{'process' if processes == 1 else 'processes'}: start {wanted} of them, "
            f"torchrun --nproc_per_node {wanted} SCRIPT"
        )


def check_tensor_parallel(config: FoxConfig, tp_size: int) -> None:
    """Refuse a number of ranks that whole heads cannot be dealt to.

    Raises:
        ValueError: ``tp_size`` does not divide a size of ``config``.
    """
    heads, kv_heads, head_dim = config.heads
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if config.qk_norm == "all_heads":
        # Each rank gathers all heads: only the products with their weights are shared.
        sizes = {f"{name} * head_dim": count * head_dim for name, count in sizes.items()}
    assert config.intermediate_size is not None, "set in __post_init__"
    sizes["intermediate_size"] = config.intermediate_size
    refused = {name: size for name, size in sizes.items() if size % tp_size}
    if refused:
        common = math.gcd(*sizes.values())
        accepted = [size for size in range(1, common + 1) if common % size == 0]
        named = " and ".join(f"{name} ({size})" for name, size in refused.items())
        raise ValueError(f"tp_size must divide {named}, got {tp_size}; this model takes {accepted}")
