"""The attention implementations a FoX layer can be told to use (`attn_implementation`).

================  =========================================================================================
``fox``           the default: GPU kernels where they run, which leave out what ``acp_eps`` allows, else PyTorch
``fox_reference`` chunked PyTorch, memory linear in the sequence length; leaves out nothing
``sdpa``          torch's scaled_dot_product_attention with the decay as a dense bias: memory quadratic
``eager``         the same written out; returns attention weights (``output_attentions=True``)
================  =========================================================================================

In the first two, decay is exact at any length. All are called as transformers calls any attention function, with a
`Decay` beside the usual arguments.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import maybe_autocast

from ..kernels.backends import PYTORCH, Backend
from ..kernels.decay import Decay, without_padding
from ..kernels.pruning.prune import prune
from ..kernels.pruning.rounding import logit_margin
from ..kernels.pruning.rules import PruningRule, Rule, key_center
from .attention_settings import AttentionSettings, attention_settings
from .cache.view import CacheView
from .configuration_fox import DEFAULT_IMPLEMENTATION

if TYPE_CHECKING:
    from ..kernels.context_parallel.sequence import ShardedSequence

Sink = tuple[Tensor, Tensor]


def fox_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    decay: Decay,
    scaling: float,
    dropout: float = 0.0,
    real: Tensor | None = None,
    view: CacheView | None = None,
    shards: "ShardedSequence | None" = None,
    backend: Backend = PYTORCH,
    settings: AttentionSettings | None = None,
    sink: Sink | None = None,
) -> tuple[Tensor, None]:
    """The best attention for the device, with pruning. Arguments as for `reference_attention_forward`."""
    if settings is None:
        settings = attention_settings(module.config, module.training or torch.is_grad_enabled())
    if view is not None:
        options: dict[str, Any] = {}
        if settings.eps is not None:
            bound = _bound(module, settings, query.dtype)
            options = {"eps": settings.eps, "rule": settings.rule, "logit_bound": bound}
        return _decode(query, key, value, decay, real, view, scaling, backend, sink, **options), None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    q, k, v = without_padding(q, k, v, decay, real)
    if shards is not None:
        if settings.eps is not None:
            decay = pruned(module, settings, q, k, decay, scaling, backend, shards, sink)
        attended = shards.attention(q, k, v, decay, scale=scaling, dropout=dropout, backend=backend)
        return _with_sink(attended, q, sink, scaling, backend), None
    # In PyTorch the search for what may be left out takes longer than leaving it out saves.
    if backend is not PYTORCH and settings.prunes(q.shape[0] * q.shape[2], q.shape[1], k.shape[1]):
        decay = pruned(module, settings, q, k, decay, scaling, backend, sink=sink)
    attended = backend.attention(q, k, v, decay, scale=scaling, dropout=dropout)
    return _with_sink(attended, q, sink, scaling, backend), None


def _with_sink(attended: Sink, q: Tensor, sink: Sink | None, scale: float, backend: Backend) -> Tensor:
    """The output of attention, given with its log-sum-exp, beside a sink, if there is one."""
    return attended[0] if sink is None else backend.add_sink(*attended, q, *sink, scale)[0]


def prepare(
    module: Any,
    settings: AttentionSettings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    dropout: float,
    backend: Backend,
) -> None:
    """Let ``backend`` make ready for what `fox_attention_forward` will do without a cache's view.

    Args:
        module: the attention layer.
        settings: of this call.
        q, k, v: ``[B, T, H or G, D]``.
        log_f: ``[B, T, Hf]`` log forget gates.
        dropout: probability of dropping an attention weight.
        backend: of these.
    """
    options: dict[str, Any] = {"has_sink": module.has_sink}
    if settings.prunes(q.shape[0] * q.shape[2], q.shape[1], k.shape[1]):
        options |= {"eps": settings.eps, "rule": settings.rule, "center": settings.centers}
        if settings.reads_bound:
            options["logit_bound"] = lambda: _bound(module, settings, q.dtype)
    backend.prepare(q, k, v, log_f, dropout=dropout, **options)


def pruned(
    module: Any,
    settings: AttentionSettings,
    q: Tensor,
    k: Tensor,
    decay: Decay,
    scaling: float,
    backend: Backend,
    shards: "ShardedSequence | None" = None,
    sink: Sink | None = None,
) -> Decay:
    """`prune` by the settings of a call, whose ``eps`` is not None.

    Args:
        module: the attention layer.
        settings: of this call.
        q: ``[B, Tq, H, D]`` queries, as `without_padding` leaves them.
        k: ``[B, Tk, G, D]`` keys, likewise.
        decay: not of a cache.
        scaling: multiplies the logits.
        backend: whose search it is.
        shards: with context parallelism, who has which tokens.
        sink: key and value of the attention sink.
    """
    options: dict[str, Any] = {"eps": settings.eps, "rule": settings.rule}
    options["logit_bound"] = _bound(module, settings, q.dtype)
    sink_k = None if sink is None else sink[0].detach()
    if settings.centers:
        center = (key_center if shards is None else shards.key_center)(k.detach())
        k, sink_k = k.detach() - center, None if sink_k is None else sink_k - center[:, 0]
    options["sink"] = sink_k
    if shards is not None:
        return shards.prune(decay, q, k, scale=scaling, **options, backend=backend)
    return prune(decay, q, k, scale=scaling, **options, search=backend.search_kv_start)


def _bound(module: Any, settings: AttentionSettings, dtype: torch.dtype) -> Tensor | None:
    return module.logit_bound(dtype) if settings.reads_bound else None


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Decay,
    real: Tensor | None,
    view: CacheView,
    scale: float,
    backend: Backend,
    sink: Sink | None,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: Tensor | None = None,
) -> Tensor:
    q = query.transpose(1, 2)
    if view.pages is None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    if PruningRule(rule).reads_bound and logit_bound is None:
        # Of these queries and all keys so far.
        largest = view.largest(decay.last)
        norms = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float64).amax(1)
        norms = norms * (abs(scale) * (1.0 + logit_margin(q.shape[-1], torch.float32)))
        logit_bound = norms * largest.repeat_interleave(q.shape[2] // largest.shape[1], dim=1)
    assert backend.decode is not None, "there is a view only where there is a decode"
    attended = backend.decode(
        q,
        key,
        value,
        decay,
        scale=scale,
        summary=view.summary,
        eps=eps,
        rule=rule,
        logit_bound=logit_bound,
        sink=None if sink is None else sink[0],
        real=real,
        pages=view.pages,
        start=view.start,
        counts=view.counts,
    )
    return _with_sink(attended, q, sink, scale, backend)


def reference_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    decay: Decay,
    scaling: float,
    dropout: float = 0.0,
    real: Tensor | None = None,
    view: CacheView | None = None,
    shards: "ShardedSequence | None" = None,
    backend: Backend = PYTORCH,
    settings: AttentionSettings | None = None,
    sink: Sink | None = None,
) -> tuple[Tensor, None]:
    """`reference_attention` behind transformers' signature.

    Args:
        module: the attention layer.
        query: ``[B, H, Tq, D]``.
        key, value: ``[B, G, Tk, D]``.
        attention_mask: unused; `decay` says which keys a query may see.
        decay: running sums and visible range of each query.
        scaling: multiplies the logits.
        dropout: probability of dropping an attention weight.
        real: ``[B, Tk]`` bool, False for padding, whose keys are hidden and whose rows are fully masked in ``decay``;
            None without padding.
        view: the cache, for few queries: ``key`` and ``value`` are then as it holds them. Only ``fox`` reads it.
        shards: with context parallelism, who has which tokens: all of the above is then of this rank's.
        backend: where ``fox`` runs; the others run in PyTorch.
        settings: of this call, by default as the layer's configuration is now. Only ``fox`` reads them.
        sink: key and value of the attention sink, ``[G, D]`` each; None without one.

    Returns:
        ``[B, Tq, H, D]`` and None: the weights are never held.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attention = PYTORCH.attention if shards is None else partial(shards.attention, backend=PYTORCH)
    attended = attention(q, k, v, decay, scale=scaling, dropout=dropout)
    return _with_sink(attended, q, sink, scaling, PYTORCH), None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    decay: Decay,
    scaling: float,
    dropout: float = 0.0,
    real: Tensor | None = None,
    view: CacheView | None = None,
    shards: "ShardedSequence | None" = None,
    backend: Backend = PYTORCH,
    settings: AttentionSettings | None = None,
    sink: Sink | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention written out, as `reference_attention_forward`; returns the weights ``[B, H, Tq, Tk]`` too.

    With a sink they add up to less than 1: its own are left out.
    """
    query, key, value = _without_padding(query, key, value, decay, real)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bias, fully_masked = _dense_bias(decay, query)
    with maybe_autocast(query.device.type, enabled=False):
        scaled = query.to(bias.dtype) * scaling
        scores = scaled @ key.to(bias.dtype).mT + bias
        if sink is None:
            weights = nn.functional.softmax(scores, dim=-1).masked_fill(fully_masked, 0.0)
        else:
            sink_k, sink_v = (x.to(bias.dtype).repeat_interleave(groups, dim=0)[:, None] for x in sink)
            scores = torch.cat([scaled @ sink_k.mT, scores.masked_fill(fully_masked, -math.inf)], dim=-1)
            share, weights = nn.functional.softmax(scores, dim=-1).tensor_split([1], dim=-1)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        out = weights @ value.to(bias.dtype)
        out = (out if sink is None else out + share * sink_v).to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights.to(query.dtype)


def sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    decay: Decay,
    scaling: float,
    dropout: float = 0.0,
    real: Tensor | None = None,
    view: CacheView | None = None,
    shards: "ShardedSequence | None" = None,
    backend: Backend = PYTORCH,
    settings: AttentionSettings | None = None,
    sink: Sink | None = None,
) -> tuple[Tensor, None]:
    """transformers' own SDPA function with the decay as its mask. Arguments as for `reference_attention_forward`."""
    output_dtype = query.dtype
    # In float32 throughout: SDPA wants the mask in the type of the queries, and rounded to bfloat16 a decay of -5 would
    # be off by 2% in the weight.
    bias, fully_masked = _dense_bias(decay, query)
    # First: `real` has no place for the sink.
    query, key, value = _without_padding(query, key, value, decay, real)
    if sink is not None:
        if dropout > 0.0:
            raise ValueError("attention_dropout must be 0 with an attention_sink and attn_implementation 'sdpa'")
        sink_k, sink_v = (x[:, None].expand(len(key), -1, -1, -1) for x in sink)
        key, value = torch.cat([sink_k, key], dim=2), torch.cat([sink_v, value], dim=2)
        bias = nn.functional.pad(bias.masked_fill(fully_masked, -math.inf), (1, 0))
    query, key, value = (x.to(bias.dtype) for x in (query, key, value))
    with maybe_autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(
            module, query, key, value, bias, dropout=dropout, scaling=scaling, is_causal=False
        )
    if sink is None and real is not None:
        # Their weights are those of a mean over all keys, later ones too.
        out = out.masked_fill(fully_masked.transpose(1, 2), 0.0)
    return out.to(output_dtype), None


