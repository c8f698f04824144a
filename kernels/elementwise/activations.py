"""Activations of gates in Triton, in float32."""

import triton
import triton.language as tl

from ..triton_common import INF, LN_2, LOG2_E

# float32(log2 e) is that much less than log2 e.
_LOG2_E_LOW = tl.constexpr(1.92596298909109e-08)


@triton.jit
def _one_plus_exp(x):
    """``1 + exp(x)``, as exact as torch's: the argument of ``exp2`` is rounded, and what that loses is put back."""
    high = x * LOG2_E
    low = tl.fma(x, LOG2_E, -high) + x * _LOG2_E_LOW
    low = tl.where(tl.abs(high) < 200.0, low, 0.0)
    e = tl.exp2(high)
    return 1.0 + tl.where(e < INF, e + e * (low * LN_2), e)


@triton.jit
def activate(b_g, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    b_z = _one_plus_exp(-b_g)
    b_s = tl.div_rn(1.0, b_z)
    if ACTIVATION == "silu":
        return tl.div_rn(b_g, b_z), b_s * (1.0 + b_g * (1.0 - b_s))
    else:
        return b_s, b_s * (1.0 - b_s)
