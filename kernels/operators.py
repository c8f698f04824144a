"""What all operators of this library share: their namespace, contiguous rows, and no second derivative; and when a
kernel may be launched without being an operator."""

import re

import torch
from torch import Tensor, nn

from .validation import ONLY_REVERSE_MODE, is_transformed

# Two copies of this code can live in one process under different package names: each names its operators after its
# own, because registering a name twice replaces the first silently. Such a name may hold ASCII only.
NAMESPACE = re.sub(r"\W", "_", __package__ or "foxlm_kernels", flags=re.ASCII)


def maybe_contiguous(x: Tensor) -> Tensor:
    """``x`` with contiguous rows (stride 1 along the last dimension), as kernels want it; copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def refuse_second_derivative(ctx, *grads: Tensor):
    """Autograd rule of an operator that is itself a gradient."""
    raise NotImplementedError(ONLY_REVERSE_MODE)


def may_launch(*inputs: Tensor) -> bool:
    """Whether a kernel that is no operator may be launched on these: no compiler, tracer, transform of torch.func or
    tensor class has to see what happens to them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(type(x) in (Tensor, nn.Parameter) and not is_transformed(x) for x in inputs)
