"""Logits of the forget gates in one launch, from 16-bit hidden states and float32 weights.

A matmul of torch wants both in one dtype: it reads a float32 copy of the hidden states, which is written first, twice
their size. With a gate per head there are a dozen columns of output, so that reading is all that it should cost: on
tensor cores, where three products of TF32 stand for one of float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device_of
from ..launches.launch import launched
from ..launches.replay import replayed
from ..operators import may_launch
from ..tiles import cdiv, next_power_of_2
from ..triton_common import overlapping, wait_for_inputs
from .gate_logits import gate_logits as gate_logits_in_pytorch

# Tokens of a program, values of each that are multiplied at once, and those that are added up on their own: tensor
# cores round a sum after the other more coarsely than torch.
_GATE_TOKENS, _GATE_VALUES, _GATE_SUM = 64, 32, 256
# With fewer tokens each gate of each has a program of its own; above so many gates, there are too many columns.
_MANY_TOKENS, _MOST_GATES = 64, 64
# Values that such a program multiplies at once.
_ROW_VALUES = 1024


@triton.jit
def _log_sigmoid(x):
    """``min(x, 0) - log1p(exp(-|x|))`` of float32 values, in float64: the logarithm of a slow gate is as small as what
    is added to 1."""
    x = x.to(tl.float64)
    z = tl.exp(-tl.abs(x))
    log1p = tl.where(z < 2.0**-20, z * (1.0 - 0.5 * z), tl.log(1.0 + z))
    return (tl.minimum(x, 0.0) - log1p).to(tl.float32)


@launched
@triton.jit(do_not_specialize=["N"])
def _gate_logits_kernel(
    X, x_n, WEIGHT, BIAS, OUT,
    N, HIDDEN, HF,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SUM: tl.constexpr,
    LOG_SIGMOID: tl.constexpr,
):  # fmt: skip
    """``OUT[n, h] = sum_k X[n, k] WEIGHT[h, k] + BIAS[h]``, as exact as in float32; or the `_log_sigmoid` of that."""
    o_n, o_h = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    m_n, m_h = o_n < N, o_h < HF
    acc = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for first in range(0, HIDDEN, BLOCK_SUM):
        part = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        for begin in range(first, first + BLOCK_SUM, BLOCK_K):
            o_k = begin + tl.arange(0, BLOCK_K)
            m_k = o_k < HIDDEN
            p_x = X + o_n[:, None].to(tl.int64) * x_n + o_k[None, :]
            b_x = tl.load(p_x, mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            p_w = WEIGHT + o_h[None, :] * HIDDEN + o_k[:, None]
            b_w = tl.load(p_w, mask=m_h[None, :] & m_k[:, None], other=0.0)
            part = tl.dot(b_x, b_w, part, input_precision="tf32x3")
        acc += part
    acc += tl.load(BIAS + o_h, mask=m_h, other=0.0)[None, :]
    if LOG_SIGMOID:
        acc = _log_sigmoid(acc)
    tl.store(OUT + o_n[:, None].to(tl.int64) * HF + o_h[None, :], acc, mask=m_n[:, None] & m_h[None, :])


@launched
@triton.jit
def _gate_logit_kernel(
    X, x_n, WEIGHT, BIAS, OUT, HIDDEN, BLOCK_K: tl.constexpr, LOG_SIGMOID: tl.constexpr, OVERLAPS: tl.constexpr
):
    """As `_gate_logits_kernel`, one value: a decoding step has few, and waits for each launch."""
    wait_for_inputs(OVERLAPS)
    i_n, i_h, gates = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    acc = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, HIDDEN, BLOCK_K):
        o_k = begin + tl.arange(0, BLOCK_K)
        m_k = o_k < HIDDEN
        b_x = tl.load(X + i_n * x_n + o_k, mask=m_k, other=0.0).to(tl.float32)
        acc += b_x * tl.load(WEIGHT + i_h * HIDDEN + o_k, mask=m_k, other=0.0)
    logit = tl.sum(acc, 0) + tl.load(BIAS + i_h)
    tl.store(OUT + i_n * gates + i_h, _log_sigmoid(logit) if LOG_SIGMOID else logit)


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor, log_sigmoid: bool = False) -> Tensor:
    """As `gate_logits.gate_logits`, which itself runs for gradients and other dtypes."""
    tokens, gates = x.shape[:-1].numel(), len(weight)
    fits = tokens > 0 and gates <= _MOST_GATES and x.dtype in (torch.float16, torch.bfloat16)
    fits &= weight.dtype == bias.dtype == torch.float32 and weight.is_contiguous() and not torch.is_grad_enabled()
    if not fits or not may_launch(x, weight, bias) or not weight.device == bias.device == x.device:
        return gate_logits_in_pytorch(x, weight, bias, log_sigmoid)
    return _launch_logits(x, weight, bias, log_sigmoid)


@replayed
def _launch_logits(x: Tensor, weight: Tensor, bias: Tensor, log_sigmoid: bool) -> Tensor:
    tokens, (gates, hidden) = x.shape[:-1].numel(), weight.shape
    rows = x.reshape(tokens, hidden)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], gates, dtype=torch.float32, device=x.device)
    arguments = dict(
        X=rows, x_n=rows.stride(0), WEIGHT=weight, BIAS=bias, OUT=out, HIDDEN=hidden, LOG_SIGMOID=log_sigmoid
    )
    with on_device_of(x):
        if tokens < _MANY_TOKENS:
            _gate_logit_kernel[(tokens, gates)](**arguments, BLOCK_K=_ROW_VALUES, **overlapping(x))
            return out
        _gate_logits_kernel[(cdiv(tokens, _GATE_TOKENS),)](
            **arguments,
            N=tokens,
            HF=gates,
            BLOCK_N=_GATE_TOKENS,
            BLOCK_H=max(16, next_power_of_2(gates)),
            BLOCK_K=_GATE_VALUES,
            BLOCK_SUM=_GATE_SUM,
        )
    return out
