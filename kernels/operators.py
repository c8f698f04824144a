"""What all operators of this library share: their namespace, contiguous rows, and no second derivative; and for
kernels that are no operators when they may be launched, and second derivatives."""

import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .decay import Decay
from .validation import ONLY_REVERSE_MODE, is_transformed_in_eager

# Two copies of this code can live in one process under different package names: each names its operators after its
# own, because registering a name twice replaces the first silently. Such a name may hold ASCII only.
NAMESPACE = re.sub(r"\W", "_", __package__ or "foxlm_kernels", flags=re.ASCII)


class _Recording(threading.local):
    """What is told of all that this thread launches and computes, while a `tape.Recorder` sees it; else None."""

    recorder: Any = None


recording = _Recording()
# Types of tensors that hide nothing.
_PLAIN = frozenset((Tensor, nn.Parameter))


def maybe_contiguous(x: Tensor) -> Tensor:
    """``x`` with contiguous rows (stride 1 along the last dimension), as kernels want it; copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous_decay(decay: Decay) -> Decay:
    """``decay`` with contiguous rows."""
    query, key, kv_start, last = decay
    if query.stride(-1) == key.stride(-1) == kv_start.stride(-1) == 1:
        return decay
    return Decay(maybe_contiguous(query), maybe_contiguous(key), maybe_contiguous(kv_start), last)


def refuse_second_derivative(ctx, *grads: Tensor):
    """Autograd rule of an operator that is itself a gradient."""
    raise NotImplementedError(ONLY_REVERSE_MODE)


def may_launch(*inputs: Tensor) -> bool:
    """Whether a kernel that is no operator may be launched on these: no compiler, tracer, transform of torch.func or
    tensor class has to see what happens to them."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    return _PLAIN.issuperset(map(type, inputs)) and not is_transformed_in_eager(inputs)


def nothing_sees(*inputs: Tensor) -> bool:
    """Whether an operator's kernels may be launched past the dispatcher, where an operator of `torch.library` costs the
    host up to 0.8 ms (H200, torch 2.11): `may_launch`, and no mode counts or records operators but our own."""
    return may_launch(*inputs) and torch._C._len_torch_dispatch_stack() == (recording.recorder is not None)


def gradients_by_torch(
    ctx: Any,
    function: Callable[..., Any],
    inputs: tuple[Tensor | None, ...],
    d_out: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` that can be differentiated again, for the backward pass of its kernel.

    Args:
        ctx: of the kernel's `torch.autograd.Function`, whose first inputs they are.
        function: returns one tensor, or as many as ``d_out`` has.
    """
    # Aliases: one input may have been computed from another, and that path is not this function's.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    needed = [x for x, needs in zip(aliases, ctx.needs_input_grad, strict=False) if needs and x is not None]
    found = iter(torch.autograd.grad(function(*aliases), needed, d_out, create_graph=True))
    return tuple(next(found) if needs else None for _, needs in zip(aliases, ctx.needs_input_grad, strict=False))
