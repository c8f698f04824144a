"""Bounds of queries, keys and logits that follow from an attention layer's weights, for any input.

The pruning rule ``paper`` takes its ``U``, a bound of every ``|scale * q . k|``, from the weights of QK-norm. The
evicting cache needs bounds of queries still to come, also in layers without QK-norm. A bound holds for queries and keys
as they are stored: it has margins for how the norm, the projection and RoPE round.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.pruning.rounding import logit_margin, stored_margin
from ..parallel.tensor_parallel import local_part
from .fused_projections import is_plain_linear
from .norm import FoxRMSNorm

# How often RoPE rounds a pair of elements: cosine and sine, which scale the pair; its two products, whose errors may be
# correlated and count as the square root of 2; and their sum.
_ROPE_ROUNDINGS = 2.0 + 2.0**0.5
# Relative error of inputs, weights and partial sums of a projection in TF32, under autocast to bfloat16, or with sums
# in it.
_PROJECTION_MARGIN = 2.0**-7


def qk_norm_bounds(attention: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Largest lengths of a query and of its keys after QK-norm, both ``[H]``; ``[1]`` if heads share the weights.

    A normalized vector has length ``sqrt(size)`` at most, the norm's weights stretch it, RoPE rotates it, and each of
    them rounds it to ``dtype``. If all heads are normalized together, one of them may have the whole length.

    Args:
        attention: a `FoxAttention`.
        dtype: of queries and keys.

    Returns:
        None without QK-norm, and where RoPE changes lengths.
    """
    if attention.qk_norm == "none" or attention.rope_stretches:
        return None
    query, key = (_norm_bound(attention, norm, dtype) for norm in (attention.q_norm, attention.k_norm))
    if len(key) < len(query):
        key = key.repeat_interleave(len(query) // len(key))
    return query, key


def _norm_bound(attention: Any, norm: FoxRMSNorm, dtype: torch.dtype) -> Tensor:
    weight = local_part(norm.weight).detach()
    size = len(weight) if attention.qk_norm == "all_heads" else attention.head_dim
    weight = weight.view(-1, attention.head_dim)
    fp32 = torch.promote_types(weight.dtype, torch.float32)
    largest = torch.linalg.vector_norm(weight, ord=float("inf"), dim=-1, dtype=fp32)
    return _stored_length(attention, largest, size, dtype, roundings=1)


def projection_bounds(attention: Any, norm: FoxRMSNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Largest lengths of a query and of its keys without QK-norm, ``[H]``.

    A normalized input has length ``sqrt(hidden)``, and a projection stretches it by its largest singular value at most:
    sound, but far more than what happens.

    Args:
        attention: a `FoxAttention` without QK-norm.
        norm: of its input.
        dtype: of queries and keys.

    Returns:
        None where RoPE changes lengths or projections are more than a matmul (LoRA, quantized).
    """
    projections = (attention.q_proj, attention.k_proj)
    if attention.rope_stretches or not all(is_plain_linear(x) for x in projections):
        return None
    query, key = (_largest_output(attention, x, norm, dtype) for x in projections)
    return query, key.repeat_interleave(attention.num_key_value_groups)


def _largest_output(attention: Any, projection: nn.Linear, norm: FoxRMSNorm, dtype: torch.dtype) -> Tensor:
    """Largest length of each head of ``projection``'s output, ``[heads]``, for an input normalized by ``norm``."""
    hidden = projection.weight.shape[1]
    weight = local_part(projection.weight).float() * local_part(norm.weight).float()
    weight = weight.unflatten(0, (-1, attention.head_dim))
    # The rounding of an element is relative to the absolute values of all products in it.
    margin = logit_margin(hidden, torch.float32) + (0.0 if dtype == torch.float64 else _PROJECTION_MARGIN)
    largest = torch.linalg.matrix_norm(weight, ord=2) + margin * torch.linalg.matrix_norm(weight)
    if projection.bias is not None:
        bias = local_part(projection.bias).float().unflatten(0, (-1, attention.head_dim))
        largest += torch.linalg.vector_norm(bias, dim=-1) / hidden**0.5
    # The normalized input, the matmul, the bias and token shift are each rounded.
    return _stored_length(attention, largest, hidden, dtype, roundings=4)


def _stored_length(attention: Any, largest: Tensor, size: int, dtype: torch.dtype, roundings: int) -> Tensor:
    """Upper bound of the lengths of queries or keys as they are stored.

    Args:
        attention: a `FoxAttention`.
        largest: the bound before any rounding, in units of ``sqrt(size)``.
        size: how many elements were normalized together, in float32.
        dtype: of queries and keys.
        roundings: to ``dtype``, before RoPE.
    """
    count = roundings + (_ROPE_ROUNDINGS if attention.use_rope else 0.0)
    factor = size**0.5 * (1.0 + logit_margin(size, torch.float32)) * (1.0 + stored_margin(dtype, count))
    # Subnormal values, in float16 those up to 6e-5, are rounded by a fixed amount.
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return largest * factor + count * least * attention.head_dim**0.5
