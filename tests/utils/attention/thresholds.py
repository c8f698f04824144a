"""Inputs on the threshold of pruning: what could be dropped has ``eps`` of a row's weight, a rounding more or less.

All keys that are to be dropped are equal and parallel to the query, so that the bounds of the rules are equalities, and
gates put their decay where the rule is about to drop them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foxlm.kernels.decay import Decay, accumulate, hide_padding, sequence_starts
from foxlm.kernels.pruning.rules import Rule

BLOCK, SCALE = 64, 0.25
# What one gate may decay by without being a hard reset.
_LARGEST_GATE = 9000.0


class Threshold(NamedTuple):
    """One query, the last token, and how its keys are seen.

    Attributes:
        q: ``[1, 1, H, D]``.
        k: ``[1, T, G, D]``.
        log_f: ``[1, T, H]`` float64.
        decay: of the query over the keys.
        bounds: ``[H]`` float64, ``scale |q| max |k|`` of the keys that are to be dropped.
    """

    q: Tensor
    k: Tensor
    log_f: Tensor
    decay: Decay
    bounds: Tensor

    def lost(self, first: Tensor) -> Tensor:
        """Largest share of the row's exact weight that is before ``first`` ``[H]``, in 80-bit arithmetic: ``[H]``."""
        q, k, log_f = (x[0].double().numpy().astype(np.longdouble) for x in (self.q, self.k, self.log_f))
        heads, tokens = q.shape[1], len(k)
        k = k.repeat(heads // k.shape[1], axis=1)
        decays = log_f[::-1].cumsum(0)[::-1]
        decays = np.concatenate([decays[1:], np.zeros_like(decays[:1])]).T
        logits = np.longdouble(SCALE) * (q[0] * k).sum(-1).T + decays
        seen = torch.isfinite(self.decay.key[0]) & (torch.arange(tokens) >= self.decay.kv_start[0, :, 0, None])
        logits[~seen.expand(heads, -1).numpy()] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        dropped = np.arange(tokens) < first.numpy()[:, None]
        return torch.from_numpy(((weights * dropped).sum(1) / weights.sum(1)).astype(np.float64))


def on_threshold(
    rule: Rule,
    own: str,
    size: float,
    excess: Sequence[float],
    *,
    direction: str = "random",
    dtype: torch.dtype = torch.float32,
    eps: float = 1e-9,
    kv_heads: int = 1,
    head_dim: int = 16,
    blocks: int = 4,
    past: bool = False,
    hidden: str = "nothing",
    seed: int = 0,
) -> Threshold:
    """Keys of which all but the last few are to be dropped.

    Args:
        rule: which one's threshold it is.
        own: what the query's own key is: "equal" to the others, "opposed", or "orthogonal" and longer.
        size: about the logit of the query with the keys that are to be dropped.
        excess: of each head, by how many nats their weight exceeds ``eps``.
        direction: of the query, "one-hot", "ones" or "random".
        dtype: of queries and keys.
        eps: of the rule.
        kv_heads, head_dim: of the keys.
        blocks: how many blocks of 64 keys are to be dropped.
        past: whether running sums are large before.
        hidden: "nothing", "padding" or "packed".
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, far = len(excess), blocks * BLOCK

    def drawn() -> Tensor:
        return torch.randn(kv_heads, head_dim, generator=generator, dtype=torch.float64)

    along = {"one-hot": torch.eye(head_dim)[:kv_heads].double(), "ones": torch.ones(kv_heads, head_dim).double()}
    unit = torch.nn.functional.normalize(along.get(direction, drawn()), dim=-1)
    length = math.sqrt(size / SCALE)
    key = (length * unit).to(dtype)
    across = drawn()
    across -= (across * unit).sum(-1, keepdim=True) * unit
    last = {"equal": key, "opposed": -key, "orthogonal": (8.0 * length * across / across.norm()).to(dtype)}[own]
    # Powers of two, which leave directions as they are.
    shrink = 2.0 ** -(torch.arange(heads) % 3).double()
    of_head = torch.arange(heads) // (heads // kv_heads)
    q = (key.double()[of_head] * shrink[:, None]).to(dtype)
    dropped, kept = (SCALE * (q.double() * x.double()[of_head]).sum(-1) for x in (key, last))

    offsets = torch.tensor([0, 10, 1 << 40])[: 3 if hidden == "packed" else 1]
    visible = far - (10 if hidden != "nothing" else 0) - (BLOCK if past else 0)
    tokens = far + 1
    for _ in range(2):
        # The rule `paper` is at its threshold by its own formula, for as many keys as there are.
        if rule == "paper":
            total = 2.0 * dropped + math.log(tokens / eps) - torch.tensor(excess).double()
        else:
            total = dropped - kept + math.log(visible / eps) - torch.tensor(excess).double()
        steps = math.ceil(float(total.max()) / _LARGEST_GATE)
        tokens = far + max(1, steps)
    log_f = torch.zeros(tokens, heads, dtype=torch.float64)
    log_f[tokens - steps :] = -total / steps
    if past:
        log_f[:BLOCK] = -0.1 * torch.rand(BLOCK, heads, generator=generator, dtype=torch.float64) - 5000.0
    k = torch.cat([key.expand(far, -1, -1), last.expand(tokens - far, -1, -1)])
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, :10] = hidden != "padding"
    starts = sequence_starts(offsets.clamp(max=tokens), tokens) if hidden == "packed" else None
    log_f = log_f[None]
    c, first = accumulate(log_f.masked_fill(~mask[..., None], 0.0), starts=starts)
    decay = Decay(c[..., -1:], c, first[..., -1:], torch.tensor([tokens - 1]))
    bounds = SCALE * q.double().norm(dim=-1) * key.double().norm(dim=-1)[of_head]
    return Threshold(q[None, None], k[None], log_f, hide_padding(decay, mask), bounds)
