"""The public function: forgetting attention over whole sequences, on the device of the inputs."""

import math
import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .backends import backend_of
from .decay import Decay, accumulate, hide_padding, sequence_starts, without_padding
from .pruning.prune import prune
from .pruning.rules import Rule, check_rule
from .validation import check_gates, check_inputs, check_options, check_packing, check_sink, real_tokens


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
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    return_lse: Literal[False] = False,
    return_kv_start: Literal[False] = False,
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
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    return_lse: bool = False,
    return_kv_start: bool = False,
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
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    return_lse: bool = False,
    return_kv_start: bool = False,
    return_first: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Causal softmax attention whose logits decay by the forget gates between key and query.

    ``O_i = sum_j P_ij v_j`` with ``P = softmax_j(scale * q_i . k_j + sum_{j < l <= i} log f_l)`` over ``j <= i``
    (Forgetting Transformer, arXiv 2503.02130). The queries are the last ``Tq`` of the ``Tk`` tokens.
    Memory is linear in ``Tk``. On an NVIDIA GPU, for head dimensions up to 256 and float16, bfloat16 or float32, this
    runs on Triton kernels, which are bitwise deterministic; elsewhere in PyTorch. Differentiable once, in reverse mode,
    in ``q``, ``k``, ``v`` and ``log_f``. Forward mode, second derivatives and torch.func's transforms raise
    `NotImplementedError` (a model has all of them with ``attn_implementation="eager"``).

    Args:
        q: ``[B, Tq, H, D]`` queries; float16, bfloat16, float32 or float64.
        k: ``[B, Tk, G, D]`` keys, ``Tk >= Tq``, ``H`` a multiple of ``G``; the type of ``q``.
        v: ``[B, Tk, G, D]`` values; the type of ``q``.
        log_f: ``[B, Tk, Hf]`` natural log of the forget gates, ``<= 0``; float32 or float64. ``Hf`` is ``H`` (a gate
            per query head), ``G`` (per key/value head) or 1 (shared). ``-inf``, or anything below -1e4, is a hard
            reset: nothing before that token is seen from it on. Positive or NaN gates raise on a CPU; on other devices
            the check would synchronise, and the result is undefined.
        scale: multiplies the logits; ``1 / sqrt(D)`` by default.
        attention_mask: ``[B, Tk]``, nonzero for real tokens and zero for padding, which may stand anywhere. A padding
            token is not attended to, does not decay anything, and its own output is zero; ``q``, ``k``, ``v`` and
            ``log_f`` may hold NaN there, and get gradients of zero.
        cu_seqlens: ``[N + 1]`` int32 or int64 offsets of the sequences packed in a batch of one,
            ``0 = o_0 <= ... <= o_N = Tk``. No sequence sees or decays another.
        dropout: probability of dropping an attention weight, in ``[0, 1)``.
        eps: Adaptive Computation Pruning: leave out keys of which it is proven that no row loses more than this of its
            attention weight in total, in ``(0, 1)``; ``exp(-10)`` in its paper. None leaves out nothing.
        rule: how that is proven, ``"tight"``, ``"paper"`` or ``"measured"``: see `foxlm.kernels.pruning.rules`.
        logit_bound: ``U`` of the rule ``paper``, a bound of ``|scale * q . k|``, a number, ``[H]`` or ``[B, H]``,
            finite and at least 0; computed from q and k by default. If it is too small by ``x``, rows may lose up to
            ``exp(2 x) eps``. Values on a GPU are not checked: where they are negative, NaN or infinite, nothing is
            pruned.
        sink_k, sink_v: ``[G, D]`` each, in the type of ``q``: key and value of an attention sink, which every query
            sees beside its keys and no gate decays: one more term of the softmax, with the logit
            ``scale * q . sink_k``. ``dropout`` does not drop it. Give both or neither.
        return_lse: also return the log-sum-exp of each row's logits, that of the sink included.
        return_kv_start: also return the first key that each query keeps.
        return_first: the older name of ``return_kv_start``.

    Returns:
        ``[B, Tq, H, D]`` in the type of ``q``; with ``return_lse`` then ``[B, H, Tq]``, float32 (float64 for float64);
        with ``return_kv_start`` then ``[B, H, Tq]`` int64, greater than a query's own index in a fully masked row.

    Raises:
        ValueError: a shape, type or value is not as above; the message names the argument.

    Example:
        >>> q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
        >>> log_f = torch.nn.functional.logsigmoid(torch.randn(1, 8, 2))
        >>> forgetting_attention(q, k, v, log_f).shape
        torch.Size([1, 8, 2, 16])
    """
    if return_first:
        # A traced graph cannot warn.
        if not torch.compiler.is_compiling():
            warnings.warn("return_first is now called return_kv_start", FutureWarning, stacklevel=2)
        return_kv_start = True
    check_inputs(q, k, v, log_f)
    check_options(scale=scale, dropout=dropout)
    sink = check_sink(sink_k, sink_v, q, k)
    # An unknown rule is refused even where eps is None.
    check_rule(0.5 if eps is None else eps, rule)
    if cu_seqlens is not None:
        check_packing(cu_seqlens, len(q), k.shape[1])
    real = None
    if attention_mask is not None:
        real = real_tokens(attention_mask, "[B, Tk]", (len(q), k.shape[1]), log_f.device)
        log_f = log_f.masked_fill(~real[..., None], 0.0)
    check_gates(log_f)
    backend = backend_of(q)
    options: dict[str, Any] = {"eps": eps, "rule": rule, "logit_bound": logit_bound}
    backend.prepare(q, k, v, log_f, dropout=dropout, has_sink=sink is not None, **options)
    starts = None if cu_seqlens is None else sequence_starts(cu_seqlens.to(log_f.device), k.shape[1])
    queries, keys = q.shape[1], k.shape[1]
    c, kv_start = accumulate(log_f, starts=starts, sum_gates=backend.sum_gates)
    last = torch.arange(keys - queries, keys, device=log_f.device)
    decay = Decay(c[..., keys - queries :], c, kv_start[..., keys - queries :], last)
    if real is not None:
        decay = hide_padding(decay, real)
        q, k, v = without_padding(q, k, v, decay, real)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if eps is not None:
        search = backend.search_kv_start
        decay = prune(decay, q, k, scale=scale, sink=sink_k, search=search, **options)
    out, lse = backend.attention(q, k, v, decay, scale=scale, dropout=dropout)
    if sink is not None:
        out, lse = backend.add_sink(out, lse, q, *sink, scale)
        if real is not None:
            padding = ~real[:, keys - queries :]
            out, lse = out.masked_fill(padding[..., None, None], 0.0), lse.masked_fill(padding[:, None], -math.inf)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_kv_start:
        results.append(decay.kv_start.repeat_interleave(q.shape[2] // decay.kv_start.shape[1], dim=1))
    return tuple(results) if len(results) > 1 else out
