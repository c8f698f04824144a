"""What the rules' definitions in PyTorch do with heads and with blocks of queries."""

import torch
from torch import Tensor


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """``[B, Hf, T, ...] -> [B, H, T, ...]``: what query heads share, for each of ``heads``."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def block_minimum(x: Tensor, block: int) -> Tensor:
    """Minimum over each block of the last dimension, the last block as long as it is."""
    padding = x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % block)
    return torch.cat([x, padding], dim=-1).unflatten(-1, (-1, block)).amin(-1)


def of_each_query(x: Tensor, block: int, queries: int) -> Tensor:
    """What a block of queries has, for each of its queries."""
    return x.repeat_interleave(block, dim=-1)[..., :queries]
