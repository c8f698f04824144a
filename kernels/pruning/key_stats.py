"""What a cache keeps of all keys so that pruning need not read them again: a few values for each block of 64 tokens.

They are what the rules of pruning read of the keys before a boundary; a new token changes only those of its block.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..tiles import PRUNED_KEYS
from .rounding import SHORTEST_LENGTH


class KeySummary(NamedTuple):
    """What pruning must know of all keys up to the end of each block of 64; blocks to come may hold anything.

    Attributes:
        c: ``[B, Hf, N]`` float64, running sum at the last key of each block.
        log_decays: ``[B, Hf, N]`` float64, ``log sum_j exp(-c_j)`` over all keys up to there.
        largest: ``[B, G, N]`` float32, ``max_j |k_j|`` over the same keys, at least `rounding.SHORTEST_LENGTH`.
    """

    c: Tensor
    log_decays: Tensor
    largest: Tensor


Running = tuple[Tensor, Tensor]
"""``log sum_j exp(-c_j)``, ``[B, Hf]`` float64, and ``max_j |k_j|``, ``[B, G]`` float32, over all keys so far."""


def empty_summary(c: Tensor, k: Tensor, tokens: int) -> tuple[KeySummary, Running]:
    """The summary of no keys, with room for ``tokens``.

    Args:
        c: any tensor ``[B, Hf, ...]`` on the right device.
        k: any tensor ``[B, G, ...]``.
        tokens: how many keys there may be.
    """
    blocks = -(-tokens // PRUNED_KEYS)
    # Two tensors: torch.compile treats parts of one as one.
    last_c, log_decays = (c.new_zeros(*c.shape[:2], blocks, dtype=torch.float64) for _ in range(2))
    largest = k.new_zeros(*k.shape[:2], blocks, dtype=torch.float32)
    no_decays = c.new_full(c.shape[:2], float("-inf"), dtype=torch.float64)
    return KeySummary(last_c, log_decays, largest), (no_decays, largest.new_full(k.shape[:2], SHORTEST_LENGTH))


def extend_summary(summary: KeySummary, running: Running, c: Tensor, k: Tensor, position: int | Tensor) -> Running:
    """Take in new tokens, in place, without waiting for the device.

    Padding may be among them: it only makes the bounds looser.

    Args:
        summary: of the tokens before; with room for these.
        running: over the tokens before.
        c: ``[B, Hf, T]`` float64 running sums of log gates at the new tokens.
        k: ``[B, G, T, D]`` their keys.
        position: index of the first of them; a tensor is one int64.

    Returns:
        Over all tokens.
    """
    tokens = c.shape[-1]
    norms = torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32)).float()
    log_decays, largest = running
    if tokens == 1:
        log_decays = torch.logaddexp(log_decays, -c[..., 0])
        largest = torch.maximum(largest, norms[..., 0])
        _write(summary, position // PRUNED_KEYS, (c, log_decays[..., None], largest[..., None]))
        return log_decays, largest

    if isinstance(position, int):
        return _extend_by_blocks(summary, running, c, norms, position)
    first_block, last_block = position // PRUNED_KEYS, (position + tokens - 1) // PRUNED_KEYS
    # As many as they may touch. Those too many repeat the last one, and write the same values there.
    count = (tokens + PRUNED_KEYS - 2) // PRUNED_KEYS + 1
    blocks = first_block + torch.arange(count, device=c.device)
    index = blocks[:, None] * PRUNED_KEYS + torch.arange(PRUNED_KEYS, device=c.device) - position
    is_new = (index >= 0) & (index < tokens)
    index = index.clamp(0, tokens - 1)
    of_block = (-c)[..., index].masked_fill(~is_new, float("-inf")).logsumexp(-1)
    log_decays = torch.cat([log_decays[..., None], of_block], dim=-1).logcumsumexp(-1)[..., 1:]
    of_block = norms[..., index].masked_fill(~is_new, 0.0).amax(-1)
    largest = torch.cat([largest[..., None], of_block], dim=-1).cummax(-1).values[..., 1:]
    _write(summary, torch.minimum(blocks, last_block), (c[..., index[:, -1]], log_decays, largest))
    return log_decays[..., -1], largest[..., -1]


def _extend_by_blocks(summary: KeySummary, running: Running, c: Tensor, norms: Tensor, position: int) -> Running:
    """As `extend_summary` where the host knows the position: half as many operators."""
    before, after = position % PRUNED_KEYS, -(position + c.shape[-1]) % PRUNED_KEYS

    def in_blocks(x: Tensor, fill: float) -> Tensor:
        return nn.functional.pad(x, (before, after), value=fill).unflatten(-1, (-1, PRUNED_KEYS))

    log_decays, largest = (x[..., None] for x in running)
    log_decays = torch.cat([log_decays, in_blocks(-c, float("-inf")).logsumexp(-1)], dim=-1).logcumsumexp(-1)[..., 1:]
    largest = torch.cat([largest, in_blocks(norms, 0.0).amax(-1)], dim=-1).cummax(-1).values[..., 1:]
    ends = c[..., PRUNED_KEYS - 1 - before :: PRUNED_KEYS]
    if after:
        ends = torch.cat([ends, c[..., -1:]], dim=-1)
    for held, new in zip(summary, (ends, log_decays, largest), strict=True):
        held.narrow(-1, position // PRUNED_KEYS, new.shape[-1]).copy_(new)
    return log_decays[..., -1], largest[..., -1]


def running_before(summary: KeySummary, block: int) -> Running:
    """What was running before ``block``, as a summary from there on begins with."""
    if block:
        return summary.log_decays[..., block - 1], summary.largest[..., block - 1]
    nothing = summary.log_decays.new_full(summary.log_decays.shape[:2], float("-inf"))
    return nothing, summary.largest.new_full(summary.largest.shape[:2], SHORTEST_LENGTH)


def _write(summary: KeySummary, blocks: int | Tensor, values: tuple[Tensor, Tensor, Tensor]) -> None:
    for held, new in zip(summary, values, strict=True):
        if isinstance(blocks, int):
            held.narrow(-1, blocks, 1).copy_(new)
        else:
            held.index_copy_(-1, blocks.reshape(-1), new)
