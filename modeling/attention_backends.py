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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import maybe_autocast

from ..kernels.backends import PYTORCH, Backend
from ..kernels.decay import Decay, without_padding
from ..kernels.pruning.rounding import logit_margin
from ..kernels.pruning.rules import PruningRule, Rule, centered, prune
from ..kernels.tiles import PRUNED_KEYS
from .cache.view import CacheView
from .configuration_fox import DEFAULT_IMPLEMENTATION

if TYPE_CHECKING:
    from ..kernels.context_parallel.sequence import ShardedSequence


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
) -> tuple[Tensor, None]:
    """The best attention for the device, with pruning. Arguments as for `reference_attention_forward`."""
    config = module.config
    if view is not None:
        options = {}
        if prunes(config):
            options = {"eps": config.acp_eps, "rule": config.acp_rule, "logit_bound": _bound(module, query.dtype)}
        return _decode(query, key, value, decay, real, view, scaling, backend, **options), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k, v = without_padding(q, k, v, decay, real)
    if shards is not None:
        if prunes(config):
            decay = pruned(module, q, k, decay, scaling, backend, shards)
        return shards.attention(q, k, v, decay, scale=scaling, dropout=dropout, backend=backend), None
    # In PyTorch the search for what may be left out takes longer than leaving it out saves.
    if backend is not PYTORCH and prunes(config):
        decay = pruned(module, q, k, decay, scaling, backend)
    out, _ = backend.attention(q, k, v, decay, scale=scaling, dropout=dropout)
    return out, None


def prepare(module: Any, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, dropout: float, backend: Backend) -> None:
    """Let ``backend`` make ready for what `fox_attention_forward` will do without a cache's view.

    Args:
        module: the attention layer.
        q, k, v: ``[B, T, H or G, D]``.
        log_f: ``[B, T, Hf]`` log forget gates.
        dropout: probability of dropping an attention weight.
        backend: of these.
    """
    config, options = module.config, {}
    if prunes(config):
        options = {"eps": config.acp_eps, "rule": config.acp_rule, "center": _centers(config)}
        if PruningRule(config.acp_rule).reads_bound:
            options["logit_bound"] = lambda: _bound(module, q.dtype)
    backend.prepare(q, k, v, log_f, dropout=dropout, **options)


def prunes(config: Any) -> bool:
    """Whether the configuration lets attention leave out keys."""
    return config.acp_eps is not None and config.forget_gate != "none"


def pruned(
    module: Any,
    q: Tensor,
    k: Tensor,
    decay: Decay,
    scaling: float,
    backend: Backend,
    shards: "ShardedSequence | None" = None,
) -> Decay:
    """`prune` by the layer's configuration, which `prunes`.

    Args:
        module: the attention layer.
        q: ``[B, Tq, H, D]`` queries, as `without_padding` leaves them.
        k: ``[B, Tk, G, D]`` keys, likewise.
        decay: not of a cache.
        scaling: multiplies the logits.
        backend: whose search it is.
        shards: with context parallelism, who has which tokens.
    """
    config = module.config
    options = {"eps": config.acp_eps, "rule": config.acp_rule, "logit_bound": _bound(module, q.dtype)}
    if shards is not None:
        keys = shards.centered(k) if _centers(config) else k
        return shards.prune(decay, q, keys, scale=scaling, **options, backend=backend)
    keys = centered(k) if _centers(config) else k
    return prune(decay, q, keys, scale=scaling, **options, search=backend.search_kv_start)


def _bound(module: Any, dtype: torch.dtype) -> Tensor | None:
    return module.logit_bound(dtype) if PruningRule(module.config.acp_rule).reads_bound else None


def _centers(config: Any) -> bool:
    # Normalized keys have little in common. A bound of all logits gains nothing: the first key is far from the others.
    return config.qk_norm == "none" and not PruningRule(config.acp_rule).reads_bound


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Decay,
    real: Tensor | None,
    view: CacheView,
    scale: float,
    backend: Backend,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: Tensor | None = None,
) -> Tensor:
    q = query.transpose(1, 2)
    if view.pages is None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    if PruningRule(rule).reads_bound and logit_bound is None:
        # Of these queries and all keys so far.
        largest = view.summary.largest.index_select(-1, decay.last[-1:] // PRUNED_KEYS)
        norms = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float64).amax(1)
        norms = norms * (abs(scale) * (1.0 + logit_margin(q.shape[-1], torch.float32)))
        logit_bound = norms * largest[..., 0].repeat_interleave(q.shape[2] // largest.shape[1], dim=1)
    assert backend.decode is not None, "there is a view only where there is a decode"
    out, _ = backend.decode(
        q,
        key,
        value,
        decay,
        scale=scale,
        summary=view.summary,
        eps=eps,
        rule=rule,
        logit_bound=logit_bound,
        real=real,
        pages=view.pages,
        start=view.start,
    )
    return out


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

    Returns:
        ``[B, Tq, H, D]`` and None: the weights are never held.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if shards is not None:
        return shards.attention(q, k, v, decay, scale=scaling, dropout=dropout, backend=PYTORCH), None
    out, _ = PYTORCH.attention(q, k, v, decay, scale=scaling, dropout=dropout)
    return out, None


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
) -> tuple[Tensor, Tensor]:
    """Attention written out, as `reference_attention_forward`; returns the weights ``[B, H, Tq, Tk]`` too."""
    query, key, value = _without_padding(query, key, value, decay, real)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bias, fully_masked = _dense_bias(decay, query)
    with maybe_autocast(query.device.type, enabled=False):
        scores = (query.to(bias.dtype) * scaling) @ key.to(bias.dtype).mT + bias
        weights = nn.functional.softmax(scores, dim=-1).masked_fill(fully_masked, 0.0)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        out = (weights @ value.to(bias.dtype)).to(query.dtype)
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
) -> tuple[Tensor, None]:
    """transformers' own SDPA function with the decay as its mask. Arguments as for `reference_attention_forward`."""
    output_dtype = query.dtype
    # In float32 throughout: SDPA wants the mask in the type of the queries, and rounded to bfloat16 a decay of -5 would
    # be off by 2% in the weight.
    bias, _ = _dense_bias(decay, query)
    query, key, value = (x.to(bias.dtype) for x in _without_padding(query, key, value, decay, real))
    with maybe_autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(
            module, query, key, value, bias, dropout=dropout, scaling=scaling, is_causal=False
        )
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
