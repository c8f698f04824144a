"""The rules of pruning as one Triton function, for every kernel that searches; in PyTorch it is `rules.may_drop`.

Margins are numbers of the host, from `rounding`.
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
def query_bounds(q, diagonal_key, key_length, scale, margin):
    """At least ``scale |q|``, at most the logit with the diagonal key, of rows ``[N, D]``; see `rules.QueryBounds`."""
    norm = lengths(q) * (1.0 + margin)
    # Where the dot product overflows, so does this product of lengths, and no difference of the two drops anything.
    diagonal = tl.sum(q * diagonal_key, 1) * scale - margin * (norm * key_length) * tl.abs(scale)
    return norm * tl.abs(scale), diagonal


@triton.jit
def sink_bound(q, SINK, norm, scale, margin, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """At most the logit with the sink's key, ``[D]`` at ``SINK``, of rows ``[N, BLOCK_D]``; ``norm`` as above."""
    o_d = tl.arange(0, BLOCK_D)
    key = tl.load(SINK + o_d, mask=o_d < D, other=0.0).to(q.dtype)[None, :]
    return tl.sum(q * key, 1) * scale - margin * (norm * lengths(key))


@triton.jit
def log_add(a, b):
    """``log(exp(a) + exp(b))`` of finite numbers."""
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def raised(c, margin):
    """``c`` of a query, float64, with the margin of all decays to it."""
    return c + margin * (32.0 - c)


@triton.jit
def may_drop(
    RULE: tl.constexpr, norm, diagonal, bound, bound_margin, decay, log_decays, largest, log_eps
):  # fmt: skip
    """Whether rows may drop the keys up to one, by the `PruningRule` of value ``RULE``. False where a number is NaN.

    Args:
        norm, diagonal: of the rows, as `query_bounds` gives them; ``tight`` reads them.
        bound, bound_margin: ``U`` of the rows, and by which share it is raised; ``paper`` reads them. False where ``U``
            is no finite number from 0 on.
        decay: ``c_i - c_j`` of the last of the keys; ``paper`` reads it.
        log_decays: log of the sum of ``exp(c_i - c_j)`` over the keys; ``tight`` reads it.
        largest: greatest length of the keys; ``tight`` reads it.
        log_eps: as `rounding.log_allowed` gives it.
    """
    if RULE == "tight":
        return log_decays.to(norm.dtype) + norm * largest - diagonal <= log_eps
    else:
        tl.static_assert(RULE == "paper")
        threshold = tl.where(bound >= 0.0, log_eps - 2.0 * (1.0 + bound_margin) * bound, -float("inf"))
        return decay.to(threshold.dtype) < threshold
