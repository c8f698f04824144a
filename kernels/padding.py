"""Padding: which keys it hides, which rows it masks, and the values that must not reach a matmul."""

import torch
from torch import Tensor

from .decay import Decay


def hide_padding(decay: Decay, real: Tensor) -> Decay:
    """Hide padding from every query, and everything from the queries that are padding.

    Args:
        decay: of ``Tq`` queries over ``Tk`` keys.
        real: ``[B, Tk]`` bool, False for padding.
    """
    if real.shape[1] == 0:
        return decay
    return skip_padding(hide_keys(decay, real), real)


def skip_padding(decay: Decay, real: Tensor) -> Decay:
    """`hide_padding` for a cache, whose kernels are given ``real`` and hide padding among its keys themselves.

    Args:
        decay: of ``Tq`` queries; its ``key`` is not read.
        real: ``[B, any]`` bool, False for padding, of all tokens up to the last query at least.
    """
    # Left padding ends before the first visible key: kernels do not even visit it.
    kv_start = torch.maximum(decay.kv_start, real.int().argmax(1)[:, None, None])
    return mask_rows(decay._replace(kv_start=kv_start), real.index_select(1, decay.last))


def hide_keys(decay: Decay, real: Tensor) -> Decay:
    """Hide the keys of padding from every query; ``real`` as for `hide_padding`."""
    return decay._replace(key=decay.key.masked_fill(~real[:, None, :], float("inf")))


def mask_rows(decay: Decay, real: Tensor) -> Decay:
    """Fully mask the rows of padding; ``real`` is ``[B, Tq]`` bool, of the queries."""
    return decay._replace(kv_start=torch.where(real[:, None, :], decay.kv_start, decay.last + 1))


def without_padding(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero what stands in padding, if there is any: a weight of zero times a NaN is a NaN.

    Args:
        q, k, v: ``[B, T, heads, D]``.
        decay: as `hide_padding` leaves it.
        real: ``[B, Tk]`` bool, False for padding; None without.
    """
    if real is None:
        return q, k, v
    fully_masked = (decay.kv_start > decay.last).all(1)[..., None, None]
    hidden = ~real[..., None, None]
    return q.masked_fill(fully_masked, 0.0), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
