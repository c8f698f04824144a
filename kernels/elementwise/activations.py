"""Activations of gates in Triton, in float32."""

import triton
import triton.language as tl

from ..triton_common import LOG2_E

# log 2 as a sum; times an integer of up to 9 bits the first is exact in float32.
_LN_2_HIGH = tl.constexpr(0.6931381225585938)
_LN_2_LOW = tl.constexpr(9.058001351536227e-06)


@triton.jit
def _one_plus_exp(x):
    """``1 + exp(x)``, as exact as torch's: ``exp2(x log2 e)`` would lose digits where its argument is large."""
    scaled = x * LOG2_E
    whole = tl.floor(scaled)
    rest = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    return 1.0 + tl.where(tl.abs(scaled) < 200.0, tl.exp2(whole) * tl.exp2(rest * LOG2_E), tl.exp2(scaled))


@triton.jit
def activate(b_g, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    b_z = _one_plus_exp(-b_g)
    b_s = tl.div_rn(1.0, b_z)
    if ACTIVATION == "silu":
        return tl.div_rn(b_g, b_z), b_s * (1.0 + b_g * (1.0 - b_s))
    else:
        return b_s, b_s * (1.0 - b_s)
