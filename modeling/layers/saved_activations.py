"""What eager training keeps for the backward pass: one cast for all projections of an input, and no product of an MLP.

torch.compile decides by itself what to keep and what to compute again; here is what eager mode would keep for nothing.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.operators import may_launch


def cast_once(x: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    """``x`` in another ``dtype`` for ``count`` readers, whose gradients are added up in the dtype of ``x``.

    Under autocast each linear layer casts its input by itself and keeps its own copy.
    """
    made: tuple[Tensor, ...] = _SharedCast.apply(x, dtype, count)
    return made


class _SharedCast(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        cast = x.to(dtype)
        # One memory, but for autograd tensors of their own, each with its gradient.
        memory = cast.untyped_storage(), cast.storage_offset(), cast.shape, cast.stride()
        return cast, *(cast.new_empty(0).set_(*memory) for _ in range(count - 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None, None
        total = given[0].to(ctx.dtype)
        for grad in given[1:]:
            # Without a float32 copy of each; not in place where a gradient of this is wanted.
            total = total + grad if torch.is_grad_enabled() else total.add_(grad)
        return total, None, None


def computed_again(x: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> contextlib.AbstractContextManager:
    """Within, what keeps ``x`` for the backward pass keeps ``inputs`` instead, and computes ``function`` of them again.

    Args:
        x: what ``function(*inputs)`` has returned, contiguous. ``inputs`` are kept anyway.
        function: deterministic.

    Where outer saved-tensor hooks decide what is kept (gradient checkpointing, offloading), only they do.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad and may_launch(x) and x.is_contiguous()
    if not wanted or _outer_hooks_decide():
        return contextlib.nullcontext()
    memory, size = x.untyped_storage().data_ptr(), x.numel()

    def pack(kept: Tensor) -> Any:
        if kept.untyped_storage().data_ptr() == memory and kept.numel() == size:
            return _Again(function, inputs, kept.shape)
        # torch does not look for changes of what it is handed back.
        return kept, kept._version

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _outer_hooks_decide() -> bool:
    """Whether there are hooks on saved tensors, or may be none; torch has no public way to ask."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", None)
    return top is None or enabled is None or not enabled() or top(False) is not None


class _Again:
    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], shape: torch.Size) -> None:
        self._function, self._inputs, self._shape = function, tuple(x.detach() for x in inputs), shape

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self._function(*self._inputs).view(self._shape)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Again):
        return packed()
    kept, version = packed
    if kept._version != version:
        raise RuntimeError("a tensor that is needed for gradients was changed in place after the forward pass read it")
    result: Tensor = kept
    return result


__all__ = ["cast_once", "computed_again"]
