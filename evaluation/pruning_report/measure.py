"""What one layer's attention on one text shows of gates and pruning, in as little room as the report needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foxlm.kernels.decay import accumulate
from foxlm.kernels.pruning.key_stats import empty_summary, extend_summary
from foxlm.kernels.pruning.later_queries import first_needed_block, future_query_bounds
from foxlm.kernels.pruning.prune import share_skipped
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.cache.paged import PAGE, LogitBounds, PagedForgettingLayer

from ..gates import RULES, first_read, kept_from, share_of_tiles_skipped
from ..recording import AttentionInputs
from .dropped import ProvenBounds, choose_rows, log_dropped

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
        spread, adversarial, seed: of the rows whose dropped weight is computed, as `choose_rows` takes them.
        shown: ``[P]`` queries whose kept range is drawn.
    """

    log_eps: tuple[float, ...]
    own: int
    rule: Rule
    lengths: tuple[int, ...]
    cache_lengths: tuple[int, ...]
    spread: int = 128
    adversarial: int = 16
    seed: int = 0
    shown: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are compared: those that bound, and that one, as measuring takes the time of all pairs."""
        return RULES if self.rule in RULES else (*RULES, self.rule)


class Case(NamedTuple):
    """One rule, by pairs or tiles, on one layer and text.

    Attributes:
        skipped: ``[E, H]`` share of causal attention skipped, by ``eps``.
        by_length: ``[N, H]`` the same at the plan's own ``eps``, by length.
        largest: ``[E, H]`` natural log of the largest weight that a row lost.
        violations: ``[E, H]`` rows that lost more than ``eps``, or of which that cannot be said.
        lost, proven: ``[H, R]`` natural logs of the weight lost and of what is proven of it, at the plan's own ``eps``.
    """

    skipped: np.ndarray
    by_length: np.ndarray
    largest: np.ndarray
    violations: np.ndarray
    lost: np.ndarray
    proven: np.ndarray


class Findings(NamedTuple):
    """Of one layer and one text; heads are query heads.

    Attributes:
        log_f_mean: ``[H]`` mean log forget gate.
        log_f: ``[S, H]`` log forget gates of some tokens.
        cases: by grain and rule.
        rows: how many different rows the check looked at.
        pages: ``[C, G]`` pages that a cache holds, by length.
        page_bytes: bytes of one of them.
        kept: by grain, ``[H, P]`` first kept key of the queries to be drawn.
    """

    log_f_mean: np.ndarray
    log_f: np.ndarray
    cases: dict[tuple[str, Rule], Case]
    rows: int
    pages: np.ndarray
    page_bytes: int
    kept: dict[str, np.ndarray]


@torch.no_grad()
def measure(layer: AttentionInputs, bounds: LogitBounds | None, plan: Plan) -> Findings:
    """Measure a layer.

    Args:
        layer: recorded attention of one sequence.
        bounds: of its queries, by the weights.
        plan: what to measure.

    Raises:
        ValueError: queries, keys or gates are not finite.
    """
    for name, x in (("queries", layer.q), ("keys", layer.k)):
        if not x.isfinite().all():
            raise ValueError(f"layer {layer.layer}: {name} are not finite; the model gives no usable attention here")
    if layer.log_f.isnan().any():
        raise ValueError(f"layer {layer.layer}: forget gates are not numbers (NaN)")
    (length, heads), eps = layer.q.shape[1:3], math.exp(plan.log_eps[plan.own])
    log_f = layer.log_f[0].repeat_interleave(heads // layer.log_f.shape[2], dim=1)
    firsts = _search(layer, plan.log_eps, plan.rules)
    cases, rows = _cases(layer, firsts, plan)
    return Findings(
        log_f_mean=log_f.double().mean(0).cpu().numpy(),
        log_f=log_f[:: -(-length // _GATE_SAMPLES)].float().cpu().numpy(),
        cases=cases,
        rows=sum(len(row.unique()) for row in rows),
        pages=held_pages(layer, bounds, plan.cache_lengths, eps, plan.rule, length).numpy(),
        page_bytes=page_bytes(layer),
        kept={grain: firsts[grain, plan.rule][plan.own].cpu().numpy()[:, plan.shown] for grain in GRAINS},
    )


def _search(layer: AttentionInputs, log_eps: Sequence[float], rules: Sequence[Rule]) -> dict[tuple[str, Rule], Tensor]:
    """``[E, H, T]`` first kept key of each query, by grain and rule: exactly in pairs, as attention reads in tiles."""
    exact = _in_float64(layer)
    firsts = {}
    for rule in rules:
        firsts["pairs", rule] = torch.stack([kept_from(exact, value, rule)[0] for value in log_eps])
        firsts["tiles", rule] = torch.stack([first_read(layer, value, rule)[0] for value in log_eps])
    return firsts


def _in_float64(layer: AttentionInputs) -> AttentionInputs:
    return layer._replace(q=layer.q.double(), k=layer.k.double())


def _share(grain: str, firsts: Tensor) -> np.ndarray:
    """Share skipped, ``[E, H]``, of ``[E, H, T]``."""
    shares = share_of_tiles_skipped(firsts) if grain == "tiles" else share_skipped(firsts, firsts.shape[-1])
    return shares.cpu().numpy()


def _cases(
    layer: AttentionInputs, firsts: dict[tuple[str, Rule], Tensor], plan: Plan
) -> tuple[dict[tuple[str, Rule], Case], Tensor]:
    """What each way to prune skips and drops, and the rows ``[H, R]`` that were looked at."""
    own = plan.log_eps[plan.own]
    prefixes = [_search(layer.first_tokens(length), [own], plan.rules) for length in plan.lengths]
    exact = _in_float64(layer)
    proven = ProvenBounds(exact)
    bounds = torch.stack([proven.of(rule, first[plan.own]) for (_, rule), first in firsts.items()])
    rows = choose_rows(bounds, plan.spread, plan.adversarial, plan.seed)
    dropped = log_dropped(exact, proven, rows, torch.cat(list(firsts.values()))).split(len(plan.log_eps))
    limits = torch.tensor(plan.log_eps, dtype=torch.float64)[:, None, None]
    cases = {
        key: Case(
            skipped=_share(key[0], first),
            by_length=np.concatenate([_share(key[0], prefix[key]) for prefix in prefixes]),
            largest=lost.nan_to_num(nan=math.inf, neginf=-math.inf).amax(-1).numpy(),
            # Not `lost > limits`: a NaN is within no limit.
            violations=(~(lost <= limits)).sum(-1).numpy(),
            lost=lost[plan.own].numpy(),
            proven=bound.cpu().gather(1, rows).numpy(),
        )
        for (key, first), lost, bound in zip(firsts.items(), dropped, bounds, strict=True)
    }
    return cases, rows


def held_pages(
    layer: AttentionInputs, bounds: LogitBounds | None, lengths: Sequence[int], eps: float, rule: Rule, room: int
) -> Tensor:
    """Pages of `FoxPagedCache` that hold what a later query may need, at several lengths of one text.

    Args:
        layer: recorded attention of one sequence.
        bounds: of any query, as `FoxDecoderLayer.logit_bounds` gives them; None frees nothing.
        lengths: ``N`` numbers of tokens taken in, at most those of ``layer``.
        eps, rule: of the cache.
        room: its ``max_cache_len``.

    Returns:
        ``[N, G]`` int64 on the CPU, pages of each key/value head.
    """
    c, _ = accumulate(layer.log_f)
    k = layer.k.transpose(1, 2)
    summary, running = empty_summary(c, k, k.shape[2])
    extend_summary(summary, running, c, k, 0)
    pages = []
    for length in lengths:
        dead = torch.zeros(k.shape[1], dtype=torch.int64)
        # The last tokens may be taken back: what is dead must be so for queries from there on.
        token = length - 1 - PagedForgettingLayer.rollback_window
        if bounds is not None and token >= PAGE:
            norm, logit = (x.to(c.device) for x in bounds)
            to_come = future_query_bounds((norm, logit), layer.q.shape[2], k.shape[-1])
            then = c[..., token]
            dead = first_needed_block(then, summary, to_come, token // PAGE, eps=eps, rule=rule, keys=room)[0].cpu()
        pages.append(-(-length // PAGE) - dead)
    return torch.stack(pages)


def page_bytes(layer: AttentionInputs) -> int:
    """Bytes of keys, values and float64 running sums in one page."""
    gates = max(1, layer.log_f.shape[2] // layer.k.shape[2])
    return PAGE * ((layer.k.shape[-1] + layer.v.shape[-1]) * layer.k.element_size() + gates * 8)
