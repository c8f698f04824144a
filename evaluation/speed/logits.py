"""The gate before a whole model is timed: are its logits those of dense attention without a cache?"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foxlm import FoxForCausalLM
from foxlm.kernels.pruning.rules import Rule

from .implementations import EPS
from .runner import Record

DTYPE = torch.bfloat16
# Context of the check, which has a dense reference.
CHECKED_TOKENS = 512
# How much worse than bfloat16 with dense attention and without a cache logits may be.
_FACTOR = 4.0


class LogitsCheck:
    """Holds logits of several models on the same tokens to those of dense attention in float32."""

    def __init__(self) -> None:
        self._references: dict[str, tuple[Tensor, float]] = {}

    def fault(
        self, family: str, model: PreTrainedModel, ids: Tensor, found: Tensor, rule: Rule | None, record: Record
    ) -> str | None:
        """What is wrong, in words; None if nothing is. Adds ``error`` and ``limit`` to ``record``.

        Args:
            family: of the model: those of one family share a reference, and their tokens.
            model: in bfloat16.
            ids: ``[B, T]`` tokens.
            found: ``[B, N, V]`` logits of the last ``N`` of them.
            rule: of pruning, which may take some weight from each row.
            record: of what is checked.
        """
        if family not in self._references:
            self._references[family] = dense_logits(model, ids, found.shape[1])
        exact, rounding = self._references[family]
        error = largest_error(found, exact)
        limit = _FACTOR * (rounding + (0.0 if rule is None else EPS))
        record |= {"error": error, "limit": limit}
        # Not the other way round: a NaN is within no limit.
        return None if error <= limit else f"logits are off by {error:.1e}, {limit:.1e} allowed"


@torch.no_grad()
def dense_logits(model: PreTrainedModel, ids: Tensor, count: int) -> tuple[Tensor, float]:
    """Logits of the last ``count`` tokens from float32 and dense attention, without a cache.

    Args:
        model: in bfloat16.
        ids: ``[B, T]`` tokens.
        count: of logits.

    Returns:
        ``[B, count, V]`` float32, and `largest_error` of the same in bfloat16.
    """
    results = []
    for dtype in (torch.float32, DTYPE):
        # A copy in the latter case too: FoX keeps its gates in float32, and `to` would not.
        dense = copy.deepcopy(model)
        if dtype == torch.float32:
            dense.float()
        dense.set_attn_implementation("eager")
        if isinstance(dense, FoxForCausalLM):
            dense.config.acp_eps = None
        results.append(dense(input_ids=ids, use_cache=False, logits_to_keep=count).logits)
        del dense
    exact, rounded = results
    return exact, largest_error(rounded, exact)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest ``|found - exact| / |exact|`` of any token, over logits ``[B, T, V]``; NaN if ``found`` has one."""
    exact = exact.double()
    return ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
