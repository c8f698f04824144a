"""What no query to come can need, by the rules and bounds of such queries: for caches that free memory."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import per_query_head
from .key_stats import KeySummary
from .rounding import log_allowed, logit_margin
from .rules import PruningRule, QueryBounds, Rule, check_rule, may_drop, raised


def future_query_bounds(bounds: tuple[Tensor, Tensor], heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """``norm`` and ``diagonal`` of `QueryBounds`, ``[H, 1]`` float64, of future queries, of which only upper bounds are
    known.

    Args:
        bounds: ``scale |q|`` and ``-scale q . k`` with its diagonal key of any such query are at most these, ``[H]`` or
            ``[1]`` each; the second also bounds any ``|scale q . k|``. Negative ones and NaN count as infinite.
        heads: number of query heads ``H``.
        head_dim: size of a head.
    """
    # The largest norms of keys are float32.
    margin = logit_margin(head_dim, torch.float32)
    given = torch.stack(bounds).double()
    norm, logit_bound = torch.where(given >= 0.0, given * (1.0 + margin), math.inf).expand(2, heads)[..., None]
    return norm, -logit_bound


class QueriesToCome(NamedTuple):
    """By which `first_needed_block` finds what no later query needs.

    Attributes:
        rule, eps: as for `first_kept`.
        norm, diagonal: ``[H, 1]`` float64, as `future_query_bounds` gives them.
        token: whose running sum no later one exceeds; before 64 nothing is found.
        most_keys: that there will ever be.
    """

    rule: PruningRule
    eps: float
    norm: Tensor
    diagonal: Tensor
    token: int
    most_keys: int


def first_needed_block(
    c: Tensor,
    summary: KeySummary,
    bounds: tuple[Tensor, Tensor],
    blocks: int,
    *,
    eps: float,
    rule: Rule,
    keys: int,
) -> Tensor:
    """First block of 64 keys that a query to come may need; every later one may drop all before.

    The rules above for queries of which only bounds are known. Their running sum is not above that of any token before
    them.

    Args:
        c: ``[B, Hf]`` float64 running sum at some token.
        summary: of the keys.
        bounds: of any query from that token on, as `future_query_bounds` gives them.
        blocks: how many blocks lie wholly before that token.
        eps: as for `first_kept`.
        rule: as for `first_kept`.
        keys: most keys there will ever be.

    Returns:
        ``[B, G]`` int32, at most ``blocks``: the least over the query heads of a key/value head.
    """
    known = check_rule(eps, rule)
    norm, diagonal = bounds
    heads, kv_heads = len(norm), summary.largest.shape[1]
    c, *entries = (per_query_head(x, heads) for x in (c[..., None], *(x[..., :blocks] for x in summary)))
    log_eps = log_allowed(eps, torch.float32, known.terms(keys))
    # A bound of the logit with the diagonal key is one of any logit.
    query = QueryBounds(raised(c, keys), norm, diagonal, -diagonal if known.reads_bound else None)
    dead = may_drop(known, query, KeySummary(*entries), log_eps)
    return dead.int().cumprod(-1).sum(-1, dtype=torch.int32).unflatten(1, (kv_heads, -1)).amin(2)
