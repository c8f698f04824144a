"""How far attention is from float64, and how far torch's own is that computes the same in the same type."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attention_inputs import attention, draw_cotangents, output_and_gradients
from eager import eager_attention

Attention = Callable[..., tuple[Tensor, Tensor]]

# How many times torch's error is allowed, in the norm and at the largest element.
_ALLOWED = (2.0, 3.0)


def exact_results(inputs: list[Tensor], cotangents: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output and gradients of the same numbers by the float64 reference, on the CPU."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in inputs]
    return output_and_gradients(attention, leaves, [x.cpu().double() for x in cotangents], **options)


def rounding_errors(
    function: Attention,
    inputs: list[Tensor],
    exact: dict[str, Tensor],
    cotangents: list[Tensor],
    **options: Any,
) -> dict[str, Tensor]:
    """``function`` less ``exact``, on the CPU; zero where both are the same infinity."""
    results = output_and_gradients(function, inputs, cotangents, **options)
    errors = {}
    for name, x in results.items():
        x = x.cpu().double()
        errors[name] = (x - exact[name]).masked_fill(x == exact[name], 0.0)
    return errors


def assert_as_exact_as_torch(
    inputs: list[Tensor],
    tokens: slice = slice(None),
    function: Attention = attention,
    without: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """The error of each result at ``tokens`` is at most so many times that of torch."""
    cotangents = draw_cotangents(inputs[0])
    exact = exact_results(inputs, cotangents, **options)
    ours, theirs = (rounding_errors(f, inputs, exact, cotangents, **options) for f in (function, eager_attention))
    worse = []
    for name, error in ours.items():
        if name in without:
            continue
        error, allowed = (x[..., tokens] if name == "lse" else x[:, tokens] for x in (error, theirs[name]))
        for times, (kind, order) in zip(_ALLOWED, (("norm", 2.0), ("largest", torch.inf)), strict=True):
            found, limit = (torch.linalg.vector_norm(x, order).item() for x in (error, allowed))
            if not found <= times * limit:
                worse.append(f"{name}, {kind}: {found:.1e} against {limit:.1e} of torch")
    assert not worse, "; ".join(worse)
