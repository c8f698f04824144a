"""Heads in another order, so that tensor parallelism gives each rank as many far-sighted ones as the others.

A rank has a row of neighboring heads (`FoxConfig.base_model_tp_plan`). New models have decay times that ascend over the
heads, and trained ones keep much of that: the last rank would read nearly all of the keys that pruning leaves, while
the others wait. The order of heads means nothing to a model: what is permuted computes what it did, up to the rounding
of sums over heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from foxlm.modeling.layers.attention import FoxAttention
from foxlm.modeling.layers.forget_gate import FoxConstantGate, FoxForgetGate
from foxlm.modeling.modeling_fox import FoxPreTrainedModel
from foxlm.modeling.parallel.tensor_parallel import check_tensor_parallel


@torch.no_grad()
def deal_heads(model: FoxPreTrainedModel, ranks: int) -> None:
    """Order the heads of each layer, in place, such that any of ``ranks`` equal rows of them forgets as fast.

    Key/value heads are dealt to the ranks like cards, those that remember longest first, there and back; the query
    heads of one stay with it. How long one remembers is read from the biases of its forget gates. Save the model then,
    and load it with `DistributedConfig(tp_size=ranks)`.

    Args:
        model: whole, not one that is sharded.
        ranks: for which it will be sharded.

    Raises:
        ValueError: ``ranks`` is not positive or does not divide the heads, or the model has no forget gates.

    Example:
        >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2))
        >>> deal_heads(model, 2)
    """
    config = model.config
    if ranks < 1:
        raise ValueError(f"ranks must be positive, got {ranks}")
    if config.forget_gate == "none":
        raise ValueError("model must have forget gates (forget_gate), got 'none': all of its heads are alike")
    check_tensor_parallel(config, ranks)
    for module in model.modules():
        if isinstance(module, FoxAttention):
            order = _dealt(_decay_biases(module), ranks)
            for weight, dim in _by_head(module):
                heads = weight.unflatten(dim, (len(order), -1))
                weight.copy_(heads.index_select(dim, order.to(weight.device)).flatten(dim, dim + 1))


def _decay_biases(attention: FoxAttention) -> Tensor:
    """``[G]``, the largest gate bias of each key/value head: the larger, the longer it remembers."""
    gate = attention.forget_gate
    assert isinstance(gate, FoxForgetGate | FoxConstantGate)
    return gate.bias.detach().float().view(attention.config.heads[1], -1).amax(-1)


def _dealt(biases: Tensor, ranks: int) -> Tensor:
    """``[G]`` int64: which key/value head comes first, second and so on."""
    rounds = biases.argsort(descending=True, stable=True).view(-1, ranks)
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.T.flatten()


def _by_head(attention: FoxAttention) -> Iterator[tuple[Tensor, int]]:
    """All weights of a layer that have a part for each key/value head, and the dimension that does."""
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
