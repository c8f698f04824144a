"""The pages that vLLM's cache holds of a FoX layer, without vLLM."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from foxlm.kernels.decay import accumulate
from foxlm.modeling.vllm.pages import Chunk, PageLayout, Pages, make_step

SIZE = 8
LAYOUT = PageLayout(SIZE, gates=3, kv_heads=2, head_dim=5, shifted=("key", "value"), dtype=torch.bfloat16)


class Request(NamedTuple):
    log_f: Tensor
    key: Tensor
    pages: Tensor


def make_pages(count: int, layout: PageLayout = LAYOUT) -> Pages:
    cache = torch.empty(count, 1, layout.tokens, layout.bytes_per_token(), dtype=torch.int8)
    pages = Pages(cache, layout)
    for view in pages.views.values():
        # What nobody wrote must not be read.
        view.fill_(float("nan") if view.is_floating_point() else 1 << 40)
    return pages


def request(length: int, pages: list[int]) -> Request:
    log_f = torch.randn(1, length, LAYOUT.gates).sigmoid().log()
    log_f[0, length // 3, 0] = -1e6
    return Request(log_f, torch.randn(1, length, 2, 5).bfloat16(), torch.tensor(pages))


def run(pages: Pages, requests: list[Request], spans: list[tuple[int, int]]) -> tuple[list[Tensor], list]:
    """The state before each token, and its sums and first keys, of one step with a span of each request."""
    chunks, row = [], 0
    for one, (start, end) in zip(requests, spans, strict=True):
        chunks.append(Chunk(slice(row, row + end - start), start, one.pages[: -(-end // SIZE)]))
        row += end - start
    step = make_step(chunks, SIZE)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(x, name)[:, slice(*span)] for x, span in zip(requests, spans, strict=True)], dim=1)

    previous = pages.previous("key", joined("key"), step)
    c, kv_start = pages.append(joined("key"), joined("key") + 1, joined("log_f"), step)
    for chunk, one in zip(chunks, requests, strict=True):
        k, v, sums = pages.read(chunk)
        assert torch.equal(k, one.key[:, : chunk.end]) and torch.equal(v, one.key[:, : chunk.end] + 1)
        assert (sums - accumulate(one.log_f)[0][..., : chunk.end]).abs().max() < 1e-12
    return [previous[:, x.rows] for x in chunks], [(c[..., x.rows], kv_start[..., x.rows]) for x in chunks]


def check(one: Request, start: int, end: int, previous: Tensor, decay: tuple[Tensor, Tensor]) -> None:
    shifted = torch.cat([torch.zeros_like(one.key[:, :1]), one.key[:, :-1]], dim=1)
    assert torch.equal(previous, shifted[:, start:end])
    c, kv_start = accumulate(one.log_f)
    assert (decay[0] - c[..., start:end]).abs().max() < 1e-12
    assert torch.equal(decay[1], kv_start[..., start:end])


def test_chunks_of_several_requests_are_as_whole_ones() -> None:
    pages = make_pages(12)
    requests = [request(29, [3, 9, 1, 7]), request(16, [2, 5]), request(20, [11, 0, 8])]
    cuts = [[0, 1, 8, 9, 24, 29], [0, 7, 8, 15, 16, 16], [0, 3, 4, 16, 17, 20]]
    for step in range(5):
        spans = [(x[step], x[step + 1]) for x in cuts]
        taking_part = [i for i, (start, end) in enumerate(spans) if end > start]
        found = run(pages, [requests[i] for i in taking_part], [spans[i] for i in taking_part])
        for i, previous, decay in zip(taking_part, *found, strict=True):
            check(requests[i], *spans[i], previous, decay)


def test_a_request_goes_on_from_a_page_that_another_writes_in_the_same_step() -> None:
    pages = make_pages(8)
    first = request(19, [4, 2, 6])
    second = Request(first.log_f.clone(), first.key.clone(), torch.tensor([4, 2, 5]))
    second.log_f[:, 16:] -= 1.0
    second.key[:, 16:] += 1.0
    run(pages, [first], [(0, 11)])
    # The one that goes on stands before the one it goes on from.
    found = run(pages, [second, first], [(16, 19), (11, 19)])
    check(second, 16, 19, found[0][0], found[1][0])
    check(first, 11, 19, found[0][1], found[1][1])


def test_a_sink_takes_the_place_of_the_first_token() -> None:
    pages = make_pages(4)
    one = request(12, [1, 2])
    one.log_f.fill_(-0.1)
    step = make_step([Chunk(slice(0, 5), 0, one.pages[:1])], SIZE)
    stands_for = torch.tensor([True, False, False, True, False])
    _, kv_start = pages.append(one.key[:, :5], one.key[:, :5], one.log_f[:, :5], step, stands_for)
    assert (kv_start == 1).all()
    step = make_step([Chunk(slice(0, 7), 5, one.pages)], SIZE)
    _, kv_start = pages.append(one.key[:, 5:], one.key[:, 5:], one.log_f[:, 5:], step, torch.ones(7, dtype=torch.bool))
    assert (kv_start == 1).all()


def test_gate_sums_are_exact_over_a_hundred_thousand_tokens() -> None:
    """In a model in bfloat16, step by step: sums of float32 would be off by more than a slow gate."""
    length = 100_000
    layout = LAYOUT._replace(tokens=128, shifted=())
    pages = make_pages(-(-length // 128), layout)
    log_f = -torch.rand(1, length, LAYOUT.gates)
    key = torch.zeros(1, 2048, 2, 5, dtype=torch.bfloat16)
    table = torch.arange(len(pages.views["key"])).flip(0)
    for start in range(0, length, 2048):
        end = min(start + 2048, length)
        step = make_step([Chunk(slice(0, end - start), start, table[: -(-end // 128)])], 128)
        pages.append(key[:, : end - start], key[:, : end - start], log_f[:, start:end], step)
    _, _, c = pages.read(Chunk(slice(0, 1), length - 1, table))
    exact = log_f.double().cumsum(1).mT
    assert (c - exact).abs().max() < 1e-8
    # What would be lost.
    assert (c.float().diff() - exact.diff()).abs().max() > 1e-3


def test_views_share_a_page_without_overlap() -> None:
    pages = make_pages(3)
    for number, view in enumerate(pages.views.values()):
        view.fill_(number)
    assert all((view == number).all() for number, view in enumerate(pages.views.values()))
    used = sum(view[0].numel() * view.element_size() for view in pages.views.values())
    assert used <= SIZE * LAYOUT.bytes_per_token() < used + 16 * (SIZE + len(pages.views))


def test_another_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache must be int8 \[pages, 1, 8, 96\].* got torch.uint8"):
        Pages(torch.empty(2, 1, 8, 96, dtype=torch.uint8), LAYOUT)
    with pytest.raises(ValueError, match=r"shape \[2, 1, 16, 96\]"):
        Pages(torch.empty(2, 1, 16, 96, dtype=torch.int8), LAYOUT)
