"""Pages are given back and handed out by one launch as by the operators of PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxlm.kernels.backends import HAS_TRITON
from foxlm.modeling.cache.page_pool import PAGE, PagePool, move_pages
from kernel_device import DEVICE, ON_KERNELS

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.portable import page_table

pytestmark = ON_KERNELS

ROWS, BLOCKS = (2, 3), 11


def pool(by_kernel: bool) -> PagePool:
    """Keys of float64 are moved by operators, which define what kernels do."""
    made = PagePool()
    states = torch.empty(ROWS[0], ROWS[1], 1, 8, device=DEVICE, dtype=torch.float16 if by_kernel else torch.float64)
    made.make_pool(states, states, ROWS[1], BLOCKS)
    return made


@settings(max_examples=20, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(0, BLOCKS), st.booleans(), st.integers(0, 2**31)), min_size=1, max_size=5),
    entries=st.sampled_from([16, 64]),
)
def test_moves(moves: list[tuple[int, bool, int]], entries: int) -> None:
    by_kernel, by_operators = pool(True), pool(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_table, "_ENTRIES", entries)
        for blocks, evicts, seed in moves:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randint(0, BLOCKS, ROWS, generator=generator).int().to(DEVICE) if evicts else None
            for one in (by_kernel, by_operators):
                move_pages([one], [start], blocks)
            for name in ("pages", "start", "_free_count"):
                assert torch.equal(*(torch.as_tensor(getattr(x, name)) for x in (by_kernel, by_operators))), name
            free, expected = (x._free[: x._free_count] for x in (by_kernel, by_operators))
            assert torch.equal(free, expected) and len(by_kernel.keys) == len(by_operators.keys)
            # Each page but page 0 is in the table once, or free.
            held = by_kernel.pages[by_kernel.pages >= 0]
            every = torch.cat([held, free]).sort().values
            assert torch.equal(every, torch.arange(1, len(by_kernel.keys), device=DEVICE, dtype=torch.int32))


@pytest.mark.parametrize("by_kernel", [True, False])
def test_without_memory_no_page_is_named_that_there_is_not(by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [pool(by_kernel), pool(by_kernel), pool(by_kernel)]
    move_pages(layers, [None] * 3, 2)
    grow = PagePool.take_counts

    def full(layer: PagePool, *counts: int) -> None:
        if layer is layers[1]:
            raise torch.OutOfMemoryError("no memory")
        grow(layer, *counts)

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "take_counts", full)
        with pytest.raises(torch.OutOfMemoryError):
            move_pages(layers, [torch.ones(ROWS, dtype=torch.int32, device=DEVICE)] * 3, BLOCKS)
    for layer in layers:
        assert (layer.pages < len(layer.keys)).all()
    # What is left is in order: each page at most once.
    move_pages(layers, [None] * 3, BLOCKS)
    for layer in layers:
        held = torch.cat([layer.pages[layer.pages >= 0], layer._free[: layer._free_count]])
        assert len(held.unique()) == len(held) and (held < len(layer.keys)).all()
        assert (layer.pages[..., 1:] >= 0).all()


def test_layers_move_together_and_keep_what_pages_hold() -> None:
    layers = [pool(True), pool(True)]
    move_pages(layers, [None, None], 2)
    k, c = torch.randn(*ROWS, 2 * PAGE, 8, device=DEVICE).half(), torch.randn(*ROWS, 2 * PAGE, device=DEVICE).double()
    for layer in layers:
        layer.write_tokens(k, k, c, torch.arange(2 * PAGE, device=DEVICE))
    before = layers[1].keys[layers[1].pages[..., :2].long()]
    move_pages(layers, [torch.ones(ROWS, dtype=torch.int32, device=DEVICE), None], BLOCKS)
    assert torch.equal(layers[1].keys[layers[1].pages[..., :2].long()], before)
    assert layers[0].pages[..., 0].eq(-1).all() and layers[0].start.eq(1).all() and not layers[1].start.any()
