"""The backward kernel for Hopper and heads of 128 (see `backward`): two warp groups that share every matmul.

A program holds 128 keys of one key/value head, as one of `portable.backward` does. ``dK`` and ``dV`` of 64 keys and a
head of 128 fill half of a warp group's registers, which leaves none for a further role: so both consumer warp groups do
everything, each for its 64 keys, and for ``dQ`` each takes 64 of the 128 columns and all 128 keys. The producer, one
warp, copies the tiles of queries to a ring of shared memory (``q_full``: the copies; ``q_empty``: one arrival, after a
barrier of both warp groups).

The order of the consumers' matmuls, with what is still in flight: ``S`` of the first tile; then in every tile ``dP``
(dK before); wait for all but ``dP``; ``dV``; wait for all but ``dV``; ``S`` of the next tile; wait for all but ``S``;
``dQ``, ``dK``; wait for all but ``dK``, which runs while ``dQ`` is added to memory. What `backward` says is fragile
depends on this order.
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

from ..launches.launch import launched
from ..triton_common import LOG2_E, PARTS_OF_TENSORS, VARYING_SIZES
from .backward_common import (
    add_row_sums,
    count_tiles,
    fast_exp2,
    fold,
    role_barrier,
    row_field,
    split_fp64,
    tile_field,
    to_nearest,
)

# Stages of the ring of tiles.
_D128_STAGES = gl.constexpr(3)


class D128Buffers(NamedTuple):
    """Shared memory; the first index is a stage. ``kv`` holds keys, then values."""

    kv: Any
    q: Any
    do: Any
    rows: Any
    ds: Any


class D128Barriers(NamedTuple):
    q_full: Any
    q_empty: Any
    kv_full: Any


class D128Work(NamedTuple):
    """Sequence, key/value head, block of keys, and the first tile of queries that may attend to it."""

    i_b: Any
    i_g: Any
    i_n: Any
    m_begin: Any


class D128Sizes(NamedTuple):
    TQ: Any
    TK: Any
    H: Any
    KV_GROUP: Any
    GATE_GROUP: Any
    HF: Any
    NN: Any
    NM: Any


@gluon.jit
def d128_producer(q_desc, do_desc, row_desc, buffers, barriers, work, sizes, M_END, ELEMENT: gl.constexpr):
    """The producer, one warp: copies the tiles in order, each once its stage has been read."""
    COPIED: gl.constexpr = q_desc.layout
    tile_count = 0
    for member in range(0, sizes.KV_GROUP):
        i_h = work.i_g * sizes.KV_GROUP + member
        i_bh = work.i_b * sizes.H + i_h
        tiles = count_tiles(M_END, i_bh, work.i_n, sizes.NN, work.m_begin)
        for t in range(tiles):
            i_m = work.m_begin + t
            stage = tile_count % _D128_STAGES
            bar = barriers.q_full.index(stage)
            mbarrier.wait(barriers.q_empty.index(stage), ((tile_count // _D128_STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 64 * 128 * 4 + 2048)
            q = buffers.q.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 128], COPIED)
            do = buffers.do.index(stage)._reinterpret(ELEMENT, [1, 64, 1, 128], COPIED)
            tma.async_copy_global_to_shared(q_desc, [work.i_b, i_m * 64, i_h, 0], bar, q)
            tma.async_copy_global_to_shared(do_desc, [work.i_b, i_m * 64, i_h, 0], bar, do)
            for i in gl.static_range(2):
                half = buffers.rows.index(stage * 2 + i)
                tma.async_copy_global_to_shared(row_desc, [(i_bh * sizes.NM + i_m) * 2 + i, 0], bar, half)
            tile_count += 1


@gluon.jit
def d128_consumer(
    dk_desc, dv_desc, buffers, barriers, work, sizes, BASE, C_K, M_END, DQ, ROW_SUMS, DC, scale,
    ELEMENT: gl.constexpr,
):  # fmt: skip
    """The consumers, two warp groups: gradients of the program's keys, and their shares of those of queries.

    Scores are held transposed, ``[keys, queries]``. ``C_K`` holds contiguous running sums of keys, ``[B, HF, TK]``, and
    ``BASE`` what `describe_blocks` says of blocks of 128 keys.
    They write ``dK`` and ``dV``, and ``DC``, ``[B, H, TK]``.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    DQ_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    SUMS_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 8, 16])
    KEY: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ones = gl.allocate_shared_memory(ELEMENT, [1, 16, 64], SHARED)
    ones.index(0).store(gl.full([16, 64], 1.0, ELEMENT, gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])))
    fence_async_shared()
    role_barrier()
    offset = sizes.TK - sizes.TQ
    total_tiles = 0
    for member in range(0, sizes.KV_GROUP):
        total_tiles += count_tiles(
            M_END, work.i_b * sizes.H + work.i_g * sizes.KV_GROUP + member, work.i_n, sizes.NN, work.m_begin
        )
    qk_scale = scale * LOG2_E
    o_n = work.i_n * 128 + gl.arange(0, 128, KEY)
    m_k = o_n < sizes.TK
    last_key = gl.minimum((work.i_n + 1) * 128, sizes.TK) - 1
    # Through a wait, so that the zeros are not set between the matmuls in flight below.
    dk, dv = warpgroup_mma_wait(0, deps=(gl.zeros([128, 128], gl.float32, OUT), gl.zeros([128, 128], gl.float32, OUT)))
    acc_dk = warpgroup_mma_init(dk)
    no_scores = gl.zeros([128, 64], gl.float32, SCORES)
    mbarrier.wait(barriers.kv_full, 0)
    # Scores of the first tile. Where there is none this reads what lies there, and the result is not used.
    mbarrier.wait(barriers.q_full.index(0), 0, pred=total_tiles > 0)
    acc_s = warpgroup_mma(
        buffers.kv.index(0), buffers.q.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    tile_count = 0
    for member in range(0, sizes.KV_GROUP):
        i_h = work.i_g * sizes.KV_GROUP + member
        i_bh = work.i_b * sizes.H + i_h
        i_gate = work.i_b * sizes.HF + i_h // sizes.GATE_GROUP
        tiles = count_tiles(M_END, i_bh, work.i_n, sizes.NN, work.m_begin)
        base = gl.load(BASE + (i_gate * sizes.NN + work.i_n))
        base_high = base.to(gl.float32)
        base_low = (base - base_high.to(gl.float64)).to(gl.float32)
        c = gl.load(C_K + (i_gate * sizes.TK + o_n), mask=m_k, other=float("inf")) * LOG2_E
        key_bias = (base - c).to(gl.float32)
        dc = fold(no_scores, 128)
        for t in range(tiles):
            i_m = work.m_begin + t
            stage = tile_count % _D128_STAGES
            # Zero, unknown to the compiler, which else keeps each address of the matmuls below in registers.
            zero = tile_count >> 30
            k = buffers.kv.index(zero)
            v = buffers.kv.index(zero + 1)
            q = buffers.q.index(stage)
            do = buffers.do.index(stage)
            acc_dp = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            b_s, dk = warpgroup_mma_wait(1, deps=(acc_s, acc_dk))
            row_base_high = tile_field(buffers.rows, stage, 0)
            row_base_low = tile_field(buffers.rows, stage, 1)
            greatest_start = tile_field(buffers.rows, stage, 2)
            if (i_m * 64 + offset < last_key) | (greatest_start > (work.i_n * 128).to(gl.float32)):
                # A masked tile: on the diagonal, where the gates' sums may cancel, or with a kv_start in it.
                o_n_again = work.i_n * 128 + zero + gl.arange(0, 128, KEY)
                row_base = row_base_high.to(gl.float64) + row_base_low.to(gl.float64)
                c_again = gl.load(C_K + (i_gate * sizes.TK + o_n_again), mask=o_n_again < sizes.TK, other=float("inf"))
                key_high, key_low = split_fp64(c_again[:, None] * LOG2_E - row_base)
                o_n_float = o_n_again.to(gl.float32)[:, None]
                d = row_field(buffers.rows, stage, 4).load(SCORES) - key_high
                d += row_field(buffers.rows, stage, 5).load(SCORES) - key_low
                b_s = b_s * qk_scale + d
                b_s = gl.where(o_n_float >= row_field(buffers.rows, stage, 6).load(SCORES), b_s, -float("inf"))
                positions = i_m * 64 + offset + gl.arange(0, 64, gl.SliceLayout(0, SCORES))
                b_p = fast_exp2(gl.where(o_n_again[:, None] <= positions[None, :], b_s, -float("inf")))
            else:
                column = (key_bias + ((row_base_high - base_high) + (row_base_low - base_low)))[:, None]
                row = row_field(buffers.rows, stage, 0).load(SCORES)
                b_p = fast_exp2(b_s * qk_scale + column + row)
            b_p_16 = gl.convert_layout(b_p.to(ELEMENT), OPERAND)
            acc_dv = warpgroup_mma(b_p_16, do, dv, is_async=True)
            b_dp = warpgroup_mma_wait(1, deps=(acc_dp,))
            delta = row_field(buffers.rows, stage, 1).load(SCORES)
            b_ds = b_p * (b_dp - delta)
            b_ds_16 = b_ds.to(ELEMENT)
            # Scores of the next tile; after the last one, of what lies there: they are not used.
            next_stage = (tile_count + 1) % _D128_STAGES
            mbarrier.wait(
                barriers.q_full.index(next_stage),
                ((tile_count + 1) // _D128_STAGES) & 1,
                pred=tile_count + 1 < total_tiles,
            )
            acc_s = warpgroup_mma(
                k, buffers.q.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            buffer = buffers.ds.index(tile_count & 1)
            buffer.store(b_ds_16)
            fence_async_shared()
            role_barrier()
            # Every warp is past the matmuls of the tile before.
            mbarrier.arrive(
                barriers.q_empty.index((tile_count + _D128_STAGES - 1) % _D128_STAGES), count=1, pred=tile_count > 0
            )
            transposed = buffer.permute((1, 0))
            dv = warpgroup_mma_wait(1, deps=(acc_dv,))
            no_dq = gl.zeros([64, 128], gl.float32, DQ_OUT)
            acc_dq = warpgroup_mma(transposed, buffers.kv.index(zero), no_dq, use_acc=False, is_async=True)
            acc_sums = gl.zeros([64, 16], gl.float32, SUMS_OUT)
            for i in gl.static_range(2):
                half = buffer.slice(i * 64, 64, 0).permute((1, 0))
                acc_sums = warpgroup_mma(half, ones.index(zero).permute((1, 0)), acc_sums, use_acc=i > 0, is_async=True)
            acc_dk = warpgroup_mma(buffer, q, dk, is_async=True)
            # Beside the matmuls, and read again, as registers are full. Of the rounded values, as the sums of rows: so
            # their roundings cancel in the gates' gradients.
            dc += fold(buffer.load(SCORES).to(gl.float32), 128)
            # All but the last matmul: only that one may be in flight from one tile to the next.
            dq, sums = warpgroup_mma_wait(1, deps=(acc_dq, acc_sums))
            x = to_nearest(dq * row_field(buffers.rows, stage, 2).permute((1, 0)).load(DQ_OUT))
            # The accumulator as [register, thread], so that a warp adds to 32 neighbours.
            x = gl.permute(gl.reshape(x, [4, 2, 8, 2, 8, 4, 2]), (1, 4, 3, 0, 2, 5, 6))
            x = gl.reshape(x, [16, 256, 2])
            even, odd = gl.split(x)
            WORDS: gl.constexpr = even.type.layout
            words = (gl.arange(0, 16, gl.SliceLayout(1, WORDS)) * 128)[:, None]
            tile = (i_bh * sizes.NM + i_m).to(gl.int64) * (64 * 128)
            thread = gl.arange(0, 256, gl.SliceLayout(0, WORDS))[None, :]
            # The second warp group adds its 64 columns behind the 2048 words of the first.
            thread += thread // 128 * 1920
            pair = (odd.to(gl.int64) << 32) + even.to(gl.int64)
            gl.atomic_add(DQ + tile // 2 + thread + words, pair, sem="relaxed")
            dq_scale = gl.max(row_field(buffers.rows, stage, 2).permute((1, 0)).load(SUMS_OUT), 1)
            add_row_sums(ROW_SUMS + (i_bh * sizes.NM + i_m) * 64, sums, dq_scale)
            tile_count += 1
        dc_k = gl.convert_layout(gl.sum(dc, 1), KEY)
        gl.store(DC + (i_bh * sizes.TK + o_n), dc_k, mask=m_k)
    dk, b_s = warpgroup_mma_wait(0, deps=(acc_dk, acc_s))
    role_barrier()
    # Keys and values are not needed any more: their gradients leave through the same memory.
    COPIED: gl.constexpr = dk_desc.layout
    ks = buffers.kv.index(0)
    vs = buffers.kv.index(1)
    k_out = ks._reinterpret(ELEMENT, [1, 128, 1, 128], COPIED)
    v_out = vs._reinterpret(ELEMENT, [1, 128, 1, 128], COPIED)
    ks.store((dk * scale).to(ELEMENT))
    vs.store(dv.to(ELEMENT))
    fence_async_shared()
    role_barrier()
    tma.async_copy_shared_to_global(dk_desc, [work.i_b, work.i_n * 128, work.i_g, 0], k_out)
    tma.async_copy_shared_to_global(dv_desc, [work.i_b, work.i_n * 128, work.i_g, 0], v_out)
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=PARTS_OF_TENSORS)
def hopper_backward_d128_kernel(
    q_desc, k_desc, v_desc, do_desc, row_desc, dk_desc, dv_desc, BASE, C_K, M_END, HEAD_ORDER, DQ, ROW_SUMS, DC,
    scale, TQ, TK, H, G, KV_GROUP, GATE_GROUP, HF, NN, NM,
    ELEMENT: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and the fixed-point sums of those of queries; arguments as in `hopper_backward`.

    Launch with 8 warps of at most 168 registers. ``DQ`` holds int64 values, each two sums of 32 bits.
    """
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    pid = gl.program_id(0)
    i_bg = gl.load(HEAD_ORDER + pid // NN)
    i_n = pid % NN
    i_b = i_bg // G
    i_g = i_bg % G
    m_begin = gl.maximum(i_n * 128 - (TK - TQ), 0) // 64
    kv = gl.allocate_shared_memory(ELEMENT, [2, 128, 128], SHARED)
    qs = gl.allocate_shared_memory(ELEMENT, [_D128_STAGES, 64, 128], SHARED)
    dos = gl.allocate_shared_memory(ELEMENT, [_D128_STAGES, 64, 128], SHARED)
    rows = gl.allocate_shared_memory(gl.float32, [_D128_STAGES * 2, 1, 256], row_desc.layout)
    dss = gl.allocate_shared_memory(ELEMENT, [2, 128, 64], SHARED)
    q_full = gl.allocate_shared_memory(gl.int64, [_D128_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [_D128_STAGES, 1], BARRIER)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(_D128_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    fence_async_shared()
    role_barrier()
    mbarrier.expect(kv_full, 128 * 128 * 4)
    k = kv.index(0)._reinterpret(ELEMENT, [1, 128, 1, 128], k_desc.layout)
    v = kv.index(1)._reinterpret(ELEMENT, [1, 128, 1, 128], k_desc.layout)
    tma.async_copy_global_to_shared(k_desc, [i_b, i_n * 128, i_g, 0], kv_full, k)
    tma.async_copy_global_to_shared(v_desc, [i_b, i_n * 128, i_g, 0], kv_full, v)
    buffers = D128Buffers(kv, qs, dos, rows, dss)
    barriers = D128Barriers(q_full, q_empty, kv_full)
    work = D128Work(i_b, i_g, i_n, m_begin)
    sizes = D128Sizes(TQ, TK, H, KV_GROUP, GATE_GROUP, HF, NN, NM)
    gl.warp_specialize(
        [
            (
                d128_consumer,
                (
                    dk_desc,
                    dv_desc,
                    buffers,
                    barriers,
                    work,
                    sizes,
                    BASE,
                    C_K,
                    M_END,
                    DQ,
                    ROW_SUMS,
                    DC,
                    scale,
                    ELEMENT,
                ),
            ),
            (d128_producer, (q_desc, do_desc, row_desc, buffers, barriers, work, sizes, M_END, ELEMENT)),
        ],
        # One warp for the second, and 24 registers; the first gets what is left, 240.
        [1],
        [24],
    )
