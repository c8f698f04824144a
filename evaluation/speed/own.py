"""This library's attention, with pruning and without."""

from collections.abc import Callable

import torch

from foxlm.kernels.attention import forgetting_attention
from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.pruning import Rule, prune

from .implementations import EPS, RULES, TILE, Attend, Implementation, first_by_definition, pruning_options, share_kept
from .inputs import Inputs


def own_name(rule: Rule | None) -> str:
    """How this library appears in tables."""
    return "foxlm" if rule is None else f"foxlm, ACP {rule}"


def own(rule: Rule | None) -> Implementation:
    """This library's attention, without pruning or by ``rule``."""

    def prepare(inputs: Inputs) -> Attend:
        return lambda q, k, v, log_f: forgetting_attention(
            q, k, v, log_f, scale=inputs.scale, **pruning_options(inputs, rule)
        )

    if rule is None:
        return Implementation(own_name(rule), prepare)
    return Implementation(
        own_name(rule),
        prepare,
        eps=EPS,
        rule=rule,
        tiles_kept=lambda inputs: _tiles_kept(inputs, rule),
        tiles_expected=lambda inputs: share_kept(first_by_definition(inputs, rule), inputs.q.shape[1]),
        boundaries=lambda inputs: _boundary_search(inputs, rule),
    )


def _tiles_kept(inputs: Inputs, rule: Rule) -> float:
    """Share of the tiles that the kernels keep, from the first key that they keep for each query."""
    options = pruning_options(inputs, rule)
    with torch.no_grad():
        _, first = forgetting_attention(*inputs[:4], scale=inputs.scale, return_first=True, **options)
    tokens, block_q = first.shape[-1], TILE[0]
    # A last block that is not full repeats its last query.
    padded = torch.cat([first, first[..., -1:].expand(*first.shape[:-1], -tokens % block_q)], dim=-1)
    return share_kept(padded.unflatten(-1, (-1, block_q)).amin(-1), tokens)


def _boundary_search(inputs: Inputs, rule: Rule) -> Callable[[], object]:
    c, first = accumulate(inputs.log_f)
    decay = Decay(c, c, first, torch.arange(c.shape[-1], device=c.device))
    options = {"logit_bound": None, **pruning_options(inputs, rule)}
    return lambda: prune(decay, inputs.q, inputs.k, scale=inputs.scale, **options)


OWN = tuple(own(rule) for rule in (None, *RULES))
