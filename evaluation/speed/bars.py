"""The few ratios that tell whether attention and training are as fast as they should be, from the records of a run.

A ratio is left out where what it needs was not measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .competitors import CUDNN
from .implementations import RULES
from .own import own_name

_PARTS = ("forward", "forward_backward")
_DENSE = own_name(None)

Record = Mapping[str, Any]


def attention_bars(case: Record) -> dict[str, dict]:
    """Ratios of one case of the attention benchmark.

    Returns:
        * ``dense_rate_over_cudnn``: rate without pruning over cuDNN's without gates, by part.
        * ``acp_over_kept``: time with pruning over (time without, times the share of tiles kept), by rule and part; 1
          if pruning itself cost nothing.
        * ``vain_cost``: by how much of the time without pruning it is longer with, where nothing can be pruned, by rule
          and part.
        * ``boundaries_of_forward``: time to find the boundaries over that of the forward pass, by rule.
        * ``dropped``: share of tiles dropped, by rule.
    """
    timed, opened = _timed(case["implementations"]), _timed(case["open_gates"])
    dense, cudnn = timed.get(_DENSE), timed.get(CUDNN)
    pruned = _own_by_rule(timed)
    bars: dict[str, dict] = {}
    if dense and cudnn:
        bars["dense_rate_over_cudnn"] = {part: cudnn[part]["ms"] / dense[part]["ms"] for part in _PARTS}
    if dense:
        bars["acp_over_kept"] = {
            rule: {part: one[part]["ms"] / (dense[part]["ms"] * one["tiles_kept"]) for part in _PARTS}
            for rule, one in pruned.items()
        }
    if _DENSE in opened:
        bars["vain_cost"] = {
            rule: {part: one[part]["ms"] / opened[_DENSE][part]["ms"] - 1.0 for part in _PARTS}
            for rule, one in _own_by_rule(opened).items()
        }
    bars["boundaries_of_forward"] = {
        rule: one["boundaries"]["ms"] / one["forward"]["ms"] for rule, one in pruned.items()
    }
    bars["dropped"] = {rule: 1.0 - one["tiles_kept"] for rule, one in pruned.items()}
    return {name: values for name, values in bars.items() if values}


def _timed(records: Sequence[Record]) -> dict[str, Record]:
    return {one["name"]: one for one in records if all(part in one for part in _PARTS)}


def _own_by_rule(records: Mapping[str, Record]) -> dict[str, Record]:
    return {rule: records[own_name(rule)] for rule in RULES if own_name(rule) in records}


def train_bars(steps: Sequence[Record]) -> dict[str, dict]:
    """Tokens per second with pruning over those without, by rule, for plain and for compiled steps.

    Returns:
        ``acp_speedup`` and ``acp_speedup_compiled``.
    """
    bars = {}
    for name, compiled in (("acp_speedup", False), ("acp_speedup_compiled", True)):
        timed = [one for one in steps if "step" in one and one["compiled"] == compiled]
        rates = {one["rule"]: one["tokens_per_second"] for one in timed}
        bars[name] = {rule: rates[rule] / rates[None] for rule in RULES if rule in rates and None in rates}
    return {name: values for name, values in bars.items() if values}
