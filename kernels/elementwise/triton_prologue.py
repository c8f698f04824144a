"""What stands between an attention layer's projections and attention, in one launch forward and one backward: token
shift of keys and values, QK-norm and RoPE of queries and keys (`prologue_kernels`)."""

from typing import Any

import torch
from torch import Tensor

from ..devices import on_device_of
from ..launches.replay import replayed
from ..operators import may_launch, maybe_contiguous, refuse_second_derivative
from ..tiles import LARGEST_HEAD_DIM, cdiv, next_power_of_2
from ..triton_common import overlapping
from .prologue import PrologueInputs
from .prologue_kernels import prologue_backward_kernel, prologue_forward_kernel

# How many heads of queries, keys and values are not as attention takes them.
_Slots = tuple[int, int, int]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Values of a program's tile.
_PROLOGUE_TILE = 2048


def attention_prologue(inputs: PrologueInputs, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values as attention takes them, computed in float32 and rounded once.

    Args:
        inputs: see there.
        eps: of QK-norm.

    Returns:
        q, k, v of the same shapes and dtypes, once differentiable in all but the pasts and angles; what nothing is done
        to is returned as it came. None for inputs that the kernels do not take: float64, tracing, torch.func's
        transforms, forward mode, gradients of padded tokens, of pasts and of angles and with a past of each token,
        weights on another device.
    """
    if not _takes(inputs):
        return None
    slots = _slots(inputs)
    if not any(slots):
        return inputs.q, inputs.k, inputs.v
    if _wants_gradients(inputs):
        if (
            inputs.last_real is not None
            or inputs.past_of_each
            or any(
                x is not None and x.requires_grad for x in (inputs.key_past, inputs.value_past, inputs.cos, inputs.sin)
            )
        ):
            return None
        q, k, v = _Prologue.apply(eps, slots, *inputs)
    else:
        q, k, v = _prologue_forward(inputs, eps, slots)
    return inputs.q if q is None else q, inputs.k if k is None else k, inputs.v if v is None else v


def _wants_gradients(inputs: PrologueInputs) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _takes(inputs: PrologueInputs) -> bool:
    q, k, v = inputs[:3]
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return False
    if q.shape[-1] > LARGEST_HEAD_DIM or 0 in q.shape or 0 in k.shape:
        return False
    given = [x for x in inputs if x is not None]
    # On one device: there are weights that are fetched when their module is called.
    if not may_launch(*given) or len({x.device for x in given}) > 1:
        return False
    if inputs.cos is None or inputs.sin is None:
        return inputs.cos is inputs.sin
    batch, tokens, rotated = inputs.cos.shape
    fits = batch in (1, q.shape[0]) and tokens == q.shape[1] and rotated % 2 == 0 and rotated <= q.shape[-1]
    return fits and inputs.sin.shape == inputs.cos.shape


class _Prologue(torch.autograd.Function):
    """Keeps the inputs and computes again what lies between."""

    @staticmethod
    def forward(ctx: Any, eps: float, slots: _Slots, *inputs: Any) -> tuple[Tensor | None, ...]:
        ctx.eps, ctx.slots = eps, slots
        ctx.save_for_backward(*inputs)
        return _prologue_forward(PrologueInputs(*inputs), eps, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *_PrologueGradient.apply(ctx.eps, ctx.slots, *grads, *inputs)
        return None, None, *_prologue_backward(grads, PrologueInputs(*inputs), ctx.eps, ctx.slots)


class _PrologueGradient(torch.autograd.Function):
    """The backward pass where a gradient of it may be asked for; `once_differentiable` would take some for constant."""

    @staticmethod
    def forward(ctx: Any, eps: float, slots: _Slots, *tensors: Any) -> tuple[Tensor | None, ...]:
        return _prologue_backward(tensors[:3], PrologueInputs(*tensors[3:]), eps, slots)

    backward = staticmethod(refuse_second_derivative)


@replayed
def _prologue_forward(inputs: PrologueInputs, eps: float, slots: _Slots) -> tuple[Tensor | None, ...]:
    """New q, k and v, or None for each that stays what it is."""
    out = [x.new_empty(x.shape) if heads else None for x, heads in zip(inputs[:3], slots, strict=True)]
    arguments, grid = _prologue_arguments(inputs, eps, slots)
    with on_device_of(inputs.q):
        prologue_forward_kernel[grid](
            **arguments,
            OUT_Q=out[0],
            OUT_K=out[1],
            OUT_V=out[2],
            PAST_OF_EACH=inputs.past_of_each,
            **overlapping(inputs.q),
        )
    return tuple(out)


def _prologue_backward(
    grads: tuple[Tensor | None, ...], inputs: PrologueInputs, eps: float, slots: _Slots
) -> tuple[Tensor | None, ...]:
    """A gradient, or None, of each of the inputs."""
    arguments, grid = _prologue_arguments(inputs, eps, slots)
    tensors = [None if heads == 0 else x for x, heads in zip(inputs[:3], slots, strict=True)]
    # Contiguous, whatever the strides of the inputs are.
    made = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*tensors, *inputs[3:5])
    ]
    dw, weight = None, inputs.q_weight
    if weight is not None:
        blocks, heads = grid[0] // sum(slots), slots[0] + slots[1]
        dw = torch.empty(grid[1] * blocks, heads, inputs.q.shape[-1], dtype=torch.float32, device=weight.device)
    for letter, grad in zip("qkv", grads, strict=True):
        grad = None if grad is None else maybe_contiguous(grad)
        arguments[f"D_OUT_{letter.upper()}"] = grad
        for axis, stride in zip("bth", (0, 0, 0) if grad is None else grad.stride(), strict=False):
            arguments[f"g{letter}_{axis}"] = stride
    names = ("DQ", "DK", "DV", "D_KEY_LOGITS", "D_VALUE_LOGITS")
    with on_device_of(inputs.q):
        prologue_backward_kernel[grid](**arguments, **dict(zip(names, made, strict=True)), DW=dw)
    # What was not touched has the gradient that came.
    made[:3] = [grad if x is None else x for x, grad in zip(made[:3], grads, strict=True)]
    d_weights: list[Tensor | None] = [None, None]
    if dw is not None:
        by_head = dw.sum(0, dtype=torch.float64).split(slots[:2])
        weights: tuple[Any, Any] = inputs.q_weight, inputs.k_weight
        d_weights = [
            (x if w.numel() == x.numel() else x.sum(0)).reshape(w.shape).to(w.dtype)
            for x, w in zip(by_head, weights, strict=True)
        ]
    return *made, None, None, *d_weights, None, None, None, None, None


def _slots(inputs: PrologueInputs) -> _Slots:
    turned = inputs.q_weight is not None or inputs.cos is not None
    heads, kv_heads = inputs.q.shape[2], inputs.k.shape[2]
    return (
        heads if turned else 0,
        kv_heads if turned or inputs.key_logits is not None else 0,
        kv_heads if inputs.value_logits is not None else 0,
    )


def _prologue_arguments(inputs: PrologueInputs, eps: float, slots: _Slots) -> tuple[dict[str, Any], tuple[int, int]]:
    """What both launches take, and their grid."""
    batch, tokens, _, head_dim = inputs.q.shape
    q, k, v = maybe_contiguous(inputs.q), maybe_contiguous(inputs.k), maybe_contiguous(inputs.v)
    key_logits, value_logits, key_past, value_past = [None if x is None else maybe_contiguous(x) for x in inputs[3:7]]
    cos, sin = inputs.cos, inputs.sin
    if cos is not None and sin is not None and (cos.stride(-1) != 1 or cos.stride() != sin.stride()):
        cos, sin = cos.contiguous(), sin.contiguous()
    half = (head_dim if cos is None else cos.shape[-1]) // 2
    rest = head_dim - 2 * half
    block_half, block_rest = next_power_of_2(half), next_power_of_2(max(1, rest))
    block_t = max(1, _PROLOGUE_TILE // next_power_of_2(2 * block_half + (block_rest if rest else 0)))
    starts = None if inputs.starts is None else inputs.starts.view(torch.uint8)
    shared = inputs.q_weight is None or inputs.q_weight.numel() == head_dim
    q_b, q_t, q_h, _ = q.stride()
    k_b, k_t, k_h, _ = k.stride()
    v_b, v_t, v_h, _ = v.stride()
    kl_b, kl_t, _ = _strides(key_logits)
    vl_b, vl_t, _ = _strides(value_logits)
    (kp_b, kp_s, kp_h), (vp_b, vp_s, vp_h) = _strides_of_past(key_past), _strides_of_past(value_past)
    c_b, c_t, _ = _strides(cos)
    arguments = dict(
        Q=q, q_b=q_b, q_t=q_t, q_h=q_h,
        K=k, k_b=k_b, k_t=k_t, k_h=k_h,
        V=v, v_b=v_b, v_t=v_t, v_h=v_h,
        KEY_LOGITS=key_logits, kl_b=kl_b, kl_t=kl_t,
        VALUE_LOGITS=value_logits, vl_b=vl_b, vl_t=vl_t,
        KEY_PAST=key_past, kp_b=kp_b, kp_s=kp_s, kp_h=kp_h,
        VALUE_PAST=value_past, vp_b=vp_b, vp_s=vp_s, vp_h=vp_h, PAST_SLOT=inputs.past_slot,
        STARTS=starts, s_b=0 if starts is None else starts.stride(0),
        SOURCES=inputs.last_real, r_b=0 if inputs.last_real is None else inputs.last_real.stride(0),
        Q_WEIGHT=inputs.q_weight, K_WEIGHT=inputs.k_weight, w_h=0 if shared else head_dim,
        EPS=eps,
        COS=cos, SIN=sin, c_b=0 if cos is None or cos.shape[0] == 1 else c_b, c_t=c_t,
        T=tokens,
        NQ=slots[0],
        NK=slots[1],
        NV=slots[2],
        HALF=half,
        REST=rest,
        BLOCK_HALF=block_half,
        BLOCK_REST=block_rest,
        BLOCK_T=block_t,
    )  # fmt: skip
    return arguments, (cdiv(tokens, block_t) * sum(slots), batch)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of three dimensions."""
    return (0, 0, 0) if x is None else x.stride()


def _strides_of_past(x: Tensor | None) -> tuple[int, int, int]:
    """Of sequences, tokens (0 for one token) and heads."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), 0 if x.ndim == 3 else x.stride(1), x.stride(-2)
