"""FlexAttention with the decay as a bias and pruning as a block mask: what torch alone offers a FoX."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from foxlm.kernels.decay import accumulate

from .inputs import Inputs

BLOCK = 128


def compiled_attention(inputs: Inputs, first: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention over ``[B, H, T, D]``; no gradient reaches the gates.

    Args:
        inputs: whose gates become the bias.
        first: ``[B, H, T / BLOCK]`` first block of keys that each block of queries keeps; all of them by default.
    """
    c = accumulate(inputs.gates_of_queries())[0].float()
    mask = causal_block_mask(c, first)
    # torch has no annotations for compiled functions.
    attend: Callable = torch.compile(flex_attention, dynamic=False)
    grouped = inputs.k.shape[2] != inputs.q.shape[2]

    def decay(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + (c[b, h, i] - c[b, h, j])

    return lambda q, k, v, log_f: attend(
        q, k, v, score_mod=decay, block_mask=mask, scale=inputs.scale, enable_gqa=grouped
    )


def causal_block_mask(c: Tensor, first: Tensor | None) -> BlockMask:
    """The blocks that each block of queries keeps, one range that ends on the diagonal.

    Args:
        c: ``[B, H, T]``, for its shape.
        first: as for `compiled_attention`.
    """
    batch, heads, tokens = c.shape
    if tokens % BLOCK:
        raise ValueError(f"FlexAttention is compared at multiples of {BLOCK} tokens, got {tokens}")
    blocks = tokens // BLOCK
    index = torch.arange(blocks, device=c.device)
    if first is None:
        first = torch.zeros(batch, heads, blocks, dtype=torch.int64, device=c.device)
    columns = index.expand(batch, heads, blocks, blocks)
    # Entries beyond a row's count are not read, but must be blocks that exist.
    below = (columns + first[..., None]).clamp(max=blocks - 1)
    diagonal = (columns + index[:, None]).clamp(max=blocks - 1)
    return BlockMask.from_kv_blocks(
        torch.ones_like(first, dtype=torch.int32),
        diagonal.int(),
        (index - first).int(),
        below.int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_causal,
    )


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j
