"""Kernels that look a step's tokens up in a block table give each request what it would get alone."""

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.pruning.key_stats import KeySummary
from foxlm.kernels.pruning.rounding import SHORTEST_LENGTH
from foxlm.kernels.reference import reference_attention
from foxlm.modeling.cache.view import CacheView
from kernel_device import DEVICE, ON_KERNELS, SOME_DTYPES

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.block_tables.append import PagePools, append_step
from foxlm.kernels.block_tables.requests import Requests, find_writers
from foxlm.kernels.block_tables.shift import previous_states
from foxlm.kernels.portable.decode import decode_attention

pytestmark = ON_KERNELS

PAGE = 64
HEADS, SIZE = 2, 12


class Request(NamedTuple):
    """All tokens of a request, and its pages."""

    k: Tensor
    v: Tensor
    log_f: Tensor
    pages: list[int]

    def tokens(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.k[start:end], self.v[start:end], self.log_f[start:end]

    @property
    def exact(self) -> tuple[Tensor, Tensor]:
        return accumulate(self.log_f[None])


class Server:
    """Pages of one layer, NaN where nobody has written."""

    def __init__(self, count: int, gates: int, dtype: torch.dtype = torch.float32) -> None:
        def pool(*shape: int, dtype: torch.dtype) -> Tensor:
            # Parts of larger pages.
            whole = torch.empty(count, math.prod(shape) + 32, dtype=dtype, device=DEVICE)
            whole.fill_(math.nan if dtype.is_floating_point else 1 << 40)
            return whole[:, 16:-16].unflatten(1, shape)

        keys, values = (pool(HEADS, PAGE, SIZE, dtype=dtype) for _ in range(2))
        sums, decays = pool(gates, PAGE, dtype=torch.float64), pool(gates, dtype=torch.float64)
        firsts, largest = pool(gates, dtype=torch.int64), pool(HEADS, dtype=torch.float32)
        self.pools = PagePools(keys, values, sums, firsts, decays, largest)
        self.held = pool(HEADS, SIZE, dtype=dtype)

    def requests(self, asked: list[Request], spans: list[tuple[int, int]], padding: int = 0) -> Requests:
        counts = [end - start for start, end in spans]
        rows = torch.tensor([0, *counts, *[0] * padding]).cumsum(0)
        lengths = torch.tensor([end for _, end in spans] + [0] * padding)
        # A server leaves what it likes in the rest of its table.
        table = torch.full((len(lengths), 1 + max(len(x.pages) for x in asked)), 1 << 20)
        for i, one in enumerate(asked):
            held = one.pages[: -(-spans[i][1] // PAGE)]
            table[i, : len(held)] = torch.tensor(held)
        table[len(asked) :] = 0
        rows, lengths, table = (x.int().to(DEVICE) for x in (rows, lengths, table))
        single = next((i for i, count in enumerate(counts) if count > 1), len(lengths))
        return Requests(rows, lengths, table, single, max(counts), find_writers(rows, lengths, table))

    def step(self, asked: list[Request], spans: list[tuple[int, int]]) -> None:
        """Take in a step, and hold everything it gives and leaves against the requests alone."""
        requests = self.requests(asked, spans)

        def rows(name: str) -> Tensor:
            return torch.cat([getattr(x, name)[slice(*span)] for x, span in zip(asked, spans, strict=True)])

        k = rows("k")
        previous = previous_states(k, self.held, requests)
        c, first = append_step(k, rows("v"), rows("log_f"), requests, self.pools)
        row = 0
        for one, (start, end) in zip(asked, spans, strict=True):
            mine = slice(row, row + end - start)
            shifted = torch.cat([torch.zeros_like(one.k[:1]), one.k[:-1]])
            assert torch.equal(previous[mine], shifted[start:end])
            exact_c, exact_first = one.exact
            assert (c[:, mine] - exact_c[0, :, start:end]).abs().max() < 1e-10
            assert torch.equal(first[:, mine], exact_first[0, :, start:end])
            self.check_pages(one, end)
            row += end - start

    def check_pages(self, one: Request, end: int) -> None:
        pages = torch.tensor(one.pages[: -(-end // PAGE)], device=DEVICE)
        lasts = torch.tensor([min(end, (i + 1) * PAGE) - 1 for i in range(len(pages))], device=DEVICE)
        pools, (c, first) = self.pools, one.exact
        for held, given_ in ((pools.keys, one.k), (pools.values, one.v)):
            assert torch.equal(held[pages].transpose(0, 1).flatten(1, 2)[:, :end], given_[:end].transpose(0, 1))
        assert (pools.sums[pages].transpose(0, 1).flatten(1)[:, :end] - c[0, :, :end]).abs().max() < 1e-10
        assert torch.equal(pools.firsts[pages], first[0].T[lasts])
        decays = (-c[0]).logcumsumexp(-1).T[lasts]
        assert (pools.log_decays[pages] - decays).abs().max() < 1e-9
        largest = one.k.double().norm(dim=-1).clamp(min=SHORTEST_LENGTH).cummax(0).values[lasts]
        torch.testing.assert_close(pools.largest[pages].double(), largest, rtol=1e-6, atol=0.0)
        assert torch.equal(self.held[pages], one.k[lasts])


def draw(length: int, pages: list[int], gates: int, rate: float = 0.05, dtype: torch.dtype = torch.float32) -> Request:
    log_f = -torch.rand(length, gates, device=DEVICE) * rate
    log_f[length // 3, 0] = -1e6
    k, v = (torch.randn(length, HEADS, SIZE, device=DEVICE, dtype=dtype) for _ in range(2))
    return Request(k, v, log_f, pages)


def shared(one: Request, tokens: int, length: int, pages: list[int]) -> Request:
    """A request that begins as ``one`` does, in its pages."""
    other = draw(length, [*one.pages[: tokens // PAGE], *pages], one.log_f.shape[1])
    begun, rest = one.tokens(0, tokens), other.tokens(tokens, length)
    k, v, log_f = (torch.cat(x) for x in zip(begun, rest, strict=True))
    return Request(k, v, log_f, other.pages)


@pytest.mark.parametrize("dtype", dict.fromkeys([torch.float32, *SOME_DTYPES]), ids=str)
@pytest.mark.parametrize("gates", [1, 2, 4])
def test_requests_in_turn(gates: int, dtype: torch.dtype) -> None:
    """One token of some beside many of others; in the middle of a page, up to its end, and after it."""
    server = Server(12, gates, dtype)
    lengths, pages = (190, 130, 70), ([3, 9, 1], [2, 11, 5], [7, 4])
    asked = [draw(length, held, gates, dtype=dtype) for length, held in zip(lengths, pages, strict=True)]
    cuts = [[0, 63, 64, 65, 189, 190], [0, 1, 2, 128, 129, 130], [0, 64, 65, 66, 67, 70]]
    for i in range(5):
        spans = [(x[i], x[i + 1]) for x in cuts]
        order = sorted(range(3), key=lambda r: spans[r][1] - spans[r][0] > 1)
        server.step([asked[r] for r in order], [spans[r] for r in order])


@pytest.mark.parametrize("seed", range(6))
def test_any_cuts(seed: int) -> None:
    choices, gates = random.Random(seed), 1 << seed % 3
    server, at = Server(12, gates), [0, 0, 0]
    pages = choices.sample(range(1, 12), 9)
    asked = [draw(choices.randint(1, 150), pages[3 * i : 3 * i + 3], gates) for i in range(3)]
    while any(start < len(one.k) for one, start in zip(asked, at, strict=True)):
        steps = [choices.choice([0, 1, 1, 5, 64, 100]) for _ in asked]
        spans = [(start, min(len(one.k), start + n)) for one, start, n in zip(asked, at, steps, strict=True)]
        order = sorted((r for r in range(3) if spans[r][1] > spans[r][0]), key=lambda r: spans[r][1] - spans[r][0] > 1)
        if order:
            server.step([asked[r] for r in order], [spans[r] for r in order])
            at = [end for _, end in spans]


@pytest.mark.parametrize("ones", [False, True], ids=["many tokens", "one token"])
def test_goes_on_from_a_page_that_another_fills_in_the_same_step(ones: bool) -> None:
    server, gates = Server(12, 2), 2
    first = draw(128, [4, 2], gates)
    second = shared(first, 64, 129, [5, 8])
    third = shared(second, 128, 129, [6])
    if ones:
        server.step([first], [(0, 63)])
        server.step([second, first], [(64, 65), (63, 64)])
        return
    server.step([first], [(0, 40)])
    # In no order: the third follows the second, which follows the first.
    server.step([third, second, first], [(128, 129), (64, 129), (40, 70)])
    assert server.requests([third, second, first], [(128, 129), (64, 129), (40, 70)]).writers.tolist() == [1, 2, -1]


def test_a_sink_takes_the_place_of_the_first_token() -> None:
    server = Server(4, 2)
    one, other = draw(70, [1, 2], 2), draw(70, [3], 2)
    one.log_f.fill_(-0.1)
    other.log_f.fill_(-0.1)
    for start, end, flags in ((0, 5, [True] + [False] * 4), (5, 70, [True] * 65)):
        requests = server.requests([one], [(start, end)])
        stands_for = torch.tensor(flags, device=DEVICE)
        _, first = append_step(*one.tokens(start, end), requests, server.pools, stands_for)
        assert (first == 1).all()
    stands_for = torch.zeros(5, dtype=torch.bool, device=DEVICE)
    _, first = append_step(*other.tokens(0, 5), server.requests([other], [(0, 5)]), server.pools, stands_for)
    assert (first == 0).all()


@pytest.mark.parametrize("rule", [None, "tight", "paper"])
@pytest.mark.parametrize("heads,gates", [(2, 2), (2, 1), (4, 2), (4, 4)])
def test_attention_of_one_token_of_each_request(heads: int, gates: int, rule: str | None) -> None:
    """Also where some requests only fill the batch up; and with pruning no page that it drops is read."""
    server, padding, eps = Server(20, gates), 2, 1e-3
    asked = [draw(200, [3, 9, 1, 13], gates, 0.5), draw(65, [2, 11], gates), draw(129, [7, 4, 5], gates, 0.5)]
    asked.append(draw(1, [6], gates))
    for one in asked[:3]:
        server.step([one], [(0, len(one.k) - 1)])
    spans = [(len(x.k) - 1, len(x.k)) for x in asked]
    requests = server.requests(asked, spans, padding)
    rows = len(asked) + padding
    news = [x.tokens(len(x.k) - 1, len(x.k)) for x in asked]
    k, v, log_f = (torch.cat(x) for x in zip(*news, asked[0].tokens(0, padding), strict=True))
    written = [x.clone() for x in server.pools]
    c, first = append_step(k, v, log_f, requests, server.pools)
    assert (first[:, len(asked) :] == 1).all()
    for before, after in zip(written, server.pools, strict=True):
        # Of padding, not even the page that its table names.
        assert torch.equal(before[0].nan_to_num(7.0), after[0].nan_to_num(7.0))

    q = torch.randn(rows, 1, heads, SIZE, device=DEVICE)
    scale, pools = SIZE**-0.5, server.pools
    decay = Decay(c.T[..., None], pools.sums, first.T[..., None], (requests.lengths.long() - 1)[:, None])
    summary = KeySummary(pools.sums[:, :, -1:], pools.log_decays[..., None], pools.largest[..., None])
    largest = CacheView(summary, requests.pages).largest(decay.last)
    for i, one in enumerate(asked):
        longest = one.k.norm(dim=-1).amax(0).clamp(min=SHORTEST_LENGTH)
        torch.testing.assert_close(largest[i], longest, rtol=1e-6, atol=0.0)
    options: dict[str, Any] = {"pages": requests.pages, "summary": summary}
    if rule is not None:
        # The weights of 64 tokens that gates of about exp(-1/4) precede by 100 more.
        pools.values[asked[0].pages[0]].fill_(math.nan)
        options |= {"eps": eps, "rule": rule}
    if rule == "paper":
        options["logit_bound"] = q.norm(dim=-1).amax(1) * scale * largest.repeat_interleave(heads // HEADS, dim=1)
    counts = torch.tensor([1000, 2000], device=DEVICE)
    out, lse = decode_attention(q, pools.keys, pools.values, decay, scale=scale, counts=counts, **options)
    # Rows that fill the batch up count nothing.
    visible = first[:, : len(asked)].expand(max(gates, HEADS), -1).unflatten(0, (HEADS, -1)).amin(1)
    there = sum(HEADS * -(-len(x.k) // PAGE) for x in asked) - int((visible // PAGE).sum())
    read = int(counts[0]) - 1000
    assert counts[1] == 2000 + there
    assert read == there if rule is None else read < there + (rule == "paper")
    for i, one in enumerate(asked):
        sums, firsts = one.exact
        alone = Decay(sums[..., -1:], sums, firsts[..., -1:], torch.tensor([len(one.k) - 1], device=DEVICE))
        exact, exact_lse = reference_attention(q[i : i + 1], one.k[None], one.v[None], alone, scale=scale)
        bound = 1e-5 if rule is None else 2 * eps * float(one.v.abs().max())
        assert (out[i] - exact[0]).abs().max() < bound
        assert (lse[i] - exact_lse[0]).abs().max() < (1e-5 if rule is None else 2 * eps)
    assert (out[len(asked) :] == 0).all() and (lse[len(asked) :] == -math.inf).all()


def test_another_dtype_is_refused() -> None:
    server, one = Server(4, 2), draw(5, [1], 2)
    requests = server.requests([one], [(0, 5)])
    with pytest.raises(ValueError, match=r"dtypes that pages hold, torch.float32 and torch.float32; got torch.float16"):
        append_step(one.k.half(), one.v, one.log_f, requests, server.pools)
