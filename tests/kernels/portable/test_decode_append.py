"""One launch takes a step's tokens into a cache as the functions of PyTorch do: gates, keys, values, key statistics."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_inputs import draw_gates
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.decay import accumulate
from foxlm.kernels.pruning.key_stats import KeySummary, Running, empty_summary, extend_summary
from foxlm.modeling.cache.page_pool import PAGE, PagePool
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS, SOME_DTYPES

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.portable.decode_append import LARGEST_STEP, append_tokens

pytestmark = ON_KERNELS

BLOCKS = 4
# Key/value heads and gates: as many gates as heads, one for all, one for each query head.
HEADS = [(2, 2), (3, 1), (2, 6), (1, 1), (1, 4)]


@dataclass
class Held:
    """A cache of one layer, dense or, with ``pool``, paged."""

    keys: Tensor
    values: Tensor
    c: Tensor
    last: tuple[Tensor, Tensor]
    summary: KeySummary
    running: Running
    length: Tensor
    unshifted: dict[str, Tensor]
    first: Tensor | None = None
    pool: PagePool | None = None

    def buffers(self) -> dict[str, Any]:
        """As arguments of `append_tokens`, without unshifted states."""
        given = {name: value for name, value in vars(self).items() if name not in ("pool", "unshifted")}
        return given | ({} if self.pool is None else {"pages": self.pool.pages})

    def contents(self) -> list[Tensor]:
        states = self.unshifted.values()
        tensors = (self.keys, self.values, self.c, *self.last, *self.summary, *self.running, self.length, self.first)
        return [*(x for x in tensors if x is not None), *states]


def empty(kind: str, batch: int, heads: tuple[int, int], size: int, dtype: torch.dtype) -> Held:
    """With NaN wherever nothing may be read. Of a paged one, every fifth block of a head has no page."""
    kv_heads, gates = heads
    room = BLOCKS * PAGE - (0 if kind == "paged" else 5)
    keys = torch.full((batch, kv_heads, room, size), math.nan, dtype=dtype, device=DEVICE)
    c = torch.full((batch, gates, room), math.nan, dtype=torch.float64, device=DEVICE)
    ring = (PAGE,) if kind == "paged" else ()
    last_c = torch.zeros(batch, gates, *ring, dtype=torch.float64, device=DEVICE)
    summary, running = empty_summary(c, keys, room)
    for x in summary:
        x.fill_(math.nan)
    length = torch.zeros((), dtype=torch.int64, device=DEVICE)
    states = torch.zeros(batch, 1 if kind == "dense" else PAGE, kv_heads, size, dtype=dtype, device=DEVICE)
    unshifted = {"key": states, "value": states.clone()}
    held = Held(keys, keys.clone(), c, (last_c, last_c.long()), summary, running, length, unshifted)
    if kind == "with first":
        held.first = torch.full((batch, gates, room), -7, dtype=torch.int32, device=DEVICE)
    if kind == "paged":
        pool = held.pool = PagePool()
        pool.make_pool(keys, keys, gates, BLOCKS)
        count = pool.pages.numel()
        pages = torch.randperm(2 * count)[:count] + 1
        pages[::5] = -1
        pool.pages.copy_(pages.view_as(pool.pages))
        for name in ("keys", "values", "c"):
            x = getattr(pool, name)
            setattr(pool, name, x.new_full((2 * count + 1, *x.shape[1:]), math.nan))
        held.keys, held.values, held.c = pool.keys, pool.values, pool.c
    return held


def append_in_pytorch(held: Held, k: Tensor, v: Tensor, log_f: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `append_tokens` does, by the functions that define it."""
    position, tokens = held.length.clone(), k.shape[2]
    positions = position + torch.arange(tokens, device=k.device)
    if real is not None:
        log_f = log_f.masked_fill(~real[..., None], 0.0)
    last_c, last_first = held.last
    if held.pool is not None:
        slot = (position - 1) % PAGE
        last_c, last_first = last_c[..., slot], last_first[..., slot]
    c, first = accumulate(log_f, position, (last_c, last_first))
    if held.pool is None:
        held.keys.index_copy_(2, positions, k)
        held.values.index_copy_(2, positions, v)
        held.c.index_copy_(2, positions, c)
        for x, new in zip(held.last, (c, first), strict=True):
            x.copy_(new[..., -1])
    else:
        held.pool.write_tokens(k, v, c, positions)
        for x, new in zip(held.last, (c, first), strict=True):
            x.index_copy_(2, positions % PAGE, new)
    if held.first is not None:
        held.first.index_copy_(2, positions, first.int())
    for x, new in zip(held.running, extend_summary(held.summary, held.running, c, k, position), strict=True):
        x.copy_(new)
    held.length.add_(tokens)
    return c, first


