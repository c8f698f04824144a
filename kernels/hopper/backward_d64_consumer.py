"""The consumer role of the backward kernel for Hopper and heads of 64 (see `backward_d64`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..triton_common import LOG2_E
from .backward_common import (
    count_tiles,
    fast_exp2,
    fold,
    role_barrier,
    row_field,
    split_fp64,
    tile_field,
)
from .backward_d64_state import D64_STAGES, KV_STAGES, next_work


@gluon.jit
def d64_consumer(
    buffers,
    barriers,
    sizes,
    M_END,
    BASE,
    C_K,
    DK,
    DV,
    DC,
    scale,
    CONSUMER: gl.constexpr,
    ELEMENT: gl.constexpr,
):
    """A consumer, one warp group: gradients of 64 keys of each work tile, ``CONSUMER`` says which.

    Scores are held transposed, ``[keys, queries]``. ``C_K`` holds contiguous running sums of keys, ``[B, HF, TK]``, and
    ``BASE`` what `describe_blocks` says of blocks of 64 keys.
    It writes ``DK`` and ``DV``, ``[B, TK, G, 64]``, and ``DC``, ``[B, H, TK]``.
    """
    # Scores, and gradients of keys and values. At this head size the two layouts are the same.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    KEY: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offset = sizes.TK - sizes.TQ
    qk_scale = scale * LOG2_E
    no_scores = gl.zeros([64, 64], gl.float32, SCORES)
    tile_count = 0
    work_count = 0
    i_work, i_bg, first_head_tiles = next_work(work_count, buffers, barriers)
    while i_work < sizes.WORK_TILES:
        i_n = i_work % sizes.NN
        i_b = i_bg // sizes.G
        i_g = i_bg % sizes.G
        m_begin = gl.maximum(i_n * 128 - offset, 0) // 64
        total_tiles = first_head_tiles
        for member in range(1, sizes.KV_GROUP):
            total_tiles += count_tiles(M_END, i_b * sizes.H + i_g * sizes.KV_GROUP + member, i_n, sizes.NN, m_begin)
        k0 = i_n * 128 + CONSUMER * 64
        last_key = gl.maximum(gl.minimum(k0 + 64, sizes.TK) - 1, 0)
        o_n = k0 + gl.arange(0, 64, KEY)
        m_k = o_n < sizes.TK
        kv_stage = (work_count % KV_STAGES) * 2 + CONSUMER
        mbarrier.wait(barriers.kv_full.index(work_count % KV_STAGES), (work_count // KV_STAGES) & 1)
        mbarrier.wait(
            barriers.q_full.index(tile_count % D64_STAGES), (tile_count // D64_STAGES) & 1, pred=total_tiles > 0
        )
        # Through a wait, so that the zeros are not set between the matmuls in flight below.
        dk, dv = warpgroup_mma_wait(0, deps=(gl.zeros([64, 64], gl.float32, OUT), gl.zeros([64, 64], gl.float32, OUT)))
        # Scores of the first tile. Where there is none this reads what lies there, and the result is not used.
        acc_s = warpgroup_mma(
            buffers.k.index(kv_stage),
            buffers.q.index(tile_count % D64_STAGES).permute((1, 0)),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        b_s = warpgroup_mma_wait(0, deps=(acc_s,))
        acc_dk = warpgroup_mma_init(dk)
        i_tile = 0
        for member in range(0, sizes.KV_GROUP):
            i_h = i_g * sizes.KV_GROUP + member
            i_bh = i_b * sizes.H + i_h
            i_gate = i_b * sizes.HF + i_h // sizes.GATE_GROUP
            tiles = first_head_tiles
            if member > 0:
                tiles = count_tiles(M_END, i_bh, i_n, sizes.NN, m_begin)
            base = gl.load(BASE + (i_gate * ((sizes.TK + 63) // 64) + last_key // 64))
            base_high = base.to(gl.float32)
            base_low = (base - base_high.to(gl.float64)).to(gl.float32)
            c = gl.load(C_K + (i_gate * sizes.TK + o_n), mask=m_k, other=float("inf")) * LOG2_E
            key_high, key_low = split_fp64(base - c)
            dc = fold(no_scores, 64)
            for t in range(tiles):
                i_m = m_begin + t
                stage = tile_count % D64_STAGES
                # Zero, unknown to the compiler, which else keeps each address of the matmuls below in registers.
                zero = tile_count >> 30
                q = buffers.q.index(stage)
                do = buffers.do.index(stage)
                acc_dp = warpgroup_mma(
                    buffers.v.index(kv_stage + zero), do.permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                row_base_high = tile_field(buffers.rows, stage, 0)
                row_base_low = tile_field(buffers.rows, stage, 1)
                greatest_start = tile_field(buffers.rows, stage, 2)
                if i_m * 64 + offset < last_key:
                    # A diagonal tile: the gates' sums may cancel.
                    row_base = row_base_high.to(gl.float64) + row_base_low.to(gl.float64)
                    distance = row_base - (base_high.to(gl.float64) + base_low.to(gl.float64))
                    bias_high, bias_low = split_fp64((key_high.to(gl.float64) + key_low.to(gl.float64)) + distance)
                    d = row_field(buffers.rows, stage, 4).load(SCORES) + bias_high[:, None]
                    d += row_field(buffers.rows, stage, 5).load(SCORES) + bias_low[:, None]
                    b_s = b_s * qk_scale + d
                    positions = i_m * 64 + offset + gl.arange(0, 64, ROW)
                    b_s = gl.where(o_n[:, None] <= positions[None, :], b_s, -float("inf"))
                    b_s = gl.where(
                        o_n.to(gl.float32)[:, None] >= row_field(buffers.rows, stage, 6).load(SCORES),
                        b_s,
                        -float("inf"),
                    )
                else:
                    column = key_high + ((row_base_high - base_high) + (row_base_low - base_low))
                    b_s = b_s * qk_scale + column[:, None] + row_field(buffers.rows, stage, 0).load(SCORES)
                    if greatest_start > k0.to(gl.float32):
                        kv_start = row_field(buffers.rows, stage, 6).load(SCORES)
                        b_s = gl.where(o_n.to(gl.float32)[:, None] >= kv_start, b_s, -float("inf"))
                b_p = fast_exp2(b_s)
                b_p_16 = b_p.to(ELEMENT)
                acc_dv = warpgroup_mma(gl.convert_layout(b_p_16, OPERAND), do, dv, is_async=True)
                b_dp, dk = warpgroup_mma_wait(1, deps=(acc_dp, acc_dk))
                delta = row_field(buffers.rows, stage, 1).load(SCORES)
                b_ds = b_p * (b_dp - delta)
                b_ds_16 = b_ds.to(ELEMENT)
                # Scores of the next tile; after the last one, of what lies there: they are not used.
                next_stage = (tile_count + 1) % D64_STAGES
                mbarrier.wait(
                    barriers.q_full.index(next_stage),
                    ((tile_count + 1) // D64_STAGES) & 1,
                    pred=i_tile + 1 < total_tiles,
                )
                acc_s = warpgroup_mma(
                    buffers.k.index(kv_stage + zero),
                    buffers.q.index(next_stage).permute((1, 0)),
                    no_scores,
                    use_acc=False,
                    is_async=True,
                )
                buffer = (tile_count & 1) * 2
                mbarrier.wait(barriers.ds_empty.index(tile_count & 1), ((tile_count >> 1) & 1) ^ 1)
                buffers.ds.index(buffer + CONSUMER).store(b_ds_16)
                fence_async_shared()
                role_barrier()
                # To the producer too: every warp is past the matmuls of the tile before.
                mbarrier.arrive(barriers.ds_full.index(tile_count % D64_STAGES), count=1)
                acc_dk = warpgroup_mma(buffers.ds.index(buffer + CONSUMER), q, dk, is_async=True)
                # Beside the matmuls, and read again, as registers are full. Of the rounded values, as the sums of rows:
                # so their roundings cancel in the gates' gradients.
                dc += fold(buffers.ds.index(buffer + CONSUMER).load(SCORES).to(gl.float32), 64)
                # All but the last matmul: only that one may be in flight from one tile to the next.
                b_s, dv = warpgroup_mma_wait(1, deps=(acc_s, acc_dv))
                tile_count += 1
                i_tile += 1
            dc_k = gl.convert_layout(gl.sum(dc, 1), KEY)
            gl.store(DC + (i_bh * sizes.TK + o_n), dc_k, mask=m_k)
        dk = warpgroup_mma_wait(0, deps=(acc_dk,))
        role_barrier()
        mbarrier.arrive(barriers.kv_empty.index(work_count % KV_STAGES), count=1)
        work_count += 1
        i_work, i_bg, first_head_tiles = next_work(work_count, buffers, barriers)
        out_keys = k0 + gl.arange(0, 64, gl.SliceLayout(1, STORED))
        o_d = gl.arange(0, 64, gl.SliceLayout(0, STORED))
        p_out = (
            (i_b.to(gl.int64) * sizes.TK * sizes.G + i_g) * 64
            + (out_keys * (sizes.G * 64)).to(gl.int64)[:, None]
            + o_d[None, :]
        )
        gl.store(DV + p_out, gl.convert_layout(dv.to(ELEMENT), STORED), mask=(out_keys < sizes.TK)[:, None])
        gl.store(DK + p_out, gl.convert_layout((dk * scale).to(ELEMENT), STORED), mask=(out_keys < sizes.TK)[:, None])
