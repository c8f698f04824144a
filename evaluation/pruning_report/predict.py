"""Floating-point operations of a model with and without pruning, and what that may gain in time.

The products of matrices are counted: of the linear layers, two operations a weight and token, and of attention, of
which causality leaves half. A backward pass takes two further products a linear layer, and five for attention's two.
Without measured rates only ratios of operations are given. With a file of ``foxlm bench attention`` the linear layers
are taken to run at the matrix product's rate there, and attention at the rate that it reached, without pruning and, on
the tiles it kept, with. What is no matrix product (norms, optimizer, launches) is left out: it takes time with and
without pruning, so a real gain is smaller.
"""

import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foxlm.kernels.pruning.rules import Rule

from ..results import parse_json
from ..speed.inputs import Case
from ..speed.own import own_name

# Products of a forward and backward pass, to those of the forward pass.
_LINEAR_TRAINING, _ATTENTION_TRAINING = 3.0, 3.5
_PARTS = ("forward", "forward_backward")


def count_flops(model: PreTrainedModel, length: int) -> dict[str, float]:
    """Operations of a forward pass over a sequence of ``length`` tokens: ``linear``, and dense causal ``attention``."""
    config: Any = model.config
    heads, _, head_dim = config.heads
    weights = sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, nn.Linear)
    )
    return {
        "linear": 2.0 * weights * length,
        "attention": config.num_hidden_layers * Case(1, heads, head_dim, length).flops(backward=False),
    }


def shares_of_flops(flops: dict[str, float], kept: float) -> dict[str, dict[str, float]]:
    """What pruning leaves of the operations.

    Args:
        flops: of `count_flops`.
        kept: share of attention's tiles that are kept.

    Returns:
        For ``forward`` and ``forward_backward``: ``attention_share``, attention's part without pruning; ``left``, the
        share of all operations that pruning leaves; ``speedup``, its inverse: the gain if all ran at one rate.
    """
    found = {}
    for part in _PARTS:
        linear, attention = _operations(flops, part)
        left = (linear + kept * attention) / (linear + attention)
        found[part] = {"attention_share": attention / (linear + attention), "left": left, "speedup": 1.0 / left}
    return found


def _operations(flops: dict[str, float], part: str) -> tuple[float, float]:
    if part == "forward":
        return flops["linear"], flops["attention"]
    return _LINEAR_TRAINING * flops["linear"], _ATTENTION_TRAINING * flops["attention"]


def predict_times(
    flops: dict[str, float], kept: float, rule: Rule, head_dim: int, length: int, bench: Path
) -> dict[str, Any]:
    """Times of a sequence by measured rates.

    Args:
        flops, kept: as of `shares_of_flops`.
        rule: that is pruned by.
        head_dim, length: of the model and the text; the measured case that is closest is taken, by the size of heads
            first.
        bench: JSON of ``foxlm bench attention``.

    Returns:
        ``source``, ``device`` and ``case`` of the rates, ``case_kept``, and for each part the milliseconds ``linear``,
        ``attention``, ``attention_pruned``, and ``speedup`` of all.

    Raises:
        ValueError: ``bench`` holds something else, or not the rates of this library without pruning and by ``rule``.
        OSError: it cannot be read.
    """
    results = parse_json(bench)
    if not isinstance(results, dict) or results.get("kind") != "attention" or "cases" not in results:
        raise ValueError(f"{bench} must be written by foxlm bench attention")
    usable = {Case.parse(one["case"]): one for one in results["cases"] if _timed(one, rule) is not None}
    if not usable:
        raise ValueError(f"{bench} has no case that measured {own_name(None)!r} and {own_name(rule)!r}")
    case = min(usable, key=lambda one: _distance(one, head_dim, length))
    timed = _timed(usable[case], rule)
    assert timed is not None, "only such cases are usable"
    dense, pruned, ceiling = timed
    found: dict[str, Any] = {
        "source": bench.name,
        "device": results["run"]["device"],
        "commit": results["run"]["commit"],
        "case": str(case),
        "case_kept": pruned["tiles_kept"],
    }
    for part in _PARTS:
        linear, attention = _operations(flops, part)
        linear_ms = linear / ceiling / 1e9
        dense_ms = attention / dense[part]["dense_tflops"] / 1e9
        pruned_ms = kept * attention / pruned[part]["done_tflops"] / 1e9
        found[part] = {
            "linear": linear_ms,
            "attention": dense_ms,
            "attention_pruned": pruned_ms,
            "speedup": (linear_ms + dense_ms) / (linear_ms + pruned_ms),
        }
    return found


def _timed(case: dict[str, Any], rule: Rule) -> tuple[dict[str, Any], dict[str, Any], float] | None:
    records = {one["name"]: one for one in case.get("implementations", ()) if all(part in one for part in _PARTS)}
    dense, pruned = records.get(own_name(None)), records.get(own_name(rule))
    if dense is None or pruned is None or not case.get("ceiling_tflops"):
        return None
    return dense, pruned, case["ceiling_tflops"]


def _distance(case: Case, head_dim: int, length: int) -> tuple[float, float]:
    return abs(math.log(case.head_dim / head_dim)), abs(math.log(case.tokens / length))
