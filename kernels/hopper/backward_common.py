"""Device functions that the backward kernels for Hopper share (see `backward`).

What a kernel must know of the 64 queries of a tile is eight fields of 64 float32 values, 2 KiB, copied as one with the
tile. `backward_rows` writes them, `row_field` and `tile_field` read them:

=====  ============================================================================================================
field  holds
=====  ============================================================================================================
0      ``c_i - c_0 - lse_i``, the row's part of the exponent; ``c_0`` is the sum of the tile's first row
1      ``delta_i``
2      fixed-point scale: what ``dQ`` is multiplied by before it is rounded to integers, a power of two
3      of the tile: ``c_0`` in two parts, the greatest ``kv_start`` of a row; then zeros
4, 5   ``c_i - c_0`` rounded to float32, and what that lacks less ``lse_i``: field 0 in two parts
6      ``kv_start`` of the row
7      unused
=====  ============================================================================================================

Exponents are in units of log 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The fixed-point scale of row sums of dS is finer than that of dQ by so much.
ROW_SUM_SCALE = gl.constexpr(2.0**18)
# The barrier of the warps of one role; its name depends on the version of Triton.
role_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def fast_exp2(x):
    """``2^x`` in one instruction, subnormal results flushed to zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def to_nearest(x):
    """The nearest int32: of what is out of range the end of the range, of NaN zero."""
    return gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def split_fp64(x):
    """A float64 value as the sum of two float32 ones; an infinite one has no second part."""
    high = x.to(gl.float32)
    low = (x - high.to(gl.float64)).to(gl.float32)
    return high, gl.where(gl.abs(high) == float("inf"), 0.0, low)


@gluon.jit
def fold(x, N: gl.constexpr):
    """``[N, 64]`` to ``[N, 4]``: each thread adds up what it holds of a row, and nothing moves between threads."""
    return gl.sum(gl.sum(gl.reshape(x, [N, 8, 4, 2]), 3), 1)


@gluon.jit
def add_row_sums(p, x, dq_scale):
    """Add row sums of ``dS``, which every column of ``x``, ``[64, 8 or 16]``, holds, to 64 int64 at ``p``."""
    N: gl.constexpr = x.shape[1] // 2
    x, _ = gl.split(gl.reshape(x, [64, N, 2]))
    L: gl.constexpr = x.type.layout
    rows = gl.arange(0, 64, gl.SliceLayout(1, L))[:, None]
    column = gl.arange(0, N, gl.SliceLayout(0, L))[None, :]
    row_scale = gl.convert_layout(dq_scale, gl.SliceLayout(1, L))[:, None] * ROW_SUM_SCALE
    gl.atomic_add(p + rows + column, (x * row_scale).to(gl.int64), mask=(rows >= 0) & (column == 0), sem="relaxed")


@gluon.jit
def count_tiles(M_END, i_bh, i_n, NN, m_begin):
    """How many tiles of queries, from ``m_begin`` on, attend to block ``i_n`` of the keys."""
    return gl.maximum(gl.load(M_END + i_bh * NN + i_n) - m_begin, 0)


@gluon.jit
def row_field(rows, stage, i: gl.constexpr):
    """Where field ``i`` of a tile's rows lies, ``[1, 64]``."""
    return rows.index(stage * 2 + i // 4).slice(i % 4 * 64, 64, 1)


@gluon.jit
def tile_field(rows, stage, i: gl.constexpr):
    """Value ``i`` of field 3."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    return gl.max(gl.max(rows.index(stage * 2).slice(192 + i, 1, 1).load(L), 1), 0)
