"""What attention refuses of its arguments: each a `ValueError` that begins with the argument's name.

Values are read on a CPU only: elsewhere that would synchronise with the device.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

ONLY_REVERSE_MODE = (
    "forgetting attention is differentiable once, in reverse mode by torch.autograd, and takes no part in torch.func's "
    "transforms (fold what vmap would map over into the batch); "
    "a model has all of them with attn_implementation='eager'"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, wide_keys: bool = False) -> None:
    """Raise a `ValueError` unless the tensors have shapes, dtypes and devices as `forgetting_attention` takes them.

    Args:
        q, k, v, log_f: its arguments.
        wide_keys: whether ``k`` and ``v`` may have a wider dtype than ``q``, as centered keys have.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("log_f", log_f)):
        check_tensor(name, x)
    refuse_transforms(q, k, v, log_f)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, T, heads, D], got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        wider = wide_keys and torch.promote_types(x.dtype, q.dtype) == x.dtype
        if not (x.dtype == q.dtype or wider) or x.device != q.device:
            raise ValueError(
                f"{name} must have the type and device of q, {q.dtype} on {q.device}, got {x.dtype} on {x.device}"
            )
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if k.shape != (batch, keys, kv_heads, head_dim):
        raise ValueError(
            f"k must have the batch size and head size of q, [{batch}, Tk, G, {head_dim}], got {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    if queries > keys:
        raise ValueError(f"q must not have more tokens than k: got {queries} queries for {keys} keys")
    if kv_heads == 0 or heads == 0 or heads % kv_heads or head_dim == 0:
        raise ValueError(
            f"q must have a positive multiple of the heads of k and a positive head size, "
            f"got {heads} query heads, {kv_heads} key/value heads, head size {head_dim}"
        )
    accepted = sorted({1, kv_heads, heads})
    if log_f.ndim != 3 or log_f.shape[:2] != (batch, keys) or log_f.shape[2] not in accepted:
        raise ValueError(
            f"log_f must have shape [B, Tk, Hf] = [{batch}, {keys}, one of {accepted}], got {list(log_f.shape)}"
        )
    if log_f.dtype not in (torch.float32, torch.float64) or log_f.device != q.device:
        raise ValueError(
            f"log_f must be float32 or float64 on {q.device}, got {log_f.dtype} on {log_f.device}: "
            "gates in half precision lose the long decays (convert the gate's logits before logsigmoid)"
        )


def is_transformed(*inputs: Tensor) -> bool:
    """Whether one of them carries a tangent of forward mode, which operators without a rule drop without a word, or is
    what a transform of torch.func makes of a tensor."""
    return not torch.compiler.is_compiling() and is_transformed_in_eager(inputs)


def is_transformed_in_eager(inputs: tuple[Tensor, ...]) -> bool:
    """`is_transformed` where nothing is compiled."""
    # All layers ask, hundreds of times a pass: so by torch.func's own check, and of tangents where there can be any.
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, inputs)):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def refuse_transforms(*inputs: Tensor | None) -> None:
    """Raise `NotImplementedError` if an input `is_transformed`."""
    if is_transformed(*(x for x in inputs if x is not None)):
        raise NotImplementedError(ONLY_REVERSE_MODE)


def check_sink(sink_k: Tensor | None, sink_v: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as a pair, or None; raises a `ValueError` unless they are as `forgetting_attention` takes them."""
    if sink_k is None and sink_v is None:
        return None
    if sink_k is None or sink_v is None:
        given, missing = ("sink_v", "sink_k") if sink_k is None else ("sink_k", "sink_v")
        raise ValueError(f"{missing} must be given with {given}, got None")
    for name, x in (("sink_k", sink_k), ("sink_v", sink_v)):
        check_tensor(name, x)
        if x.shape != k.shape[2:] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be [G, D] = {list(k.shape[2:])} in the type and on the device of q, {q.dtype} on "
                f"{q.device}, got {x.dtype} of shape {list(x.shape)} on {x.device}"
            )
    refuse_transforms(sink_k, sink_v)
    return sink_k, sink_v


def check_gates(log_f: Tensor) -> None:
    """Raise a `ValueError` if a log gate, those of padding already zero, is positive or NaN."""
    if is_readable(log_f) and not (log_f <= 0.0).all():
        raise ValueError(
            "log_f must be <= 0 and not NaN: it is the log of a gate in [0, 1], as logsigmoid gives it; "
            f"got a largest value of {log_f.max().item()}"
        )


def check_options(*, scale: float | None, dropout: float) -> None:
    """Raise a `ValueError` unless the options are as `forgetting_attention` takes them."""
    check_scale(scale)
    if not (is_number(dropout) and 0.0 <= dropout < 1.0):
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise a `ValueError` about argument ``name`` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_scale(scale: float | None) -> None:
    """Raise a `ValueError` unless ``scale`` is a finite number or None."""
    if scale is not None and not (is_number(scale) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")


def real_tokens(attention_mask: Tensor, axes: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    """``attention_mask`` as `bool_mask` gives it, if it has ``shape``; ``axes`` is what the message calls them."""
    check_tensor("attention_mask", attention_mask)
    refuse_transforms(attention_mask)
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask must have shape {axes} = {list(shape)}, got {list(attention_mask.shape)}")
    return bool_mask(attention_mask, device)


def bool_mask(attention_mask: Tensor, device: torch.device) -> Tensor:
    """True where ``attention_mask`` is nonzero, on ``device``.

    Raises:
        ValueError: it is complex, on the meta device alone, holds NaN, or is an additive mask, which would mean the
            opposite.
    """
    if attention_mask.is_complex() or (attention_mask.is_meta and device.type != "meta"):
        raise ValueError(
            f"attention_mask must be bool, integer or floating point, on {device} or on the CPU, "
            f"got {attention_mask.dtype} on {attention_mask.device}"
        )
    if attention_mask.is_floating_point() and is_readable(attention_mask) and not (attention_mask >= 0).all():
        raise ValueError(
            "attention_mask must be nonzero for real tokens and zero for padding, got an additive mask "
            f"(a least value of {attention_mask.min().item()})"
        )
    return attention_mask.to(device=device, dtype=torch.bool)


def check_packing(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise a `ValueError` unless ``cu_seqlens`` packs sequences of ``length`` tokens in a batch of one."""
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences in a batch of one, got a batch of {batch}")
    check_tensor("cu_seqlens", cu_seqlens)
    refuse_transforms(cu_seqlens)
    check_cu_seqlens("cu_seqlens", cu_seqlens, length)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, length: int) -> None:
    """Raise a `ValueError` about argument ``name`` unless it holds offsets that rise from 0 to ``length``."""
    check_tensor(name, cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(
            f"{name} must be int32 or int64 of shape [N + 1] with N >= 1, "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if is_readable(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
            raise ValueError(f"{name} must rise from 0 to the number of tokens, {length}, got {offsets}")


def check_tensor(name: str, x: object) -> None:
    """Raise a `ValueError` about argument ``name`` unless it is a dense tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {x.layout} (nested: {x.is_nested})")


def is_number(x: object) -> bool:
    """Whether ``x`` is a real number of Python or numpy; a tensor is none: its gradient would be lost."""
    return type(x) is float or (isinstance(x, Real) and not isinstance(x, bool))


def is_readable(x: Tensor) -> bool:
    """Whether its values can be read without waiting for another device or breaking a traced graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
