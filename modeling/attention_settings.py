"""What a configuration says of attention and may change from call to call, read once for all layers of one."""

from collections.abc import Iterator
from contextlib import contextmanager
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
        least_pairs: pairs of query and key from which on attention without a cache's view is pruned: see `prunes`.
    """

    implementation: str
    eps: float | None
    rule: Rule
    reads_bound: bool
    centers: bool
    least_pairs: int

    def prunes(self, rows: int, queries: int, keys: int) -> bool:
        """Whether these are enough for a search for what may be left out to pay.

        Args:
            rows: sequences times query heads.
            queries: of a row, the last of its keys.
            keys: of a row.
        """
        return self.eps is not None and rows * queries * (2 * keys - queries) >= 2 * self.least_pairs


# About 0.2 ms of attention on an H100, less than a host takes to launch the search. 24 heads of one sequence of 4,096
# tokens have 2.0e8: with a search in each of its 24 layers a 760M model took 30 ms for such a prompt, without 20.
_least_pairs = 2**28


@contextmanager
def pruned_at_any_length() -> Iterator[None]:
    """Prunes short prompts too while it is open: so that they launch what long ones do, to be compiled or tested."""
    global _least_pairs
    before, _least_pairs = _least_pairs, 0
    try:
        yield
    finally:
        _least_pairs = before


def attention_settings(config: Any, learns: bool = True) -> AttentionSettings:
    """Those of a `FoxConfig`; that of a standalone layer may name no implementation.

    Args:
        config: of the model.
        learns: whether there is a backward pass, or may be one.

    Raises:
        ValueError: ``acp_eps`` was set to what pruning cannot go by after the configuration was made.
    """
    eps = config.acp_eps
    if eps is not None and not 0.0 < eps < 1.0:
        raise ValueError(f"acp_eps must be a number in (0, 1), or None, which turns pruning off, got {eps!r}")
    reads_bound = PruningRule(config.acp_rule).reads_bound
    return AttentionSettings(
        implementation=config._attn_implementation or DEFAULT_IMPLEMENTATION,
        # Without forget gates nothing is forgotten.
        eps=None if config.forget_gate == "none" else eps,
        # To measure takes longer than a forward pass alone saves by it; `tight` is what it begins with.
        rule=config.acp_rule if learns or config.acp_rule != "measured" else "tight",
        reads_bound=reads_bound,
        # Normalized keys have little in common. A bound of all logits gains nothing: the first key is far from others.
        centers=config.qk_norm == "none" and not reads_bound,
        # A backward pass saves more than twice as much.
        least_pairs=0 if learns else _least_pairs,
    )


__all__ = ["AttentionSettings", "attention_settings", "pruned_at_any_length"]
