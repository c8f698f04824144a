"""Tensor parallelism: each rank has whole heads, with their gates and sinks, and its rows of the MLP."""

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from ..configuration_fox import SUMMED_OVER_RANKS, FoxConfig


def config_of_rank(config: FoxConfig) -> FoxConfig:
    """``config`` with the heads and the MLP's size of one rank, which `check_tensor_parallel` has found to divide."""
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return config
    config = copy.deepcopy(config)
    for size in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(config, size, getattr(config, size) // ranks)
    return config


def weights_of_rank(
    weights: Iterable[tuple[str, Tensor]], own: Mapping[str, Tensor], config: FoxConfig
) -> Iterator[tuple[str, Tensor]]:
    """Of each weight of a checkpoint what this rank holds.

    Args:
        weights: names and whole tensors.
        own: this rank's, by name; their shapes tell along which dimension a weight is cut.
        config: of the whole model.

    Raises:
        ValueError: a weight has a shape that is not that of the model; the message names it.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    plan = config._tensor_parallel_plan()
    summed = {name.rpartition(".")[2] for name, style in plan.items() if style == SUMMED_OVER_RANKS}
    for name, weight in weights:
        if ranks > 1 and name in own:
            module, _, kind = name.rpartition(".")
            weight = _part(name, weight, own[name].shape, rank, ranks)
            if kind == "bias" and rank > 0 and module.rpartition(".")[2] in summed:
                # The sum over ranks has it once.
                weight = torch.zeros_like(weight)
        yield name, weight


def _part(name: str, weight: Tensor, shape: torch.Size, rank: int, ranks: int) -> Tensor:
    if weight.shape == shape:
        return weight
    for dim, size in enumerate(shape):
        if weight.shape == (*shape[:dim], size * ranks, *shape[dim + 1 :]):
            return weight.narrow(dim, rank * size, size)
    raise ValueError(f"{name} must be {list(shape)} or {ranks} such parts side by side, got {list(weight.shape)}")
