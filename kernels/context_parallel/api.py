"""The public function of context parallelism: forgetting attention of a sequence that lies on several ranks."""

from typing import Any

from torch import Tensor

from ..backends import backend_of
from ..decay import Decay, sequence_starts, without_padding
from ..pruning.rules import Rule, check_rule
from ..validation import check_gates, check_inputs, check_options, check_packing, check_sink, real_tokens
from .group import ContextParallel


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    context: ContextParallel,
    length: int,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
) -> Tensor:
    """`forgetting_attention` of this rank's queries over the keys of all ranks, which call it together.

    A rank fetches of the keys and values of others what its queries keep, while it computes what needs none. The fewer
    keys pruning leaves, the less is moved; ``context.traffic`` has how much. Differentiable as `forgetting_attention`.

    Args:
        q: ``[B, T, H, D]`` queries of this rank's tokens, ``context.shards(length).take`` of those of all.
        k, v: ``[B, T, G, D]`` their keys and values.
        log_f: ``[B, T, Hf]`` natural log of their forget gates, float32 or float64.
        context: the ranks that share each sequence.
        length: tokens of the whole sequence.
        attention_mask: ``[B, length]``, of all tokens, the same on all ranks.
        cu_seqlens: ``[N + 1]``, of all tokens, the same on all ranks.
        scale, dropout, eps, rule, logit_bound: as for `forgetting_attention`, but for the rule ``measured``.
        sink_k, sink_v: as for `forgetting_attention`, the same on all ranks; gradients are of this rank's queries.

    Returns:
        ``[B, T, H, D]`` in the type of ``q``.

    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    check_inputs(q, k, v, log_f)
    if not isinstance(context, ContextParallel):
        raise ValueError(f"context must be a ContextParallel, got {type(context).__name__}")
    shards = context.shards(length)
    tokens = sum(stop - start for _, start, stop in shards.segments)
    if not q.shape[1] == k.shape[1] == tokens:
        raise ValueError(
            f"q, k and v must have this rank's {tokens} of {length} tokens, got {q.shape[1]} and {k.shape[1]}"
        )
    check_options(scale=scale, dropout=dropout)
    sink = check_sink(sink_k, sink_v, q, k)
    # An unknown rule is refused even where eps is None.
    check_rule(0.5 if eps is None else eps, rule)
    starts = real = None
    if cu_seqlens is not None:
        check_packing(cu_seqlens, len(q), length)
        starts = shards.take(sequence_starts(cu_seqlens.to(q.device), length))
    if attention_mask is not None:
        real = shards.take(real_tokens(attention_mask, "[B, length]", (len(q), length), q.device))
        log_f = log_f.masked_fill(~real[..., None], 0.0)
    check_gates(log_f)
    backend = backend_of(q)
    c, kv_start = shards.accumulate(log_f, starts, backend)
    decay = Decay(c, c, kv_start, shards.tables(q.device).positions)
    if real is not None:
        decay = shards.hide_padding(decay, real)
        q, k, v = without_padding(q, k, v, decay, real)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if eps is not None:
        bounds: dict[str, Any] = {"logit_bound": logit_bound, "sink": sink_k}
        decay = shards.prune(decay, q, k, eps=eps, rule=rule, scale=scale, **bounds, backend=backend)
    attended = shards.attention(q, k, v, decay, scale=scale, dropout=dropout, backend=backend)
    if sink is None:
        return attended[0]
    out, _ = backend.add_sink(*attended, q, *sink, scale)
    return out if real is None else out.masked_fill(~real[..., None, None], 0.0)
