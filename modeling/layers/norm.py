"""RMSNorm, and the recomputation in backward that norms and token shift share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..parallel.tensor_parallel import local_part, sum_gradients

# Elements. From here on the memory of a tensor's float32 copies is worth more than computing them twice.
_LARGE = 1 << 22


def keeping_inputs_only(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; of large inputs backward computes the intermediate results again instead of keeping them.

    Norms and token shift compute in float32: in a model of 760M parameters what they would keep is 1.2 GB a layer at
    16,384 tokens, more than all matrix products. torch.compile decides for itself what to keep.
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
        # Ranks that share the weight, each for heads of its own.
        self.ranks: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return keeping_inputs_only(self._normalize, x, sum_gradients(local_part(self.weight), self.ranks))

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        size = x.shape[-1:]
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # torch's kernel does the same in one launch instead of eight, and it is launches that eager inference waits
            # for. With a weight for each head it cannot round once at the end; autocast would have it return float32.
            if weight.shape == size and weight.dtype == x.dtype:
                return nn.functional.rms_norm(x, size, weight, self.eps).to(x.dtype)
            wide = nn.functional.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), size, None, self.eps)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # One weight for all heads, or one for each.
        weight = weight if weight.shape == size else weight.view(-1, x.shape[-1])
        return (weight * wide).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
