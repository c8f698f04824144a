"""What pruning keeps in every layer of a model while it runs: tiles of whole sequences, keys of a decoding step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foxlm import FoxForCausalLM
from foxlm.kernels.decay import Decay
from foxlm.kernels.pruning.rules import Rule, centered, prune
from foxlm.modeling.attention_backends import ALL_ATTENTION_FUNCTIONS

from .implementations import EPS, RULES, share_of_tiles
from .sessions import Decoder, Session, greedy_step

Shares = dict[Rule | None, float]
"""By rule, None for no pruning."""


@torch.no_grad()
def keys_kept(model: PreTrainedModel, ids: Tensor) -> Shares:
    """Share of keys that the step after ``ids``, ``[B, T]``, may attend to by each rule, over all layers and heads.

    An estimate of what it reads: kernels skip keys in blocks, and finding the first one may read more.
    """
    if model.config.forget_gate == "none":
        return {None: 1.0}
    session = Session(Decoder("foxlm", "dynamic", "tight"), model, greedy_step, len(ids), ids.shape[1])
    session.fill(ids)
    with _observed(model, lambda decay: 1.0 - (decay.kv_start / (decay.last + 1)).double().mean().item()) as shares:
        session.step()
    return _means(shares)


@torch.no_grad()
def tiles_kept(model: FoxForCausalLM, ids: Tensor) -> Shares:
    """Share of the tiles of causal attention over ``ids``, ``[B, T]``, that each rule keeps, in all layers and heads.

    One sequence at a time, which needs the least memory.
    """
    if model.config.forget_gate == "none":
        return {None: 1.0}
    with _observed(model, lambda decay: share_of_tiles(decay.kv_start)) as shares:
        for row in ids.split(1):
            model.model(row, use_cache=False)
    return _means(shares)


def _means(shares: dict[Rule, list[float]]) -> Shares:
    return {None: 1.0} | {rule: sum(values) / len(values) for rule, values in shares.items() if values}


@contextmanager
def _observed(model: PreTrainedModel, share: Callable[[Decay], float]) -> Iterator[dict[Rule, list[float]]]:
    """Collect ``share`` of what each rule leaves of every layer's attention."""
    shares: dict[Rule, list[float]] = {rule: [] for rule in RULES}
    name = model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def observing(module, query, key, value, attention_mask, *, decay, scaling, backend, **kwargs):
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        for rule in RULES:
            bound = module.logit_bound(query.dtype) if rule == "paper" else None
            # As in `fox_attention_forward`; a decoding step does not center what is in its cache.
            centers = rule == "tight" and module.config.qk_norm == "none" and q.shape[1] == k.shape[1]
            keys = centered(k) if centers else k
            options = {"eps": EPS, "rule": rule, "scale": scaling, "logit_bound": bound}
            shares[rule].append(share(prune(decay, q, keys, **options, search=backend.search_kv_start)))
        return attend(
            module, query, key, value, attention_mask, decay=decay, scaling=scaling, backend=backend, **kwargs
        )

    ALL_ATTENTION_FUNCTIONS[name] = observing
    try:
        yield shares
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend
