"""LoRA adapters by request: what they adapt is of vLLM's class for linear layers, which it wraps."""

from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear

from ..configuration_fox import FoxConfig, peft_targets


def make_adaptable(model: nn.Module, config: FoxConfig) -> None:
    """Replace the linear layers that a LoRA of a FoX model adapts (`peft_targets`) by vLLM's, before they are loaded.

    They are then called one by one: nothing may be fused with what an adapter changes.

    Args:
        model: with the modules of `modeling_fox`; changed in place.
        config: of the model.
    """
    adapted = peft_targets(config)["target_modules"]
    found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in adapted]
    for name, linear in found:
        parent, _, own = name.rpartition(".")
        replaced = ReplicatedLinear(
            linear.in_features, linear.out_features, bias=linear.bias is not None, return_bias=False, prefix=name
        )
        setattr(model.get_submodule(parent), own, replaced)