def _without_padding(
    query: Tensor, key: Tensor, value: Tensor, decay: Decay, real: Tensor | None
) -> tuple[Tensor, ...]:
    """`without_padding` of heads before tokens, as these functions have them."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return tuple(x.transpose(1, 2) for x in without_padding(q, k, v, decay, real))


def _dense_bias(decay: Decay, query: Tensor) -> tuple[Tensor, Tensor]:
    """``D`` as ``[B, H or 1, Tq, Tk]``, float32 or wider, finite for a key of every row; and the fully masked rows."""
    bias = decay.bias()
    heads = query.shape[1]
    if bias.shape[1] not in (1, heads):
        bias = bias.repeat_interleave(heads // bias.shape[1], dim=1)
    # softmax of a row of -inf is NaN. Such rows belong to padding, whose output is not read.
    fully_masked = torch.isneginf(bias.amax(-1, keepdim=True))
    return bias.masked_fill(fully_masked, 0.0).to(torch.promote_types(query.dtype, torch.float32)), fully_masked


# An instance of our own: these functions need a `Decay`, which other models do not pass.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS[DEFAULT_IMPLEMENTATION] = fox_attention_forward
ALL_ATTENTION_FUNCTIONS["fox_reference"] = reference_attention_forward
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_forward


def runs_own_attention(implementation: str) -> bool:
    """Whether layers with this ``attn_implementation`` call `fox_attention_forward`, and no function in its place."""
    found = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return found is fox_attention_forward
