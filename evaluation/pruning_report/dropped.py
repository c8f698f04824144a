"""The attention weight that pruning really drops, exactly, beside what is proven of it.

For some rows of each head the true weights are computed in float64, as logarithms: what a fast head drops is often far
below the smallest number. Rows are drawn evenly over the text, and those are added of which least is proven: whose
bound comes closest to ``eps``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foxlm.kernels.decay import accumulate
from foxlm.kernels.pruning.rules import Rule

from ..gates import bounded_keys
from ..recording import AttentionInputs

# Weights that are held at once, 8 bytes each, several times over.
_AT_ONCE = 16 * 2**20


class ProvenBounds:
    """What both rules prove of the weight that rows lose, worked out from their formulas, not by their search.

    Args:
        layer: recorded attention of one sequence.

    Attributes:
        c: ``[H, T]`` float64 running sums of log gates.
        first: ``[H, T]`` int64, the first key that no hard reset hides.
    """

    def __init__(self, layer: AttentionInputs) -> None:
        heads = layer.q.shape[2]
        c, first = accumulate(layer.log_f)
        self._layer = layer
        self.c, self.first = (x[0].repeat_interleave(heads // x.shape[1], dim=0) for x in (c, first))
        self._q_norm = layer.q[0].double().norm(dim=-1).T * abs(layer.scale)
        decays = (-self.c).logcumsumexp(-1)
        self._decays = torch.nn.functional.pad(decays, (1, 0), value=float("-inf"))

    def of(self, rule: Rule, first: Tensor) -> Tensor:
        """Natural log of the weight that each row may lose by ``rule`` if it starts at ``first``.

        Args:
            rule: ``paper`` or ``tight``.
            first: ``[H, T]`` int64.

        Returns:
            ``[H, T]`` float64, ``-inf`` where a row drops nothing that it could see.
        """
        bound = self._tight(first) if rule == "tight" else self._paper(first)
        return bound.masked_fill(first <= self.first, float("-inf"))

    def _tight(self, first: Tensor) -> Tensor:
        layer = self._layer
        keys = bounded_keys(layer, "tight")[0].double()
        group = layer.q.shape[2] // keys.shape[1]
        largest = keys.norm(dim=-1).cummax(0).values.T.repeat_interleave(group, dim=0)
        largest = torch.nn.functional.pad(largest, (1, 0))
        own = layer.scale * (layer.q[0].double() * keys.repeat_interleave(group, dim=1)).sum(-1).T
        return self._q_norm * largest.gather(1, first) + self.c + self._decays.gather(1, first) - own

    def _paper(self, first: Tensor) -> Tensor:
        layer, length = self._layer, self.c.shape[1]
        if layer.logit_bound is None:
            keys = layer.k[0].double().norm(dim=-1).amax(0).repeat_interleave(layer.q.shape[2] // layer.k.shape[2])
            bound = self._q_norm.amax(1) * keys
        else:
            bound = layer.logit_bound.double().expand(len(self.c))
        last_dropped = self.c.gather(1, (first - 1).clamp(min=0))
        return 2.0 * bound[:, None] + math.log(length) + self.c - last_dropped


def choose_rows(bounds: Sequence[Tensor], spread: int, adversarial: int, seed: int, length: int, heads: int) -> Tensor:
    """Rows to look at: some of every part of the text, and of each of ``bounds`` those closest to ``eps``.

    Args:
        bounds: ``[H, T]`` of `ProvenBounds`, for several ways to prune.
        spread: rows that are drawn, one in each of so many equal parts; all of them if there are no more.
        adversarial: rows that are added for each of ``bounds``.
        seed: of those that are drawn.
        length, heads: ``T`` and ``H``.

    Returns:
        ``[H, R]`` int64 on the CPU; a row may be in it more than once.
    """
    if length <= spread:
        return torch.arange(length).expand(heads, -1)
    generator = torch.Generator().manual_seed(seed)
    part = torch.arange(spread) + torch.rand(heads, spread, generator=generator, dtype=torch.float64)
    drawn = (part * (length / spread)).long().clamp(max=length - 1)
    worst = [bound.topk(min(adversarial, length), dim=1).indices.cpu() for bound in bounds]
    return torch.cat([drawn, *worst], dim=1)


def distinct_rows(rows: Tensor, length: int) -> int:
    """How many different rows of all heads are in ``[H, R]``."""
    return int(torch.zeros(len(rows), length, dtype=torch.bool).scatter_(1, rows, True).sum())


def log_weights(layer: AttentionInputs, bounds: ProvenBounds, heads: slice, rows: Tensor) -> Tensor:
    """Natural logs of the true attention weights of some rows.

    Args:
        layer: recorded attention of one sequence.
        bounds: of it.
        heads: which.
        rows: ``[h, R]`` int64, of those heads.

    Returns:
        ``[h, R, T]`` float64, ``-inf`` for keys that a row cannot see.
    """
    q = layer.q[0].transpose(0, 1)[heads]
    q = q.gather(1, rows[..., None].expand(-1, -1, q.shape[-1])).double()
    every = torch.arange(layer.q.shape[2], device=q.device)[heads]
    k = layer.k[0].transpose(0, 1)[every // (layer.q.shape[2] // layer.k.shape[2])].double()
    c = bounds.c[heads]
    logits = layer.scale * q @ k.mT + (c.gather(1, rows)[..., None] - c[:, None])
    keys = torch.arange(c.shape[1], device=c.device)
    hidden = (keys > rows[..., None]) | (keys < bounds.first[heads].gather(1, rows)[..., None])
    return logits.masked_fill_(hidden, float("-inf")).log_softmax(-1)


def log_dropped(layer: AttentionInputs, bounds: ProvenBounds, rows: Tensor, firsts: Sequence[Tensor]) -> list[Tensor]:
    """Natural log of the attention weight that rows give to the keys they drop.

    Args:
        layer: recorded attention of one sequence.
        bounds: of it.
        rows: ``[H, R]`` int64.
        firsts: ``[H, T]`` int64 each: the first key that each row keeps, for several ways to prune.

    Returns:
        ``[H, R]`` float64 on the CPU for each of ``firsts``; ``-inf`` for a row that drops nothing it could see.
    """
    count, length = rows.shape[1], layer.q.shape[1]
    at_once = max(1, _AT_ONCE // (count * length))
    rows = rows.to(layer.q.device)
    found: list[list[Tensor]] = [[] for _ in firsts]
    for start in range(0, len(rows), at_once):
        heads = slice(start, start + at_once)
        weights = log_weights(layer, bounds, heads, rows[heads]).logcumsumexp(-1)
        # Entry n: all keys before n.
        before = torch.nn.functional.pad(weights, (1, 0), value=float("-inf"))
        for parts, first in zip(found, firsts, strict=True):
            kept = first[heads].gather(1, rows[heads])
            parts.append(before.gather(2, kept[..., None])[..., 0].cpu())
    return [torch.cat(parts) for parts in found]
