"""The attention implementations a FoX layer can be told to use (`attn_implementation`).

================  =========================================================================================
``fox_reference`` the default: chunked PyTorch, memory linear in the sequence length, decay exact at any length
``sdpa``          torch's scaled_dot_product_attention with the decay as a dense bias: memory quadratic
``eager``         the same written out; returns attention weights (``output_attentions=True``)
================  =========================================================================================

All three are called as transformers calls any attention function, with a `Decay` beside the usual arguments.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from ..kernels.decay import Decay
from ..kernels.reference import reference_attention

logger = logging.get_logger(__name__)

DEFAULT_IMPLEMENTATION = "fox_reference"
IMPLEMENTATIONS = (DEFAULT_IMPLEMENTATION, "sdpa", "eager")


def reference_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    decay: Decay,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
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

    Returns:
        ``[B, Tq, H, D]`` and None: the weights are never held.
    """
    _warn_of_attentions(kwargs)
    out, _ = reference_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        decay,
        scale=scaling,
        dropout=dropout,
    )
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
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out, as `reference_attention_forward`; returns the weights ``[B, H, Tq, Tk]`` too."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(dtype) * scaling + _dense_bias(decay, query).to(dtype)
    weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    decay: Decay,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' own SDPA function with the decay as its mask. Arguments as for `reference_attention_forward`."""
    _warn_of_attentions(kwargs)
    output_dtype = query.dtype
    # In float32 throughout: SDPA wants the mask in the type of the queries, and rounded to bfloat16 a decay of -5 would
    # be off by 2% in the weight.
    dtype = torch.promote_types(query.dtype, torch.float32)
    bias = _dense_bias(decay, query).to(dtype)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    with maybe_autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(
            module, query, key, value, bias, dropout=dropout, scaling=scaling, is_causal=False
        )
    return out.to(output_dtype), None


def _warn_of_attentions(kwargs: dict) -> None:
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "output_attentions=True has no effect: only attn_implementation='eager' holds the attention weights"
        )


def _dense_bias(decay: Decay, query: Tensor) -> Tensor:
    """``D`` as ``[B, H or 1, Tq, Tk]`` float64, finite in at least one key of every query."""
    bias = decay.bias()
    # softmax of a row of -inf is NaN. Such rows belong to padding, whose output nobody reads.
    bias = bias.masked_fill(torch.isneginf(bias).all(-1, keepdim=True), 0.0)
    heads = query.shape[1]
    return bias if bias.shape[1] in (1, heads) else bias.repeat_interleave(heads // bias.shape[1], dim=1)


# transformers ignores padding without a word for an implementation that has no mask function (the mask becomes None).
AttentionInterface.register(DEFAULT_IMPLEMENTATION, reference_attention_forward)
AttentionMaskInterface.register(DEFAULT_IMPLEMENTATION, flash_attention_mask)

# An instance of our own: for FoX models alone, "sdpa" is called with the decay as its mask.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_forward