def draw_step(
    tokens: int, batch: int, heads: tuple[int, int], size: int, dtype: torch.dtype, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys and values as parts of a larger tensor, as they come from fused projections; log gates; padding or None."""
    kv_heads, gates = heads
    both = torch.randn(batch, tokens, 2 * kv_heads, size) * torch.rand(batch, tokens, 1, 1).mul(8.0).exp()
    k, v = both.to(DEVICE, dtype).transpose(1, 2).chunk(2, dim=1)
    log_f = draw_gates(batch, tokens, gates, dtype=torch.float32).to(DEVICE)
    real = torch.rand(batch, tokens).to(DEVICE) < 0.6 if padded else None
    if real is not None:
        log_f = log_f.masked_fill(~real[..., None] & (torch.rand_like(log_f) < 0.5), math.nan)
    return k, v, log_f, real


def last_real(real: Tensor | None) -> Tensor | None:
    """``[B, 1 + T]``, one token after the other."""
    if real is None:
        return None
    rows = [[max((i for i in range(t) if row[i]), default=-1) for t in range(len(row) + 1)] for row in real.tolist()]
    return torch.tensor(rows, device=real.device)


def keep_in_pytorch(held: Tensor, states: Tensor, position: int, real: Tensor | None) -> None:
    """Write ``states``, ``[B, T, G, D]``, to slots of ``held``; padding repeats the last real one."""
    for t in range(states.shape[1]):
        before, slot = held[:, (position + t - 1) % held.shape[1]], (position + t) % held.shape[1]
        is_real = torch.ones(len(held), dtype=torch.bool, device=held.device) if real is None else real[:, t]
        held[:, slot] = torch.where(is_real[:, None, None], states[:, t], before)


def assert_same(found: Held, expected: Held) -> None:
    """Equal; sums of gates but for the order of their terms, lengths but for two roundings."""
    for x, y in zip(found.contents(), expected.contents(), strict=True):
        exact = not x.is_floating_point() or any(x is z for z in (found.keys, found.values, *found.unshifted.values()))
        tolerance = 0.0 if exact else 1e-14 if x.dtype == torch.float64 else 2.0**-22
        if found.pool is not None and any(x is z for z in (found.keys, found.values, found.c)):
            # Page 0 holds whatever was written there last.
            x, y = x[1:], y[1:]
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


@settings(max_examples=25 if INTERPRETED else 200)
@given(
    kind=st.sampled_from(["dense", "with first", "paged"]),
    position=st.sampled_from([0, 1, 47, 48, 49, 62, 63, 64, 65, 127, 128, 150]),
    steps=st.lists(st.one_of(st.just(1), st.integers(1, LARGEST_STEP)), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    heads=st.sampled_from(HEADS),
    size=st.sampled_from([8, 16, 40, 64]),
    dtype=st.sampled_from(SOME_DTYPES),
    padded=st.booleans(),
    shifted=st.sampled_from([(), ("key",), ("value",), ("key", "value")]),
    seed=st.integers(0, 2**20),
)
def test_a_step_is_taken_in_as_defined(kind, position, steps, batch, heads, size, dtype, padded, shifted, seed):
    torch.manual_seed(seed)
    expected = empty(kind, batch, heads, size, dtype)
    for tokens in [LARGEST_STEP] * (position // LARGEST_STEP) + [position % LARGEST_STEP]:
        if tokens:
            append_in_pytorch(expected, *draw_step(tokens, batch, heads, size, dtype, padded))
    found = copy.deepcopy(expected)
    if found.pool is not None:
        found.keys, found.values, found.c = found.pool.keys, found.pool.values, found.pool.c
    for tokens in steps:
        k, v, log_f, real = draw_step(tokens, batch, heads, size, dtype, padded)
        positions = expected.length + torch.arange(tokens, device=DEVICE)
        c, first = append_in_pytorch(expected, k, v, log_f, real)
        again, position = copy.deepcopy(found), int(positions[0])
        states = {name: torch.randn_like(k).transpose(1, 2) for name in shifted}
        options: dict[str, Any] = {"last_real": last_real(real)}
        for name, new in states.items():
            keep_in_pytorch(expected.unshifted[name], new, position, real)
            options[f"{name}_states"] = new, found.unshifted[name]
        found_c, found_first = append_tokens(k, v, log_f, positions, real, **found.buffers(), **options)
        torch.testing.assert_close(found_c, c, rtol=1e-14, atol=1e-14)
        assert torch.equal(found_first, first)
        assert_same(found, expected)
        options |= {f"{name}_states": (new, again.unshifted[name]) for name, new in states.items()}
        append_tokens(k, v, log_f, positions, real, **again.buffers(), **options)
        for x, y in zip(again.contents(), found.contents(), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.smoke
def test_a_key_that_is_no_number_bounds_nothing() -> None:
    """Nor do those after it, whatever is said of NaN and maxima."""
    torch.manual_seed(0)
    held = empty("dense", 1, (2, 2), 16, torch.float32)
    for tokens in (1, 3):
        k, v, log_f, _ = draw_step(tokens, 1, (2, 2), 16, torch.float32, False)
        k = k.clone()
        k[0, 0, 0, 0] = math.nan
        append_tokens(k, v, log_f, held.length + torch.arange(tokens, device=DEVICE), **held.buffers())
        assert held.summary.largest[0, 0, 0].item() == held.running[1][0, 0].item() == math.inf
        assert held.running[1][0, 1].isfinite() and held.keys[0, 0, 0, 0].isnan()


def test_another_dtype_than_the_cache_holds_is_refused() -> None:
    held = empty("dense", 1, (2, 2), 16, torch.float32)
    k, v, log_f, _ = draw_step(1, 1, (2, 2), 16, torch.float16, False)
    with pytest.raises(ValueError, match=r"holds, torch.float32 and torch.float32; got torch.float16"):
        append_tokens(k, v, log_f, held.length[None], **held.buffers())


@pytest.mark.parametrize("forgotten", ["carry", "ring", "block"])
def test_what_is_taken_in_wrong_is_seen(forgotten: str) -> None:
    """Negative control."""
    torch.manual_seed(0)
    expected = empty("paged", 1, (2, 2), 16, torch.float32)
    for tokens in [16] * 4:
        append_in_pytorch(expected, *draw_step(tokens, 1, (2, 2), 16, torch.float32, False))
    wrong = copy.deepcopy(expected)
    assert_same(wrong, expected)
    if forgotten == "carry":
        wrong.running[0].add_(1e-9)
    elif forgotten == "ring":
        wrong.last[1][0, 0, 3] += 1
    else:
        wrong.summary.largest[0, 0, 0] *= 1.0 + 1e-6
    with pytest.raises(AssertionError):
        assert_same(wrong, expected)
