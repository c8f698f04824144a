"""How a model and its step are laid out over several GPUs, and how fast these can talk to each other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from foxlm import FoxForCausalLM

from .flops import count
from .scaling import GRADIENT_BYTES, WEIGHT_BYTES, ShardedModel
from .timing import interleaved

_BANDWIDTH_ROUNDS = 5


@dataclass(frozen=True)
class Layout:
    """A way to spread a training step over ranks.

    Attributes:
        name: as it appears in tables.
        distribute: shards a model, in place, over a one-dimensional mesh. A forward pass then takes what ``own`` gives.
        own: what a rank computes of the step's tokens, ``[ranks, T]``: rank and tokens to tokens.
    """

    name: str
    distribute: Callable[[FoxForCausalLM, DeviceMesh], None]
    own: Callable[[int, Tensor], Tensor]


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


def own_row(rank: int, ids: Tensor) -> Tensor:
    """One sequence for each rank."""
    return ids[rank : rank + 1]


FSDP2 = Layout("FSDP2", fully_sharded, own_row)


def groups_of(model: FoxForCausalLM) -> ShardedModel:
    """What `fully_sharded` sends of a model that is not sharded yet."""
    embedding = 0 if model.config.tie_word_embeddings else count(model.model.embed_tokens)
    layers, all_layers = len(model.model.layers), count(model.model.layers)
    return ShardedModel(layers, all_layers // layers, embedding, count(model) - all_layers - embedding)


def measure_bandwidths(groups: ShardedModel, mesh: DeviceMesh) -> dict[str, float]:
    """Bytes per second that each rank receives while a layer's weights are gathered and its gradients scattered.

    Returns:
        ``all_gather`` and ``reduce_scatter``, and of what size: ``weight_bytes`` and ``gradient_bytes``.
    """
    device, group, ranks = mesh.device_type, mesh.get_group(), mesh.size()
    part = -(-groups.layer // ranks)
    weights = torch.zeros(ranks * part, dtype=torch.bfloat16, device=device)
    gradients = torch.zeros(ranks * part, dtype=torch.float32, device=device)
    weights_part, gradients_part = weights[:part].clone(), gradients[:part].clone()
    # torch 2.13 has renamed them.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: gather(weights, weights_part, group=group),
        "reduce_scatter": lambda: scatter(gradients_part, gradients, group=group),
    }
    times = interleaved(calls, _BANDWIDTH_ROUNDS, device)
    received = {"all_gather": WEIGHT_BYTES, "reduce_scatter": GRADIENT_BYTES}
    rates = {name: 1e3 * size * part * (ranks - 1) / times[name].ms for name, size in received.items()}
    return rates | {"weight_bytes": float(weights.nbytes), "gradient_bytes": float(gradients.nbytes)}
