"""Reorder the heads of a model so that tensor parallelism balances the load of pruned attention over ranks.

A rank holds consecutive heads (`FoxConfig.base_model_tp_plan`). New models have decay times that ascend over the heads,
and trained ones keep much of that order: the last rank would read nearly all of the keys that pruning leaves, while the
others wait. A permutation of heads does not change the function, up to the rounding of sums over heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from foxlm.kernels.argument_types import typed
from foxlm.modeling.layers.attention import FoxAttention
from foxlm.modeling.layers.forget_gate import FoxConstantGate, FoxForgetGate
from foxlm.modeling.modeling_fox import FoxPreTrainedModel
from foxlm.modeling.parallel.tensor_parallel import check_tensor_parallel


@typed
@torch.no_grad()
def balance_heads(model: FoxPreTrainedModel, ranks: int) -> None:
    """Reorder the heads of each layer, in place, so that slow-forgetting heads are spread evenly over ``ranks``.

    Key/value heads, sorted by the largest bias of their forget gates, are assigned to ranks in zigzag order; query
    heads stay with their key/value head. Save the model afterwards and load it with
    `DistributedConfig(tp_size=ranks)`.

    Args:
        model: not sharded.
        ranks: number of tensor-parallel ranks.

    Raises:
        ValueError: ``ranks`` is not positive or does not divide the heads, or the model has no forget gates.

    Example:
        >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2))
        >>> balance_heads(model, 2)
    """
    config = model.config
    if ranks < 1:
        raise ValueError(f"ranks must be positive, got {ranks}")
    if config.forget_gate == "none":
        raise ValueError("model must have forget gates (forget_gate), got 'none': its heads need no balancing")
    check_tensor_parallel(config, ranks, "ranks")
    for module in model.modules():
        if isinstance(module, FoxAttention):
            order = _balanced_order(_decay_biases(module), ranks)
            for weight, dim in _by_head(module):
                heads = weight.unflatten(dim, (len(order), -1))
                weight.copy_(heads.index_select(dim, order.to(weight.device)).flatten(dim, dim + 1))


def _decay_biases(attention: FoxAttention) -> Tensor:
    """``[G]``, the largest gate bias of each key/value head: the larger it is, the slower the head forgets."""
    gate = attention.forget_gate
    assert isinstance(gate, FoxForgetGate | FoxConstantGate)
    return gate.bias.detach().float().view(attention.config.heads[1], -1).amax(-1)


def _balanced_order(biases: Tensor, ranks: int) -> Tensor:
    """``[G]`` int64 permutation of key/value heads: sorted by bias, assigned to ranks in zigzag order."""
    rounds = biases.argsort(descending=True, stable=True).view(-1, ranks)
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.T.flatten()


def _by_head(attention: FoxAttention) -> Iterator[tuple[Tensor, int]]:
    """The weights of a layer that are split by key/value head, each with the dimension that is split."""
    config = attention.config
    for name, parameter in attention.named_parameters():
        module = name.rpartition(".")[0]
        if module in ("q_norm", "k_norm") and config.qk_norm == "shared":
            continue
        if module == "o_proj":
            # Its bias belongs to the residual stream.
            if parameter.ndim == 2:
                yield parameter, 1
            continue
        yield parameter, 0
