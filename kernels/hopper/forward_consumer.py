"""The consumer role of the forward kernel for Hopper (see `forward`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton_common import INF, LN_2, LOG2_E
from .forward_state import (
    CONSUMER_ROWS,
    WORK_BLOCK,
    WORK_FIRST,
    WORK_FIRST_SPLIT,
    WORK_HEAD,
    WORK_KV_START,
    WORK_LAST,
    WORK_STAGES,
    advance,
    get_field,
)

# How far, in powers of two, the largest weight may exceed one before what was summed is rescaled.
_LAZINESS = gl.constexpr(8.0)


@gluon.jit
def _softmax(scores, maximum, total, shift, TOTAL: gl.constexpr, BLOCK_N: gl.constexpr, IS_LAZY: gl.constexpr):
    """Online softmax: weights of the logits ``scores + shift``, in units of log 2.

    ``total`` is ``[64, 8]``: partial sums, one for each pair of columns that a thread has.

    Returns:
        Weights, the factor for what was summed before, and the new ``maximum`` and ``total``.
    """
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) + shift)
    if IS_LAZY:
        new_maximum = gl.where(new_maximum > maximum + _LAZINESS, new_maximum, maximum)
    # A row without a visible key so far: any finite shift leaves its weights at zero.
    finite = gl.where(new_maximum == -INF, 0.0, new_maximum)
    rescale = gl.exp2(maximum - finite)
    weights = gl.exp2(scores - gl.expand_dims(finite - shift, 1))
    # The summed axis lies in registers of one thread only; threads are added up once, at the end.
    part = gl.sum(gl.reshape(weights, [CONSUMER_ROWS, BLOCK_N // 8, 8]), 1)
    part = gl.convert_layout(part, TOTAL, assert_trivial=True)
    factor = gl.convert_layout(rescale, gl.SliceLayout(1, TOTAL), assert_trivial=True)
    total = total * gl.expand_dims(factor, 1) + part
    return weights, rescale, new_maximum, total


# Values of a thread that the assembly below takes at once.
_RESCALED = 32


@gluon.constexpr_function
def _rescale_assembly():
    # Two of a thread's values are of one row, the next two of its other row, and so on: two factors decide for all.
    n = _RESCALED
    ones = [
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000;",
        f"setp.neu.f32 q, ${2 * n + 2}, 0f3F800000;",
        "or.pred p, p, q;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra DONE;",
    ]
    multiplications = [f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)]
    return "\n".join(["{", ".reg .pred p, q;", *ones, *multiplications, "DONE:", "}"])


@gluon.constexpr_function
def _rescale_constraints():
    n = _RESCALED
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def _rescale(out, factor, IS_LAZY: gl.constexpr):
    """``out * factor`` by row. If ``IS_LAZY``, a warp all of whose factors are one jumps over the multiplications."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, out.type.layout), assert_trivial=True)
    factor = gl.expand_dims(factor, 1)
    if IS_LAZY:
        assembly: gl.constexpr = _rescale_assembly()
        constraints: gl.constexpr = _rescale_constraints()
        factor = gl.broadcast(factor, out)[0]
        return gl.inline_asm_elementwise(assembly, constraints, [out, factor], dtype=gl.float32, is_pure=True, pack=32)
    else:
        return out * factor


