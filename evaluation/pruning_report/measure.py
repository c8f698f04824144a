"""What one layer's attention on one text shows of gates and pruning, in as little room as the report needs."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foxlm.kernels.backends import PYTORCH, backend_of
from foxlm.kernels.pruning.rules import Rule, share_skipped
from foxlm.modeling.cache.paged import LogitBounds

from ..gates import RULES, first_read, in_tiles, kept_from, share_of_tiles_skipped
from ..recording import AttentionInputs
from .cache import held_pages
from .dropped import ProvenBounds, choose_rows, distinct_rows, log_dropped

GRAINS = ("pairs", "tiles")
# Tokens of a text whose gates are kept for the quantiles.
_GATE_SAMPLES = 2048


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        log_eps: natural logs of each ``eps``, descending.
        own: index in ``log_eps`` of the one that is looked at closely.
        rule: the rule that is looked at closely.
        lengths: tokens of the prefixes that are measured too, ascending; the last is the whole text.
        cache_lengths: tokens after which the cache is looked at, ascending; the last is the whole text.
        room: tokens that the cache has room for.
        spread, adversarial: rows of each head and text whose dropped weight is computed, as `choose_rows` takes them.
        seed: of those that are drawn.
        shown: ``[P]`` queries whose kept range is drawn.
    """

    log_eps: tuple[float, ...]
    own: int
    rule: Rule
    lengths: tuple[int, ...]
    cache_lengths: tuple[int, ...]
    room: int
    spread: int = 128
    adversarial: int = 16
    seed: int = 0
    shown: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def eps(self) -> float:
        return math.exp(self.log_eps[self.own])


@dataclass(frozen=True)
class Dropped:
    """The check of one layer and text, for one rule and grain.

    Attributes:
        largest: ``[E, H]`` natural log of the largest weight that a row lost.
        violations: ``[E, H]`` rows that lost more than ``eps``, or of which that cannot be said.
        lost, proven: ``[H, R]`` natural logs of the weight lost and of what is proven of it, at the plan's own ``eps``.
    """

    largest: np.ndarray
    violations: np.ndarray
    lost: np.ndarray
    proven: np.ndarray


@dataclass(frozen=True)
class Findings:
    """Of one layer and one text; heads are query heads.

    Attributes:
        log_f_mean: ``[H]`` mean log forget gate.
        log_f: ``[S, H]`` log forget gates of some tokens.
        skipped: by grain and rule, ``[E, H]`` share of causal attention skipped.
        by_length: by grain and rule, ``[N, H]`` the same at the plan's own ``eps``, by length.
        dropped: by grain and rule.
        rows: how many different rows the check looked at.
        pages: ``[C, G]`` pages that a cache holds, by length; page_bytes: of one of them.
        kept: by grain, ``[H, P]`` first kept key of the queries to be drawn.
    """

    log_f_mean: np.ndarray
    log_f: np.ndarray
    skipped: dict[tuple[str, Rule], np.ndarray]
    by_length: dict[tuple[str, Rule], np.ndarray]
    dropped: dict[tuple[str, Rule], Dropped]
    rows: int
    pages: np.ndarray
    page_bytes: int
    kept: dict[str, np.ndarray]


Firsts = dict[tuple[str, Rule], list[Tensor]]
"""``[H, T]`` first kept key of each query, by grain and rule, for each ``eps``."""


