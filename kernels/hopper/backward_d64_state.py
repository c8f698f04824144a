"""State of the backward kernel for Hopper and heads of 64 that its roles share (see `backward_d64`)."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .backward_common import role_barrier

# Stages of the rings of tiles and of work tiles' keys and values.
D64_STAGES = gl.constexpr(4)
KV_STAGES = gl.constexpr(2)


class D64Buffers(NamedTuple):
    """Shared memory; the first index is a stage, or half of one."""

    k: Any
    v: Any
    q: Any
    do: Any
    rows: Any
    ds: Any
    work: Any


class D64Barriers(NamedTuple):
    q_full: Any
    kv_full: Any
    kv_empty: Any
    ds_full: Any
    ds_empty: Any
    work_full: Any
    work_empty: Any


class D64Sizes(NamedTuple):
    WORK_TILES: Any
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
def _work_field(work, stage, i: gl.constexpr):
    """Field ``i`` of the work tile in ``stage``."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(work.index(stage * 4 + i).load(one), 0)


@gluon.jit
def next_work(work_count, buffers, barriers):
    """The program's work tile ``work_count``: its index, its key/value head, and the tiles of its first query head."""
    stage = work_count % 2
    mbarrier.wait(barriers.work_full.index(stage), (work_count // 2) & 1)
    i_work = _work_field(buffers.work, stage, 0)
    i_bg = _work_field(buffers.work, stage, 1)
    tiles = _work_field(buffers.work, stage, 2)
    role_barrier()
    mbarrier.arrive(barriers.work_empty.index(stage), count=1)
    return i_work, i_bg, tiles
