"""RMSNorm, and the recomputation in backward that norms and token shift share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..parallel.tensor_parallel import local_part, sum_gradients

# Elements of an input from which on the memory of its float32 copies is worth computing them twice.
_LARGE = 1 << 22


def recompute_if_large(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; for large inputs, backward recomputes intermediate results instead of storing them.

    Norms and token shift compute in float32: in a model of 760M parameters they would store 1.2 GB per layer at 16,384
    tokens, more than all matmuls. torch.compile decides for itself what to store.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or inputs[0].numel() < _LARGE:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class FoxRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32; ``weight`` covers it, or several heads of it (``[heads * D]``)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        # The process group that shares the weight under tensor parallelism, each rank for heads of its own.
        self.ranks: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return recompute_if_large(self._normalize, x, sum_gradients(local_part(self.weight), self.ranks))

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        size = x.shape[-1:]
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # torch's kernel does the same in one launch instead of eight, and eager inference is launch-bound. With a
            # weight for each head it cannot round once at the end; under autocast it would return float32.
            if weight.shape == size and weight.dtype == x.dtype:
                return nn.functional.rms_norm(x, size, weight, self.eps).to(x.dtype)
            normalized = nn.functional.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), size, None, self.eps)
        else:
            x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
            normalized = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        # One weight for all heads, or one for each.
        weight = weight if weight.shape == size else weight.view(-1, x.shape[-1])
        return (weight * normalized).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
