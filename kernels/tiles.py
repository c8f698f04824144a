"""Tile shapes of the GPU kernels: a pure function of head size, dtype and architecture."""

from typing import NamedTuple

import torch

# Blocks of queries and keys that pruning drops, whatever the tiles: forward and backward drop the same.
PRUNED_QUERIES, PRUNED_KEYS = 128, 64
# Queries of a sequence that kernels of decoding take, and times the query heads that share keys.
LARGEST_DECODED_QUERIES, LARGEST_DECODED_ROWS = 16, 64


class Tile(NamedTuple):
    """Shape and resources of one kernel's programs.

    Attributes:
        queries, keys: rows and columns of a tile of scores; powers of two from 16.
        warps: warps per program.
        stages: depth of the software pipeline that loads tiles.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    backward: Tile


# For GPUs with 227 KiB of shared memory and matrix units fed from it (sm_90: H100, H200), by padded head size.
_HOPPER = {
    64: Tiles(Tile(128, 64, 4, 4), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
}
# For everything else: fits the 99 KiB of sm_86 and sm_89.
_SMALL = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    256: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
}
# float32 operands take twice the room, and their matmuls run on the ordinary units.
_FP32 = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
}


class HopperForward(NamedTuple):
    """Shape and resources of `hopper_forward`'s programs.

    Attributes:
        consumers: consumer warp groups, 2 or 3, each with 64 queries.
        keys: columns of a tile of scores.
        stages: tiles of keys and values that shared memory holds.
        query_stages: blocks of queries that it holds, at least 2.
        head_swizzle: heads whose work tiles are computed at once, so that their keys share the L2 cache.
        lazy: rescale the output only when the running maximum has risen by more than 2^8.
        fence: keep ptxas from moving the wait for a matmul ahead of the softmax.
        registers: of a consumer's thread.
        producer_registers: of a producer's thread.
        initial_registers: of every thread when a program starts; all of them together must be there.
    """

    consumers: int
    keys: int
    stages: int
    query_stages: int
    head_swizzle: int
    lazy: bool
    fence: bool
    registers: int
    producer_registers: int
    initial_registers: int


# By head size. Measured on an H100.
HOPPER_FORWARD = {
    64: HopperForward(
        consumers=3,
        keys=128,
        stages=4,
        query_stages=2,
        head_swizzle=4,
        lazy=True,
        fence=False,
        registers=160,
        producer_registers=32,
        initial_registers=128,
    ),
    128: HopperForward(
        consumers=2,
        keys=128,
        stages=2,
        query_stages=2,
        head_swizzle=4,
        lazy=True,
        fence=True,
        registers=240,
        producer_registers=32,
        initial_registers=168,
    ),
}

LARGEST_HEAD_DIM = max(_HOPPER)


def cdiv(x: int, y: int) -> int:
    """``x / y`` rounded up. As `triton.cdiv`, which takes the host some microseconds more."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is not below ``x``, from 1."""
    return 1 << (x - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a head of ``head_dim`` is padded to."""
    return max(16, next_power_of_2(head_dim))


def choose_tiles(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles for heads of ``head_dim``, up to `LARGEST_HEAD_DIM`.

    Args:
        head_dim: size of a head.
        dtype: of queries, keys and values.
        capability: compute capability of the GPU, ``(9, 0)`` for an H100. One that nobody tuned for gets tiles that
            fit any GPU from ``(8, 0)``.
    """
    size = max(64, padded_head_dim(head_dim))
    if dtype == torch.float32:
        return _FP32[size]
    return _HOPPER[size] if capability[0] in (9, 10) else _SMALL[size]
