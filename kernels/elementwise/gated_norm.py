"""RMSNorm with the output gate after it, or with the residual connection before it, in PyTorch: the definition.

    y = w x / sqrt(mean(x^2) + eps) * act(gate)          y = w s / sqrt(mean(s^2) + eps),  s = x + residual

with the mean over the last dimension of ``x``. The Triton kernels that compute the same are in `triton_gated_norm`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# What `gated_norm` may apply to the gate, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": nn.functional.silu}

# Elements of an input from which on the memory of its float32 copies is worth computing them twice.
_LARGE = 1 << 22


def recompute_if_large(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; for large inputs, backward recomputes intermediate results instead of storing them.

    Of what computes in float32 and has no kernel: in a model of 760M parameters norms and token shift would store
    1.2 GB per layer at 16,384 tokens, more than all matmuls. torch.compile decides for itself what to store.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or inputs[0].numel() < _LARGE:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def gated_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, activation: str = "sigmoid"
) -> Tensor:
    """RMSNorm over the last dimension in float32 (or wider), times the activated gate.

    Args:
        x: ``[..., H, D]``, or ``[..., D]`` if the weight covers that.
        weight: ``[D]``, or ``[H * D]`` with values of its own for each head.
        eps: added to the mean of squares.
        gate: ``[..., H * D]``, or None for the norm alone.
        activation: of the gate, one of `ACTIVATIONS`.

    Returns:
        The shape of ``x``; its dtype, promoted with that of the gate.
    """
    out = recompute_if_large(lambda x, weight: _normalize(x, weight, eps), x, weight)
    return out if gate is None else out * ACTIVATIONS[activation](gate).view_as(out)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of two tensors ``[..., D]`` of one dtype, in that dtype, and its `gated_norm` without a gate."""
    total = x + residual
    return total, gated_norm(total, weight, eps)


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        normalized = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    else:
        normalized = nn.functional.rms_norm(x_fp32, x.shape[-1:], None, eps)
    # One weight for all heads, or one for each.
    weight = weight if weight.shape == x.shape[-1:] else weight.view(-1, x.shape[-1])
    return (weight * normalized).to(x.dtype)
