"""Floating-point operations of a model's matmuls, counted by torch."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from foxlm import FoxConfig, FoxForCausalLM

# Matmuls of a forward and backward pass over those of the forward pass. Attention's backward pass has five for two.
LINEAR_TRAINING, ATTENTION_TRAINING = 3.0, 3.5


def forward_flops(config: FoxConfig, tokens: int) -> dict[str, float]:
    """FLOPs of a forward pass over one sequence: ``linear``, and dense causal ``attention``.

    torch counts them on a model without memory (the meta device) with eager attention, which computes whole squares;
    causality leaves half of those.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        # Moved too: after transformers has loaded a model, `torch.linspace` may leave biases of gates on the CPU.
        model = FoxForCausalLM(config).to("meta")
        ids = torch.zeros(1, tokens, dtype=torch.int64)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if op is torch.ops.aten.bmm)
    return {"linear": float(sum(counts.values()) - attention), "attention": attention / 2.0}


def training_flops(config: FoxConfig, tokens: int) -> float:
    """FLOPs of forward and backward without pruning and recomputation, as model FLOPs utilization (MFU) counts them.

    By that convention attention's backward pass counts twice its forward pass.
    """
    return LINEAR_TRAINING * sum(forward_flops(config, tokens).values())


def shares_of_flops(flops: dict[str, float], kept: float) -> dict[str, dict[str, float]]:
    """What pruning leaves of the FLOPs.

    Args:
        flops: as of `forward_flops`.
        kept: computed-tile fraction of attention.

    Returns:
        For ``forward`` and ``forward_backward``: ``attention_share``, attention's part without pruning; ``left``, the
        share of all FLOPs that pruning leaves; ``speedup``, its inverse: the gain if all ran at one rate.
    """
    found = {}
    for part, factors in (("forward", (1.0, 1.0)), ("forward_backward", (LINEAR_TRAINING, ATTENTION_TRAINING))):
        linear, attention = factors[0] * flops["linear"], factors[1] * flops["attention"]
        left = (linear + kept * attention) / (linear + attention)
        found[part] = {"attention_share": attention / (linear + attention), "left": left, "speedup": 1.0 / left}
    return found
