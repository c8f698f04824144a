"""What a configuration says of attention and may change from call to call, read once for all layers of one."""

from typing import Any, NamedTuple

from ..kernels.pruning.rules import PruningRule, Rule
from .configuration_fox import DEFAULT_IMPLEMENTATION


class AttentionSettings(NamedTuple):
    """The part of a configuration that attention reads at each call.

    transformers looks at each attribute of a configuration twice as it is read, for the time of a launch.

    Attributes:
        implementation: of attention, a name in `IMPLEMENTATIONS`.
        eps: largest attention weight that a row may lose; None where attention is to leave nothing out.
        rule: by which keys are left out.
        reads_bound: whether the rule reads a bound of all logits.
        centers: whether the rule is given `centered` keys.
    """

    implementation: str
    eps: float | None
    rule: Rule
    reads_bound: bool
    centers: bool


def attention_settings(config: Any) -> AttentionSettings:
    """Those of a `FoxConfig`; that of a standalone layer may name no implementation."""
    reads_bound = PruningRule(config.acp_rule).reads_bound
    return AttentionSettings(
        implementation=config._attn_implementation or DEFAULT_IMPLEMENTATION,
        # Without forget gates nothing is forgotten.
        eps=None if config.forget_gate == "none" else config.acp_eps,
        rule=config.acp_rule,
        reads_bound=reads_bound,
        # Normalized keys have little in common. A bound of all logits gains nothing: the first key is far from others.
        centers=config.qk_norm == "none" and not reads_bound,
    )


__all__ = ["AttentionSettings", "attention_settings"]
