"""Logits of the forget gates, in PyTorch: the definition. The Triton kernel is in `triton_gate_logits`."""

import torch
from torch import Tensor, nn


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor, log_sigmoid: bool = False) -> Tensor:
    """``x weight^T + bias`` in float32, or wider; with ``log_sigmoid`` the log gates that these logits mean.

    Args:
        x: ``[..., hidden]``.
        weight: ``[Hf, hidden]``.
        bias: ``[Hf]``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return nn.functional.logsigmoid(logits) if log_sigmoid else logits
