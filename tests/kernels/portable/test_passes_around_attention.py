"""Small passes before attention and its backward pass: the order of heads, and the largest keys and values so far."""

import pytest
import torch

from foxlm.kernels.backends import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.portable.backward_rows import MAXIMA_KEYS, running_maxima
from foxlm.kernels.portable.block_ranges import heaviest_first
from kernel_device import DEVICE, ON_KERNELS

pytestmark = ON_KERNELS


@pytest.mark.parametrize("heads, blocks", [(1, 1), (3, 200), (24, 129), (130, 5), (600, 3)])
def test_heaviest_first_is_a_stable_order(heads: int, blocks: int) -> None:
    low = torch.randint(0, 3, (heads, blocks), dtype=torch.int32, device=DEVICE)
    assert torch.equal(heaviest_first(low).long(), low.sum(-1).argsort(stable=True))


@pytest.mark.parametrize("tokens", [1, 300, 17_000])
def test_running_maxima_are_those_of_all_groups_so_far(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    k, v = torch.randn(2, 2, tokens, 1, 16, generator=generator)
    # Longest first in one sequence and last in the other.
    k, v = (torch.stack([x[0] * torch.linspace(2, 1, tokens)[:, None, None], x[1] * 5]) for x in (k, v))
    found = running_maxima(k.to(DEVICE), v.to(DEVICE)).cpu()
    sizes = torch.stack([k.abs().amax(-1), v.norm(dim=-1)]).transpose(2, 3).cummax(-1).values
    # The last group may be short.
    ends = torch.arange(MAXIMA_KEYS - 1, tokens + MAXIMA_KEYS - 1, MAXIMA_KEYS).clamp(max=tokens - 1)
    torch.testing.assert_close(found, sizes[..., ends])
