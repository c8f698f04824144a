"""Logits of the forget gates, in PyTorch: the definition. The Triton kernel is in `triton_gate_logits`."""

import torch
from torch import Tensor, nn


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x weight^T + bias`` in float32, or wider.

    Args:
        x: ``[..., hidden]``.
        weight: ``[Hf, hidden]``.
        bias: ``[Hf]``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
