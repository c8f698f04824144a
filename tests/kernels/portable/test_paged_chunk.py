"""Chunks of a prompt go through an evicting cache by kernels as by the functions of PyTorch."""

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import HAS_TRITON, PYTORCH, TRITON, Backend
from foxlm.kernels.pruning.key_stats import empty_summary, running_before
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.cache import paged
from foxlm.modeling.cache.page_pool import PAGE
from foxlm.modeling.cache.paged import PagedForgettingLayer
from foxlm.modeling.token_layout import TokenLayout
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

pytestmark = ON_KERNELS

DTYPES = [torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16]
# Query heads, key/value heads and gates: one for each head, one for each query head, one for all.
HEADS = [(2, 2, 2), (4, 2, 4), (4, 2, 2), (4, 2, 1), (2, 1, 1)]


class Taken:
    """A layer that takes chunks on one backend; tensors that kernels leave alone are those of PyTorch's functions."""

    def __init__(self, backend: Backend, heads: tuple[int, int, int], rule: Rule, size: int) -> None:
        self.backend, self.heads = backend, heads
        self.layer = PagedForgettingLayer(900, (heads[2], heads[1], ()), heads[0] // heads[1], 1e-3, rule)
        self.layer.take_bounds((torch.full((1,), size**0.5), torch.full((1,), float(size**0.5))))
        self.length = 0

    def take(self, log_f: Tensor, k: Tensor, v: Tensor, unshifted: dict[str, Tensor]) -> list[Tensor]:
        positions = torch.arange(-1, k.shape[2], device=k.device) + self.length
        layout = TokenLayout(positions[1:], None, None, None, positions.remainder(PAGE))
        self.length += k.shape[2]
        for name, x in unshifted.items():
            self.layer.append_unshifted(name, x, layout)
        self.layer.append_gates(log_f, layout, self.backend)
        keys, values = self.layer.update(k, v)
        decay, _ = self.layer.decay(use_decode_kernel=False)
        paged.flush_pages([x for x in [self.layer] if x.pending is not None])
        return [keys, values, decay.query, decay.key, decay.kv_start, decay.last]

    def state(self) -> list[Tensor]:
        layer, blocks = self.layer, -(-self.length // PAGE)
        # What is held of tokens so far; the rest of a page may be anything.
        held = layer.read(self.length, layer.summary)
        pages = [layer.start, layer.pages, layer._free[: layer._free_count], torch.tensor(len(layer.keys))]
        return [*(x[..., :blocks] for x in layer.summary), *layer.running, *pages, *layer.recent.values(), *held]


@pytest.mark.parametrize(
    ("heads", "rule"), [*((heads, "tight") for heads in HEADS), ((4, 2, 4), "paper"), ((2, 2, 2), "measured")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(dtype: torch.dtype, heads: tuple[int, int, int], rule: Rule) -> None:
    _, kv_heads, gates = heads
    size = 24 if heads == (4, 2, 4) else 16
    operators = PYTORCH._replace(sum_gates=TRITON.sum_gates)
    by_kernels, by_operators = (Taken(x, heads, rule, size) for x in (TRITON, operators))
    # Of the first heads, which forget at once, and the others, which hardly do.
    rates = torch.tensor([0.8] * max(1, gates // 2) + [1e-3] * (gates // 2), device=DEVICE)
    evicted = False
    for tokens in (150, 90, 1, 80):
        # Parts of a larger tensor. One gate is a hard reset.
        both = torch.randn(2, tokens, 2 * kv_heads, size, device=DEVICE).to(dtype)
        k, v = both.transpose(1, 2).chunk(2, dim=1)
        log_f = -torch.rand(2, tokens, gates, device=DEVICE) * rates
        if tokens == 90:
            log_f[0, 5, 0] = -torch.inf
        shifted = {(2, 2, 2): ("key", "value"), (4, 2, 4): ("value",)}.get(heads, ())
        unshifted = {name: torch.randn(2, 2 * tokens, kv_heads, size).to(k)[:, ::2] for name in shifted}
        found, expected = (x.take(log_f, k, v, unshifted) for x in (by_kernels, by_operators))
        found, expected = found + by_kernels.state(), expected + by_operators.state()
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert x.dtype == y.dtype and x.shape == y.shape, i
            torch.testing.assert_close(x, y, rtol=1e-12 if x.dtype == torch.float64 else 1e-6, atol=1e-12, msg=str(i))
        evicted |= bool((by_kernels.layer.start > 0).any())
    assert evicted and by_kernels.layer._backend is None and by_kernels.layer._in_chunk is None


@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_of_other_caches(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Of a prompt, of chunks that begin anywhere, and after a crop, where what was running is part of the summary."""
    kv_heads, gates = heads
    c = -torch.rand(2, gates, 900, device=DEVICE).double().cumsum(-1)
    k = torch.randn(2, 900, kv_heads, 16, device=DEVICE).to(dtype).transpose(1, 2)
    states = [empty_summary(c, k, 960) for _ in range(2)]
    for begin, end in ((0, 200), (200, 264), (264, 700), (640, 900)):
        if begin == 640:
            states = [(summary, running_before(summary, 10)) for summary, _ in states]
        new = c[..., begin:end], k[:, :, begin:end], begin
        states = [
            (summary, function(summary, running, *new))
            for function, (summary, running) in zip(
                (TRITON.extend_summary, PYTORCH.extend_summary), states, strict=True
            )
        ]
        blocks = -(-end // PAGE)
        (found, found_running), (expected, expected_running) = states
        for x, y in zip((*found, *found_running), (*expected, *expected_running), strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            rtol = 1e-12 if x.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(x[..., :blocks], y[..., :blocks], rtol=rtol, atol=1e-12)


def test_without_bounds_nothing_is_evicted() -> None:
    layer = Taken(TRITON, (2, 2, 2), "tight", 16)
    layer.layer.take_bounds(None)
    for _ in range(2):
        k = torch.randn(1, 2, 150, 16, device=DEVICE, dtype=DTYPES[0])
        layer.take(torch.full((1, 150, 2), -1.0, device=DEVICE), k, k, {})
    assert not layer.layer.start.any() and torch.equal(layer.layer.read(300, layer.layer.summary)[0][:, :, 150:], k)
