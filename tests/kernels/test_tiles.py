"""Tiles of the kernels: a pure function, with an answer for every GPU."""

import pytest
import torch

from foxlm.kernels.tiles import LARGEST_HEAD_DIM, PRUNED_KEYS, choose_tiles, padded_head_dim

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (99, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_size_has_tiles(dtype, capability):
    for head_dim in range(1, LARGEST_HEAD_DIM + 1):
        for tile in choose_tiles(head_dim, dtype, capability):
            assert all(size >= 16 and size.bit_count() == 1 for size in (tile.queries, tile.keys))
            assert tile.warps in (4, 8) and tile.stages >= 1
            # The forward pass takes the decay of far keys from blocks of 64: some of them, or one or two of them.
            assert tile.keys <= 2 * PRUNED_KEYS


def test_a_gpu_that_nobody_tuned_for_gets_tiles_that_fit_all():
    for dtype in DTYPES:
        for head_dim in (16, 64, 128, 256):
            small = choose_tiles(head_dim, dtype, (8, 6))
            assert all(choose_tiles(head_dim, dtype, other) == small for other in ((8, 0), (8, 9), (12, 0), (13, 7)))


def test_hopper_has_tiles_of_its_own():
    """Negative control."""
    for head_dim in (16, 64, 128, 256):
        assert choose_tiles(head_dim, torch.bfloat16, (9, 0)) != choose_tiles(head_dim, torch.bfloat16, (8, 6))


def test_heads_are_padded_to_a_power_of_two():
    sizes = {1: 16, 16: 16, 17: 32, 40: 64, 64: 64, 65: 128, 80: 128, 96: 128, 192: 256, 256: 256}
    assert {size: padded_head_dim(size) for size in sizes} == sizes
