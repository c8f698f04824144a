"""The few figures that tell whether attention, training and decoding are as fast as they should be.

A figure is left out where what it needs was not measured.
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


# What is wanted of training on several H100 GPUs.
_SCALING_TARGET, _MFU_TARGET = 0.9, 0.45


def several_bars(results: Record) -> dict[str, dict]:
    """Figures of training on several GPUs, by name of the step.

    Returns:
        Each with ``value`` and, for the model, length and GPUs that it is wanted of, ``at_least``:

        * ``scaling_efficiency``: tokens per second over those of one GPU times the GPUs, the faster of a plain step and
          one under the same layout.
        * ``mfu``: model FLOPs per second of each GPU over its peak by the data sheet.
    """
    timed = [one for one in results["steps"] if "step" in one]
    wanted = {"scaling_efficiency": _SCALING_TARGET} if _is_760m(results) else {}
    wanted |= {"mfu": _MFU_TARGET} if _is_7b(results) else {}
    bars: dict[str, dict] = {"scaling_efficiency": {}, "mfu": {}}
    for one in (one for one in timed if one["gpus"] > 1):
        alone = [other["tokens_per_second"] for other in timed if other["gpus"] == 1 and other["name"] == one["name"]]
        if alone:
            bars["scaling_efficiency"][one["name"]] = one["tokens_per_second"] / (one["gpus"] * max(alone))
        if one["mfu"] is not None:
            bars["mfu"][one["name"]] = one["mfu"]
    return {
        bar: {
            name: {"value": value} | ({"at_least": wanted[bar]} if bar in wanted else {})
            for name, value in values.items()
        }
        for bar, values in bars.items()
        if values
    }


def _is_760m(results: Record) -> bool:
    whole = (results["sizes"]["hidden_size"], results["sizes"]["num_hidden_layers"]) == (1536, 24)
    alike = results["tokens"] == 16384 and results["gpus"] == 2 and not results["checkpointing"]
    return results["preset"] == "pro-760m" and whole and alike


def _is_7b(results: Record) -> bool:
    """Of the shape of Llama's 7B, with FoX's parts."""
    shape = (results["sizes"]["hidden_size"], results["sizes"]["num_hidden_layers"]) == (4096, 32)
    return shape and results["tokens"] == 32768 and results["gpus"] == 2 and results["checkpointing"]


def prefill_kind(way: Record) -> str:
    """What a way to take in a prompt is compared with: ``whole``, ``in_parts`` or ``compiled``."""
    return "in_parts" if way["chunked"] else "compiled" if way["compiled"] else "whole"


def prefill_bars(ways: Sequence[Record]) -> dict[str, dict]:
    """Ratios of prompt tokens per second, with the dynamic cache.

    Returns:
        By `prefill_kind`, ``acp_speedup`` (with pruning over without, by rule) and ``over_llama`` (over the plain
        Llama's, by rule, ``"none"`` without pruning).
    """
    bars: dict[str, dict] = {}
    timed = [one for one in ways if "first_token" in one and one["cache"] == "dynamic"]
    for kind in dict.fromkeys(prefill_kind(one) for one in timed):
        alike = [one for one in timed if prefill_kind(one) == kind]
        rates = {one["rule"]: one["tokens_per_second"] for one in alike if one["family"] == "foxlm"}
        llama = [one["tokens_per_second"] for one in alike if one["family"] == "Llama"]
        found = {
            "acp_speedup": {rule: rates[rule] / rates[None] for rule in RULES if rule in rates and None in rates},
            "over_llama": {rule or "none": rate / llama[0] for rule, rate in rates.items() if llama},
        }
        if any(found.values()):
            bars[kind] = {name: values for name, values in found.items() if values}
    return bars


# What is wanted of decoding with the 760M Pro after 14,336 tokens on an H100: "at_most" or "at_least", how much, and of
# which batch (None for any).
_DECODE_TARGETS: dict[str, tuple[str, float, int | None]] = {
    "step_ms": ("at_most", 2.5, 1),
    "tokens_per_second": ("at_least", 2000.0, 8),
    "acp_speedup": ("at_least", 1.8, 8),
    "paged_bytes": ("at_most", 0.4, None),
    "paged_rate": ("at_least", 0.9, None),
    "rate_over_llama": ("at_least", 2.0, 8),
    "largest_batch": ("at_least", 2.5, None),
}
# Milliseconds of a step by batch, without pruning and with, to compare with.
AUTHORS_DECODE_MS = {1: (55.0, 68.0), 8: (80.0, 58.0)}
AUTHORS_DECODE_SOURCE = "the authors' code on an H100, 760M Pro, 14,336 tokens"


def decode_bars(batch: Record) -> dict[str, dict]:
    """Figures of one batch of the decoding benchmark, with pruning by ``tight``, steps compiled on a GPU.

    Returns:
        By name, ``value`` and what is wanted at this batch, ``at_most`` or ``at_least``, if anything:

        * ``step_ms`` and ``tokens_per_second``: with the static cache.
        * ``acp_speedup``: its time without pruning over that with.
        * ``paged_bytes``: memory of the paged cache over that of all keys and values.
        * ``paged_rate``: tokens per second with the paged cache over those with the static one.
        * ``rate_over_llama``: tokens per second with the static cache over those of a plain Llama.
    """
    timed = {(one["family"], one["cache"], one["rule"]): one for one in batch["decoders"] if "step" in one}
    dense, pruned, paged, llama = (
        timed.get(key)
        for key in (
            ("foxlm", "static", None),
            ("foxlm", "static", "tight"),
            ("foxlm", "paged", "tight"),
            ("Llama", "static", None),
        )
    )
    values: dict[str, float] = {}
    if pruned:
        values |= {"step_ms": pruned["step"]["ms"], "tokens_per_second": pruned["tokens_per_second"]}
    if pruned and dense:
        values["acp_speedup"] = dense["step"]["ms"] / pruned["step"]["ms"]
    if paged:
        values["paged_bytes"] = paged["stored_bytes"] / batch["kv_bytes"]
    if paged and pruned:
        values["paged_rate"] = paged["tokens_per_second"] / pruned["tokens_per_second"]
    if pruned and llama:
        values["rate_over_llama"] = pruned["tokens_per_second"] / llama["tokens_per_second"]
    return {name: _decode_bar(name, value, batch["batch"]) for name, value in values.items()}


def largest_batch_bars(paged: int, static: int) -> dict[str, dict]:
    """``largest_batch``: largest batch with the paged cache over that with the static one, as in `decode_bars`."""
    return {"largest_batch": _decode_bar("largest_batch", paged / static, None)} if paged and static else {}


def _decode_bar(name: str, value: float, batch: int | None) -> dict[str, float]:
    relation, wanted, of_batch = _DECODE_TARGETS[name]
    return {"value": value} | ({relation: wanted} if of_batch in (None, batch) else {})