@gluon.jit
def _pack(weights, dtype: gl.constexpr, BLOCK_N: gl.constexpr):
    """Weights as pairs of 16-bit values: a loop carries 32-bit registers without shuffling their halves."""
    a, b = gl.split(gl.reshape(weights, [CONSUMER_ROWS, BLOCK_N // 2, 2]))
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
    """What `_pack` packed, in the layout ``OPERAND`` of a matmul."""
    a, b = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    weights = gl.reshape(gl.join(a, b), [CONSUMER_ROWS, BLOCK_N]).to(dtype, bitcast=True)
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
def _skip_tiles(tiles, stage, phase, v_stage, v_phase, barriers, STAGES: gl.constexpr):
    """Release tiles that this consumer does not attend to, but not before they have been written."""
    for _ in range(tiles):
        mbarrier.wait(barriers.k_full.index(stage), phase)
        mbarrier.wait(barriers.v_full.index(v_stage), v_phase)
        mbarrier.arrive(barriers.kv_empty.index(stage), count=1)
        v_stage, v_phase = stage, phase
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase, v_stage, v_phase


@gluon.jit
def forward_consumer(
    CONSUMER: gl.constexpr,
    shared,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    IS_LAZY: gl.constexpr,
    HAS_FENCE: gl.constexpr,
):
    """A consumer, one warp group: attention of 64 queries of each work tile.

    ``CONSUMER`` says which; ``shared`` is what `_hopper_forward_kernel` gives to all consumers.
    """
    out_descriptor, buffers, barriers, sizes, rows, TQ, scale = shared
    BLOCK_M: gl.constexpr = CONSUMER_ROWS * CONSUMERS
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
    stage = 0
    phase = 0
    # Of the tile before, whose values are multiplied now. Before the first one: a wait that passes.
    v_stage = STAGES - 1
    v_phase = 1
    work_count = 0
    # The first tile of a work tile multiplies them too, but the result is dropped.
    b_o = gl.zeros([CONSUMER_ROWS, D], gl.float32, OUT)
    packed_p = _pack(gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, SCORES), dtype, BLOCK_N)
    mbarrier.wait(barriers.work_full.index(0), 0)
    i_bh = get_field(buffers.work_tiles, 0, WORK_HEAD)
    while i_bh >= 0:
        work_stage = work_count % WORK_STAGES
        q_stage = work_count % Q_STAGES
        i_m = get_field(buffers.work_tiles, work_stage, WORK_BLOCK)
        first_tile = get_field(buffers.work_tiles, work_stage, WORK_FIRST)
        last_tile = get_field(buffers.work_tiles, work_stage, WORK_LAST)
        least = get_field(buffers.work_tiles, work_stage, WORK_KV_START + 2 * CONSUMER)
        greatest = get_field(buffers.work_tiles, work_stage, WORK_KV_START + 1 + 2 * CONSUMER)
        first_row = i_m * BLOCK_M + CONSUMER * CONSUMER_ROWS
        # This consumer attends to tiles own_first to own_last; of those, full_first to full_end - 1 are full.
        own_last = gl.minimum((gl.minimum(first_row + offset + CONSUMER_ROWS - 1, sizes.TK - 1)) // BLOCK_N, last_tile)
        own_last = gl.maximum(own_last, first_tile)
        own_first = gl.maximum(gl.minimum(gl.maximum(least, 0) // BLOCK_N, own_last), first_tile)
        full_end = (first_row + offset + 1) // BLOCK_N
        full_first = (gl.minimum(greatest, sizes.TK) + BLOCK_N - 1) // BLOCK_N
        maximum = gl.full([CONSUMER_ROWS], -INF, gl.float32, ROW)
        total = gl.zeros([CONSUMER_ROWS, 8], gl.float32, TOTAL)
        q = buffers.q.index(q_stage * CONSUMERS + CONSUMER).reshape([CONSUMER_ROWS, D])
        q_phase = (work_count // Q_STAGES) & 1
        # With the first tile's bias the bias producer has written that of rows.
        mbarrier.wait(barriers.k_full.index(stage), phase)
        first_split = get_field(buffers.work_tiles, work_stage, WORK_FIRST_SPLIT)
        i_rows = 2 * (work_stage * CONSUMERS + CONSUMER)
        row_high = buffers.row_bias.index(i_rows).load(ROW)
        mbarrier.wait(barriers.q_full.index(q_stage), q_phase)
        # By now the output of the work tile before has left its stage.
        tma.store_wait(0)
        mbarrier.arrive(barriers.q_empty.index((work_count + Q_STAGES - 1) % Q_STAGES), count=1, pred=work_count > 0)
        stage, phase, v_stage, v_phase = _skip_tiles(
            last_tile - own_last, stage, phase, v_stage, v_phase, barriers, STAGES
        )

        for tile in range(own_last, own_first - 1, -1):
            b_p = _unpack(packed_p, dtype, BLOCK_N, OPERAND)
            mbarrier.wait(barriers.k_full.index(stage), phase)
            b_s = warpgroup_mma(
                q,
                buffers.k.index(stage).reshape([BLOCK_N, D]).permute((1, 0)),
                gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, SCORES),
                use_acc=False,
                is_async=True,
            )
            mbarrier.wait(barriers.v_full.index(v_stage), v_phase)
            b_o = warpgroup_mma(
                b_p,
                buffers.v.index(v_stage).reshape([BLOCK_N, D]),
                b_o,
                use_acc=tile < own_last - 1,
                is_async=True,
            )
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            if tile < first_split:
                key_high = gl.expand_dims(buffers.bias_high.index(stage).load(COLUMN), 0)
                b_s = b_s * qk_scale + key_high
                shift = row_high
            else:
                key_high = gl.expand_dims(buffers.bias_high.index(stage).load(COLUMN), 0)
                key_low = gl.expand_dims(buffers.bias_low.index(stage).load(COLUMN), 0)
                row_low = buffers.row_bias.index(i_rows + 1).load(ROW)
                b_s = b_s * qk_scale + (
                    (gl.expand_dims(row_high, 1) + key_high) + (gl.expand_dims(row_low, 1) + key_low)
                )
                shift = gl.zeros([CONSUMER_ROWS], gl.float32, ROW)
            if (tile >= full_end) | (tile < full_first):
                o_n = gl.expand_dims(tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=COLUMN), 0)
                last = buffers.rows.index(i_rows).load(ROW)
                b_s = _mask(b_s, o_n, last, buffers.rows.index(i_rows + 1).load(ROW))
            new_b_p, rescale, maximum, total = _softmax(b_s, maximum, total, shift, TOTAL, BLOCK_N, IS_LAZY)
            if HAS_FENCE:
                mbarrier.wait(barriers.q_full.index(q_stage), q_phase)
            b_o, b_p = warpgroup_mma_wait(0, deps=(b_o, b_p))
            mbarrier.arrive(barriers.kv_empty.index(stage), count=1)
            b_o = _rescale(b_o, rescale, IS_LAZY)
            packed_p = _pack(new_b_p, dtype, BLOCK_N)
            v_stage, v_phase = stage, phase
            stage, phase = advance(stage, phase, STAGES)

        mbarrier.arrive(barriers.work_empty.index(work_stage), count=1)
        mbarrier.wait(barriers.v_full.index(v_stage), v_phase)
        b_o = warpgroup_mma(
            _unpack(packed_p, dtype, BLOCK_N, OPERAND),
            buffers.v.index(v_stage).reshape([BLOCK_N, D]),
            b_o,
            use_acc=own_first < own_last,
            is_async=True,
        )
        sums = gl.convert_layout(gl.sum(total, 1), OUT_ROW, assert_trivial=True)
        lse = (gl.convert_layout(maximum, OUT_ROW, assert_trivial=True) + gl.log2(sums)) * LN_2
        # The weights of a fully masked row are zero.
        inverse = gl.where(sums > 0.0, 1.0 / sums, 0.0)
        i = first_row + gl.arange(0, CONSUMER_ROWS, layout=OUT_ROW)
        gl.store(rows.LSE + i_bh.to(gl.int64) * TQ + i, lse, mask=i < TQ)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        q.store((b_o * gl.expand_dims(inverse, 1)).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            out_descriptor,
            [i_bh // sizes.H, i_bh % sizes.H, first_row, 0],
            buffers.q.index(q_stage * CONSUMERS + CONSUMER),
        )
        stage, phase, v_stage, v_phase = _skip_tiles(
            own_first - first_tile, stage, phase, v_stage, v_phase, barriers, STAGES
        )
        work_count += 1
        next_stage = work_count % WORK_STAGES
        mbarrier.wait(barriers.work_full.index(next_stage), (work_count // WORK_STAGES) & 1)
        i_bh = get_field(buffers.work_tiles, next_stage, WORK_HEAD)
    tma.store_wait(0)
