"""RMSNorm, alone or with the output gate that follows it."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.elementwise.gated_norm import gated_norm
from ...kernels.validation import is_transformed
from ..parallel.tensor_parallel import local_part, sum_gradients

# Rows from which on torch's fused backward adds up parts of the weight's gradient that it has rounded to its dtype.
_MANY_ROWS = 1 << 16


class FoxRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32; ``weight`` covers it, or several heads of it (``[heads * D]``).

    In eager mode one kernel forward, and backward only the input and one value per row are saved: torch's own where
    weight and input have one shape and dtype, else that of `kernels.backends`.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        # The process group that shares the weight under tensor parallelism, each rank for heads of its own.
        self.ranks: Any = None

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "sigmoid") -> Tensor:
        """
        Args:
            x: ``[..., size]``, or ``[..., heads, D]``.
            gate: ``[..., heads * D]``, which the result is multiplied by once it is activated; or None.
            activation: of the gate: "sigmoid" or "silu".

        Returns:
            The shape of ``x``; its dtype, promoted with that of the gate.
        """
        weight = self.local_weight()
        if torch.compiler.is_compiling():
            return gated_norm(x, weight, self.eps, gate, activation)
        if gate is None and _torch_fuses(x, weight):
            # Under autocast it returns float32.
            return nn.functional.rms_norm(x, weight.shape, weight, self.eps).to(x.dtype)
        # Imported when they are used, since importing the kernels takes time.
        from ...kernels.backends import elementwise_backend_of

        return elementwise_backend_of(x).gated_norm(x, weight, self.eps, gate, activation)

    def local_weight(self) -> Tensor:
        """This rank's part of the weight."""
        weight = self.weight
        # Of a plain one at once: hosts are slower than GPUs for short prompts.
        if self.ranks is None and type(weight) is nn.Parameter:
            return weight
        return sum_gradients(local_part(weight), self.ranks)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def _torch_fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a kernel that computes this in float32, rounds once and saves no float32 copy of the input."""
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        return False
    if not torch.is_grad_enabled():
        return True
    if not x.is_cuda or is_transformed(x) or is_transformed(weight):
        return False
    return x.dtype in (torch.float32, torch.float64) or x.numel() <= _MANY_ROWS * x.shape[-1]
