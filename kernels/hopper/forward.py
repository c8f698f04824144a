"""The forward pass for Hopper (sm_90) in Gluon, Triton's language below tiles: warps with different tasks.

Mathematics, tiles and bias are those of `forward`; here is how they are laid on the machine. One program runs on each
multiprocessor and draws *items* of work until none is left. An item is one block of ``NC * 64`` queries of a head; its
tiles of ``BLOCK_N`` keys are walked from the last, on the diagonal, down to the first. In a program:

* *Consumers*, ``NC`` warpgroups with 64 queries each, multiply and take the softmax.
* *Two warps* write the bias of each tile's keys to shared memory: one float32 for a far tile, two halves for a near
  one. Consumers need registers, and float64 numbers would take them.
* *One warp* draws items and has the tensor memory accelerator (TMA) fetch queries, keys and values.

**Barriers.** Everybody walks the same list of tiles, from one item to the next without a break; tile ``t`` of that list
lies in slot ``t % STAGES`` of a ring. Waiting for a barrier takes the parity of its round, which flips each time that
the ring is through; a party that has to wait for a slot to be *free* waits with the opposite one, which passes at once
in the first round.

=============== ========================================================================= ======================
barrier         meaning                                                                   arrivals
=============== ========================================================================= ======================
``k_full``      keys have come and the bias is written                                    loader, bias warps
``v_full``      values have come                                                          loader
``done``        no consumer needs the keys and bias of tile t, the values of tile t - 1   every consumer
``q_full``      queries of an item have come (a ring of ``QSTAGES``)                      loader
``q_empty``     their place is free; a consumer's output leaves through it too            every consumer
``item_full``   the next item is described (a ring of two)                                loader
``item_empty``  everybody has read it                                                     consumers, bias warps
=============== ========================================================================= ======================

A consumer multiplies the weights of tile ``t - 1`` with its values while the scores of tile ``t`` are under way: hence
values are released one tile later than keys, and the loader waits with the values of a tile for the ``done`` of the
*next* slot. A consumer passes over tiles that only others see, but waits and arrives for them as if it had used them:
a parity tells a round only from its neighbours, so nobody may run two rounds ahead. One item may end and the next begin
within a ring, so work that is light, once pruned, does not wait for the pipeline to fill.

**Lazy rescaling** (``LAZY``). Weights are ``exp2(s_ij - m_i)``, and the output is their sum over values divided by
their sum: any ``m_i`` gives the same result as long as nothing overflows. It is the running maximum, but raised only
when that is more than 2^8 ahead; so weights are below 2^8, which float16 holds as well, and have the same relative
rounding. Almost always a tile leaves it alone; then whole warps jump over multiplying the output by one.

**The fence** (``FENCE``). The weights of a tile should be taken while the product before runs. Left to itself, ptxas
moves the wait for that product ahead of the softmax. A wait for a barrier that has long been passed ends the basic
block, which it does not move code across.

**Order.** A counter in global memory deals out items: heads by falling work, ``TOGETHER`` at a time so that few heads'
keys share the L2 cache, and of these the last, longest blocks first. It is a new tensor for each launch: that holds in
CUDA graphs, on several streams, and after a launch that was aborted. Which program computes an item does not change its
bits.

**Registers** are what speed hangs on. A consumer has as many live numbers as registers, so whether ptxas keeps them
there is decided by trifles, such as the order of independent statements: with values and bias in variables of their
own, written before what else goes into the same expression, heads of 64 spilled 236 times per tile instead of once;
with strides for ``C_Q``, nine times in one consumer. After any change look at the loops' STL and LDL in SASS. All
consumers together must also fit the instruction cache (128 KiB); therefore near and far tiles share one loop.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..backends import HAS_GLUON
from ..decay import Decay
from ..portable.block_ranges import heaviest_first, kv_start_ranges
from ..portable.forward import key_decay
from ..tiles import HOPPER_FORWARD
from ..triton_common import BASE_BLOCK, INF, LN_2, LOG2_E

# Queries of a consumer: what a warpgroup multiplies at once.
QUERIES = 64

_ROWS = gl.constexpr(QUERIES)
# How far, in powers of two, the largest weight may exceed one before what was summed is rescaled.
_LAZINESS = gl.constexpr(8.0)

# An item in shared memory: its head (-1: no more items), block of queries, first tile, first near tile and last tile,
# then, for each consumer, the least and the greatest first key of its rows.
_ITEM = gl.constexpr(16)
_HEAD = gl.constexpr(0)
_BLOCK = gl.constexpr(1)
_START = gl.constexpr(2)
_NEAR = gl.constexpr(3)
_STOP = gl.constexpr(4)
_RANGES = gl.constexpr(5)


class _Descriptors(NamedTuple):
    """TMA descriptors of ``[B, heads, T, D]`` in tiles of one head."""

    q: Any
    k: Any
    v: Any
    out: Any


class _Buffers(NamedTuple):
    """Shared memory. The first index is a slot; for the last two, a consumer."""

    q: Any
    k: Any
    v: Any
    bias_high: Any
    bias_low: Any
    items: Any
    rows: Any  # of each consumer: positions of its queries, and the first keys that they see
    rows_low: Any  # second half of its rows' bias


class _Barriers(NamedTuple):
    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    done: Any
    item_full: Any
    item_empty: Any


class _Sizes(NamedTuple):
    HEADS: Any  # B * H
    NM: Any  # items of a head
    NR: Any  # blocks of 64 queries of a head
    LAST: Any
    TK: Any
    H: Any
    KV_GROUP: Any


class _Work(NamedTuple):
    ORDER: Any
    LOW: Any
    HIGH: Any
    COUNTER: Any


class _Gates(NamedTuple):
    C_Q: Any
    C_K: Any
    RELATIVE: Any
    BASE: Any
    ck_b: Any
    ck_h: Any


class _Rows(NamedTuple):
    LSE: Any
    FIRST: Any
    first_b: Any
    first_h: Any
    FIRST_GROUP: Any


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    """The next slot of a ring and its parity."""
    slot += 1
    if STAGES == 1:
        return slot * 0, phase ^ 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _get(items, slot, field):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(items.index(slot * _ITEM + field).load(one), 0)


@gluon.jit
def _put(items, slot, field, x):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    items.index(slot * _ITEM + field).store(gl.full([1], x, gl.int32, one))


@gluon.jit
def _load(
    descriptors,
    buffers,
    barriers,
    sizes,
    work,
    NC: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QSTAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """One warp: draws items, describes them to the others, and fetches their queries, keys and values."""
    BLOCK_M: gl.constexpr = _ROWS * NC
    total = sizes.HEADS * sizes.NM
    offset = gl.load(sizes.LAST).to(gl.int32)
    slot = 0
    phase = 0
    item = 0
    ticket = gl.atomic_add(work.COUNTER, 1, sem="relaxed", scope="gpu")
    while ticket < total:
        # Drawn one item ahead, so that nobody waits for the counter.
        next_ticket = gl.atomic_add(work.COUNTER, 1, sem="relaxed", scope="gpu")
        group = ticket // (sizes.NM * TOGETHER) * TOGETHER
        heads = gl.minimum(sizes.HEADS - group, TOGETHER)
        turn = ticket - group * sizes.NM
        block = sizes.NM - 1 - turn // heads
        head = gl.load(work.ORDER + group + turn % heads).to(gl.int32)
        row = block * BLOCK_M + offset
        stop = (gl.minimum(row + BLOCK_M, sizes.TK) - 1) // BLOCK_N
        item_slot = item % 2
        mbarrier.wait(barriers.item_empty.index(item_slot), ((item // 2) & 1) ^ 1)
        least = stop * BLOCK_N
        for consumer in gl.static_range(NC):
            i = block * NC + consumer
            low = gl.load(work.LOW + head.to(gl.int64) * sizes.NR + i, mask=i < sizes.NR, other=0x7FFFFFFF)
            high = gl.load(work.HIGH + head.to(gl.int64) * sizes.NR + i, mask=i < sizes.NR, other=0)
            least = gl.minimum(least, low)
            _put(buffers.items, item_slot, _RANGES + 2 * consumer, low)
            _put(buffers.items, item_slot, _RANGES + 1 + 2 * consumer, high)
        start = gl.maximum(least, 0) // BLOCK_N
        near = gl.maximum(gl.minimum((row + 1) // BLOCK_N, stop), start)
        _put(buffers.items, item_slot, _HEAD, head)
        _put(buffers.items, item_slot, _BLOCK, block)
        _put(buffers.items, item_slot, _START, start)
        _put(buffers.items, item_slot, _NEAR, near)
        _put(buffers.items, item_slot, _STOP, stop)
        mbarrier.arrive(barriers.item_full.index(item_slot), count=1)
        b = head // sizes.H
        h = head % sizes.H
        g = h // sizes.KV_GROUP
        q_slot = item % QSTAGES
        mbarrier.wait(barriers.q_empty.index(q_slot), ((item // QSTAGES) & 1) ^ 1)
        q_full = barriers.q_full.index(q_slot)
        mbarrier.expect(q_full, NC * descriptors.q.block_type.nbytes)
        for consumer in gl.static_range(NC):
            rows = block * BLOCK_M + consumer * _ROWS
            tma.async_copy_global_to_shared(
                descriptors.q, [b, h, rows, 0], q_full, buffers.q.index(q_slot * NC + consumer)
            )
        for t in range(stop - start + 1):
            j = (stop - t) * BLOCK_N
            next_slot, next_phase = _advance(slot, phase, STAGES)
            mbarrier.wait(barriers.done.index(slot), phase ^ 1)
            k_full = barriers.k_full.index(slot)
            mbarrier.expect(k_full, descriptors.k.block_type.nbytes)
            tma.async_copy_global_to_shared(descriptors.k, [b, g, j, 0], k_full, buffers.k.index(slot))
            mbarrier.wait(barriers.done.index(next_slot), next_phase ^ 1)
            v_full = barriers.v_full.index(slot)
            mbarrier.expect(v_full, descriptors.v.block_type.nbytes)
            tma.async_copy_global_to_shared(descriptors.v, [b, g, j, 0], v_full, buffers.v.index(slot))
            slot, phase = next_slot, next_phase
        item += 1
        ticket = next_ticket
    item_slot = item % 2
    mbarrier.wait(barriers.item_empty.index(item_slot), ((item // 2) & 1) ^ 1)
    _put(buffers.items, item_slot, _HEAD, -1)
    mbarrier.arrive(barriers.item_full.index(item_slot), count=1)


@gluon.jit
def _write_bias(
    buffers,
    barriers,
    sizes,
    gates,
    HF,
    GATE_GROUP,
    TQ,
    NB,
    NC: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Two warps: ``base - c_j`` of each tile's keys, where ``base`` is ``c_i`` of the item's first query."""
    BLOCK_M: gl.constexpr = _ROWS * NC
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_N // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    columns = gl.arange(0, BLOCK_N, layout=layout)
    slot = 0
    phase = 0
    item = 0
    mbarrier.wait(barriers.item_full.index(0), 0)
    head = _get(buffers.items, 0, _HEAD)
    while head >= 0:
        item_slot = item % 2
        block = _get(buffers.items, item_slot, _BLOCK)
        start = _get(buffers.items, item_slot, _START)
        near = _get(buffers.items, item_slot, _NEAR)
        stop = _get(buffers.items, item_slot, _STOP)
        mbarrier.arrive(barriers.item_empty.index(item_slot), count=1)
        b = (head // sizes.H).to(gl.int64)
        gate = (head % sizes.H // GATE_GROUP).to(gl.int64)
        first_c = gl.load(gates.C_Q + (b * HF + gate) * TQ + block * BLOCK_M)
        base = first_c * LOG2_E
        p_relative = gates.RELATIVE + (b * HF + gate) * sizes.TK
        p_base = gates.BASE + (b * HF + gate) * NB
        p_ck = gates.C_K + b * gates.ck_b + gate * gates.ck_h
        for t in range(stop - start + 1):
            tile = stop - t
            keys = tile * BLOCK_N + columns
            if tile < near:
                relative = gl.load(p_relative + keys)
                end = gl.load(p_base + keys // BASE_BLOCK)
                bias = (base - end).to(gl.float32) - relative
                mbarrier.wait(barriers.done.index(slot), phase ^ 1)
                buffers.bias_high.index(slot).store(bias)
            else:
                c = gl.load(p_ck + keys, mask=keys < sizes.TK, other=INF)
                exact = (first_c - c) * LOG2_E
                high = exact.to(gl.float32)
                low = (exact - high.to(gl.float64)).to(gl.float32)
                low = gl.where(high == -INF, 0.0, low)
                mbarrier.wait(barriers.done.index(slot), phase ^ 1)
                buffers.bias_high.index(slot).store(high)
                buffers.bias_low.index(slot).store(low)
            mbarrier.arrive(barriers.k_full.index(slot), count=1)
            slot, phase = _advance(slot, phase, STAGES)
        item += 1
        mbarrier.wait(barriers.item_full.index(item % 2), (item // 2) & 1)
        head = _get(buffers.items, item % 2, _HEAD)


@gluon.jit
def _softmax(scores, maximum, total, shift, TOTAL: gl.constexpr, BLOCK_N: gl.constexpr, LAZY: gl.constexpr):
    """Weights of the logits ``scores + shift``, in units of log 2.

    ``total`` is ``[64, 8]``: partial sums, one for each pair of columns that a thread has.

    Returns:
        Weights, the factor for what was summed before, and the new ``maximum`` and ``total``.
    """
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) + shift)
    if LAZY:
        new_maximum = gl.where(new_maximum > maximum + _LAZINESS, new_maximum, maximum)
    # A row that has seen nothing yet: any finite number leaves its weights at zero.
    finite = gl.where(new_maximum == -INF, 0.0, new_maximum)
    rescale = gl.exp2(maximum - finite)
    weights = gl.exp2(scores - gl.expand_dims(finite - shift, 1))
    # The summed axis lies in registers of one thread only; threads are added up once, at the end.
    part = gl.sum(gl.reshape(weights, [_ROWS, BLOCK_N // 8, 8]), 1)
    part = gl.convert_layout(part, TOTAL, assert_trivial=True)
    factor = gl.convert_layout(rescale, gl.SliceLayout(1, TOTAL), assert_trivial=True)
    total = total * gl.expand_dims(factor, 1) + part
    return weights, rescale, new_maximum, total


# Numbers of a thread that the assembly below takes at once.
_RESCALED = 32


@gluon.constexpr_function
def _rescale_assembly():
    # Two of a thread's numbers are of one row, the next two of its other row, and so on: two factors decide for all.
    n = _RESCALED
    ones = [
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000;",
        f"setp.neu.f32 q, ${2 * n + 2}, 0f3F800000;",
        "or.pred p, p, q;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra DONE;",
    ]
    products = [f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)]
    return "\n".join(["{", ".reg .pred p, q;", *ones, *products, "DONE:", "}"])


@gluon.constexpr_function
def _rescale_constraints():
    n = _RESCALED
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def _rescale(out, factor, LAZY: gl.constexpr):
    """``out * factor`` by row. If ``LAZY``, a warp all of whose factors are one jumps over the multiplications."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, out.type.layout), assert_trivial=True)
    factor = gl.expand_dims(factor, 1)
    if LAZY:
        assembly: gl.constexpr = _rescale_assembly()
        constraints: gl.constexpr = _rescale_constraints()
        factor = gl.broadcast(factor, out)[0]
        return gl.inline_asm_elementwise(assembly, constraints, [out, factor], dtype=gl.float32, is_pure=True, pack=32)
    else:
        return out * factor


@gluon.jit
def _pack(weights, dtype: gl.constexpr, BLOCK_N: gl.constexpr):
    """Weights as pairs of 16-bit numbers: a loop carries 32-bit registers without shuffling their halves."""
    a, b = gl.split(gl.reshape(weights, [_ROWS, BLOCK_N // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def _unpack(packed, dtype: gl.constexpr, BLOCK_N: gl.constexpr, OPERAND: gl.constexpr):
    a, b = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    weights = gl.reshape(gl.join(a, b), [_ROWS, BLOCK_N]).to(dtype, bitcast=True)
    return gl.convert_layout(weights, OPERAND, assert_trivial=True)


@gluon.jit
def _mask(scores, keys, last, first):
    """``scores`` where ``first <= keys <= last``, else ``-inf``."""
    keys, _ = gl.broadcast(keys, scores)
    last, _ = gl.broadcast(gl.expand_dims(last, 1), scores)
    first, _ = gl.broadcast(gl.expand_dims(first, 1), scores)
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.s32 p, $2, $3; setp.ge.and.s32 p, $2, $4, p; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r,r",
        [scores, keys, last, first],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _skip(tiles, slot, phase, v_slot, v_phase, barriers, STAGES: gl.constexpr):
    """Pass over tiles that this consumer has no use for, but not before they could have been used."""
    for _ in range(tiles):
        mbarrier.wait(barriers.k_full.index(slot), phase)
        mbarrier.wait(barriers.v_full.index(v_slot), v_phase)
        mbarrier.arrive(barriers.done.index(slot), count=1)
        v_slot, v_phase = slot, phase
        slot, phase = _advance(slot, phase, STAGES)
    return slot, phase, v_slot, v_phase


@gluon.jit
def _attend(
    CONSUMER: gl.constexpr,
    shared,
    NC: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QSTAGES: gl.constexpr,
    LAZY: gl.constexpr,
    FENCE: gl.constexpr,
):
    """A consumer: attention of 64 queries of each item."""
    out_descriptor, buffers, barriers, sizes, gates, rows, HF, GATE_GROUP, TQ, scale = shared
    BLOCK_M: gl.constexpr = _ROWS * NC
    D: gl.constexpr = buffers.q.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = buffers.q.dtype
    qk_scale = scale * LOG2_E
    offset = gl.load(sizes.LAST).to(gl.int32)
    slot = 0
    phase = 0
    # Of the tile before, whose values are multiplied now. Before the first one: a wait that passes.
    v_slot = STAGES - 1
    v_phase = 1
    item = 0
    # The first tile of an item multiplies them too, but drops the product.
    out = gl.zeros([_ROWS, D], gl.float32, OUT)
    packed = _pack(gl.zeros([_ROWS, BLOCK_N], gl.float32, SCORES), dtype, BLOCK_N)
    mbarrier.wait(barriers.item_full.index(0), 0)
    head = _get(buffers.items, 0, _HEAD)
    while head >= 0:
        item_slot = item % 2
        q_slot = item % QSTAGES
        block = _get(buffers.items, item_slot, _BLOCK)
        start = _get(buffers.items, item_slot, _START)
        near = _get(buffers.items, item_slot, _NEAR)
        stop = _get(buffers.items, item_slot, _STOP)
        low = _get(buffers.items, item_slot, _RANGES + 2 * CONSUMER)
        high = _get(buffers.items, item_slot, _RANGES + 1 + 2 * CONSUMER)
        b = (head // sizes.H).to(gl.int64)
        h = (head % sizes.H).to(gl.int64)
        first_row = block * BLOCK_M + CONSUMER * _ROWS
        o_rows = first_row + gl.arange(0, _ROWS, layout=ROW)
        is_row = o_rows < TQ
        p_cq = gates.C_Q + (b * HF + h // GATE_GROUP) * TQ
        base = gl.load(p_cq + block * BLOCK_M)
        c = gl.load(p_cq + o_rows, mask=is_row, other=0.0)
        p_first = rows.FIRST + b * rows.first_b + h // rows.FIRST_GROUP * rows.first_h
        first = gl.load(p_first + o_rows, mask=is_row, other=0).to(gl.int32)
        exact = gl.where(is_row, (c - base) * LOG2_E, 0.0)
        row_high = exact.to(gl.float32)
        row_low = (exact - row_high.to(gl.float64)).to(gl.float32)
        # Seldom needed: registers are for the rest.
        buffers.rows.index(CONSUMER * 2).store(o_rows + offset)
        buffers.rows.index(CONSUMER * 2 + 1).store(first)
        buffers.rows_low.index(CONSUMER).store(row_low)
        # Own tiles are own_start to own_stop; of those, whole_start to whole_end - 1 need no mask.
        own_stop = gl.minimum((gl.minimum(first_row + offset + _ROWS - 1, sizes.TK - 1)) // BLOCK_N, stop)
        own_stop = gl.maximum(own_stop, start)
        own_start = gl.maximum(gl.minimum(gl.maximum(low, 0) // BLOCK_N, own_stop), start)
        whole_end = (first_row + offset + 1) // BLOCK_N
        whole_start = (gl.minimum(high, sizes.TK) + BLOCK_N - 1) // BLOCK_N
        maximum = gl.full([_ROWS], -INF, gl.float32, ROW)
        total = gl.zeros([_ROWS, 8], gl.float32, TOTAL)
        q = buffers.q.index(q_slot * NC + CONSUMER).reshape([_ROWS, D])
        q_phase = (item // QSTAGES) & 1
        mbarrier.wait(barriers.q_full.index(q_slot), q_phase)
        mbarrier.arrive(barriers.item_empty.index(item_slot), count=1)
        slot, phase, v_slot, v_phase = _skip(stop - own_stop, slot, phase, v_slot, v_phase, barriers, STAGES)

        for tile in range(own_stop, own_start - 1, -1):
            weights = _unpack(packed, dtype, BLOCK_N, OPERAND)
            mbarrier.wait(barriers.k_full.index(slot), phase)
            scores = warpgroup_mma(
                q,
                buffers.k.index(slot).reshape([BLOCK_N, D]).permute((1, 0)),
                gl.zeros([_ROWS, BLOCK_N], gl.float32, SCORES),
                use_acc=False,
                is_async=True,
            )
            mbarrier.wait(barriers.v_full.index(v_slot), v_phase)
            out = warpgroup_mma(
                weights,
                buffers.v.index(v_slot).reshape([BLOCK_N, D]),
                out,
                use_acc=tile < own_stop - 1,
                is_async=True,
            )
            scores = warpgroup_mma_wait(1, deps=(scores,))
            if tile < near:
                key_high = gl.expand_dims(buffers.bias_high.index(slot).load(COLUMN), 0)
                scores = scores * qk_scale + key_high
                shift = row_high
            else:
                key_high = gl.expand_dims(buffers.bias_high.index(slot).load(COLUMN), 0)
                key_low = gl.expand_dims(buffers.bias_low.index(slot).load(COLUMN), 0)
                row_low = buffers.rows_low.index(CONSUMER).load(ROW)
                scores = scores * qk_scale + (
                    (gl.expand_dims(row_high, 1) + key_high) + (gl.expand_dims(row_low, 1) + key_low)
                )
                shift = gl.zeros([_ROWS], gl.float32, ROW)
            if (tile >= whole_end) | (tile < whole_start):
                keys = gl.expand_dims(tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=COLUMN), 0)
                last = buffers.rows.index(CONSUMER * 2).load(ROW)
                scores = _mask(scores, keys, last, buffers.rows.index(CONSUMER * 2 + 1).load(ROW))
            new_weights, rescale, maximum, total = _softmax(scores, maximum, total, shift, TOTAL, BLOCK_N, LAZY)
            if FENCE:
                mbarrier.wait(barriers.q_full.index(q_slot), q_phase)
            out, weights = warpgroup_mma_wait(0, deps=(out, weights))
            mbarrier.arrive(barriers.done.index(slot), count=1)
            out = _rescale(out, rescale, LAZY)
            packed = _pack(new_weights, dtype, BLOCK_N)
            v_slot, v_phase = slot, phase
            slot, phase = _advance(slot, phase, STAGES)

        mbarrier.wait(barriers.v_full.index(v_slot), v_phase)
        out = warpgroup_mma(
            _unpack(packed, dtype, BLOCK_N, OPERAND),
            buffers.v.index(v_slot).reshape([BLOCK_N, D]),
            out,
            use_acc=own_start < own_stop,
            is_async=True,
        )
        sums = gl.convert_layout(gl.sum(total, 1), OUT_ROW, assert_trivial=True)
        lse = (gl.convert_layout(maximum, OUT_ROW, assert_trivial=True) + gl.log2(sums)) * LN_2
        # The weights of a row that sees nothing are zero.
        inverse = gl.where(sums > 0.0, 1.0 / sums, 0.0)
        i = first_row + gl.arange(0, _ROWS, layout=OUT_ROW)
        gl.store(rows.LSE + head.to(gl.int64) * TQ + i, lse, mask=i < TQ)
        out = warpgroup_mma_wait(0, deps=(out,))
        q.store((out * gl.expand_dims(inverse, 1)).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            out_descriptor,
            [head // sizes.H, head % sizes.H, first_row, 0],
            buffers.q.index(q_slot * NC + CONSUMER),
        )
        slot, phase, v_slot, v_phase = _skip(own_start - start, slot, phase, v_slot, v_phase, barriers, STAGES)
        item += 1
        mbarrier.wait(barriers.item_full.index(item % 2), (item // 2) & 1)
        head = _get(buffers.items, item % 2, _HEAD)
        tma.store_wait(0)
        mbarrier.arrive(barriers.q_empty.index(q_slot), count=1)


# No special code for sizes, nor for the alignment of tensors that may be parts of others: a length that comes for the
# first time must not compile anew.
_SIZES = [
    "ck_b",
    "ck_h",
    "first_b",
    "first_h",
    "HEADS",
    "NM",
    "NR",
    "TQ",
    "TK",
    "NB",
    "H",
    "KV_GROUP",
    "HF",
    "GATE_GROUP",
    "FIRST_GROUP",
]
_TENSORS = ["C_Q", "C_K", "RELATIVE", "BASE", "LSE", "FIRST", "LAST", "ORDER", "LOW", "HIGH", "COUNTER"]


@gluon.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_TENSORS)
def _hopper_forward_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    out_descriptor,
    C_Q,
    C_K,
    RELATIVE,
    BASE,
    LSE,
    FIRST,
    LAST,
    ORDER,
    LOW,
    HIGH,
    COUNTER,
    ck_b,
    ck_h,
    first_b,
    first_h,
    scale,
    HEADS,
    NM,
    NR,
    TQ,
    TK,
    NB,
    H,
    KV_GROUP,
    HF,
    GATE_GROUP,
    FIRST_GROUP,
    NC: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QSTAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    LAZY: gl.constexpr,
    FENCE: gl.constexpr,
    REGISTERS: gl.constexpr,
    HELPER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_descriptor.dtype
    D: gl.constexpr = q_descriptor.block_type.shape[3]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = _Buffers(
        q=gl.allocate_shared_memory(dtype, [QSTAGES * NC, 1, 1, _ROWS, D], q_descriptor.layout),
        k=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_descriptor.layout),
        v=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_descriptor.layout),
        bias_high=gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], PLAIN),
        bias_low=gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], PLAIN),
        items=gl.allocate_shared_memory(gl.int32, [2 * _ITEM, 1], PLAIN),
        rows=gl.allocate_shared_memory(gl.int32, [2 * NC, _ROWS], PLAIN),
        rows_low=gl.allocate_shared_memory(gl.float32, [NC, _ROWS], PLAIN),
    )
    barriers = _Barriers(
        q_full=gl.allocate_shared_memory(gl.int64, [QSTAGES, 1], BARRIER),
        q_empty=gl.allocate_shared_memory(gl.int64, [QSTAGES, 1], BARRIER),
        k_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        v_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        done=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        item_full=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        item_empty=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.k_full.index(i), count=2)
        mbarrier.init(barriers.v_full.index(i), count=1)
        mbarrier.init(barriers.done.index(i), count=NC)
    for i in gl.static_range(QSTAGES):
        mbarrier.init(barriers.q_full.index(i), count=1)
        mbarrier.init(barriers.q_empty.index(i), count=NC)
    for i in gl.static_range(2):
        mbarrier.init(barriers.item_full.index(i), count=1)
        mbarrier.init(barriers.item_empty.index(i), count=NC + 1)
    fence_async_shared()

    descriptors = _Descriptors(q_descriptor, k_descriptor, v_descriptor, out_descriptor)
    sizes = _Sizes(HEADS, NM, NR, LAST, TK, H, KV_GROUP)
    gates = _Gates(C_Q, C_K, RELATIVE, BASE, ck_b, ck_h)
    rows = _Rows(LSE, FIRST, first_b, first_h, FIRST_GROUP)
    shared = (out_descriptor, buffers, barriers, sizes, gates, rows, HF, GATE_GROUP, TQ, scale)
    work = _Work(ORDER, LOW, HIGH, COUNTER)
    if NC == 2:
        gl.warp_specialize(
            [
                (_attend, (gl.constexpr(0), shared, NC, BLOCK_N, STAGES, QSTAGES, LAZY, FENCE)),
                (_attend, (gl.constexpr(1), shared, NC, BLOCK_N, STAGES, QSTAGES, LAZY, FENCE)),
                (_write_bias, (buffers, barriers, sizes, gates, HF, GATE_GROUP, TQ, NB, NC, BLOCK_N, STAGES)),
                (_load, (descriptors, buffers, barriers, sizes, work, NC, BLOCK_N, STAGES, QSTAGES, TOGETHER)),
            ],
            [4, 2, 1],
            [REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS],
        )
    else:
        gl.static_assert(NC == 3)
        gl.warp_specialize(
            [
                (_attend, (gl.constexpr(0), shared, NC, BLOCK_N, STAGES, QSTAGES, LAZY, FENCE)),
                (_attend, (gl.constexpr(1), shared, NC, BLOCK_N, STAGES, QSTAGES, LAZY, FENCE)),
                (_attend, (gl.constexpr(2), shared, NC, BLOCK_N, STAGES, QSTAGES, LAZY, FENCE)),
                (_write_bias, (buffers, barriers, sizes, gates, HF, GATE_GROUP, TQ, NB, NC, BLOCK_N, STAGES)),
                (_load, (descriptors, buffers, barriers, sizes, work, NC, BLOCK_N, STAGES, QSTAGES, TOGETHER)),
            ],
            [4, 4, 2, 1],
            [REGISTERS, REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS],
        )


def _fits_tma(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read ``x``, ``[B, T, heads, D]``."""
    strides = [
        stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
    ]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in strides)


def hopper_forward_takes(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether `hopper_forward` computes this: on sm_90, 16-bit, heads of 64 or 128, without dropout."""
    return (
        HAS_GLUON
        and dropout == 0.0
        and q.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] in HOPPER_FORWARD
        and q.numel() > 0
        and all(_fits_tma(x) for x in (q, k, v))
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """``x``, ``[B, T, heads, D]``, as ``[B, heads, T, D]`` in tiles of ``rows`` tokens of one head."""
    batch, tokens, heads, head_dim = x.shape
    # The stride of a single element may be anything.
    b, t, h = (step if size > 1 else head_dim for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    block, layout = [1, 1, rows, head_dim], _layout(rows, head_dim, x.dtype)
    return TensorDescriptor(x, [batch, heads, tokens, head_dim], [b, h, t, 1], block, layout)


@functools.cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    # To make one takes the host as long as a launch.
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], element)


def hopper_forward(q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float) -> tuple[Tensor, Tensor]:
    """As `forward.forward` without dropout, for what `hopper_forward_takes`.

    Returns:
        Output ``[B, Tq, H, D]`` in the type of ``q`` and log-sum-exp ``[B, H, Tq]`` float32.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    shape = HOPPER_FORWARD[head_dim]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    relative, base = key_decay(decay.key)
    low, high = kv_start_ranges(decay.kv_start, decay.last, heads, QUERIES)
    order = heaviest_first(low.flatten(0, 1))
    items = triton.cdiv(queries, QUERIES * shape.consumers)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    programs = min(items * batch * heads, torch.cuda.get_device_properties(q.device).multi_processor_count)
    _hopper_forward_kernel[(programs,)](
        _descriptor(q, QUERIES),
        _descriptor(k, shape.keys),
        _descriptor(v, shape.keys),
        _descriptor(out, QUERIES),
        # With strides of its own, the consumers' loop over tiles spills registers.
        decay.query.contiguous(),
        decay.key,
        relative,
        base,
        lse,
        decay.kv_start,
        decay.last,
        order,
        low,
        high,
        counter,
        *decay.key.stride()[:2],
        *decay.kv_start.stride()[:2],
        scale,
        batch * heads,
        items,
        low.shape[-1],
        queries,
        keys,
        base.shape[-1],
        heads,
        heads // kv_heads,
        gates,
        heads // gates,
        heads // decay.kv_start.shape[1],
        NC=shape.consumers,
        BLOCK_N=shape.keys,
        STAGES=shape.stages,
        QSTAGES=shape.query_stages,
        TOGETHER=shape.together,
        LAZY=shape.lazy,
        FENCE=shape.fence,
        REGISTERS=shape.registers,
        HELPER_REGISTERS=shape.helper_registers,
        num_warps=4,
        maxnreg=shape.initial_registers,
    )
    return out, lse
