"""What all operators of this library share: their namespace, and what they refuse of autograd."""

import re

import torch
from torch import Tensor

# Two copies of this code can live in one process under different package names: each names its operators after its
# own, because registering a name twice replaces the first silently. Such a name may hold ASCII only.
NAMESPACE = re.sub(r"\W", "_", __package__ or "foxlm_kernels", flags=re.ASCII)

ONLY_REVERSE_MODE = (
    "forgetting attention is differentiable once, in reverse mode by torch.autograd, and takes no part in torch.func's "
    "transforms (fold what vmap would map over into the batch); "
    "a model has all of them with attn_implementation='eager'"
)


def maybe_contiguous(x: Tensor) -> Tensor:
    """``x`` with contiguous rows (stride 1 along the last dimension), as kernels want it; copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` carries a tangent of forward mode, which operators without a rule drop without a word, or is what a
    transform of torch.func makes of a tensor."""
    if torch.compiler.is_compiling():
        return False
    return torch.func.debug_unwrap(x) is not x or torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def refuse_transforms(*inputs: Tensor | None) -> None:
    """Raise `NotImplementedError` if an input `is_transformed`."""
    if any(x is not None and is_transformed(x) for x in inputs):
        raise NotImplementedError(ONLY_REVERSE_MODE)


def refuse_second_derivative(ctx, *grads: Tensor):
    """Autograd rule of an operator that is itself a gradient."""
    raise NotImplementedError(ONLY_REVERSE_MODE)
