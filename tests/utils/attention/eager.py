"""Forgetting attention as one writes it in torch: what the rounding errors of kernels are compared with."""

import torch
from torch import Tensor

from foxlm.kernels.decay import LOG_ZERO_GATE


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take the arguments of `foxlm.forgetting_attention`; return output and log-sum-exp.

    Products are in the type of ``q``, the softmax is in float32, and gates are summed in float64: no rounding but those
    that the type asks for.
    """
    keys, (queries, heads, head_dim) = k.shape[1], q.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v, log_f = (x.transpose(1, 2) for x in (q, k, v, log_f))
    k, v, log_f = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v, log_f))

    visible = torch.ones(keys, keys, dtype=torch.bool, device=q.device).tril()
    if attention_mask is not None:
        real = attention_mask.to(q.device).bool()[:, None]
        log_f = log_f.masked_fill(~real, 0.0)
        visible = visible & real[..., None] & real[..., None, :]
    starts = log_f < LOG_ZERO_GATE
    log_f = log_f.masked_fill(starts, 0.0)
    if cu_seqlens is not None:
        starts = starts | (torch.arange(keys)[:, None] == cu_seqlens[:-1]).any(-1).to(q.device)
    sequence = starts.cumsum(-1)
    visible = (visible & (sequence[..., None] == sequence[..., None, :]))[..., keys - queries :, :]

    c = log_f.double().cumsum(-1)
    decay = c[..., keys - queries :, None] - c[..., None, :]
    scores = ((q @ k.mT) * scale).float() + decay.float()
    scores = scores.masked_fill(~visible, -torch.inf)
    # Softmax of a row of -inf alone is NaN.
    sees_something = visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~sees_something, 0.0).softmax(-1).masked_fill(~sees_something, 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2), scores.logsumexp(-1)
