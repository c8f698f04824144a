"""What the benchmark asks of an attention to be compared, and of pruning: by which rule, counted in which tiles.

What an implementation needs beside its inputs (a compiled function, a block mask, running sums for a bias) is prepared
before it is timed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from foxlm.kernels.pruning.rules import Rule, first_kept, share_skipped
from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES

from .inputs import Inputs

# Largest attention weight that a row may lose: below bfloat16's own rounding.
EPS = math.exp(-10.0)
# Queries and keys of the tiles that are counted: what kernels drop at a time.
TILE = (PRUNED_QUERIES, PRUNED_KEYS)
RULES: tuple[Rule, ...] = ("paper", "tight")

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Output from q, k, v and log_f."""


class Named(Protocol):
    @property
    def name(self) -> str: ...


NamedType = TypeVar("NamedType", bound=Named)


def with_names(known: Sequence[NamedType], names: Sequence[str]) -> list[NamedType]:
    """Those of ``known`` whose names contain one of ``names``; all of them for none.

    Raises:
        ValueError: one of ``names`` is part of no name.
    """
    for name in names:
        if not any(name.lower() in one.name.lower() for one in known):
            raise ValueError(f"--only must be part of one of {[one.name for one in known]}, got {name!r}")
    return [one for one in known if not names or any(name.lower() in one.name.lower() for name in names)]


def all_tiles(inputs: Inputs) -> float:
    """The share that is kept without pruning."""
    return 1.0


def _anywhere(device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute causal attention.

    Attributes:
        name: as it appears in tables.
        prepare: makes the function to time from the inputs.
        gated: whether the output depends on the forget gates.
        gate_gradient: whether their gradient is computed.
        head_first: whether it takes ``[B, H, T, D]`` instead of ``[B, T, H, D]``.
        eps: attention weight that a row may lose by pruning.
        rule: of pruning, None without.
        tiles_kept: share of the causal tiles that it computes.
        tiles_expected: share that its rule keeps; None where `tiles_kept` is that by construction.
        boundaries: makes a function that only searches what each query keeps, to be timed by itself.
        missing: why it cannot run on a device, None if it can.
    """

    name: str
    prepare: Callable[[Inputs], Attend]
    gated: bool = True
    gate_gradient: bool = True
    head_first: bool = False
    eps: float = 0.0
    rule: Rule | None = None
    tiles_kept: Callable[[Inputs], float] = all_tiles
    tiles_expected: Callable[[Inputs], float] | None = None
    boundaries: Callable[[Inputs], Callable[[], object]] | None = None
    missing: Callable[[str], str | None] = _anywhere


def pruning_options(inputs: Inputs, rule: Rule | None) -> dict[str, Any]:
    """How this library is told to prune by ``rule``, or not to."""
    if rule is None:
        return {}
    bound = {"logit_bound": inputs.logit_bound} if rule == "paper" else {}
    return {"eps": EPS, "rule": rule, **bound}


def share_kept(first: Tensor, tokens: int, tile: tuple[int, int] = TILE) -> float:
    """Share of the tiles that are kept where each block of queries keeps the keys from ``first`` on.

    Args:
        first: ``[B, H, ceil(T / tile[0])]``.
        tokens: ``T``.
        tile: queries and keys of a tile.
    """
    return 1.0 - share_skipped(first, tokens, *tile).mean().item()


def share_of_tiles(first: Tensor) -> float:
    """Share of the tiles that are kept where each query of a whole sequence keeps the keys from ``first`` on.

    Args:
        first: ``[B, H, T]``, alike within each block of queries.
    """
    tokens, block_q = first.shape[-1], TILE[0]
    # A last block that is not full repeats its last query.
    padded = torch.cat([first, first[..., -1:].expand(*first.shape[:-1], -tokens % block_q)], dim=-1)
    return share_kept(padded.unflatten(-1, (-1, block_q)).amin(-1), tokens)


def first_by_definition(inputs: Inputs, rule: Rule, tile: tuple[int, int] = TILE) -> Tensor:
    """First key that each block of queries keeps by the definition of ``rule``, ``[B, H, ceil(T / tile[0])]``."""
    block_q, block_k = tile
    options = pruning_options(inputs, rule)
    keys = inputs.searched_keys(rule)
    return first_kept(inputs.q, keys, inputs.log_f, scale=inputs.scale, block_q=block_q, block_k=block_k, **options)
