"""Which blocks of queries attend to which blocks of keys, their sums, and in which order heads are computed, in Triton.

For every forward and backward kernel (names: `triton_common`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, cdiv
from ..triton_common import INF, INT32_MAX, LOG2_E, kernel

# Up to so many heads, a program for each finds its place; every one of them adds up the work of all.
_ORDERED_HEADS = 512
# Blocks of keys of a program of `_query_range_kernel`, and blocks of queries that it looks at at a time.
_RANGE_CHUNK = 64


class DescribedBlocks(NamedTuple):
    """What kernels of attention must know of blocks before they begin.

    Attributes:
        least, greatest: ``[B, H, ceil(Tq / queries)]`` int32, of ``kv_start`` in each block of queries.
        base: ``[B, Hf, ceil(Tk / keys)]`` float64, the running sum at the last visible key of each block of keys, 0 if
            all are hidden; in units of log 2, as the next.
        relative: ``[B, Hf, Tk]`` float32, running sums relative to ``base``; for the forward pass.
        counter: ``[1]`` int32 zero, for a dynamic scheduler. A new tensor for each launch: that holds in CUDA graphs,
            on several streams, and after a launch that was cut short.
    """

    least: Tensor
    greatest: Tensor
    base: Tensor
    relative: Tensor
    counter: Tensor


@kernel
def _describe_blocks_kernel(
    KV_START, LAST, C_K, LEAST, GREATEST, BASE, RELATIVE, WORK_COUNTER,
    s_b, s_h, ck_b, ck_h,
    TQ, TK, H, HF, START_GROUP, GATE_GROUP, NM, NB,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`DescribedBlocks`: a program has a head's block of queries, and of keys, for the first head of each gate."""
    i_bh, i_block = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    p_start = KV_START + i_b.to(tl.int64) * s_b + (i_h // START_GROUP).to(tl.int64) * s_h
    beyond = tl.load(LAST) + TQ
    least = tl.min(tl.load(p_start + o_m, mask=o_m < TQ, other=beyond), 0)
    greatest = tl.max(tl.load(p_start + o_m, mask=o_m < TQ, other=0), 0)
    tl.store(LEAST + i_bh * NM + i_block, least.to(tl.int32), mask=i_block < NM)
    tl.store(GREATEST + i_bh * NM + i_block, greatest.to(tl.int32), mask=i_block < NM)

    i_gate = i_h // GATE_GROUP
    is_first = i_h % GATE_GROUP == 0
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = (o_n < TK) & is_first
    p_ck = C_K + i_b.to(tl.int64) * ck_b + i_gate.to(tl.int64) * ck_h
    c = tl.load(p_ck + o_n, mask=m_k, other=INF) * LOG2_E
    # c never increases, so the minimum over the block is at its last visible key.
    base = tl.min(c, 0)
    base = tl.where(base == INF, 0.0, base)
    i_row = i_b * HF + i_gate
    tl.store(BASE + i_row * NB + i_block, base, mask=is_first & (i_block < NB))
    tl.store(RELATIVE + i_row.to(tl.int64) * TK + o_n, (c - base).to(tl.float32), mask=m_k)
    tl.store(WORK_COUNTER, 0, mask=(i_bh == 0) & (i_block == 0))


def describe_blocks(decay: Decay, heads: int, queries: int, keys: int) -> DescribedBlocks:
    """Describe the blocks of one launch of attention, in one launch.

    Args:
        decay: contiguous along the last dimensions.
        heads: number of query heads.
        queries, keys: of a block.
    """
    (batch, start_heads, length), gates = decay.kv_start.shape, decay.key.shape[1]
    query_blocks, key_blocks = cdiv(length, queries), cdiv(decay.key.shape[2], keys)
    device = decay.key.device
    least, greatest = torch.empty(2, batch, heads, query_blocks, dtype=torch.int32, device=device).unbind()
    described = DescribedBlocks(
        least=least,
        greatest=greatest,
        base=torch.empty(batch, gates, key_blocks, dtype=torch.float64, device=device),
        relative=torch.empty(decay.key.shape, dtype=torch.float32, device=device),
        counter=torch.empty(1, dtype=torch.int32, device=device),
    )
    _describe_blocks_kernel[(batch * heads, max(query_blocks, key_blocks))](
        KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
        LAST=decay.last,
        C_K=decay.key, ck_b=decay.key.stride(0), ck_h=decay.key.stride(1),
        LEAST=least,
        GREATEST=greatest,
        BASE=described.base,
        RELATIVE=described.relative,
        WORK_COUNTER=described.counter,
        TQ=length,
        TK=decay.key.shape[2],
        H=heads,
        HF=gates,
        START_GROUP=heads // start_heads,
        GATE_GROUP=heads // gates,
        NM=query_blocks,
        NB=key_blocks,
        BLOCK_M=queries,
        BLOCK_N=keys,
        num_warps=1,
    )  # fmt: skip
    return described


@triton.jit
def _sums_of_rows(LEAST, o_h, HEADS, NM, HEADS_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of ``LEAST`` over the blocks of each of the heads ``o_h``, ``[HEADS_AT_ONCE]`` int64."""
    totals = tl.zeros([HEADS_AT_ONCE], tl.int64)
    for begin in range(0, NM, BLOCK):
        o_m = begin + tl.arange(0, BLOCK)
        m_least = (o_h[:, None] < HEADS) & (o_m[None, :] < NM)
        totals += tl.sum(tl.load(LEAST + o_h[:, None] * NM + o_m[None, :], mask=m_least, other=0).to(tl.int64), 1)
    return totals


@triton.jit
def _store_place(LEAST, HEAD_ORDER, i_h, HEADS, NM):
    """Put a head where it belongs by rising sums of ``LEAST``; PyTorch needs eight launches for sum and sort."""
    HEADS_AT_ONCE: tl.constexpr = 32
    BLOCK: tl.constexpr = 128
    own = tl.sum(_sums_of_rows(LEAST, i_h + tl.zeros([1], tl.int32), HEADS, NM, 1, BLOCK), 0)
    rank = 0
    for begin in range(0, HEADS, HEADS_AT_ONCE):
        o_h = begin + tl.arange(0, HEADS_AT_ONCE)
        totals = _sums_of_rows(LEAST, o_h, HEADS, NM, HEADS_AT_ONCE, BLOCK)
        is_heavier = (totals < own) | ((totals == own) & (o_h < i_h))
        rank += tl.sum((is_heavier & (o_h < HEADS)).to(tl.int32), 0)
    tl.store(HEAD_ORDER + rank, i_h)


@kernel
def _query_range_kernel(
    LEAST,
    GREATEST,
    LAST,
    M_END,
    M_FULL_END,
    HEAD_ORDER,
    HEADS,
    KV_GROUP,
    NM,
    NN,
    TK,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For ``CHUNK`` blocks of keys: the results of `query_ranges`, from those of `describe_blocks`."""
    i_bh = tl.program_id(0)
    if (tl.program_id(1) == 0) & (i_bh < HEADS):
        _store_place(LEAST, HEAD_ORDER, i_bh, HEADS, NM * KV_GROUP)
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


def query_ranges(
    least: Tensor, greatest: Tensor, last: Tensor, keys: int, kv_heads: int, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """For each block of keys, the blocks of queries that attend to it and those whose tiles with it are full.

    And in the same launch, `heaviest_first` of the key/value heads.

    Args:
        least, greatest: of `describe_blocks`, ``[B, H, ceil(Tq / tile.queries)]``.
        last: ``[Tq]`` int64, diagonal key of each query.
        keys: number of keys.
        kv_heads: number of key/value heads.
        tile: sizes of the blocks.

    Returns:
        One past the last block of queries that attends to it, and the first one past the diagonal that holds a
        ``kv_start`` within it: ``[B, H, ceil(Tk / tile.keys)]`` int32 each. And ``[B * G]`` int32.
    """
    batch, heads, blocks = least.shape
    key_blocks = cdiv(keys, tile.keys)
    m_end, full_end = torch.empty(2, batch, heads, key_blocks, dtype=torch.int32, device=least.device).unbind()
    by_kv_head = least.view(batch * kv_heads, -1)
    is_sorted = batch * kv_heads > _ORDERED_HEADS
    order = _sorted_heads(by_kv_head) if is_sorted else least.new_empty(batch * kv_heads)
    _query_range_kernel[(batch * heads, cdiv(key_blocks, _RANGE_CHUNK))](
        LEAST=least,
        GREATEST=greatest,
        LAST=last,
        M_END=m_end,
        M_FULL_END=full_end,
        HEAD_ORDER=order,
        HEADS=0 if is_sorted else batch * kv_heads,
        KV_GROUP=heads // kv_heads,
        NM=blocks,
        NN=key_blocks,
        TK=keys,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        CHUNK=_RANGE_CHUNK,
    )
    return m_end, full_end, order


@kernel
def _head_order_kernel(LEAST, HEAD_ORDER, HEADS, NM):
    """`heaviest_first`, a program for each head."""
    _store_place(LEAST, HEAD_ORDER, tl.program_id(0), HEADS, NM)


def heaviest_first(least: Tensor) -> Tensor:
    """Order of heads by falling work.

    Args:
        least: contiguous ``[heads, blocks]`` int32, least ``kv_start`` of each block of a head's queries.

    Returns:
        ``[heads]`` int32.
    """
    heads, blocks = least.shape
    if heads > _ORDERED_HEADS:
        return _sorted_heads(least)
    order = torch.empty(heads, dtype=torch.int32, device=least.device)
    _head_order_kernel[(heads,)](
        LEAST=least,
        HEAD_ORDER=order,
        HEADS=heads,
        NM=blocks,
        num_warps=4,
    )
    return order


def _sorted_heads(least: Tensor) -> Tensor:
    return least.sum(-1).argsort(stable=True).int()
