"""State of the forward kernel for Hopper that its roles share: arguments, shared memory, work tiles (see `forward`)."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Queries of a consumer: the rows of a warp group's matmul.
QUERIES = 64
CONSUMER_ROWS = gl.constexpr(QUERIES)

# Work tiles that are described at once.
WORK_STAGES = gl.constexpr(4)
# A work tile in shared memory: its head (-1: no more work), block of queries, first and last tile, and the first tile
# whose bias is in two parts, which the bias producer adds; then, for each consumer, the least and the greatest kv_start
# of its rows.
WORK_FIELDS = gl.constexpr(16)
WORK_HEAD = gl.constexpr(0)
WORK_BLOCK = gl.constexpr(1)
WORK_FIRST = gl.constexpr(2)
WORK_LAST = gl.constexpr(3)
WORK_FIRST_SPLIT = gl.constexpr(4)
WORK_KV_START = gl.constexpr(5)


class ForwardDescriptors(NamedTuple):
    """TMA descriptors of ``[B, heads, T, D]`` in tiles of one head."""

    q: Any
    k: Any
    v: Any
    out: Any


class ForwardBuffers(NamedTuple):
    """Shared memory. The first index is a stage."""

    q: Any
    k: Any
    v: Any
    bias_high: Any
    bias_low: Any
    work_tiles: Any
    rows: Any  # of each consumer of a work tile: diagonal keys of its queries, and their kv_start
    row_bias: Any  # in two parts


class ForwardBarriers(NamedTuple):
    """The table in `forward` says what each means."""

    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    kv_empty: Any
    work_full: Any
    work_empty: Any


class ForwardSizes(NamedTuple):
    HEADS: Any  # B * H
    NM: Any  # work tiles of a head
    NR: Any  # blocks of 64 queries of a head
    LAST: Any
    TK: Any
    H: Any
    KV_GROUP: Any


class ForwardWork(NamedTuple):
    """What work tiles are made of: `heaviest_first`, `describe_blocks` of 64 queries, and its counter."""

    HEAD_ORDER: Any
    LEAST: Any
    GREATEST: Any
    WORK_COUNTER: Any


class ForwardGates(NamedTuple):
    """Running sums, and those of keys as `describe_blocks` splits them."""

    C_Q: Any
    C_K: Any
    RELATIVE: Any
    BASE: Any
    ck_b: Any
    ck_h: Any


class ForwardRows(NamedTuple):
    LSE: Any
    KV_START: Any
    s_b: Any
    s_h: Any
    START_GROUP: Any


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring and its phase."""
    stage += 1
    if STAGES == 1:
        return stage * 0, phase ^ 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def get_field(work_tiles, stage, field):
    """A field of the work tile in ``stage``."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(work_tiles.index(stage * WORK_FIELDS + field).load(one), 0)


@gluon.jit
def put_field(work_tiles, stage, field, x):
    """Write a field of the work tile in ``stage``."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    work_tiles.index(stage * WORK_FIELDS + field).store(gl.full([1], x, gl.int32, one))
