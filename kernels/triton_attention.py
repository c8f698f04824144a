"""Attention on GPU kernels as `torch.library` operators, for autograd, torch.compile and CUDA graphs; the host never
waits.

The kernels are in `portable`, those for H100 and H200 in `hopper`, which are taken where their shapes allow; here is
what the dispatcher must know of them. Float32 matmuls run in TF32 if torch is told so
(``torch.backends.cuda.matmul.allow_tf32``).
"""

import torch
from torch import Tensor

from .decay import Decay
from .devices import capability_of, on_device_of
from .launches.replay import replayed
from .operators import NAMESPACE, contiguous_decay, maybe_contiguous, nothing_sees, refuse_second_derivative
from .portable.backward import backward
from .portable.forward import forward
from .tiles import choose_tiles
from .triton_common import HAS_GLUON
from .validation import refuse_transforms

if HAS_GLUON:
    from .hopper.backward import hopper_backward, hopper_backward_takes
    from .hopper.forward import hopper_forward, hopper_forward_takes


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`reference_attention` by GPU kernels, with the same arguments and results, for finite q, k and v.

    float16, bfloat16 or float32; heads up to 256. Results are bitwise deterministic.
    """
    is_seen = not nothing_sees(q, k, v, decay.query, decay.key)
    if is_seen:
        refuse_transforms(q, k, v, decay.query, decay.key)
    seed = torch.randint(2**62, (), dtype=torch.int64, device=q.device) if dropout > 0.0 else None
    if is_seen:
        out, lse = _forward(q, k, v, decay.query, decay.key, decay.kv_start, decay.last, scale, dropout, seed)
    elif torch.is_grad_enabled():
        out, lse = _Attention.apply(q, k, v, decay.query, decay.key, decay.kv_start, decay.last, scale, dropout, seed)
    else:
        out, lse = _launch_forward(q, k, v, decay, scale, dropout, seed)
    return out, lse.float()


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`triton_attention` without autograd, with the log-sum-exp as `backward_pass` wants it.

    This and the next are not operators: what goes through the dispatcher costs the host a third of a millisecond.
    """
    return _launch_forward(q, k, v, decay, scale, dropout, seed)


def backward_pass(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the running sums at queries and keys, from what `forward_pass` returned and theirs."""
    return _launch_backward(d_out, d_lse, q, k, v, decay, out, lse, scale, dropout, seed)


def _tiles(q: Tensor):
    return choose_tiles(q.shape[-1], q.dtype, capability_of(q) or (0, 0))


@torch.library.custom_op(f"{NAMESPACE}::triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, v, Decay(c_q, c_k, kv_start, last), scale, dropout, seed)


@replayed
def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
    decay = contiguous_decay(decay)
    with on_device_of(q):
        if HAS_GLUON and hopper_forward_takes(q, k, v, dropout):
            return hopper_forward(q, k, v, decay, scale)
        return forward(q, k, v, decay, scale, dropout, seed, _tiles(q).forward)


def _empty_lse(q: Tensor) -> Tensor:
    # In float32 its rounding would be one of every weight of a row, in the backward pass.
    dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)


@_forward.register_fake
def _forward_fake(q, k, v, c_q, c_k, kv_start, last, scale, dropout, seed):
    return q.new_empty(q.shape), _empty_lse(q)


def _backward_of_rows(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # The log-sum-exp of a fully masked row is a constant.
    d_lse = d_lse.masked_fill(torch.isneginf(lse), 0.0)
    return _launch_backward(d_out, d_lse, q, k, v, Decay(c_q, c_k, kv_start, last), out, lse, scale, dropout, seed)


_backward = torch.library.custom_op(f"{NAMESPACE}::triton_backward", _backward_of_rows, mutates_args=())


def _launch_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        dq, dk, dv, dc_q, dc_k = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, decay.query, decay.key)
        )
        return dq, dk, dv, dc_q, dc_k
    gates = decay.query.shape[1]
    d_out, d_lse, q, k, v = (maybe_contiguous(x) for x in (d_out, d_lse, q, k, v))
    decay = contiguous_decay(decay)
    with on_device_of(q):
        if HAS_GLUON and hopper_forward_takes(q, k, v, dropout) and hopper_backward_takes(q, k):
            dq, dk, dv, dc_q, dc_k = hopper_backward(d_out, d_lse, q, k, v, decay, out, lse, scale)
        else:
            tile = _tiles(q).backward
            dq, dk, dv, dc_q, dc_k = backward(d_out, d_lse, q, k, v, decay, out, lse, scale, dropout, seed, tile)
    if gates != q.shape[2]:
        dc_q, dc_k = (x.unflatten(1, (gates, -1)).sum(2) for x in (dc_q, dc_k))
    return dq, dk, dv, dc_q, dc_k


@_backward.register_fake
def _backward_fake(d_out, d_lse, q, k, v, c_q, c_k, kv_start, last, out, lse, scale, dropout, seed):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, c_q, c_k))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, scale, dropout, seed = inputs
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.scale, ctx.dropout = scale, dropout


def _autograd(ctx, d_out: Tensor, d_lse: Tensor):
    *tensors, seed = ctx.saved_tensors
    return *_backward(d_out, d_lse, *tensors, ctx.scale, ctx.dropout, seed), None, None, None, None, None


class _Attention(torch.autograd.Function):
    """`_forward` and `_backward` past the dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, c_q, c_k, kv_start, last, scale, dropout, seed):
        # The log-sum-exp seldom has a gradient.
        ctx.set_materialize_grads(False)
        out, lse = _launch_forward(q, k, v, Decay(c_q, c_k, kv_start, last), scale, dropout, seed)
        _save_for_backward(ctx, (q, k, v, c_q, c_k, kv_start, last, scale, dropout, seed), (out, lse))
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        q, k, v, c_q, c_k, kv_start, last, out, lse, seed = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        if d_lse is None and not torch.is_grad_enabled():
            decay = Decay(c_q, c_k, kv_start, last)
            d_lse = torch.zeros_like(lse, dtype=torch.float32)
            grads = backward_pass(d_out, d_lse, q, k, v, decay, out, lse, ctx.scale, ctx.dropout, seed)
            return *grads, None, None, None, None, None
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
        # The operator refuses what would differentiate its result.
        backward = _backward if torch.is_grad_enabled() else _backward_of_rows
        grads = backward(d_out, d_lse, q, k, v, c_q, c_k, kv_start, last, out, lse, ctx.scale, ctx.dropout, seed)
        return *grads, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)
_backward.register_autograd(refuse_second_derivative)
