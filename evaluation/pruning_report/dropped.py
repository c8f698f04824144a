"""The attention weight that pruning really drops, exactly, beside what is proven of it.

Weights are computed in float64, as logarithms: what a fast head drops is often far below the smallest number.
"""

import math

import torch
from torch import Tensor

from foxlm.kernels.pruning.rules import Rule

from ..gates import bounded_keys, decay_of
from ..recording import AttentionInputs

# Weights that are held at once, 8 bytes each, several times over.
_AT_ONCE = 16 * 2**20


class ProvenBounds:
    """What the rules prove of the weight that rows lose, worked out from their formulas, not by their search.

    Args:
        layer: recorded attention of one sequence, queries and keys in float64.

    Attributes:
        c: ``[H, T]`` float64 running sums of log gates.
        first: ``[H, T]`` int64, the first key that no hard reset hides.
    """

    def __init__(self, layer: AttentionInputs) -> None:
        heads = layer.q.shape[2]
        decay = decay_of(layer)
        self._layer = layer
        self.c, self.first = (x[0].repeat_interleave(heads // x.shape[1], dim=0) for x in (decay.query, decay.kv_start))
        self._q_norm = layer.q[0].norm(dim=-1).T * abs(layer.scale)

    def of(self, rule: Rule, first: Tensor) -> Tensor:
        """Natural log of the weight that each row may lose by ``rule`` if it starts at ``first``.

        Args:
            rule: ``measured`` proves nothing beforehand: what ``tight`` would have to say of it.
            first: ``[H, T]`` int64.

        Returns:
            ``[H, T]`` float64, ``-inf`` where a row drops nothing that it could see.
        """
        bound = self._paper(first) if rule == "paper" else self._tight(first)
        return bound.masked_fill(first <= self.first, float("-inf"))

    def _tight(self, first: Tensor) -> Tensor:
        layer = self._layer
        bounded, sink = bounded_keys(layer, "tight")
        groups = layer.q.shape[2] // layer.k.shape[2]
        keys = bounded[0].repeat_interleave(groups, dim=1)
        last_dropped = (first - 1).clamp(min=0)
        largest = keys.norm(dim=-1).T.cummax(1).values.gather(1, last_dropped)
        own = layer.scale * (layer.q[0] * keys).sum(-1).T
        if sink is not None:
            own = torch.logaddexp(own, layer.scale * _of_sink(layer.q[0], sink.expand(1, *sink.shape[-2:])[0]))
        return self._q_norm * largest + self.c + (-self.c).logcumsumexp(-1).gather(1, last_dropped) - own

    def _paper(self, first: Tensor) -> Tensor:
        layer = self._layer
        if layer.logit_bound is None:
            keys = layer.k[0].norm(dim=-1).amax(0).repeat_interleave(layer.q.shape[2] // layer.k.shape[2])
            bound = self._q_norm.amax(1) * keys
        else:
            bound = layer.logit_bound.double().expand(len(self.c))
        last_dropped = self.c.gather(1, (first - 1).clamp(min=0))
        return 2.0 * bound[:, None] + math.log(self.c.shape[1]) + self.c - last_dropped


def _of_sink(q: Tensor, sink: Tensor) -> Tensor:
    """``[T, H, D]`` queries times the key ``[G, D]`` of a sink: ``[H, T]``."""
    return (q * sink.to(q.dtype).repeat_interleave(q.shape[1] // len(sink), dim=0)).sum(-1).T


def choose_rows(bounds: Tensor, spread: int, adversarial: int, seed: int) -> Tensor:
    """Rows to look at: some of every part of the text, and of each of ``bounds`` those closest to ``eps``.

    Args:
        bounds: ``[K, H, T]`` of `ProvenBounds`, for several ways to prune.
        spread: rows that are drawn, one in each of so many equal parts; all of them if there are no more.
        adversarial: rows that are added for each of the ``K`` ways.
        seed: of those that are drawn.

    Returns:
        ``[H, R]`` int64 on the CPU; a row may be in it more than once.
    """
    _, heads, length = bounds.shape
    if length <= spread:
        return torch.arange(length).expand(heads, -1)
    generator = torch.Generator().manual_seed(seed)
    part = torch.arange(spread) + torch.rand(heads, spread, generator=generator, dtype=torch.float64)
    drawn = (part * (length / spread)).long().clamp(max=length - 1)
    worst = bounds.topk(min(adversarial, length)).indices
    return torch.cat([drawn, worst.transpose(0, 1).flatten(1).cpu()], dim=1)


def log_dropped(layer: AttentionInputs, bounds: ProvenBounds, rows: Tensor, firsts: Tensor) -> Tensor:
    """Natural log of the attention weight that rows give to the keys they drop.

    Args:
        layer: recorded attention of one sequence, queries and keys in float64.
        bounds: of it.
        rows: ``[H, R]`` int64.
        firsts: ``[N, H, T]`` int64, the first key that each row keeps, for several ways to prune.

    Returns:
        ``[N, H, R]`` float64 on the CPU; ``-inf`` for a row that drops nothing it could see.
    """
    (count, heads, length), device = firsts.shape, firsts.device
    rows = rows.to(device)
    kept = firsts.gather(2, rows.expand(count, -1, -1)).permute(1, 2, 0)
    q, k = layer.q[0], layer.k[0]
    keys = torch.arange(length, device=device)
    at_once = max(1, _AT_ONCE // (rows.shape[1] * length))
    lost = []
    for some in torch.arange(heads, device=device).split(at_once):
        logits = layer.scale * q[rows[some], some[:, None]] @ k[:, some // (heads // k.shape[1])].permute(1, 2, 0)
        c, first = bounds.c[some], bounds.first[some]
        logits += c.gather(1, rows[some])[..., None] - c[:, None]
        hidden = (keys > rows[some, :, None]) | (keys < first.gather(1, rows[some])[..., None])
        logits.masked_fill_(hidden, float("-inf"))
        normalizer = logits.logsumexp(-1)
        if layer.sink is not None:
            of_sink = layer.scale * _of_sink(q, layer.sink[0])[some].gather(1, rows[some])
            normalizer = torch.logaddexp(normalizer, of_sink)
        before = (logits - normalizer[..., None]).logcumsumexp(-1)
        # Entry n: all keys before n.
        before = torch.nn.functional.pad(before, (1, 0), value=float("-inf"))
        lost.append(before.gather(2, kept[some]))
    return torch.cat(lost).permute(2, 0, 1).cpu()
