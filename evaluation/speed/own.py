"""This library's attention, with pruning and without."""

from collections.abc import Callable

import torch
from torch import Tensor

from foxlm.kernels.attention import forgetting_attention
from foxlm.kernels.backends import backend_of
from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.pruning.rules import Rule, prune

from .implementations import (
    EPS,
    RULES,
    Attend,
    Implementation,
    first_by_definition,
    pruning_options,
    share_kept,
    share_of_tiles,
)
from .inputs import Inputs


def own_name(rule: Rule | None) -> str:
    """How this library appears in tables."""
    return "foxlm" if rule is None else f"foxlm, ACP {rule}"


def own(rule: Rule | None) -> Implementation:
    """This library's attention, without pruning or by ``rule``."""

    def prepare(inputs: Inputs) -> Attend:
        if rule is not None and inputs.centers:
            return lambda q, k, v, log_f: _attend_as_model(q, k, v, log_f, inputs, rule)
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
        tiles_kept=lambda inputs: share_of_tiles(_first_kept(inputs, rule)),
        tiles_expected=lambda inputs: share_kept(first_by_definition(inputs, rule), inputs.q.shape[1]),
        boundaries=lambda inputs: _boundary_search(inputs, rule),
    )


def _attend_as_model(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, inputs: Inputs, rule: Rule) -> Tensor:
    """As a model without QK-norm does it, whose centered keys the public function does not know."""
    decay = _search(_decay(q, log_f), inputs._replace(q=q, k=k), rule)
    return backend_of(q).attention(q, k, v, decay, scale=inputs.scale, dropout=0.0)[0]


@torch.no_grad()
def _first_kept(inputs: Inputs, rule: Rule) -> Tensor:
    """The first key that the kernels keep for each query, ``[B, H, T]``."""
    if inputs.centers:
        return _boundary_search(inputs, rule)().kv_start
    options = pruning_options(inputs, rule)
    return forgetting_attention(*inputs[:4], scale=inputs.scale, return_first=True, **options)[1]


def _boundary_search(inputs: Inputs, rule: Rule) -> Callable[[], Decay]:
    decay = _decay(inputs.q, inputs.log_f)
    return lambda: _search(decay, inputs, rule)


def _search(decay: Decay, inputs: Inputs, rule: Rule) -> Decay:
    options = {"logit_bound": None, **pruning_options(inputs, rule)}
    search = backend_of(inputs.q).search_kv_start
    return prune(decay, inputs.q, inputs.searched_keys(rule), scale=inputs.scale, **options, search=search)


def _decay(q: Tensor, log_f: Tensor) -> Decay:
    c, kv_start = accumulate(log_f, sum_gates=backend_of(q).sum_gates)
    return Decay(c, c, kv_start, torch.arange(c.shape[-1], device=c.device))


OWN = tuple(own(rule) for rule in (None, *RULES))
