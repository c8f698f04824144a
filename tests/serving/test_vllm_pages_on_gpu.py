"""Pages that kernels read and write are those of PyTorch, without vLLM."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import HAS_TRITON, backend_of
from foxlm.kernels.decay import Decay
from foxlm.kernels.reference import reference_attention
from foxlm.modeling.vllm.pages import Chunk, PageLayout, Pages, make_step
from kernel_device import DEVICE, ON_KERNELS, SOME_DTYPES

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.modeling.vllm.pages_on_gpu import GpuPages, GpuStep, Prompts

pytestmark = ON_KERNELS

PAGE, GATES, HEADS, SIZE = 64, 2, 2, 16
# Requests: their pages, and how many tokens they have after each step. One of them only fills the last batch up.
TABLES = ([3, 5, 7], [1, 4, 2], [6, 8])
STEPS = ((100, 20, 0), (101, 150, 0), (164, 151, 30), (165, 152, 31))


def layout(dtype: torch.dtype) -> PageLayout:
    return PageLayout(PAGE, GATES, HEADS, SIZE, ("key", "value"), dtype)


def cache(dtype: torch.dtype, device: str) -> Tensor:
    return torch.zeros(9, 1, PAGE, layout(dtype).bytes_per_token(), dtype=torch.int8, device=device)


def of_step(spans: list[tuple[int, int, int]], chunk: type) -> Any:
    """Of requests, first and last tokens; those with one token first."""
    spans = sorted(spans, key=lambda x: x[2] - x[1] > 1)
    rows = torch.tensor([0] + [end - start for _, start, end in spans]).cumsum(0)
    chunks = [
        Chunk(slice(int(rows[i]), int(rows[i + 1])), start, torch.tensor(TABLES[r][: -(-end // PAGE)]))
        for i, (r, start, end) in enumerate(spans)
    ]
    if chunk is Pages:
        return make_step(chunks, PAGE)
    single = sum(end - start == 1 for _, start, end in spans)
    table = torch.zeros(len(spans), 3, dtype=torch.int32)
    for i, one in enumerate(chunks):
        table[i, : len(one.pages)] = one.pages
    lengths = torch.tensor([end for *_, end in spans])
    longest = max(end - start for _, start, end in spans)
    rows, lengths, table = (x.int().to(DEVICE) for x in (rows, lengths, table))
    return GpuStep(rows, lengths, table, longest, single, chunks[single:], []).begin()


@pytest.mark.parametrize("dtype", dict.fromkeys([torch.float32, *SOME_DTYPES]), ids=str)
def test_steps_are_those_of_pytorch(dtype: torch.dtype) -> None:
    expected = Pages(cache(dtype, "cpu"), layout(dtype))
    given = GpuPages(cache(dtype, DEVICE), layout(dtype))
    before = (0, 0, 0)
    for after in STEPS:
        spans = [(r, a, b) for r, (a, b) in enumerate(zip(before, after, strict=True)) if b > a]
        tokens = sum(b - a for _, a, b in spans)
        k, v = (torch.randn(1, tokens, HEADS, SIZE).to(dtype) for _ in range(2))
        log_f = -torch.rand(1, tokens, GATES)
        log_f[0, ::9, 1] = -1e6
        stands_for = torch.rand(tokens) < 0.5
        steps = of_step(spans, Pages), of_step(spans, GpuPages)
        for name, x in (("key", k), ("value", v)):
            previous = given.previous(name, x.to(DEVICE), steps[1])
            assert torch.equal(expected.previous(name, x, steps[0]), previous.cpu())
        sums, firsts = expected.append(k, v, log_f, steps[0], stands_for)
        c, kv_start = given.append(k.to(DEVICE), v.to(DEVICE), log_f.to(DEVICE), steps[1], stands_for.to(DEVICE))
        assert (c.cpu() - sums).abs().max() < 1e-10 and torch.equal(kv_start.cpu(), firsts)
        for name in ("key", "value", "kv_start", "unshifted_key", "unshifted_value"):
            assert torch.equal(expected.views[name][1:], given.views[name][1:].cpu()), name
        for one in steps[0].chunks:
            for x, y in zip(expected.read(one), given.read(one._replace(pages=one.pages.to(DEVICE))), strict=True):
                assert (x.double() - y.cpu().double()).abs().max() < 1e-10
        before = after


def test_decoding_reads_what_pruning_leaves() -> None:
    """Of the view that layers give to the kernels: values that are left out are NaN."""
    pages = GpuPages(cache(torch.float32, DEVICE), layout(torch.float32))
    k, v = (torch.randn(1, 150, HEADS, SIZE, device=DEVICE) for _ in range(2))
    log_f = torch.full((1, 150, GATES), -0.5, device=DEVICE)
    for start, end in ((0, 149), (149, 150)):
        step = of_step([(0, start, end)], GpuPages)
        rows = slice(start, end)
        c, kv_start = pages.append(k[:, rows], v[:, rows], log_f[:, rows], step)
    pages.views["value"][TABLES[0][0]] = math.nan
    q = torch.randn(1, 1, 4, SIZE, device=DEVICE)
    decay = Decay(c[0].T[..., None], pages.pools.sums, kv_start[0].T[..., None], step.last)
    view, decode = pages.view(step), backend_of(q).decode
    assert decode is not None
    options: dict[str, Any] = {"summary": view.summary, "pages": view.pages, "scale": 0.25}
    out, _ = decode(q, pages.pools.keys, pages.pools.values, decay, eps=1e-4, **options)
    sums = log_f.double().cumsum(1).mT
    whole = Decay(sums[..., -1:], sums, kv_start, torch.tensor([149], device=DEVICE))
    exact, _ = reference_attention(q, k, v, whole, scale=0.25)
    assert (out - exact).abs().max() < 1e-3
    out, _ = decode(q, pages.pools.keys, pages.pools.values, decay, eps=None, **options)
    assert out.isnan().any()


def test_what_is_not_finite_stays_with_its_request() -> None:
    """Of the first request a gate, of the second a value; of the third nothing."""
    rows = torch.tensor([0, 2, 5, 7], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([2, 3, 2], dtype=torch.int32, device=DEVICE)
    table = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    prompts = Prompts(slice(0, 3), slice(0, 7), length=4)
    (prompts,) = GpuStep(rows, lengths, table, 3, 0, [], [prompts]).begin().prompts
    assert prompts.begins is not None and prompts.begins.tolist() == [0, 0, 2, 2, 2, 5, 5]
    v, log_f = torch.randn(1, 7, HEADS, SIZE, device=DEVICE), -torch.rand(1, 7, GATES, device=DEVICE)
    log_f[0, 3, 0] = -math.inf
    broken_v, broken_f = v.clone(), log_f.clone()
    broken_f[0, 1, 0], broken_v[0, 3, 1, 2] = math.nan, math.inf
    clean_v, clean_f, broken = prompts.isolated(broken_v, broken_f)
    assert broken is not None and broken.tolist() == [False, True, False, True, True, False, False]
    assert clean_v.isfinite().all() and not clean_f.isnan().any()
    whole = ~broken
    assert torch.equal(clean_v[0, whole], v[0, whole]) and torch.equal(clean_f[0, whole], log_f[0, whole])
    alone = Prompts(slice(0, 1), slice(0, 2), length=2, begins=prompts.begins[:2])
    assert alone.isolated(broken_v, broken_f) == (broken_v, broken_f, None)
