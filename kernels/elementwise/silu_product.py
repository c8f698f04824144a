"""The activation of a gated MLP, in PyTorch: the definition.

    y = g sigmoid(g) u

The Triton kernels that compute the same are in `triton_silu_product`.
"""

from torch import Tensor, nn


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of the same shape ``[..., size]``."""
    return nn.functional.silu(gate) * up
