"""Forgetting attention written a second time, from the paper alone: arXiv 2503.02130, equations 3 to 5.

    F_ij = prod_{j < l <= i} f_l        O_i = sum_{j <= i} F_ij exp(scale q_i . k_j) v_j / sum_{j <= i} F_ij exp(...)

In float64, with dense matrices and the gates multiplied as they are: no running sum, no bias, no shift by the
maximum and no hidden key. Padding and packing are done by leaving the other tokens out. What it shares with
the implementation under test is only the definition. Logits above 700 overflow: it is for tests.
"""

import itertools
import math

import torch
from torch import Tensor


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take the arguments of `foxlm.forgetting_attention`; return output and log-sum-exp in float64."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    q = q.double()
    k, v, f = (_per_query_head(x.double(), heads) for x in (k, v, log_f.double().exp()))

    # The output of a fully masked row: rows that no sequence fills keep it.
    out = q * 0.0
    lse = out.sum(-1) - math.inf
    for b in range(batch):
        for tokens in _sequences(b, keys, attention_mask, cu_seqlens):
            rows = [n for n, token in enumerate(tokens) if token >= keys - queries]
            if not rows:
                continue
            own = torch.tensor(tokens)
            asked = own[rows] - (keys - queries)
            logits = scale * torch.einsum("ihd,jhd->ijh", q[b, asked], k[b, own])
            weights = _forget_matrix(f[b, own])[rows] * logits.exp()
            total, mixed = weights.sum(1), torch.einsum("ijh,jhd->ihd", weights, v[b, own])
            if sink_k is not None and sink_v is not None:
                # One more key, which no gate decays.
                sinks = [_per_query_head(x.double()[None, None], heads)[0, 0] for x in (sink_k, sink_v)]
                weight = (scale * (q[b, asked] * sinks[0]).sum(-1)).exp()
                total, mixed = total + weight, mixed + weight[..., None] * sinks[1]
            mixed = mixed / total[..., None]
            out = out.index_put((torch.tensor(b), asked), mixed)
            lse = lse.index_put((torch.tensor(b), asked), total.log())
    return out, lse.transpose(1, 2)


def _forget_matrix(f: Tensor) -> Tensor:
    """``F`` as ``[T, T, H]`` from gates ``[T, H]``: each token multiplies what was left of those before it."""
    rows: list[Tensor] = []
    left = f[:0]
    for gate in f:
        left = torch.cat([left * gate, torch.ones_like(f[:1])])
        rows.append(torch.cat([left, torch.zeros_like(f[len(left) :])]))
    return torch.stack(rows)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of what it shares: head ``h`` of ``H`` uses ``h // (H / n)`` of ``n``."""
    return x[:, :, [h // (heads // x.shape[2]) for h in range(heads)]]


def _sequences(b: int, keys: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> list[list[int]]:
    """The tokens of each sequence in row ``b`` of the batch, without padding."""
    offsets = [0, keys] if cu_seqlens is None else cu_seqlens.tolist()
    real = [True] * keys if attention_mask is None else attention_mask[b].bool().tolist()
    return [[t for t in range(start, stop) if real[t]] for start, stop in itertools.pairwise(offsets)]
