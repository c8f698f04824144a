"""An attention sink, in PyTorch: the definition.

A sink is a key and a value of each key/value head that every query sees and no gate decays: one more term of the
softmax. So it is added to attention that was computed without it, by the log-sum-exp of that:

    l = scale q . k_sink        s = exp(l) / (exp(lse) + exp(l))        out' = (1 - s) out + s v_sink
    lse' = log(exp(lse) + exp(l))

The Triton kernels that compute the same are in `triton_attention_sink`.
"""

import torch
from torch import Tensor


def add_sink(
    out: Tensor, lse: Tensor, q: Tensor, sink_k: Tensor, sink_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the keys and the sink, from attention over the keys alone.

    Args:
        out: ``[B, T, H, D]``, zero in rows that see no key.
        lse: ``[B, H, T]`` log-sum-exp of each row's logits, float32 or float64; -inf in rows that see no key.
        q: ``[B, T, H, D]`` queries.
        sink_k, sink_v: ``[G, D]`` key and value of the sink, ``H`` a multiple of ``G``.
        scale: multiplies the logits.

    Returns:
        ``[B, T, H, D]`` in the dtype of ``out``, ``sink_v`` in rows that see no key, and the log-sum-exp with the sink.
    """
    groups, dtype = q.shape[2] // sink_k.shape[0], lse.dtype
    key, value = (x.to(dtype).repeat_interleave(groups, dim=0) for x in (sink_k, sink_v))
    logits = scale * (q.to(dtype) * key).sum(-1)
    lse = lse.transpose(1, 2)
    # One of the two shares is small, and is computed as such.
    share, rest = torch.sigmoid(logits - lse)[..., None], torch.sigmoid(lse - logits)[..., None]
    merged = rest * out.to(dtype) + share * value
    return merged.to(out.dtype), torch.logaddexp(lse, logits).transpose(1, 2)
