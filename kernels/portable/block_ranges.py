"""Which blocks of queries attend to which blocks of keys, and in which order heads are computed, in Triton.

For every forward and backward kernel (names: `triton_common`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Tile, cdiv
from ..triton_common import INT32_MAX, kernel

# Up to so many heads, a program for each finds its place; every one of them adds up the work of all.
_ORDERED_HEADS = 128
# Blocks of keys of a program of `_query_range_kernel`, and blocks of queries that it looks at at a time.
_RANGE_CHUNK = 64


@kernel
def _kv_start_range_kernel(KV_START, LAST, LEAST, GREATEST, s_b, s_h, H, START_GROUP, TQ, NM, BLOCK_M: tl.constexpr):
    """Least and greatest ``kv_start`` of a block of queries."""
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_start = KV_START + (i_bh // H).to(tl.int64) * s_b + (i_bh % H // START_GROUP).to(tl.int64) * s_h
    beyond = tl.load(LAST) + TQ
    least = tl.min(tl.load(p_start + o_m, mask=o_m < TQ, other=beyond), 0)
    greatest = tl.max(tl.load(p_start + o_m, mask=o_m < TQ, other=0), 0)
    tl.store(LEAST + i_bh * NM + i_m, least.to(tl.int32))
    tl.store(GREATEST + i_bh * NM + i_m, greatest.to(tl.int32))


def kv_start_ranges(kv_start: Tensor, last: Tensor, heads: int, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest ``kv_start`` of each block of queries.

    Args:
        kv_start: ``[B, H or Hf or 1, Tq]`` int64, contiguous along the last dimension.
        last: ``[Tq]`` int64, diagonal key of each query.
        heads: number of query heads.
        block: queries of a block.

    Returns:
        ``[B, H, ceil(Tq / block)]`` int32 each.
    """
    batch, start_heads, queries = kv_start.shape
    blocks = cdiv(queries, block)
    least, greatest = torch.empty(2, batch, heads, blocks, dtype=torch.int32, device=kv_start.device).unbind()
    _kv_start_range_kernel[(batch * heads, blocks)](
        KV_START=kv_start, s_b=kv_start.stride(0), s_h=kv_start.stride(1),
        LAST=last,
        LEAST=least,
        GREATEST=greatest,
        H=heads,
        START_GROUP=heads // start_heads,
        TQ=queries,
        NM=blocks,
        BLOCK_M=block,
        num_warps=1,
    )  # fmt: skip
    return least, greatest


