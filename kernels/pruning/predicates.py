"""The rules of `pruning` as Triton functions, for every kernel that searches; in PyTorch they are `pruning.may_drop`.

Their margins are host numbers, from `rounding`.
"""

import triton
import triton.language as tl

from .rounding import SHORTEST_LENGTH

_LEAST_SQUARE = tl.constexpr(SHORTEST_LENGTH**2)


@triton.jit
def lengths(x):
    """``[N, D] -> [N]``, never zero."""
    return tl.sqrt(tl.sum(x * x, 1) + _LEAST_SQUARE)


@triton.jit
def query_bounds(q, own_key, own_length, scale, margin):
    """At least ``scale |q|`` and at most the logit with the own key, of rows ``[N, D]``; see `pruning.QueryBounds`."""
    norm = lengths(q) * (1.0 + margin)
    # Where the dot product overflows, so does this product of lengths, and no difference of the two drops anything.
    own = tl.sum(q * own_key, 1) * scale - margin * (norm * own_length) * tl.abs(scale)
    return norm * tl.abs(scale), own


@triton.jit
def raised(c, margin):
    """``c`` of a query, float64, with the margin of all decays to it."""
    return c + margin * (32.0 - c)


@triton.jit
def may_drop_tight(norm, own, log_decays, largest, log_eps):
    """Whether rows may drop the keys of which these are; false where a number is NaN."""
    return log_decays.to(norm.dtype) + norm * largest - own <= log_eps


@triton.jit
def may_drop_paper(decay, bound, bound_margin, log_eps):
    """Whether rows may drop the keys up to one with this decay; false where ``bound`` is no finite number from 0 on."""
    threshold = tl.where(bound >= 0.0, log_eps - 2.0 * (1.0 + bound_margin) * bound, -float("inf"))
    return decay.to(threshold.dtype) < threshold
