"""The backward kernel for Hopper and heads of 64: warpgroups that each do a part of the work on a tile.

A persistent program per multiprocessor draws items, each of 128 keys of one key/value head, from a counter. Its roles:

* Two *consumers*, a warpgroup each, hold 64 keys of the item: scores, weights and their gradients for every tile of 64
  queries that sees the keys, and ``dK``, ``dV`` and the keys' gradients of the decay, in registers.
* The *dQ* warpgroup multiplies ``dS^T`` of both consumers by the keys, and by ones for the sums of its rows, and adds
  the products, rounded, to memory.
* The *producer*, one warp, draws the items and copies keys, values and tiles of queries to shared memory.

They wait for each other at nothing but these rings of barriers; "empty" ones start out passed, as the inverted phase
of their waits says. ``it`` counts tiles and ``wi`` items over the whole life of the program, alike in every role.

===================  =====  =============  =========================================================================
ring                 slots  arrivals       hands over
===================  =====  =============  =========================================================================
full, empty          4      copies; 2      a tile: queries, gradients of outputs, rows (`hopper_backward_parts`)
k_full, k_empty      2      copies; 3      keys and values of an item
s_full, s_empty      2      2; 1           ``dS`` of a tile from the consumers to the dQ warpgroup
item_full, -_empty   2      1; 3           the item: its number (past the last: none left), head, and its first head's
                                           tiles
===================  =====  =============  =========================================================================

In a consumer, the scores of a tile are begun within the tile before, so that they are there when it starts. The order
of its products, with what is still in flight: ``dP`` (dK before), ``dV``; wait for all but ``dV``; ``S`` of the next
tile; ``dK``; wait for all but ``dK``. What `hopper_backward` says is fragile hangs on this order.
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

# Slots of the rings of tiles and of items.
_STAGES = gl.constexpr(4)
_ITEMS = gl.constexpr(2)


class _Buffers(NamedTuple):
    """Shared memory; the first index is a slot, or half of one."""

    ks: Any
    vs: Any
    qs: Any
    dos: Any
    rows: Any
    dss: Any
    item: Any


class _Barriers(NamedTuple):
    full: Any
    empty: Any
    k_full: Any
    k_empty: Any
    s_full: Any
    s_empty: Any
    item_full: Any
    item_empty: Any


class _Sizes(NamedTuple):
    TOTAL: Any
    TQ: Any
    TK: Any
    H: Any
    G: Any
    KV_GROUP: Any
    GATE_GROUP: Any
    HF: Any
    NN: Any
    NM: Any


@gluon.jit
def _item_number(item, slot, i: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(item.index(slot * 4 + i).load(one), 0)


@gluon.jit
def _next_item(wi, item, item_full, item_empty):
    """The program's item ``wi``: its number, its head, and the tiles of the first query head."""
    slot = wi % 2
    mbarrier.wait(item_full.index(slot), (wi // 2) & 1)
    number = _item_number(item, slot, 0)
    kv_head = _item_number(item, slot, 1)
    tiles = _item_number(item, slot, 2)
    role_barrier()
    mbarrier.arrive(item_empty.index(slot), count=1)
    return number, kv_head, tiles


@gluon.jit
def _produce(descriptors, buffers, barriers, sizes, STOP, ORDER, COUNTER, ELEMENT: gl.constexpr):
    """One warp: draws items, and copies each tile once those who read what its slot held are done."""
    q_desc, k_desc, v_desc, do_desc, row_desc = descriptors
    ks, vs, qs, dos, rows, item = buffers.ks, buffers.vs, buffers.qs, buffers.dos, buffers.rows, buffers.item
    full, empty, k_full, k_empty, item_full, item_empty = (
        barriers.full,
        barriers.empty,
        barriers.k_full,
        barriers.k_empty,
        barriers.item_full,
        barriers.item_empty,
    )
    TOTAL, TQ, TK, H, G, KV_GROUP, NN, NM = (
        sizes.TOTAL,
        sizes.TQ,
        sizes.TK,
        sizes.H,
        sizes.G,
        sizes.KV_GROUP,
        sizes.NN,
        sizes.NM,
    )
    L4: gl.constexpr = q_desc.layout
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    wi = 0
    number = gl.atomic_add(COUNTER, 1, sem="relaxed", scope="gpu")
    going = True
    while going:
        bounded = gl.minimum(number, TOTAL - 1)
        kv_head = gl.load(ORDER + bounded // NN)
        n = bounded % NN
        b = kv_head // G
        g = kv_head % G
        start = gl.maximum(n * 128 - (TK - TQ), 0) // 64
        first_tiles = count_tiles(STOP, TQ, b * H + g * KV_GROUP, n, NN, start)
        slot = wi % 2
        mbarrier.wait(item_empty.index(slot), ((wi // 2) & 1) ^ 1)
        item.index(slot * 4).store(gl.full([1], number, gl.int32, one))
        item.index(slot * 4 + 1).store(gl.full([1], kv_head, gl.int32, one))
        item.index(slot * 4 + 2).store(gl.full([1], first_tiles, gl.int32, one))
        role_barrier()
        mbarrier.arrive(item_full.index(slot), count=1)
        if number < TOTAL:
            k_slot = wi % _ITEMS
            k_bar = k_full.index(k_slot)
            mbarrier.wait(k_empty.index(k_slot), ((wi // _ITEMS) & 1) ^ 1)
            mbarrier.expect(k_bar, 128 * 64 * 4)
            for i in gl.static_range(2):
                k_half = ks.index(k_slot * 2 + i)._reinterpret(ELEMENT, [1, 64, 1, 64], L4)
                v_half = vs.index(k_slot * 2 + i)._reinterpret(ELEMENT, [1, 64, 1, 64], L4)
                tma.async_copy_global_to_shared(k_desc, [b, n * 128 + i * 64, g, 0], k_bar, k_half)
                tma.async_copy_global_to_shared(v_desc, [b, n * 128 + i * 64, g, 0], k_bar, v_half)
            for member in range(0, KV_GROUP):
                h = g * KV_GROUP + member
                head = b * H + h
                tiles = first_tiles
                if member > 0:
                    tiles = count_tiles(STOP, TQ, head, n, NN, start)
                for t in range(tiles):
                    m = start + t
                    stage = it % _STAGES
                    bar = full.index(stage)
                    mbarrier.wait(empty.index(stage), ((it // _STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, 64 * 64 * 4 + 2048)
                    q = qs.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 64], L4)
                    do = dos.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 64], L4)
                    tma.async_copy_global_to_shared(q_desc, [b, m * 64, h, 0], bar, q)
                    tma.async_copy_global_to_shared(do_desc, [b, m * 64, h, 0], bar, do)
                    for i in gl.static_range(2):
                        half = rows.index(stage * 2 + i)
                        tma.async_copy_global_to_shared(row_desc, [(head * NM + m) * 2 + i, 0], bar, half)
                    it += 1
            number = gl.atomic_add(COUNTER, 1, sem="relaxed", scope="gpu")
            wi += 1
        else:
            going = False


@gluon.jit
def _consume(
    buffers,
    barriers,
    sizes,
    STOP,
    C,
    C_K,
    DK,
    DV,
    DC,
    scale,
    WHO: gl.constexpr,
    ELEMENT: gl.constexpr,
):
    """One warpgroup: 64 keys of each item, ``WHO`` says which; scores are held as ``[keys, queries]``."""
    ks, vs, qs, dos, rows, dss, item = (
        buffers.ks,
        buffers.vs,
        buffers.qs,
        buffers.dos,
        buffers.rows,
        buffers.dss,
        buffers.item,
    )
    full, empty, k_full, k_empty, s_full, s_empty, item_full, item_empty = (
        barriers.full,
        barriers.empty,
        barriers.k_full,
        barriers.k_empty,
        barriers.s_full,
        barriers.s_empty,
        barriers.item_full,
        barriers.item_empty,
    )
    TOTAL, TQ, TK, H, G, KV_GROUP, GATE_GROUP, HF, NN = (
        sizes.TOTAL,
        sizes.TQ,
        sizes.TK,
        sizes.H,
        sizes.G,
        sizes.KV_GROUP,
        sizes.GATE_GROUP,
        sizes.HF,
        sizes.NN,
    )
    # Scores, and gradients of keys and values. At this head size the two layouts are the same.
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OL: gl.constexpr = gl.DotOperandLayout(0, AL, 2)
    KEY: gl.constexpr = gl.SliceLayout(1, SL)
    ROW: gl.constexpr = gl.SliceLayout(0, SL)
    ST: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offset = TK - TQ
    qk_scale = scale * LOG2_E
    no_scores = gl.zeros([64, 64], gl.float32, SL)
    it = 0
    wi = 0
    number, kv_head, first_tiles = _next_item(wi, item, item_full, item_empty)
    while number < TOTAL:
        n = number % NN
        b = kv_head // G
        g = kv_head % G
        start = gl.maximum(n * 128 - offset, 0) // 64
        total = first_tiles
        for member in range(1, KV_GROUP):
            total += count_tiles(STOP, TQ, b * H + g * KV_GROUP + member, n, NN, start)
        k0 = n * 128 + WHO * 64
        last_key = gl.maximum(gl.minimum(k0 + 64, TK) - 1, 0)
        keys = k0 + gl.arange(0, 64, KEY)
        is_key = keys < TK
        k_slot = (wi % _ITEMS) * 2 + WHO
        mbarrier.wait(k_full.index(wi % _ITEMS), (wi // _ITEMS) & 1)
        mbarrier.wait(full.index(it % _STAGES), (it // _STAGES) & 1, pred=total > 0)
        # Through a wait, so that the zeros are not set between the products in flight below.
        dk, dv = warpgroup_mma_wait(0, deps=(gl.zeros([64, 64], gl.float32, AL), gl.zeros([64, 64], gl.float32, AL)))
        # Scores of the first tile. Where there is none this reads what lies there, and nobody reads the product.
        s_acc = warpgroup_mma(
            ks.index(k_slot), qs.index(it % _STAGES).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=(s_acc,))
        dk_acc = warpgroup_mma_init(dk)
        j = 0
        for member in range(0, KV_GROUP):
            h = g * KV_GROUP + member
            head = b * H + h
            gate = b * HF + h // GATE_GROUP
            tiles = first_tiles
            if member > 0:
                tiles = count_tiles(STOP, TQ, head, n, NN, start)
            base = gl.load(C + (gate * TK + last_key)) * LOG2_E
            base_high = base.to(gl.float32)
            base_low = (base - base_high.to(gl.float64)).to(gl.float32)
            c = gl.load(C_K + (gate * TK + keys), mask=is_key, other=float("inf")) * LOG2_E
            key_high, key_low = split_in_two(base - c)
            dc = fold(no_scores, 64)
            for t in range(tiles):
                m = start + t
                stage = it % _STAGES
                # Zero, unknown to the compiler, which else keeps each address of the products below in registers.
                z = it >> 30
                q = qs.index(stage)
                do = dos.index(stage)
                dp_acc = warpgroup_mma(
                    vs.index(k_slot + z), do.permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                row_base_high = tile_field(rows, stage, 0)
                row_base_low = tile_field(rows, stage, 1)
                last_first = tile_field(rows, stage, 2)
                if m * 64 + offset < last_key:
                    # On the diagonal: the gates' sums may cancel.
                    row_base = row_base_high.to(gl.float64) + row_base_low.to(gl.float64)
                    far = row_base - (base_high.to(gl.float64) + base_low.to(gl.float64))
                    near_high, near_low = split_in_two((key_high.to(gl.float64) + key_low.to(gl.float64)) + far)
                    d = row_field(rows, stage, 4).load(SL) + near_high[:, None]
                    d += row_field(rows, stage, 5).load(SL) + near_low[:, None]
                    s = s * qk_scale + d
                    positions = m * 64 + offset + gl.arange(0, 64, ROW)
                    s = gl.where(keys[:, None] <= positions[None, :], s, -float("inf"))
                    s = gl.where(keys.to(gl.float32)[:, None] >= row_field(rows, stage, 6).load(SL), s, -float("inf"))
                else:
                    column = key_high + ((row_base_high - base_high) + (row_base_low - base_low))
                    s = s * qk_scale + column[:, None] + row_field(rows, stage, 0).load(SL)
                    if last_first > k0.to(gl.float32):
                        first = row_field(rows, stage, 6).load(SL)
                        s = gl.where(keys.to(gl.float32)[:, None] >= first, s, -float("inf"))
                p = fast_exp2(s)
                p_narrow = p.to(ELEMENT)
                dv_acc = warpgroup_mma(gl.convert_layout(p_narrow, OL), do, dv, is_async=True)
                dp, dk = warpgroup_mma_wait(1, deps=(dp_acc, dk_acc))
                delta = row_field(rows, stage, 1).load(SL)
                ds = p * (dp - delta)
                ds_narrow = ds.to(ELEMENT)
                # Of the rounded numbers, as the sums of rows: so their roundings cancel in the gates' gradients.
                dc += fold(ds_narrow.to(gl.float32), 64)
                # Scores of the next tile; after the last one, of what lies there: nobody reads them.
                next_stage = (it + 1) % _STAGES
                mbarrier.wait(full.index(next_stage), ((it + 1) // _STAGES) & 1, pred=j + 1 < total)
                s_acc = warpgroup_mma(
                    ks.index(k_slot + z), qs.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                buffer = (it & 1) * 2
                mbarrier.wait(s_empty.index(it & 1), ((it >> 1) & 1) ^ 1)
                dss.index(buffer + WHO).store(ds_narrow)
                fence_async_shared()
                role_barrier()
                mbarrier.arrive(s_full.index(it & 1), count=1)
                # Every warp is past the products of the tile before.
                mbarrier.arrive(empty.index((it + _STAGES - 1) % _STAGES), count=1, pred=j > 0)
                dk_acc = warpgroup_mma(dss.index(buffer + WHO), q, dk, is_async=True)
                # All but the last product: only that one may be in flight from one tile to the next.
                s, dv = warpgroup_mma_wait(1, deps=(s_acc, dv_acc))
                it += 1
                j += 1
            columns = gl.convert_layout(gl.sum(dc, 1), KEY)
            gl.store(DC + (head * TK + keys), columns, mask=is_key)
        dk = warpgroup_mma_wait(0, deps=(dk_acc,))
        role_barrier()
        mbarrier.arrive(k_empty.index(wi % _ITEMS), count=1)
        mbarrier.arrive(empty.index((it + _STAGES - 1) % _STAGES), count=1, pred=total > 0)
        wi += 1
        number, kv_head, first_tiles = _next_item(wi, item, item_full, item_empty)
        out_keys = k0 + gl.arange(0, 64, gl.SliceLayout(1, ST))
        dims = gl.arange(0, 64, gl.SliceLayout(0, ST))
        p_out = (b.to(gl.int64) * TK * G + g) * 64 + (out_keys * (G * 64)).to(gl.int64)[:, None] + dims[None, :]
        gl.store(DV + p_out, gl.convert_layout(dv.to(ELEMENT), ST), mask=(out_keys < TK)[:, None])
        gl.store(DK + p_out, gl.convert_layout((dk * scale).to(ELEMENT), ST), mask=(out_keys < TK)[:, None])


@gluon.jit
def _add_accumulator(p, x):
    """Add ``[64, 64]`` to memory as ``[register, thread]``, so that a warp adds to 32 neighbours."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 2, 8, 8, 4, 2]), (1, 3, 0, 2, 4, 5)), [16, 128, 2])
    even, odd = gl.split(x)
    L: gl.constexpr = even.type.layout
    p += gl.arange(0, 128, gl.SliceLayout(0, L))[None, :]
    words = (gl.arange(0, 16, gl.SliceLayout(1, L)) * 128)[:, None]
    gl.atomic_add(p + words, even, sem="relaxed")
    gl.atomic_add(p + (words + 2048), odd, sem="relaxed")


@gluon.jit
def _add_dq(buffers, barriers, sizes, ones, STOP, ROWS, DQ, ROW_SUMS, ELEMENT: gl.constexpr):
    """One warpgroup: ``dQ`` and the sums of rows of ``dS`` of every tile, and their addition to what others add."""
    ks, dss, item = buffers.ks, buffers.dss, buffers.item
    k_full, k_empty, s_full, s_empty, item_full, item_empty = (
        barriers.k_full,
        barriers.k_empty,
        barriers.s_full,
        barriers.s_empty,
        barriers.item_full,
        barriers.item_empty,
    )
    TOTAL, TQ, TK, H, G, KV_GROUP, NN, NM = (
        sizes.TOTAL,
        sizes.TQ,
        sizes.TK,
        sizes.H,
        sizes.G,
        sizes.KV_GROUP,
        sizes.NN,
        sizes.NM,
    )
    QL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    RL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    row = gl.arange(0, 64, gl.SliceLayout(1, QL))
    zeros = gl.zeros([64, 64], gl.float32, QL)
    no_sums = gl.zeros([64, 8], gl.float32, RL)
    it = 0
    wi = 0
    number, kv_head, first_tiles = _next_item(wi, item, item_full, item_empty)
    while number < TOTAL:
        n = number % NN
        b = kv_head // G
        g = kv_head % G
        start = gl.maximum(n * 128 - (TK - TQ), 0) // 64
        k_slot = wi % _ITEMS
        mbarrier.wait(k_full.index(k_slot), (wi // _ITEMS) & 1)
        for member in range(0, KV_GROUP):
            head = b * H + g * KV_GROUP + member
            tiles = first_tiles
            if member > 0:
                tiles = count_tiles(STOP, TQ, head, n, NN, start)
            tile = head * NM + start
            for _ in range(tiles):
                buffer = (it & 1) * 2
                z = it >> 30
                # From global memory: the tile's slot of shared memory is not this role's to hold.
                per_quantum = gl.load(ROWS + tile.to(gl.int64) * 512 + (row + 128))
                p_dq = DQ + tile.to(gl.int64) * (64 * 64)
                mbarrier.wait(s_full.index(it & 1), (it >> 1) & 1)
                acc = zeros
                for i in gl.static_range(2):
                    k = ks.index(k_slot * 2 + i + z)
                    acc = warpgroup_mma(dss.index(buffer + i).permute((1, 0)), k, acc, use_acc=i > 0, is_async=True)
                sums = no_sums
                for i in gl.static_range(2):
                    transposed = dss.index(buffer + i).permute((1, 0))
                    sums = warpgroup_mma(transposed, ones.index(z).permute((1, 0)), sums, use_acc=i > 0, is_async=True)
                x, sums = warpgroup_mma_wait(0, deps=(acc, sums))
                role_barrier()
                mbarrier.arrive(s_empty.index(it & 1), count=1)
                _add_accumulator(p_dq, to_nearest(x * per_quantum[:, None]))
                add_row_sums(ROW_SUMS + tile * 64, sums, per_quantum)
                tile += 1
                it += 1
        role_barrier()
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        wi += 1
        number, kv_head, first_tiles = _next_item(wi, item, item_full, item_empty)


@gluon.jit(do_not_specialize=["TOTAL"])
def hopper_backward_64_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    row_desc,
    ROWS,
    C,
    C_K,
    STOP,
    ORDER,
    COUNTER,
    DQ,
    ROW_SUMS,
    DK,
    DV,
    DC,
    scale,
    TOTAL,
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
    """Launch with 4 warps of at most 128 registers. ``TOTAL`` items; ``DQ`` holds int32 sums."""
    L2: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ks = gl.allocate_shared_memory(ELEMENT, [2 * _ITEMS, 64, 64], L2)
    vs = gl.allocate_shared_memory(ELEMENT, [2 * _ITEMS, 64, 64], L2)
    qs = gl.allocate_shared_memory(ELEMENT, [_STAGES, 64, 64], L2)
    dos = gl.allocate_shared_memory(ELEMENT, [_STAGES, 64, 64], L2)
    rows = gl.allocate_shared_memory(gl.float32, [_STAGES * 2, 1, 256], row_desc.layout)
    dss = gl.allocate_shared_memory(ELEMENT, [4, 64, 64], L2)
    ones = gl.allocate_shared_memory(ELEMENT, [1, 8, 64], L2)
    ones.index(0).store(gl.full([8, 64], 1.0, ELEMENT, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    item = gl.allocate_shared_memory(gl.int32, [8, 1], NUMBER)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [_ITEMS, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [_ITEMS, 1], BARRIER)
    s_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    s_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(_ITEMS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=3)
    for i in gl.static_range(2):
        mbarrier.init(s_full.index(i), count=2)
        mbarrier.init(s_empty.index(i), count=1)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=3)
    fence_async_shared()
    role_barrier()
    buffers = _Buffers(ks, vs, qs, dos, rows, dss, item)
    barriers = _Barriers(full, empty, k_full, k_empty, s_full, s_empty, item_full, item_empty)
    sizes = _Sizes(TOTAL, TQ, TK, H, G, KV_GROUP, GATE_GROUP, HF, NN, NM)
    gl.warp_specialize(
        [
            (_consume, (buffers, barriers, sizes, STOP, C, C_K, DK, DV, DC, scale, gl.constexpr(0), ELEMENT)),
            (_consume, (buffers, barriers, sizes, STOP, C, C_K, DK, DV, DC, scale, gl.constexpr(1), ELEMENT)),
            (_add_dq, (buffers, barriers, sizes, ones, STOP, ROWS, DQ, ROW_SUMS, ELEMENT)),
            (
                _produce,
                ((q_desc, k_desc, v_desc, do_desc, row_desc), buffers, barriers, sizes, STOP, ORDER, COUNTER, ELEMENT),
            ),
        ],
        # Warps of all roles but the first, and registers of their threads. The first gets what is left of
        # 4 * 128: 208, as the other consumer.
        [4, 4, 1],
        [208, 72, 24],
    )