@kernel
def _query_range_kernel(
    LEAST,
    GREATEST,
    LAST,
    M_END,
    M_FULL_END,
    NM,
    NN,
    TK,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For ``CHUNK`` blocks of keys: the results of `query_ranges`, from those of `kv_start_ranges`."""
    i_bh = tl.program_id(0)
    o_n = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    offset = tl.load(LAST).to(tl.int32)
    m_begin = tl.maximum(o_n * BLOCK_N - offset, 0) // BLOCK_M
    last_key = tl.minimum((o_n + 1) * BLOCK_N, TK) - 1
    full_begin = tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_M)
    m_end = m_begin
    full_end = tl.full([CHUNK], 0, tl.int32) + NM
    for chunk in range(0, NM, CHUNK):
        o_m = chunk + tl.arange(0, CHUNK)
        least = tl.load(LEAST + i_bh * NM + o_m, mask=o_m < NM, other=INT32_MAX)
        greatest = tl.load(GREATEST + i_bh * NM + o_m, mask=o_m < NM, other=0)
        attends = (least[None, :] < ((o_n + 1) * BLOCK_N)[:, None]) & (o_m[None, :] >= m_begin[:, None])
        m_end = tl.maximum(m_end, tl.max(tl.where(attends, o_m[None, :] + 1, 0), 1))
        is_masked = (greatest[None, :] > (o_n * BLOCK_N)[:, None]) & (o_m[None, :] >= full_begin[:, None])
        full_end = tl.minimum(full_end, tl.min(tl.where(is_masked, o_m[None, :], NM), 1))
    tl.store(M_END + i_bh * NN + o_n, m_end, mask=o_n < NN)
    tl.store(M_FULL_END + i_bh * NN + o_n, full_end, mask=o_n < NN)


def query_ranges(least: Tensor, greatest: Tensor, last: Tensor, keys: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """For each block of keys, the blocks of queries that attend to it and those whose tiles with it are full.

    Args:
        least, greatest: of `kv_start_ranges`, ``[B, H, ceil(Tq / tile.queries)]``.
        last: ``[Tq]`` int64, diagonal key of each query.
        keys: number of keys.
        tile: sizes of the blocks.

    Returns:
        One past the last block of queries that attends to it, and the first one past the diagonal that holds a
        ``kv_start`` within it: ``[B, H, ceil(Tk / tile.keys)]`` int32 each.
    """
    batch, heads, blocks = least.shape
    key_blocks = cdiv(keys, tile.keys)
    m_end, full_end = torch.empty(2, batch, heads, key_blocks, dtype=torch.int32, device=least.device).unbind()
    _query_range_kernel[(batch * heads, cdiv(key_blocks, _RANGE_CHUNK))](
        LEAST=least,
        GREATEST=greatest,
        LAST=last,
        M_END=m_end,
        M_FULL_END=full_end,
        NM=blocks,
        NN=key_blocks,
        TK=keys,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        CHUNK=_RANGE_CHUNK,
    )
    return m_end, full_end


@triton.jit
def _sums_of_rows(LEAST, o_h, HEADS, NM, HEADS_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of ``LEAST`` over the blocks of each of the heads ``o_h``, ``[HEADS_AT_ONCE]`` int64."""
    totals = tl.zeros([HEADS_AT_ONCE], tl.int64)
    for begin in range(0, NM, BLOCK):
        o_m = begin + tl.arange(0, BLOCK)
        m_least = (o_h[:, None] < HEADS) & (o_m[None, :] < NM)
        totals += tl.sum(tl.load(LEAST + o_h[:, None] * NM + o_m[None, :], mask=m_least, other=0).to(tl.int64), 1)
    return totals


@kernel
def _head_order_kernel(LEAST, HEAD_ORDER, HEADS, NM, HEADS_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Heads by rising sums of ``LEAST``, a program for each; one launch, where PyTorch needs eight for sum and sort."""
    i_h = tl.program_id(0)
    own = tl.sum(_sums_of_rows(LEAST, i_h + tl.zeros([1], tl.int32), HEADS, NM, 1, BLOCK), 0)
    rank = 0
    for begin in range(0, HEADS, HEADS_AT_ONCE):
        o_h = begin + tl.arange(0, HEADS_AT_ONCE)
        totals = _sums_of_rows(LEAST, o_h, HEADS, NM, HEADS_AT_ONCE, BLOCK)
        is_heavier = (totals < own) | ((totals == own) & (o_h < i_h))
        rank += tl.sum((is_heavier & (o_h < HEADS)).to(tl.int32), 0)
    tl.store(HEAD_ORDER + rank, i_h.to(tl.int64))


def heaviest_first(least: Tensor) -> Tensor:
    """Order of heads by falling work.

    Args:
        least: contiguous ``[heads, blocks]`` int32, least ``kv_start`` of each block of a head's queries.

    Returns:
        ``[heads]`` int64.
    """
    heads, blocks = least.shape
    if heads > _ORDERED_HEADS:
        return least.sum(-1).argsort(stable=True)
    order = torch.empty(heads, dtype=torch.int64, device=least.device)
    _head_order_kernel[(heads,)](
        LEAST=least,
        HEAD_ORDER=order,
        HEADS=heads,
        NM=blocks,
        HEADS_AT_ONCE=32,
        BLOCK=128,
        num_warps=4,
    )
    return order