@torch.no_grad()
def measure(layer: AttentionInputs, bounds: LogitBounds | None, plan: Plan, details: bool) -> Findings:
    """Measure a layer.

    Args:
        layer: recorded attention of one sequence.
        bounds: of its queries, by the weights.
        plan: what to measure.
        details: whether the text is one whose kept ranges are wanted.

    Raises:
        ValueError: queries, keys or gates are not finite.
    """
    for name, x in (("queries", layer.q), ("keys", layer.k)):
        if not x.isfinite().all():
            raise ValueError(f"layer {layer.layer}: {name} are not finite; the model gives no usable attention here")
    if layer.log_f.isnan().any():
        raise ValueError(f"layer {layer.layer}: forget gates are not numbers (NaN)")
    length, heads = layer.q.shape[1:3]
    recorded, layer = layer, layer._replace(q=layer.q.double(), k=layer.k.double())
    proven = ProvenBounds(layer)
    firsts: Firsts = {}
    for rule in RULES:
        pairs = [first_kept_by_model(layer, value, rule) for value in plan.log_eps]
        firsts["pairs", rule] = pairs
        firsts["tiles", rule] = [
            _first_in_tiles(recorded, first, value, rule, proven)
            for first, value in zip(pairs, plan.log_eps, strict=True)
        ]
    dropped, rows = _check(layer, proven, firsts, plan)
    cache = held_pages(recorded, bounds, plan.cache_lengths, plan.eps, plan.rule, plan.room)
    group = heads // layer.log_f.shape[2]
    log_f = layer.log_f[0].repeat_interleave(group, dim=1)
    sampled = torch.linspace(0, length - 1, min(length, _GATE_SAMPLES), device=log_f.device).long()
    own = {grain: firsts[grain, plan.rule][plan.own].cpu() for grain in GRAINS}
    shown = plan.shown if details else plan.shown[:0]
    return Findings(
        log_f_mean=log_f.double().mean(0).cpu().numpy(),
        log_f=log_f[sampled].float().cpu().numpy(),
        skipped={key: torch.stack([_share(key[0], x) for x in those]).numpy() for key, those in firsts.items()},
        by_length=_by_length(recorded, firsts, plan, proven),
        dropped=dropped,
        rows=rows,
        pages=cache.pages.numpy(),
        page_bytes=cache.page_bytes,
        kept={grain: first[:, shown].numpy() for grain, first in own.items()},
    )


def first_kept_by_model(layer: AttentionInputs, log_eps: float, rule: Rule) -> Tensor:
    """First key that each query keeps by ``rule`` as the model bounds its logits, ``[H, T]``."""
    return kept_from(layer, log_eps, rule)[0]


def _first_in_tiles(layer: AttentionInputs, kept: Tensor, log_eps: float, rule: Rule, proven: ProvenBounds) -> Tensor:
    """First key that attention reads for each query, ``[H, T]``."""
    if backend_of(layer.q) is not PYTORCH or proven.first.any():
        return first_read(layer, log_eps, rule)[0]
    return in_tiles(kept)


def _share(grain: str, first: Tensor) -> Tensor:
    """Share skipped, ``[H]`` on the CPU, of ``[H, T]``."""
    if grain == "tiles":
        return share_of_tiles_skipped(first[None])[0].cpu()
    return share_skipped(first[None], first.shape[-1])[0].cpu()


def _by_length(
    layer: AttentionInputs, firsts: Firsts, plan: Plan, proven: ProvenBounds
) -> dict[tuple[str, Rule], np.ndarray]:
    value = plan.log_eps[plan.own]
    shares: dict[tuple[str, Rule], list[Tensor]] = {key: [] for key in firsts}
    for length in plan.lengths:
        part = layer._replace(q=layer.q[:, :length], k=layer.k[:, :length], log_f=layer.log_f[:, :length])
        for rule in RULES:
            whole = firsts["pairs", rule][plan.own]
            # What a query may drop by the rule `tight` is told by the keys before it; by `paper` by all.
            causal = rule == "tight" or length == whole.shape[1]
            pairs = whole[:, :length] if causal else first_kept_by_model(part, value, rule)
            shares["pairs", rule].append(_share("pairs", pairs))
            shares["tiles", rule].append(_share("tiles", _first_in_tiles(part, pairs, value, rule, proven)))
    return {key: torch.stack(those).numpy() for key, those in shares.items()}


def _check(
    layer: AttentionInputs, proven: ProvenBounds, firsts: Firsts, plan: Plan
) -> tuple[dict[tuple[str, Rule], Dropped], int]:
    length, heads = layer.q.shape[1:3]
    bounds = {key: proven.of(key[1], those[plan.own]) for key, those in firsts.items()}
    rows = choose_rows(list(bounds.values()), plan.spread, plan.adversarial, plan.seed, length, heads)
    flat = log_dropped(layer, proven, rows, [first for those in firsts.values() for first in those])
    limits = torch.tensor(plan.log_eps, dtype=torch.float64)[:, None, None]
    found = {}
    for index, key in enumerate(firsts):
        lost = torch.stack(flat[index * len(plan.log_eps) : (index + 1) * len(plan.log_eps)])
        # Not the other way round: a NaN is within no limit.
        exceeds = ~(lost <= limits)
        found[key] = Dropped(
            largest=lost.nan_to_num(nan=math.inf, neginf=-math.inf).amax(-1).numpy(),
            violations=exceeds.sum(-1).numpy(),
            lost=lost[plan.own].numpy(),
            proven=bounds[key].cpu().gather(1, rows).numpy(),
        )
    return found, distinct_rows(rows, length)
