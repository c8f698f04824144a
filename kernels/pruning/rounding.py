"""How much the rules of `pruning` allow for rounding. What each margin covers is shown in their proof."""

import math

import torch

# Lengths below count as this: squares of what is shorter would underflow in float32.
SHORTEST_LENGTH = 2.0**-51


def logit_margin(head_dim: int, dtype: torch.dtype) -> float:
    """By which share of ``scale |q| |k|`` a logit or its bound may be off, for heads of ``head_dim``.

    Args:
        head_dim: size of a head; 0 where no sum over it is taken, as of a bound that is given.
        dtype: of the arithmetic, or of the coarsest number in it.
    """
    return (head_dim + 32) * torch.finfo(dtype).eps


def stored_margin(dtype: torch.dtype, roundings: float) -> float:
    """By which share of itself a length grows at most if its vector is rounded to ``dtype`` so many times."""
    return (1.0 + torch.finfo(dtype).eps / 2.0) ** roundings - 1.0


def decay_margin(keys: int) -> float:
    """By which share of ``|c| + 32`` the decay of all that a query drops may be off, for sums of so many log gates."""
    return keys * 2.0**-51


def log_allowed(eps: float, dtype: torch.dtype, keys: int = 1) -> float:
    """``log eps - log keys``, lowered by what rounding of sums in ``dtype`` that end near it may be off."""
    log_eps = math.log(eps) - math.log(keys)
    return log_eps - 128.0 * torch.finfo(dtype).eps * (1.0 + abs(log_eps))
