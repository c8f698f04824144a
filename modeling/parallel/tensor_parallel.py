"""Tensor parallelism: what layers do where a weight is sharded, and what `from_pretrained` refuses before it shards.

Each rank has whole heads, by the plan in `FoxConfig.base_model_tp_plan`, and transformers carries it out. It cuts
projections into as many rows as it likes; half a head would then show as a shape that does not fit, somewhere in the
first forward pass.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

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
        """transformers' "rowwise"; within `local_weights` small outputs are summed by `small_sums.sum_small`."""

        def install_forward(self, module, mesh):
            # Name of the group that shares memory, while it is to be used.
            module.sums_through = None
            return super().install_forward(module, mesh)

        def transform_output_post_forward(self, module, output, mesh):
            if module.sums_through is None:
                return super().transform_output_post_forward(module, output, mesh)
            from .small_sums import is_small, sum_small

            if not is_small(output):
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


def local_tensor(weight: Tensor) -> Tensor:
    """The tensor with this rank's values of a weight that may be sharded; `local_part` may be a view of it."""
    return cast(Any, weight)._local_tensor if is_sharded(weight) else weight


def set_local_tensor(weight: Tensor, values: Tensor) -> None:
    """Move a weight that may be sharded to the memory of ``values``, which are its values on this rank."""
    if is_sharded(weight):
        mesh, placements = cast(Any, weight).device_mesh, cast(Any, weight).placements
        sizes: dict[str, Any] = {"shape": weight.shape, "stride": weight.stride()}
        # Both the memory that the DTensor reports and its local tensor: setting one leaves the other.
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


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules, itself first and each once, in a fifth of the time of ``model.modules()``: every `generate` asks."""
    modules, found = [model], {id(model)}
    for module in modules:
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found.add(id(child))
                modules.append(child)
    return modules


def shards_layers(modules: list[nn.Module]) -> bool:
    """Whether FSDP does, whose weights are whole only while their layer runs."""
    return any(hasattr(kind, "unshard") for kind in set(map(type, modules)))


@contextlib.contextmanager
def local_weights(model: nn.Module) -> Iterator[None]:
    """Within it, the sharded weights of ``model`` are this rank's plain tensors, for calls without gradients.

    Each access to a sharded weight (`DTensor`) costs the host as much time as a small kernel takes. Small sums over
    ranks go through memory that the GPUs of one host share (`sum_small`). Models without sharded weights, and FSDP's,
    are left as they are. All ranks must enter together.
    """
    modules = modules_of(model)
    with contextlib.ExitStack() as undo:
        if not shards_layers(modules):
            for module in modules:
                # transformers' mark of its tensor parallelism. The embedding sums the rows that ranks look up.
                if getattr(module, "_is_hooked", False) and not isinstance(module, nn.Embedding):
                    with torch.inference_mode(False), torch.no_grad():
                        _use_local_weights(module, undo)
        yield


def _use_local_weights(module: Any, undo: contextlib.ExitStack) -> None:
    for name, weight in list(module._parameters.items()):
        if not is_sharded(weight):
            continue
        if hasattr(module, "sums_through") and name == "weight":
            from .small_sums import share_memory

            module.sums_through = share_memory(cast(Any, weight).device_mesh, local_tensor(weight).device)
            undo.callback(setattr, module, "sums_through", None)
        part = nn.Parameter(local_tensor(weight), requires_grad=False)
        module._parameters[name] = part
        undo.callback(_restore, module, name, part, weight)


def _restore(module: nn.Module, name: str, part: nn.Parameter, weight: nn.Parameter) -> None:
    # Unless another weight was put there.
    if module._parameters.get(name) is part:
        module._parameters[name] = weight


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


def check_tensor_parallel(config: FoxConfig, tp_size: int, name: str = "tp_size") -> None:
    """Refuse a number of ranks that does not divide the heads; ``name`` is what the message calls it.

    Raises:
        ValueError: ``tp_size`` does not divide a size of ``config``.
    """
    heads, kv_heads, head_dim = config.heads
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if config.qk_norm == "all_heads":
        # Each rank gathers all heads: only the projections are sharded.
        sizes = {f"{name} * head_dim": count * head_dim for name, count in sizes.items()}
    assert config.intermediate_size is not None, "set in __post_init__"
    sizes["intermediate_size"] = config.intermediate_size
    refused = {name: size for name, size in sizes.items() if size % tp_size}
    if refused:
        common = math.gcd(*sizes.values())
        accepted = [size for size in range(1, common + 1) if common % size == 0]
        named = " and ".join(f"{name} ({size})" for name, size in refused.items())
        raise ValueError(f"{name} must divide {named}, got {tp_size}; this model takes {accepted}")
