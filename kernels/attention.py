"""The public function: forgetting attention over whole sequences, on whatever device the inputs are."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .backend import HAS_TRITON
from .decay import Decay, accumulate, sequence_starts
from .pruning import Rule, check_rule, prune
from .reference import backward_pass as reference_backward
from .reference import forward_pass as reference_forward
from .reference import reference_attention

if HAS_TRITON:
    from .triton_attention import backward_pass as triton_backward
    from .triton_attention import forward_pass as triton_forward
    from .triton_attention import supports, triton_attention

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    return_first: Literal[False] = False,
) -> Tensor: ...


@overload
def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | None = None,
    return_lse: bool = False,
    return_first: bool = False,
) -> tuple[Tensor, ...]: ...


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | None = None,
    return_lse: bool = False,
    return_first: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Causal softmax attention whose logits decay by the forget gates between key and query.

    ``O_i = sum_j P_ij v_j`` with ``P = softmax_j(scale * q_i . k_j + sum_{j < l <= i} log f_l)`` over ``j <= i``
    (Forgetting Transformer, arXiv 2503.02130). The queries are the last ``Tq`` of the ``Tk`` tokens.
    Memory is linear in ``Tk``. On an NVIDIA GPU, for heads up to 256 and types up to float32, this runs on Triton
    kernels, which give the same bits each time; elsewhere in PyTorch. Differentiable once, in reverse mode, in ``q``,
    ``k``, ``v`` and ``log_f``; not inside torch.func's transforms (a model does all that with
    ``attn_implementation="eager"``).

    Args:
        q: ``[B, Tq, H, D]`` queries; float16, bfloat16, float32 or float64.
        k: ``[B, Tk, G, D]`` keys, ``Tk >= Tq``, ``H`` a multiple of ``G``; the type of ``q``.
        v: ``[B, Tk, G, D]`` values; the type of ``q``.
        log_f: ``[B, Tk, Hf]`` natural log of the forget gates, ``<= 0``; float32 or float64. ``Hf`` is ``H`` (a gate
            per query head), ``G`` (per key/value head) or 1 (shared). ``-inf``, or anything below -1e4, is a hard
            reset: nothing before that token is seen from it on. Positive or NaN gates raise on a CPU; on other devices
            the check would wait for the device, and the result is undefined.
        scale: multiplies the logits; ``1 / sqrt(D)`` by default.
        attention_mask: ``[B, Tk]``, nonzero for real tokens and zero for padding, which may stand anywhere. A padding
            token is not attended to, does not decay anything, and its own output is zero; it may hold NaN.
        cu_seqlens: ``[N + 1]`` int32 or int64 offsets of the sequences packed in a batch of one,
            ``0 = o_0 <= ... <= o_N = Tk``. No sequence sees or decays another.
        dropout: probability of dropping an attention weight, in ``[0, 1)``.
        eps: Adaptive Computation Pruning: leave out keys of which it is proven that no row loses more than this of its
            attention weight in total, in ``(0, 1)``; ``exp(-10)`` in its paper. None leaves out nothing.
        rule: how that is proven, ``"tight"`` or ``"paper"``: see `foxlm.kernels.pruning`.
        logit_bound: ``U`` of the rule ``paper``, a bound of ``|scale * q . k|``, a number or ``[H]``; found by default.
        return_lse: also return the log-sum-exp of each row's logits.
        return_first: also return the first key that each query keeps.

    Returns:
        ``[B, Tq, H, D]`` in the type of ``q``; with ``return_lse`` then ``[B, H, Tq]``, float32 (float64 for float64);
        with ``return_first`` then ``[B, H, Tq]`` int64, greater than a query's own index if it sees nothing.

    Raises:
        ValueError: a shape, type or value is not as above; the message names the argument.

    Example:
        >>> q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
        >>> log_f = torch.nn.functional.logsigmoid(torch.randn(1, 8, 2))
        >>> forgetting_attention(q, k, v, log_f).shape
        torch.Size([1, 8, 2, 16])
    """
    check_inputs(q, k, v, log_f)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    if eps is not None:
        check_rule(eps, rule)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    starts = real = None
    if cu_seqlens is not None:
        starts = _packed_starts(cu_seqlens, log_f)
    if attention_mask is not None:
        real = _real_tokens(attention_mask, log_f)
        log_f = log_f.masked_fill(~real[..., None], 0.0)
    decay = _last_queries(q.shape[1], log_f, starts)
    if real is not None:
        decay = hide_padding(decay, real)
        q, k, v = without_padding(q, k, v, decay)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if eps is not None:
        decay = prune(decay, q, k, eps=eps, rule=rule, scale=scale, logit_bound=logit_bound)
    out, lse = best_attention(q)(q, k, v, decay, scale=scale, dropout=dropout)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_first:
        first = decay.first
        results.append(first.repeat_interleave(q.shape[2] // first.shape[1], dim=1))
    return tuple(results) if len(results) > 1 else out


def best_attention(q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The fastest function over a `Decay` for queries of this device, type and head size."""
    return triton_attention if HAS_TRITON and supports(q) else reference_attention


class Passes(NamedTuple):
    """Attention over a `Decay` as two functions, for who takes care of gradients: see `reference`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


REFERENCE = Passes(reference_forward, reference_backward)


def best_passes(q: Tensor) -> Passes:
    """As `best_attention`."""
    return Passes(triton_forward, triton_backward) if HAS_TRITON and supports(q) else REFERENCE


def _last_queries(queries: int, log_f: Tensor, starts: Tensor | None) -> Decay:
    """The decay of the last ``queries`` tokens over all tokens."""
    keys = log_f.shape[1]
    c, first = accumulate(log_f, starts=starts)
    last = torch.arange(keys - queries, keys, device=log_f.device)
    return Decay(c[..., keys - queries :], c, first[..., keys - queries :], last)


def _packed_starts(cu_seqlens: Tensor, log_f: Tensor) -> Tensor:
    batch, keys, _ = log_f.shape
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences in a batch of one, got a batch of {batch}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, keys)
    return sequence_starts(cu_seqlens.to(log_f.device), keys)


def _real_tokens(attention_mask: Tensor, log_f: Tensor) -> Tensor:
    if attention_mask.shape != log_f.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape [B, Tk] = {list(log_f.shape[:2])}, got {list(attention_mask.shape)}"
        )
    return as_bool_mask(attention_mask, log_f.device)


def as_bool_mask(attention_mask: Tensor, device: torch.device) -> Tensor:
    """True where ``attention_mask`` is nonzero; a `ValueError` for an additive mask, which would mean the opposite.

    The values are read on a CPU only: elsewhere that would wait for the device.
    """
    readable = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if attention_mask.is_floating_point() and readable and (attention_mask < 0).any():
        raise ValueError("attention_mask must be nonzero for real tokens and zero for padding, got an additive mask")
    return attention_mask.to(device=device, dtype=torch.bool)


def hide_padding(decay: Decay, real: Tensor) -> Decay:
    """Hide padding from every query, and everything from the queries that are padding.

    Args:
        decay: of ``Tq`` queries over ``Tk`` keys.
        real: ``[B, Tk]`` bool, False for padding.
    """
    paged = decay.cached is not None and decay.cached.pages is not None
    key = decay.key if paged else decay.key.masked_fill(~real[:, None, :], float("inf"))
    if decay.shards is None:
        real_query = real.index_select(1, decay.last)
        # Left padding is beyond the first visible key: kernels do not even visit it.
        first = torch.maximum(decay.first, (~real).int().cumprod(1).sum(1)[:, None, None])
    else:
        # The keys are those of the same tokens; what is padding further left, other ranks know.
        real_query, first = real, decay.first
    first = torch.where(real_query[:, None, :], first, decay.last + 1)
    return decay._replace(key=key, first=first, real=real)


def without_padding(q: Tensor, k: Tensor, v: Tensor, decay: Decay) -> tuple[Tensor, Tensor, Tensor]:
    """Zero what stands in padding, if there is any: a weight of zero times a NaN is a NaN."""
    if decay.real is None:
        return q, k, v
    sees_nothing = (decay.first > decay.last).all(1)[..., None, None]
    hidden = ~decay.real[..., None, None]
    return q.masked_fill(sees_nothing, 0.0), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> None:
    """Raise a `ValueError` unless the tensors are as `forgetting_attention` takes them; the message names which."""
    for name, x in (("q", q), ("k", k), ("v", v), ("log_f", log_f)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, T, heads, D], got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
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
    if log_f.device.type == "cpu" and not torch.compiler.is_compiling() and not (log_f <= 0.0).all():
        raise ValueError(
            "log_f must be <= 0 and not NaN: it is the log of a gate in [0, 1], as logsigmoid gives it; "
            f"got a largest value of {log_f.max().item()}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, length: int) -> None:
    """Raise a `ValueError` about argument ``name`` unless it holds offsets that rise from 0 to ``length``.

    The values are read on a CPU only: elsewhere that would wait for the device.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(
            f"{name} must be int32 or int64 of shape [N + 1] with N >= 1, "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
            raise ValueError(f"{name} must rise from 0 to the number of tokens, {length}, got {offsets}")
