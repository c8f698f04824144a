"""The forward kernel for Hopper and its producer roles (see `forward`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..launches.launch import launched
from ..triton_common import BASE_BLOCK, INF, LOG2_E, PARTS_OF_TENSORS, VARYING_SIZES
from .forward_consumer import forward_consumer
from .forward_state import (
    CONSUMER_ROWS,
    WORK_BLOCK,
    WORK_FIELDS,
    WORK_FIRST,
    WORK_FIRST_SPLIT,
    WORK_HEAD,
    WORK_KV_START,
    WORK_LAST,
    WORK_STAGES,
    ForwardBarriers,
    ForwardBuffers,
    ForwardDescriptors,
    ForwardGates,
    ForwardRows,
    ForwardSizes,
    ForwardWork,
    advance,
    get_field,
    put_field,
)

# Powers of two by which the rows of a work tile may decay for one float32 part of their bias to do: its roundings then
# change a weight by less than 2^-16 of it.
_LARGEST_UNSPLIT = gl.constexpr(64.0)


@gluon.jit
def forward_producer(
    descriptors,
    buffers,
    barriers,
    sizes,
    work,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    HEAD_SWIZZLE: gl.constexpr,
):
    """The producer, one warp: draws work tiles, describes them to the other roles, and copies their queries, keys and
    values to shared memory."""
    BLOCK_M: gl.constexpr = CONSUMER_ROWS * CONSUMERS
    total = sizes.HEADS * sizes.NM
    offset = gl.load(sizes.LAST).to(gl.int32)
    stage = 0
    phase = 0
    work_count = 0
    i_work = gl.atomic_add(work.WORK_COUNTER, 1, sem="relaxed", scope="gpu")
    while i_work < total:
        # The next index is prefetched, which hides the latency of the atomic.
        next_work = gl.atomic_add(work.WORK_COUNTER, 1, sem="relaxed", scope="gpu")
        group = i_work // (sizes.NM * HEAD_SWIZZLE) * HEAD_SWIZZLE
        heads = gl.minimum(sizes.HEADS - group, HEAD_SWIZZLE)
        turn = i_work - group * sizes.NM
        i_m = sizes.NM - 1 - turn // heads
        i_bh = gl.load(work.HEAD_ORDER + group + turn % heads).to(gl.int32)
        row = i_m * BLOCK_M + offset
        last_tile = (gl.minimum(row + BLOCK_M, sizes.TK) - 1) // BLOCK_N
        work_stage = work_count % WORK_STAGES
        mbarrier.wait(barriers.work_empty.index(work_stage), ((work_count // WORK_STAGES) & 1) ^ 1)
        first_key = last_tile * BLOCK_N
        for consumer in gl.static_range(CONSUMERS):
            i = i_m * CONSUMERS + consumer
            least = gl.load(work.LEAST + i_bh.to(gl.int64) * sizes.NR + i, mask=i < sizes.NR, other=0x7FFFFFFF)
            greatest = gl.load(work.GREATEST + i_bh.to(gl.int64) * sizes.NR + i, mask=i < sizes.NR, other=0)
            first_key = gl.minimum(first_key, least)
            put_field(buffers.work_tiles, work_stage, WORK_KV_START + 2 * consumer, least)
            put_field(buffers.work_tiles, work_stage, WORK_KV_START + 1 + 2 * consumer, greatest)
        first_tile = gl.maximum(first_key, 0) // BLOCK_N
        put_field(buffers.work_tiles, work_stage, WORK_HEAD, i_bh)
        put_field(buffers.work_tiles, work_stage, WORK_BLOCK, i_m)
        put_field(buffers.work_tiles, work_stage, WORK_FIRST, first_tile)
        put_field(buffers.work_tiles, work_stage, WORK_LAST, last_tile)
        mbarrier.arrive(barriers.work_full.index(work_stage), count=1)
        i_b = i_bh // sizes.H
        i_h = i_bh % sizes.H
        i_g = i_h // sizes.KV_GROUP
        q_stage = work_count % Q_STAGES
        mbarrier.wait(barriers.q_empty.index(q_stage), ((work_count // Q_STAGES) & 1) ^ 1)
        q_full = barriers.q_full.index(q_stage)
        mbarrier.expect(q_full, CONSUMERS * descriptors.q.block_type.nbytes)
        for consumer in gl.static_range(CONSUMERS):
            rows = i_m * BLOCK_M + consumer * CONSUMER_ROWS
            tma.async_copy_global_to_shared(
                descriptors.q, [i_b, i_h, rows, 0], q_full, buffers.q.index(q_stage * CONSUMERS + consumer)
            )
        for t in range(last_tile - first_tile + 1):
            n = (last_tile - t) * BLOCK_N
            next_stage, next_phase = advance(stage, phase, STAGES)
            mbarrier.wait(barriers.kv_empty.index(stage), phase ^ 1)
            k_full = barriers.k_full.index(stage)
            mbarrier.expect(k_full, descriptors.k.block_type.nbytes)
            tma.async_copy_global_to_shared(descriptors.k, [i_b, i_g, n, 0], k_full, buffers.k.index(stage))
            mbarrier.wait(barriers.kv_empty.index(next_stage), next_phase ^ 1)
            v_full = barriers.v_full.index(stage)
            mbarrier.expect(v_full, descriptors.v.block_type.nbytes)
            tma.async_copy_global_to_shared(descriptors.v, [i_b, i_g, n, 0], v_full, buffers.v.index(stage))
            stage, phase = next_stage, next_phase
        work_count += 1
        i_work = next_work
    work_stage = work_count % WORK_STAGES
    mbarrier.wait(barriers.work_empty.index(work_stage), ((work_count // WORK_STAGES) & 1) ^ 1)
    put_field(buffers.work_tiles, work_stage, WORK_HEAD, -1)
    mbarrier.arrive(barriers.work_full.index(work_stage), count=1)


@gluon.jit
def _put_rows(buffers, i, p_cq, p_start, first_c, queries, last, TQ):
    """Write what a consumer must know of its ``queries`` of a work tile; ``i`` counts both."""
    mask = queries < TQ
    c = gl.load(p_cq + queries, mask=mask, other=0.0)
    kv_start = gl.load(p_start + queries, mask=mask, other=0).to(gl.int32)
    exact = gl.where(mask, (c - first_c) * LOG2_E, 0.0)
    high = exact.to(gl.float32)
    buffers.rows.index(2 * i).store(last)
    buffers.rows.index(2 * i + 1).store(kv_start)
    buffers.row_bias.index(2 * i).store(high)
    buffers.row_bias.index(2 * i + 1).store((exact - high.to(gl.float64)).to(gl.float32))


@gluon.jit
def forward_bias_producer(
    buffers,
    barriers,
    sizes,
    gates,
    rows,
    HF,
    GATE_GROUP,
    TQ,
    NB,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The bias producer, two warps: what each work tile's rows add to their logits, ``c_i - base``, and what each
    tile's keys add, ``base - c_j``; ``base`` is ``c_i`` of the first query."""
    BLOCK_M: gl.constexpr = CONSUMER_ROWS * CONSUMERS
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_N // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    row_layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    o_tile = gl.arange(0, BLOCK_N, layout=layout)
    offset = gl.load(sizes.LAST).to(gl.int32)
    stage = 0
    phase = 0
    work_count = 0
    mbarrier.wait(barriers.work_full.index(0), 0)
    i_bh = get_field(buffers.work_tiles, 0, WORK_HEAD)
    while i_bh >= 0:
        work_stage = work_count % WORK_STAGES
        i_m = get_field(buffers.work_tiles, work_stage, WORK_BLOCK)
        first_tile = get_field(buffers.work_tiles, work_stage, WORK_FIRST)
        last_tile = get_field(buffers.work_tiles, work_stage, WORK_LAST)
        i_b = (i_bh // sizes.H).to(gl.int64)
        i_h = i_bh % sizes.H
        i_gate = (i_h // GATE_GROUP).to(gl.int64)
        first_row = i_m * BLOCK_M
        p_cq = gates.C_Q + (i_b * HF + i_gate) * TQ
        first_c = gl.load(p_cq + first_row)
        last_c = gl.load(p_cq + gl.minimum(first_row + BLOCK_M, TQ) - 1)
        p_start = rows.KV_START + i_b * rows.s_b + (i_h // rows.START_GROUP).to(gl.int64) * rows.s_h
        for consumer in gl.static_range(CONSUMERS):
            o_m = first_row + consumer * CONSUMER_ROWS + gl.arange(0, CONSUMER_ROWS, layout=row_layout)
            _put_rows(buffers, work_stage * CONSUMERS + consumer, p_cq, p_start, first_c, o_m, o_m + offset, TQ)
        # Where rows decay little from first to last, so do the keys beside them, and one part is precise enough.
        diagonal = gl.maximum(gl.minimum((first_row + offset + 1) // BLOCK_N, last_tile), first_tile)
        first_split = gl.where((first_c - last_c) * LOG2_E <= _LARGEST_UNSPLIT, last_tile + 1, diagonal)
        put_field(buffers.work_tiles, work_stage, WORK_FIRST_SPLIT, first_split)
        mbarrier.arrive(barriers.work_empty.index(work_stage), count=1)
        base = first_c * LOG2_E
        p_relative = gates.RELATIVE + (i_b * HF + i_gate) * sizes.TK
        p_base = gates.BASE + (i_b * HF + i_gate) * NB
        p_ck = gates.C_K + i_b * gates.ck_b + i_gate * gates.ck_h
        for t in range(last_tile - first_tile + 1):
            tile = last_tile - t
            o_n = tile * BLOCK_N + o_tile
            if tile < diagonal:
                relative = gl.load(p_relative + o_n)
                end = gl.load(p_base + o_n // BASE_BLOCK)
                bias = (base - end).to(gl.float32) - relative
                mbarrier.wait(barriers.kv_empty.index(stage), phase ^ 1)
                buffers.bias_high.index(stage).store(bias)
            else:
                c = gl.load(p_ck + o_n, mask=o_n < sizes.TK, other=INF)
                exact = (first_c - c) * LOG2_E
                high = exact.to(gl.float32)
                low = (exact - high.to(gl.float64)).to(gl.float32)
                low = gl.where(high == -INF, 0.0, low)
                mbarrier.wait(barriers.kv_empty.index(stage), phase ^ 1)
                buffers.bias_high.index(stage).store(high)
                buffers.bias_low.index(stage).store(low)
            mbarrier.arrive(barriers.k_full.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        work_count += 1
        next_stage = work_count % WORK_STAGES
        mbarrier.wait(barriers.work_full.index(next_stage), (work_count // WORK_STAGES) & 1)
        i_bh = get_field(buffers.work_tiles, next_stage, WORK_HEAD)


# Beside what varies, sizes of the model that were not specialized when the kernel was tuned.
_SIZES = (*VARYING_SIZES, "H", "KV_GROUP", "HF", "GATE_GROUP", "START_GROUP")


@launched
@gluon.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=PARTS_OF_TENSORS)
def hopper_forward_kernel(
    q_descriptor, k_descriptor, v_descriptor, out_descriptor, C_Q, C_K, RELATIVE, BASE, LSE, KV_START, LAST,
    HEAD_ORDER, LEAST, GREATEST, WORK_COUNTER,
    ck_b, ck_h, s_b, s_h,
    scale, HEADS, NM, NR, TQ, TK, NB, H, KV_GROUP, HF, GATE_GROUP, START_GROUP,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    HEAD_SWIZZLE: gl.constexpr,
    IS_LAZY: gl.constexpr,
    HAS_FENCE: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all queries; arguments as in `hopper_forward`.

    Launch with 4 warps, those of the first consumer. ``LEAST`` and ``GREATEST`` are ``[B, H, NR]``, of blocks of 64
    queries; ``HEADS`` is ``B * H``, and ``NM`` the work tiles of a head.
    """
    # A stage is given back within the next work tile, which has another.
    gl.static_assert(Q_STAGES >= 2)
    dtype: gl.constexpr = q_descriptor.dtype
    D: gl.constexpr = q_descriptor.block_type.shape[3]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = ForwardBuffers(
        q=gl.allocate_shared_memory(dtype, [Q_STAGES * CONSUMERS, 1, 1, CONSUMER_ROWS, D], q_descriptor.layout),
        k=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_descriptor.layout),
        v=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_descriptor.layout),
        bias_high=gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], PLAIN),
        bias_low=gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], PLAIN),
        work_tiles=gl.allocate_shared_memory(gl.int32, [WORK_STAGES * WORK_FIELDS, 1], PLAIN),
        rows=gl.allocate_shared_memory(gl.int32, [2 * WORK_STAGES * CONSUMERS, CONSUMER_ROWS], PLAIN),
        row_bias=gl.allocate_shared_memory(gl.float32, [2 * WORK_STAGES * CONSUMERS, CONSUMER_ROWS], PLAIN),
    )
    barriers = ForwardBarriers(
        q_full=gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER),
        q_empty=gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER),
        k_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        v_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        kv_empty=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        work_full=gl.allocate_shared_memory(gl.int64, [WORK_STAGES, 1], BARRIER),
        work_empty=gl.allocate_shared_memory(gl.int64, [WORK_STAGES, 1], BARRIER),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.k_full.index(i), count=2)
        mbarrier.init(barriers.v_full.index(i), count=1)
        mbarrier.init(barriers.kv_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(barriers.q_full.index(i), count=1)
        mbarrier.init(barriers.q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(WORK_STAGES):
        mbarrier.init(barriers.work_full.index(i), count=1)
        mbarrier.init(barriers.work_empty.index(i), count=CONSUMERS + 1)
    fence_async_shared()

    descriptors = ForwardDescriptors(q_descriptor, k_descriptor, v_descriptor, out_descriptor)
    sizes = ForwardSizes(HEADS, NM, NR, LAST, TK, H, KV_GROUP)
    gates = ForwardGates(C_Q, C_K, RELATIVE, BASE, ck_b, ck_h)
    rows = ForwardRows(LSE, KV_START, s_b, s_h, START_GROUP)
    shared = (out_descriptor, buffers, barriers, sizes, rows, TQ, scale)
    work = ForwardWork(HEAD_ORDER, LEAST, GREATEST, WORK_COUNTER)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (forward_consumer, (gl.constexpr(0), shared, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, IS_LAZY, HAS_FENCE)),
                (forward_consumer, (gl.constexpr(1), shared, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, IS_LAZY, HAS_FENCE)),
                (
                    forward_bias_producer,
                    (buffers, barriers, sizes, gates, rows, HF, GATE_GROUP, TQ, NB, CONSUMERS, BLOCK_N, STAGES),
                ),
                (
                    forward_producer,
                    (descriptors, buffers, barriers, sizes, work, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, HEAD_SWIZZLE),
                ),
            ],
            [4, 2, 1],
            [REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (forward_consumer, (gl.constexpr(0), shared, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, IS_LAZY, HAS_FENCE)),
                (forward_consumer, (gl.constexpr(1), shared, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, IS_LAZY, HAS_FENCE)),
                (forward_consumer, (gl.constexpr(2), shared, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, IS_LAZY, HAS_FENCE)),
                (
                    forward_bias_producer,
                    (buffers, barriers, sizes, gates, rows, HF, GATE_GROUP, TQ, NB, CONSUMERS, BLOCK_N, STAGES),
                ),
                (
                    forward_producer,
                    (descriptors, buffers, barriers, sizes, work, CONSUMERS, BLOCK_N, STAGES, Q_STAGES, HEAD_SWIZZLE),
                ),
            ],
            [4, 4, 2, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
