"""The activation of a gated MLP, in PyTorch: the definition.

    y = g sigmoid(g) u

The Triton kernels that compute the same are in `triton_silu_product` and, with the matmul before it, in
`portable.small_linear`.
"""

from torch import Tensor, nn


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of the same shape ``[..., size]``."""
    return nn.functional.silu(gate) * up


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu_product` of two linear layers.

    Args:
        x: ``[..., in]``.
        weight: ``[2 * size, in]``, of ``gate`` and then of ``up``.
        bias: ``[2 * size]``, or None.

    Returns:
        ``[..., size]``.
    """
    return silu_product(*nn.functional.linear(x, weight, bias).chunk(2, dim=-1))
