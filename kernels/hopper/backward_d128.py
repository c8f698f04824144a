"""The backward kernel for Hopper and heads of 128: two warpgroups that share every product.

A program holds 128 keys of one key/value head, as one of `backward` does. ``dK`` and ``dV`` of 64 keys and a head of
128 fill half of a warpgroup's registers, which leaves none for a further role: so both warpgroups do everything, each
for its 64 keys, and for ``dQ`` each takes 64 of the 128 columns and all 128 keys. One warp more copies the tiles of
queries to a ring of shared memory (``full``: the copies; ``empty``: one arrival, after a barrier of both warpgroups).

The order of the consumer's products, with what is still in flight: ``S`` of the first tile; then in every tile ``dP``
(dK before); wait for all but ``dP``; ``dV``; wait for all but ``dV``; ``S`` of the next tile; wait for all but ``S``;
``dQ``, ``dK``; wait for all but ``dK``, which runs while ``dQ`` is added to memory. What `hopper_backward` says is
fragile hangs on this order.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .common import (
    LOG2_E,
    add_row_sums,
    count_tiles,
    fast_exp2,
    fold,
    role_barrier,
    row_field,
    split_in_two,
    tile_field,
    to_nearest,
)

# Slots of the ring of tiles.
_STAGES = gl.constexpr(3)


class _Buffers(NamedTuple):
    """Shared memory; the first index is a slot. ``kv`` holds keys, then values."""

    kv: Any
    qs: Any
    dos: Any
    rows: Any
    dss: Any


class _Barriers(NamedTuple):
    full: Any
    empty: Any
    kv_full: Any


class _Item(NamedTuple):
    """Batch, key/value head, block of keys, and the first tile of queries that may see it."""

    b: Any
    g: Any
    n: Any
    start: Any


class _Sizes(NamedTuple):
    TQ: Any
    TK: Any
    H: Any
    KV_GROUP: Any
    GATE_GROUP: Any
    HF: Any
    NN: Any
    NM: Any


@gluon.jit
def _produce(q_desc, do_desc, row_desc, buffers, barriers, item, sizes, STOP, ELEMENT: gl.constexpr):
    """One warp: copies the tiles in order, each once the consumers are done with what its slot held."""
    qs, dos, rows = buffers.qs, buffers.dos, buffers.rows
    full, empty = barriers.full, barriers.empty
    b, g, n, start = item.b, item.g, item.n, item.start
    TQ, H, KV_GROUP, NN, NM = sizes.TQ, sizes.H, sizes.KV_GROUP, sizes.NN, sizes.NM
    L4: gl.constexpr = q_desc.layout
    it = 0
    for member in range(0, KV_GROUP):
        h = g * KV_GROUP + member
        head = b * H + h
        tiles = count_tiles(STOP, TQ, head, n, NN, start)
        for t in range(tiles):
            m = start + t
            stage = it % _STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((it // _STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 64 * 128 * 4 + 2048)
            q = qs.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 128], L4)
            do = dos.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 128], L4)
            tma.async_copy_global_to_shared(q_desc, [b, m * 64, h, 0], bar, q)
            tma.async_copy_global_to_shared(do_desc, [b, m * 64, h, 0], bar, do)
            for i in gl.static_range(2):
                half = rows.index(stage * 2 + i)
                tma.async_copy_global_to_shared(row_desc, [(head * NM + m) * 2 + i, 0], bar, half)
            it += 1


@gluon.jit
def _consume(
    dk_desc, dv_desc, buffers, barriers, item, sizes, C, C_K, STOP, DQ, ROW_SUMS, DC, scale, ELEMENT: gl.constexpr
):
    """Two warpgroups: the gradients of the program's keys. Scores are held as ``[keys, queries]``."""
    kv, qs, dos, rows, dss = buffers.kv, buffers.qs, buffers.dos, buffers.rows, buffers.dss
    full, empty, kv_full = barriers.full, barriers.empty, barriers.kv_full
    b, g, n, start = item.b, item.g, item.n, item.start
    TQ, TK, H, KV_GROUP = sizes.TQ, sizes.TK, sizes.H, sizes.KV_GROUP
    GATE_GROUP, HF, NN, NM = sizes.GATE_GROUP, sizes.HF, sizes.NN, sizes.NM
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    OL: gl.constexpr = gl.DotOperandLayout(0, AL, 2)
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    RL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 8, 16])
    KEY: gl.constexpr = gl.SliceLayout(1, SL)
    L2: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ones = gl.allocate_shared_memory(ELEMENT, [1, 16, 64], L2)
    ones.index(0).store(gl.full([16, 64], 1.0, ELEMENT, gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])))
    fence_async_shared()
    role_barrier()
    offset = TK - TQ
    total = 0
    for member in range(0, KV_GROUP):
        total += count_tiles(STOP, TQ, b * H + g * KV_GROUP + member, n, NN, start)
    qk_scale = scale * LOG2_E
    keys = n * 128 + gl.arange(0, 128, KEY)
    is_key = keys < TK
    last_key = gl.minimum((n + 1) * 128, TK) - 1
    # Through a wait, so that the zeros are not set between the products in flight below.
    dk, dv = warpgroup_mma_wait(0, deps=(gl.zeros([128, 128], gl.float32, AL), gl.zeros([128, 128], gl.float32, AL)))
    dk_acc = warpgroup_mma_init(dk)
    no_scores = gl.zeros([128, 64], gl.float32, SL)
    mbarrier.wait(kv_full, 0)
    # Scores of the first tile. Where there is none this reads what lies there, and nobody reads the product.
    mbarrier.wait(full.index(0), 0, pred=total > 0)
    s_acc = warpgroup_mma(kv.index(0), qs.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    it = 0
    for member in range(0, KV_GROUP):
        h = g * KV_GROUP + member
        head = b * H + h
        gate = b * HF + h // GATE_GROUP
        tiles = count_tiles(STOP, TQ, head, n, NN, start)
        base = gl.load(C + (gate * TK + last_key)) * LOG2_E
        base_high = base.to(gl.float32)
        base_low = (base - base_high.to(gl.float64)).to(gl.float32)
        c = gl.load(C_K + (gate * TK + keys), mask=is_key, other=float("inf")) * LOG2_E
        key_far = (base - c).to(gl.float32)
        dc = fold(no_scores, 128)
        for t in range(tiles):
            m = start + t
            stage = it % _STAGES
            # Zero, unknown to the compiler, which else keeps each address of the products below in registers.
            z = it >> 30
            k = kv.index(z)
            v = kv.index(z + 1)
            q = qs.index(stage)
            do = dos.index(stage)
            dp_acc = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            s, dk = warpgroup_mma_wait(1, deps=(s_acc, dk_acc))
            row_base_high = tile_field(rows, stage, 0)
            row_base_low = tile_field(rows, stage, 1)
            last_first = tile_field(rows, stage, 2)
            if (m * 64 + offset < last_key) | (last_first > (n * 128).to(gl.float32)):
                # On the diagonal, where the gates' sums may cancel, or cut by the first key of a row.
                near = n * 128 + z + gl.arange(0, 128, KEY)
                row_base = row_base_high.to(gl.float64) + row_base_low.to(gl.float64)
                near_c = gl.load(C_K + (gate * TK + near), mask=near < TK, other=float("inf"))
                key_high, key_low = split_in_two(near_c[:, None] * LOG2_E - row_base)
                near_float = near.to(gl.float32)[:, None]
                d = row_field(rows, stage, 4).load(SL) - key_high
                d += row_field(rows, stage, 5).load(SL) - key_low
                s = s * qk_scale + d
                s = gl.where(near_float >= row_field(rows, stage, 6).load(SL), s, -float("inf"))
                positions = m * 64 + offset + gl.arange(0, 64, gl.SliceLayout(0, SL))
                p = fast_exp2(gl.where(near[:, None] <= positions[None, :], s, -float("inf")))
            else:
                column = (key_far + ((row_base_high - base_high) + (row_base_low - base_low)))[:, None]
                row = row_field(rows, stage, 0).load(SL)
                p = fast_exp2(s * qk_scale + column + row)
            p_narrow = gl.convert_layout(p.to(ELEMENT), OL)
            dv_acc = warpgroup_mma(p_narrow, do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp_acc,))
            delta = row_field(rows, stage, 1).load(SL)
            ds = p * (dp - delta)
            ds_narrow = ds.to(ELEMENT)
            # Of the rounded numbers, as the sums of rows: so their roundings cancel in the gates' gradients.
            dc += fold(ds_narrow.to(gl.float32), 128)
            # Scores of the next tile; after the last one, of what lies there: nobody reads them.
            next_stage = (it + 1) % _STAGES
            mbarrier.wait(full.index(next_stage), ((it + 1) // _STAGES) & 1, pred=it + 1 < total)
            s_acc = warpgroup_mma(k, qs.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            buffer = dss.index(it & 1)
            buffer.store(ds_narrow)
            fence_async_shared()
            role_barrier()
            # Every warp is past the products of the tile before.
            mbarrier.arrive(empty.index((it + _STAGES - 1) % _STAGES), count=1, pred=it > 0)
            transposed = buffer.permute((1, 0))
            dv = warpgroup_mma_wait(1, deps=(dv_acc,))
            no_dq = gl.zeros([64, 128], gl.float32, QL)
            dq_acc = warpgroup_mma(transposed, kv.index(z), no_dq, use_acc=False, is_async=True)
            sums_acc = gl.zeros([64, 16], gl.float32, RL)
            for i in gl.static_range(2):
                half = buffer.slice(i * 64, 64, 0).permute((1, 0))
                sums_acc = warpgroup_mma(half, ones.index(z).permute((1, 0)), sums_acc, use_acc=i > 0, is_async=True)
            dk_acc = warpgroup_mma(buffer, q, dk, is_async=True)
            # All but the last product: only that one may be in flight from one tile to the next.
            dq, sums = warpgroup_mma_wait(1, deps=(dq_acc, sums_acc))
            x = to_nearest(dq * row_field(rows, stage, 2).permute((1, 0)).load(QL))
            # The accumulator as [register, thread], so that a warp adds to 32 neighbours.
            x = gl.permute(gl.reshape(x, [4, 2, 8, 2, 8, 4, 2]), (1, 4, 3, 0, 2, 5, 6))
            x = gl.reshape(x, [16, 256, 2])
            even, odd = gl.split(x)
            PL: gl.constexpr = even.type.layout
            words = (gl.arange(0, 16, gl.SliceLayout(1, PL)) * 128)[:, None]
            tile = (head * NM + m).to(gl.int64) * (64 * 128)
            thread = gl.arange(0, 256, gl.SliceLayout(0, PL))[None, :]
            # The second warpgroup adds its 64 columns behind the 2048 words of the first.
            thread += thread // 128 * 1920
            pair = (odd.to(gl.int64) << 32) + even.to(gl.int64)
            gl.atomic_add(DQ + tile // 2 + thread + words, pair, sem="relaxed")
            per_quantum = gl.max(row_field(rows, stage, 2).permute((1, 0)).load(RL), 1)
            add_row_sums(ROW_SUMS + (head * NM + m) * 64, sums, per_quantum)
            it += 1
        columns = gl.convert_layout(gl.sum(dc, 1), KEY)
        gl.store(DC + (head * TK + keys), columns, mask=is_key)
    dk, s = warpgroup_mma_wait(0, deps=(dk_acc, s_acc))
    role_barrier()
    # Nobody reads keys and values any more: their gradients leave through the same memory.
    L4: gl.constexpr = dk_desc.layout
    ks = kv.index(0)
    vs = kv.index(1)
    k_out = ks._reinterpret(ELEMENT, [1, 128, 1, 128], L4)
    v_out = vs._reinterpret(ELEMENT, [1, 128, 1, 128], L4)
    ks.store((dk * scale).to(ELEMENT))
    vs.store(dv.to(ELEMENT))
    fence_async_shared()
    role_barrier()
    tma.async_copy_shared_to_global(dk_desc, [b, n * 128, g, 0], k_out)
    tma.async_copy_shared_to_global(dv_desc, [b, n * 128, g, 0], v_out)
    tma.store_wait(0)


@gluon.jit
def hopper_backward_128_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    row_desc,
    dk_desc,
    dv_desc,
    C,
    C_K,
    STOP,
    ORDER,
    DQ,
    ROW_SUMS,
    DC,
    scale,
    TQ,
    TK,
    H,
    G,
    KV_GROUP,
    GATE_GROUP,
    HF,
    NN,
    NM,
    ELEMENT: gl.constexpr,
):
    """Launch with 8 warps of at most 168 registers. ``DQ`` holds int64 numbers, each the sum of two of 32 bits."""
    L2: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    pid = gl.program_id(0)
    kv_head = gl.load(ORDER + pid // NN)
    n = pid % NN
    b = kv_head // G
    g = kv_head % G
    start = gl.maximum(n * 128 - (TK - TQ), 0) // 64
    kv = gl.allocate_shared_memory(ELEMENT, [2, 128, 128], L2)
    qs = gl.allocate_shared_memory(ELEMENT, [_STAGES, 64, 128], L2)
    dos = gl.allocate_shared_memory(ELEMENT, [_STAGES, 64, 128], L2)
    rows = gl.allocate_shared_memory(gl.float32, [_STAGES * 2, 1, 256], row_desc.layout)
    dss = gl.allocate_shared_memory(ELEMENT, [2, 128, 64], L2)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    fence_async_shared()
    role_barrier()
    mbarrier.expect(kv_full, 128 * 128 * 4)
    k = kv.index(0)._reinterpret(ELEMENT, [1, 128, 1, 128], k_desc.layout)
    v = kv.index(1)._reinterpret(ELEMENT, [1, 128, 1, 128], k_desc.layout)
    tma.async_copy_global_to_shared(k_desc, [b, n * 128, g, 0], kv_full, k)
    tma.async_copy_global_to_shared(v_desc, [b, n * 128, g, 0], kv_full, v)
    buffers = _Buffers(kv, qs, dos, rows, dss)
    barriers = _Barriers(full, empty, kv_full)
    item = _Item(b, g, n, start)
    sizes = _Sizes(TQ, TK, H, KV_GROUP, GATE_GROUP, HF, NN, NM)
    gl.warp_specialize(
        [
            (
                _consume,
                (dk_desc, dv_desc, buffers, barriers, item, sizes, C, C_K, STOP, DQ, ROW_SUMS, DC, scale, ELEMENT),
            ),
            (_produce, (q_desc, do_desc, row_desc, buffers, barriers, item, sizes, STOP, ELEMENT)),
        ],
        # One warp for the second, and 24 registers; the first gets what is left, 240.
        [1],
        [24],
    )
