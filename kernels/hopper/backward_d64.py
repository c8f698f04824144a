"""The backward kernel for Hopper and heads of 64 (see `backward`): warp groups that each do a part of a tile's work.

One persistent program per multiprocessor draws work tiles, each of 128 keys of one key/value head, from a dynamic
scheduler. The roles of its warps:

* Two *consumers*, a warp group each, hold 64 keys of the work tile: scores, weights and their gradients for every tile
  of 64 queries that attends to the keys, and ``dK``, ``dV`` and the keys' gradients of the decay, in registers.
* The *dQ consumer*, a warp group, multiplies ``dS^T`` of both consumers by the keys, and by ones for its row sums, and
  adds the results, rounded, to memory.
* The *producer*, one warp, draws work tiles and copies keys, values and tiles of queries to shared memory.

They synchronize by nothing but these rings of mbarriers. ``tile_count`` and ``work_count`` count tiles and work tiles
over the whole life of the program, alike in every role; stages and phases follow from them.

=======================  ======  =============  =====================================================================
full and empty           stages  arrivals       hands over
=======================  ======  =============  =====================================================================
``q_full``               4       copies         a tile: queries, gradients of outputs, fields of rows
                                                (`backward_common`)
``kv_full, kv_empty``    2       copies; 3      keys and values of a work tile
``ds_full, ds_empty``    4; 2    2; 1           ``dS`` of a tile, in one of 2 stages, to the dQ consumer; and to the
                                                producer, that the tile before has been used
``work_full, -_empty``   2       1; 3           the work tile: its index (past the last: none left), its key/value
                                                head, and the tiles of its first query head
=======================  ======  =============  =====================================================================

In a consumer, the scores of a tile are begun within the tile before, so that they are there when it starts. The order
of its matmuls, with what is still in flight: ``dP`` (dK before), ``dV``; wait for all but ``dV``; ``S`` of the next
tile; ``dK``; wait for all but ``dK``. What `backward` says is fragile depends on this order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launches.launch import launched
from ..triton_common import PARTS_OF_TENSORS, VARYING_SIZES
from .backward_common import add_row_sums, count_tiles, role_barrier, to_nearest
from .backward_d64_consumer import d64_consumer
from .backward_d64_state import D64_STAGES, KV_STAGES, D64Barriers, D64Buffers, D64Sizes, next_work


@gluon.jit
def d64_producer(descriptors, buffers, barriers, sizes, M_END, HEAD_ORDER, WORK_COUNTER, ELEMENT: gl.constexpr):
    """The producer, one warp: draws work tiles, and copies each tile once all have read what its stage held before.

    ``descriptors`` are those of queries, keys, values, gradients of outputs, and fields of rows.
    """
    q_desc, k_desc, v_desc, do_desc, row_desc = descriptors
    COPIED: gl.constexpr = q_desc.layout
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile_count = 0
    work_count = 0
    i_work = gl.atomic_add(WORK_COUNTER, 1, sem="relaxed", scope="gpu")
    going = True
    while going:
        bounded = gl.minimum(i_work, sizes.WORK_TILES - 1)
        i_bg = gl.load(HEAD_ORDER + bounded // sizes.NN)
        i_n = bounded % sizes.NN
        i_b = i_bg // sizes.G
        i_g = i_bg % sizes.G
        m_begin = gl.maximum(i_n * 128 - (sizes.TK - sizes.TQ), 0) // 64
        first_head_tiles = count_tiles(M_END, i_b * sizes.H + i_g * sizes.KV_GROUP, i_n, sizes.NN, m_begin)
        work_stage = work_count % 2
        mbarrier.wait(barriers.work_empty.index(work_stage), ((work_count // 2) & 1) ^ 1)
        buffers.work.index(work_stage * 4).store(gl.full([1], i_work, gl.int32, one))
        buffers.work.index(work_stage * 4 + 1).store(gl.full([1], i_bg, gl.int32, one))
        buffers.work.index(work_stage * 4 + 2).store(gl.full([1], first_head_tiles, gl.int32, one))
        role_barrier()
        mbarrier.arrive(barriers.work_full.index(work_stage), count=1)
        if i_work < sizes.WORK_TILES:
            kv_stage = work_count % KV_STAGES
            k_bar = barriers.kv_full.index(kv_stage)
            mbarrier.wait(barriers.kv_empty.index(kv_stage), ((work_count // KV_STAGES) & 1) ^ 1)
            mbarrier.expect(k_bar, 128 * 64 * 4)
            for i in gl.static_range(2):
                k_half = buffers.k.index(kv_stage * 2 + i)._reinterpret(ELEMENT, [1, 64, 1, 64], COPIED)
                v_half = buffers.v.index(kv_stage * 2 + i)._reinterpret(ELEMENT, [1, 64, 1, 64], COPIED)
                tma.async_copy_global_to_shared(k_desc, [i_b, i_n * 128 + i * 64, i_g, 0], k_bar, k_half)
                tma.async_copy_global_to_shared(v_desc, [i_b, i_n * 128 + i * 64, i_g, 0], k_bar, v_half)
            for member in range(0, sizes.KV_GROUP):
                i_h = i_g * sizes.KV_GROUP + member
                i_bh = i_b * sizes.H + i_h
                tiles = first_head_tiles
                if member > 0:
                    tiles = count_tiles(M_END, i_bh, i_n, sizes.NN, m_begin)
                for t in range(tiles):
                    i_m = m_begin + t
                    stage = tile_count % D64_STAGES
                    bar = barriers.q_full.index(stage)
                    # The tile that lies there has been used once dS of the one after it is stored.
                    after = tile_count - (D64_STAGES - 1)
                    mbarrier.wait(
                        barriers.ds_full.index(after % D64_STAGES), (after // D64_STAGES) & 1, pred=after >= 1
                    )
                    mbarrier.expect(bar, 64 * 64 * 4 + 2048)
                    q = buffers.q.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 64], COPIED)
                    do = buffers.do.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 64], COPIED)
                    tma.async_copy_global_to_shared(q_desc, [i_b, i_m * 64, i_h, 0], bar, q)
                    tma.async_copy_global_to_shared(do_desc, [i_b, i_m * 64, i_h, 0], bar, do)
                    for i in gl.static_range(2):
                        half = buffers.rows.index(stage * 2 + i)
                        tma.async_copy_global_to_shared(row_desc, [(i_bh * sizes.NM + i_m) * 2 + i, 0], bar, half)
                    tile_count += 1
            i_work = gl.atomic_add(WORK_COUNTER, 1, sem="relaxed", scope="gpu")
            work_count += 1
        else:
            going = False


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
def d64_dq_consumer(buffers, barriers, sizes, ones, M_END, ROWS, DQ, ROW_SUMS, ELEMENT: gl.constexpr):
    """The dQ consumer, one warp group: adds ``dQ`` and the row sums of ``dS`` of every tile to the fixed-point sums."""
    DQ_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    row = gl.arange(0, 64, gl.SliceLayout(1, DQ_OUT))
    zeros = gl.zeros([64, 64], gl.float32, DQ_OUT)
    no_sums = gl.zeros([64, 8], gl.float32, SUMS_OUT)
    tile_count = 0
    work_count = 0
    i_work, i_bg, first_head_tiles = next_work(work_count, buffers, barriers)
    while i_work < sizes.WORK_TILES:
        i_n = i_work % sizes.NN
        i_b = i_bg // sizes.G
        i_g = i_bg % sizes.G
        m_begin = gl.maximum(i_n * 128 - (sizes.TK - sizes.TQ), 0) // 64
        kv_stage = work_count % KV_STAGES
        mbarrier.wait(barriers.kv_full.index(kv_stage), (work_count // KV_STAGES) & 1)
        for member in range(0, sizes.KV_GROUP):
            i_bh = i_b * sizes.H + i_g * sizes.KV_GROUP + member
            tiles = first_head_tiles
            if member > 0:
                tiles = count_tiles(M_END, i_bh, i_n, sizes.NN, m_begin)
            tile = i_bh * sizes.NM + m_begin
            for _ in range(tiles):
                buffer = (tile_count & 1) * 2
                zero = tile_count >> 30
                # From global memory: this role does not hold the tile's stage of shared memory.
                dq_scale = gl.load(ROWS + tile.to(gl.int64) * 512 + (row + 128))
                p_dq = DQ + tile.to(gl.int64) * (64 * 64)
                mbarrier.wait(barriers.ds_full.index(tile_count % D64_STAGES), (tile_count // D64_STAGES) & 1)
                acc = zeros
                for i in gl.static_range(2):
                    k = buffers.k.index(kv_stage * 2 + i + zero)
                    acc = warpgroup_mma(
                        buffers.ds.index(buffer + i).permute((1, 0)), k, acc, use_acc=i > 0, is_async=True
                    )
                sums = no_sums
                for i in gl.static_range(2):
                    transposed = buffers.ds.index(buffer + i).permute((1, 0))
                    sums = warpgroup_mma(
                        transposed, ones.index(zero).permute((1, 0)), sums, use_acc=i > 0, is_async=True
                    )
                x, sums = warpgroup_mma_wait(0, deps=(acc, sums))
                role_barrier()
                mbarrier.arrive(barriers.ds_empty.index(tile_count & 1), count=1)
                _add_accumulator(p_dq, to_nearest(x * dq_scale[:, None]))
                add_row_sums(ROW_SUMS + tile * 64, sums, dq_scale)
                tile += 1
                tile_count += 1
        role_barrier()
        mbarrier.arrive(barriers.kv_empty.index(kv_stage), count=1)
        work_count += 1
        i_work, i_bg, first_head_tiles = next_work(work_count, buffers, barriers)


@launched
@gluon.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=PARTS_OF_TENSORS)
def hopper_backward_d64_kernel(
    q_desc, k_desc, v_desc, do_desc, row_desc, ROWS, BASE, C_K, M_END, HEAD_ORDER, WORK_COUNTER, DQ, ROW_SUMS, DK,
    DV, DC, scale, WORK_TILES, TQ, TK, H, G, KV_GROUP, GATE_GROUP, HF, NN, NM,
    ELEMENT: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and the fixed-point sums of those of queries; arguments as in `hopper_backward`.

    Launch with 4 warps, those of the first consumer, of at most 128 registers. ``DQ`` holds int32 sums.
    """
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ks = gl.allocate_shared_memory(ELEMENT, [2 * KV_STAGES, 64, 64], SHARED)
    vs = gl.allocate_shared_memory(ELEMENT, [2 * KV_STAGES, 64, 64], SHARED)
    qs = gl.allocate_shared_memory(ELEMENT, [D64_STAGES, 64, 64], SHARED)
    dos = gl.allocate_shared_memory(ELEMENT, [D64_STAGES, 64, 64], SHARED)
    rows = gl.allocate_shared_memory(gl.float32, [D64_STAGES * 2, 1, 256], row_desc.layout)
    dss = gl.allocate_shared_memory(ELEMENT, [4, 64, 64], SHARED)
    ones = gl.allocate_shared_memory(ELEMENT, [1, 8, 64], SHARED)
    ones.index(0).store(gl.full([8, 64], 1.0, ELEMENT, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    work = gl.allocate_shared_memory(gl.int32, [8, 1], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [D64_STAGES, 1], BARRIER)
    kv_full = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [D64_STAGES, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(D64_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=2)
    for i in gl.static_range(KV_STAGES):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=3)
    for i in gl.static_range(2):
        mbarrier.init(ds_empty.index(i), count=1)
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_empty.index(i), count=3)
    fence_async_shared()
    role_barrier()
    buffers = D64Buffers(ks, vs, qs, dos, rows, dss, work)
    barriers = D64Barriers(q_full, kv_full, kv_empty, ds_full, ds_empty, work_full, work_empty)
    sizes = D64Sizes(WORK_TILES, TQ, TK, H, G, KV_GROUP, GATE_GROUP, HF, NN, NM)
    gl.warp_specialize(
        [
            (
                d64_consumer,
                (buffers, barriers, sizes, M_END, BASE, C_K, DK, DV, DC, scale, gl.constexpr(0), ELEMENT),
            ),
            (
                d64_consumer,
                (buffers, barriers, sizes, M_END, BASE, C_K, DK, DV, DC, scale, gl.constexpr(1), ELEMENT),
            ),
            (d64_dq_consumer, (buffers, barriers, sizes, ones, M_END, ROWS, DQ, ROW_SUMS, ELEMENT)),
            (
                d64_producer,
                (
                    (q_desc, k_desc, v_desc, do_desc, row_desc),
                    buffers,
                    barriers,
                    sizes,
                    M_END,
                    HEAD_ORDER,
                    WORK_COUNTER,
                    ELEMENT,
                ),
            ),
        ],
        # Warps of all roles but the first, and registers of their threads. The first gets what is left of 4 * 128:
        # 208, as the other consumer.
        [4, 4, 1],
        [208, 72, 24],
    )
