"""What an evicting cache (`FoxPagedCache`) holds of a text, by its own rule, without running it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foxlm.kernels.decay import accumulate
from foxlm.kernels.pruning.key_stats import empty_summary, extend_summary
from foxlm.kernels.pruning.rules import Rule, bounds_to_come, first_dead_block
from foxlm.modeling.cache.paged import PAGE, LogitBounds, PagedForgettingLayer

from ..recording import AttentionInputs


class HeldPages(NamedTuple):
    """Pages of one layer.

    Attributes:
        pages: ``[N, G]`` int64 on the CPU, pages held of each key/value head at each of ``N`` lengths.
        page_bytes: of keys, values and running sums in one page.
    """

    pages: Tensor
    page_bytes: int


def held_pages(
    layer: AttentionInputs, bounds: LogitBounds | None, lengths: Sequence[int], eps: float, rule: Rule, room: int
) -> HeldPages:
    """How many pages hold the tokens that a later query may need, at several lengths of one text.

    Args:
        layer: recorded attention of one sequence.
        bounds: of any query, as `FoxDecoderLayer.logit_bounds` gives them; None frees nothing.
        lengths: tokens taken in, at most those of ``layer``.
        eps, rule: of the cache.
        room: its ``max_cache_len``.
    """
    c, _ = accumulate(layer.log_f)
    k = layer.k.transpose(1, 2)
    heads, kv_heads = layer.q.shape[2], k.shape[1]
    summary, running = empty_summary(c, k, k.shape[2])
    extend_summary(summary, running, c, k, 0)
    pages = []
    for length in lengths:
        dead = torch.zeros(kv_heads, dtype=torch.int64)
        # The last tokens may be taken back: what is dead must be so for queries from there on.
        token = length - 1 - PagedForgettingLayer.rollback_window
        if bounds is not None and token >= PAGE:
            query, logit = (x.to(c.device) for x in bounds)
            then = c[..., token]
            dead = first_dead_block(
                then,
                summary,
                bounds_to_come((query, logit), heads, k.shape[-1]),
                token // PAGE,
                eps=eps,
                rule=rule,
                keys=room,
            )[0]
        pages.append(-(-length // PAGE) - dead.cpu().long())
    gates = max(1, c.shape[1] // kv_heads)
    numbers = (layer.k.shape[-1] + layer.v.shape[-1]) * layer.k.element_size() + gates * c.element_size()
    return HeldPages(torch.stack(pages), PAGE * numbers)
