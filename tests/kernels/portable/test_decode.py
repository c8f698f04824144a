"""Decode attention over dense and paged caches equals the reference, and pruning reads fewer blocks."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attention_inputs import draw_gates, draw_inputs, padding_mask
from eager import eager_attention
from foxlm.kernels.backends import HAS_TRITON, backend_of
from foxlm.kernels.decay import Decay, accumulate, hide_padding
from foxlm.kernels.pruning.key_stats import KeySummary
from foxlm.kernels.reference import reference_attention
from kernel_device import DEVICE, DTYPES, INTERPRETED, ON_KERNELS, SOME_DTYPES

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.portable import decode, decode_attend, decode_search
from foxlm.kernels.portable.decode import decode_attention
from foxlm.kernels.portable.decode_attend import DecodeTile, choose_decode_tile

pytestmark = ON_KERNELS

BLOCK = 64
HEAD_DIMS = [16, 40, 64, 80, 128, 256]
# Heads of queries, of keys and values, and of gates.
HEADS = [(2, 2, 2), (2, 2, 1), (4, 2, 4), (4, 2, 2), (6, 2, 1)]
TOKENS = 150 if INTERPRETED else 700
# How many times torch's error is allowed, as in rounding_errors.py.
ALLOWED = {torch.float16: 3.0, torch.bfloat16: 3.0, torch.float32: 4.5}


class Cache(NamedTuple):
    """What attention reads: ``q``, ``k``, ``v``, their decay and which tokens are real."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Decay
    real: Tensor | None = None

    def to(self, device: str) -> "Cache":
        query, key, first, last = self.decay
        decay = Decay(query.to(device), key.to(device), first.to(device), last.to(device))
        real = None if self.real is None else self.real.to(device)
        return Cache(self.q.to(device), self.k.to(device), self.v.to(device), decay, real)


def cache_of(inputs: list[Tensor], mask: Tensor | None = None) -> Cache:
    """Of ``[q, k, v, log_f]``; the queries are the last tokens."""
    q, k, v, log_f = (x.detach() for x in inputs)
    keys, queries = k.shape[1], q.shape[1]
    real = None if mask is None else mask.bool()
    c, first = accumulate(log_f if real is None else log_f.masked_fill(~real[..., None], 0.0))
    decay = Decay(c[..., -queries:], c, first[..., -queries:], torch.arange(keys - queries, keys))
    return Cache(q, k, v, decay if real is None else hide_padding(decay, real), real)


def fast(cache_inputs: list[Tensor], rate: float) -> list[Tensor]:
    """The same with gates of about ``exp(-rate)``, every head faster than the one before."""
    q, k, v, log_f = (x.detach() for x in cache_inputs)
    heads = 1.0 + torch.arange(log_f.shape[-1], dtype=log_f.dtype)
    return [q, k, v, -rate * heads * (0.5 + torch.rand_like(log_f))]


def longer(cache: Cache, capacity: int) -> Cache:
    """The same in a cache that has room for more, with NaN in it."""
    more = capacity - cache.k.shape[1]
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, more), value=math.nan) for x in (cache.k, cache.v))
    key = torch.nn.functional.pad(cache.decay.key, (0, more), value=math.nan)
    real = None if cache.real is None else torch.nn.functional.pad(cache.real, (0, more), value=True)
    return Cache(cache.q, k, v, cache.decay._replace(key=key), real)


def paged(cache: Cache) -> tuple[Cache, Tensor]:
    """The same in pools of pages, in random order and with pages of NaN between; and the page of each block."""
    batch, keys, kv_heads, _ = cache.k.shape
    gates = cache.decay.key.shape[1]
    blocks = -(-keys // BLOCK)
    whole = longer(cache, blocks * BLOCK)
    count = batch * kv_heads * blocks
    order = torch.randperm(2 * count)[:count]
    rows = max(1, gates // kv_heads)

    def pool(x: Tensor) -> Tensor:
        """``[B, G, N, ...]`` to pages."""
        pages = torch.full((2 * count, *x.shape[3:]), math.nan, dtype=x.dtype)
        pages[order] = x.flatten(0, 2)
        return pages

    k, v = (pool(x.unflatten(1, (blocks, BLOCK)).permute(0, 3, 1, 2, 4)) for x in (whole.k, whole.v))
    key = whole.decay.key.expand(-1, max(gates, kv_heads), -1)
    key = pool(key.unflatten(1, (kv_heads, rows)).unflatten(-1, (blocks, BLOCK)).transpose(2, 3))
    pages = order.reshape(batch, kv_heads, blocks).int()
    return Cache(cache.q, k, v, cache.decay._replace(key=key), whole.real), pages


def summary_of(cache: Cache, blocks: int = 0) -> KeySummary:
    """Of a dense cache, with NaN in entries that must not be read and up to at least ``blocks`` of them."""
    own_block = int(cache.decay.last[-1]) // BLOCK
    key = cache.decay.key
    hidden = torch.isposinf(key).all(1)[..., None]
    norms = cache.k.double().norm(dim=-1).masked_fill(hidden, 0.0).cummax(1).values.transpose(1, 2)
    ends = torch.arange(1, own_block + 1) * BLOCK - 1
    entries = (key.cummin(-1).values, torch.logcumsumexp(-key, dim=-1), norms.float())
    size = max(blocks, own_block + 1)
    padded = (torch.nn.functional.pad(x[..., ends], (0, size - own_block), value=math.nan) for x in entries)
    return KeySummary(*(x.to(DEVICE) for x in padded))


def exact(cache: Cache) -> tuple[Tensor, Tensor]:
    """By the reference in float64, with zeros in padding."""
    q, k, v = (x.double() for x in cache[:3])
    if cache.real is not None:
        hidden = ~cache.real[..., None, None]
        q, k, v = q.nan_to_num(), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    return reference_attention(q, k, v, cache.decay, scale=scale_of(q))


def scale_of(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def decoded(cache: Cache, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, decay, real = cache.to(DEVICE)
    out, lse = decode_attention(q, k, v, decay, scale=scale_of(q), real=real, **options)
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, q.dtype, torch.float32)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    return out.cpu(), lse.cpu()


def both(cache: Cache, **options: Any) -> tuple[Tensor, Tensor]:
    """Of a dense cache with room for more, after it was seen to be what a paged one gives."""
    out, lse = decoded(longer(cache, cache.k.shape[1] + 100), **options)
    in_pages, pages = paged(cache)
    paged_out, paged_lse = decoded(in_pages, pages=pages.to(DEVICE), **options)
    # The shares of programs differ, and with them the order of sums.
    tolerance = 1e-5 if out.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(paged_out, out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(paged_lse, lse, rtol=1e-5, atol=1e-5)
    return out, lse


def assert_exact(inputs: list[Tensor], mask: Tensor | None = None) -> None:
    """Errors are at most so many times those of torch in the same type."""
    cache = cache_of(inputs, mask)
    found, expected = both(cache), exact(cache)
    q, k, v, log_f = (x.detach() for x in inputs)
    if mask is not None:
        q, k, v = (x.nan_to_num() for x in (q, k, v))
    theirs = eager_attention(q, k, v, log_f, attention_mask=mask)
    seen = ~torch.isneginf(expected[1])
    assert torch.equal(torch.isneginf(found[1]), ~seen)
    assert (found[0].transpose(1, 2)[~seen] == 0.0).all()
    for name, x, y, z in zip(("out", "lse"), found, theirs, expected, strict=True):
        error, allowed = ((a.double() - z).masked_fill(a == z, 0.0).abs().max().item() for a in (x, y))
        # Torch happens to be exact in a few elements, but not by more than the type's rounding of the result.
        rounding = torch.finfo(x.dtype).eps * z.masked_fill(torch.isinf(z), 0.0).abs().max().item()
        assert error <= ALLOWED[q.dtype] * max(allowed, rounding), name


def draw(heads: tuple[int, int, int] = (4, 2, 4), queries: int = 1, **options: Any) -> list[Tensor]:
    options = {"batch": 2, "head_dim": 16, "dtype": SOME_DTYPES[0], "keys": TOKENS, **options}
    return [x.detach() for x in draw_inputs(queries=queries, heads=heads, **options)]


# ---- Without pruning


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_size_and_type(head_dim, dtype, heads):
    assert_exact(draw(heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_grouped_heads_and_gates(dtype, queries, heads):
    assert_exact(fast(draw(heads, queries, dtype=dtype), 0.01))
    # With hard resets.
    assert_exact(draw(heads, queries, dtype=dtype))


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", ["left", "right", "holes", "empty"])
def test_padding(kind, queries, heads):
    inputs = fast(draw(heads, queries), 0.01)
    mask = padding_mask(kind, 2, TOKENS)
    for x in inputs[1:3]:
        x[mask == 0] = math.nan
    assert_exact(inputs, mask)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128])
def test_short_caches(tokens):
    assert_exact(draw(queries=min(2, tokens), keys=tokens))


def test_large_sums_stay_exact():
    """Where the running sum is -1e7, float32 knows it to within 1."""
    inputs = fast(draw(), 0.01)
    inputs[3][:, 0] = -0.9e4
    cache = cache_of(inputs)
    moved = cache.decay._replace(query=cache.decay.query - 1e7, key=cache.decay.key - 1e7)
    torch.testing.assert_close(decoded(cache._replace(decay=moved)), decoded(cache), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 4)], ids=str)
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 40])
def test_shares_of_any_size(programs, heads, monkeypatch):
    """One program for many heads, and many for one; more heads than are counted at a time."""
    monkeypatch.setattr(decode_attend, "_INTERPRETED_PROGRAMS", programs)
    monkeypatch.setattr(decode_attend, "multiprocessors_of", lambda x: 1 if x.is_cuda else None)
    tile = choose_decode_tile(heads[0] // heads[1], 16, torch.float32)
    monkeypatch.setattr(decode, "choose_decode_tile", lambda *_: tile._replace(programs=programs))
    monkeypatch.setattr(decode_attend, "_SCAN", 2)
    assert_exact(fast(draw(heads, batch=3), 0.01))


@pytest.mark.parametrize("tile", [DecodeTile(True, 64, 4, 2, 2, None), DecodeTile(False, 32, 2, 1, 2, 128)], ids=str)
def test_other_tiles(tile, monkeypatch):
    monkeypatch.setattr(decode, "choose_decode_tile", lambda *_: tile)
    assert_exact(draw((2, 2, 2)))


def test_same_bits_each_time():
    cache = longer(cache_of(fast(draw(), 0.01)), 2 * TOKENS)
    first, second = decoded(cache), decoded(cache)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ---- Pruning


def kept_blocks(cache: Cache, eps: float, rule: str, bound: float) -> Tensor:
    """First block ``[B, G]`` that is read, by the rule's definition in float64."""
    q, k, _, decay, _ = cache
    heads, kv_heads = q.shape[2], k.shape[2]
    k = k.double().nan_to_num().repeat_interleave(heads // kv_heads, dim=2)
    c_q, c_k, first = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in decay[:3])
    norm = q.double().norm(dim=-1).transpose(1, 2) * scale_of(q)
    own = torch.einsum("bihd,bihd->bhi", q.double(), k[:, decay.last]) * scale_of(q)
    kept = first // BLOCK
    for n in range(1, int(decay.last[-1]) // BLOCK + 1):
        before = c_k[..., : n * BLOCK]
        if rule != "paper":
            largest = k[:, : n * BLOCK].norm(dim=-1).masked_fill(torch.isinf(before.transpose(1, 2)), 0.0).amax(1)
            weight = norm * largest[..., None] + c_q + (-before).logsumexp(-1, keepdim=True) - own
            droppable = weight <= math.log(eps)
        else:
            droppable = c_q - before.amin(-1, keepdim=True) < math.log(eps) - (decay.last + 1).log() - 2.0 * bound
        kept = torch.where(droppable & (n <= decay.last // BLOCK), kept.clamp(min=n), kept)
    kept = kept.masked_fill(first > decay.last, torch.iinfo(torch.int64).max)
    return kept.unflatten(1, (kv_heads, -1)).amin((2, 3))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("rule", "bound"), [("tight", 0.0), ("measured", 0.0), ("paper", 1.5)])
def test_expected_blocks_are_read(rule, bound, queries, heads, monkeypatch):
    # So that the search takes several steps.
    monkeypatch.setattr(decode_search, "_CANDIDATES", 1)
    monkeypatch.setattr(decode_search, "_search_steps", lambda *_: 3)
    eps, tokens = 1e-3, 10 * BLOCK + 5
    inputs = fast(draw(heads, queries, keys=tokens), 0.03)
    inputs[0] /= 4.0
    cache = cache_of(inputs)
    options: dict[str, Any] = {"eps": eps, "rule": rule, "summary": summary_of(cache, 40)}
    if rule == "paper":
        options["logit_bound"] = bound if queries == 1 else torch.full((heads[0],), bound, device=DEVICE)
    kept = kept_blocks(cache, eps, rule, bound)
    assert (kept > 0).any()
    read = torch.arange(tokens)[None, :, None] // BLOCK >= kept[:, None, :]
    unread = cache._replace(v=cache.v.masked_fill(~read[..., None], math.nan))
    out, lse = both(unread, **options)
    assert out.isfinite().all()
    first = cache.decay.kv_start.repeat_interleave(heads[0] // heads[2], 1)
    first = torch.maximum(first, BLOCK * kept.repeat_interleave(heads[0] // heads[1], 1)[..., None])
    _, expected = exact(cache._replace(decay=cache.decay._replace(kv_start=first)))
    torch.testing.assert_close(lse, expected.float(), rtol=1e-3, atol=1e-3)
    # Not one block less is read.
    position = BLOCK * kept
    v = cache.v.clone()
    for b in range(2):
        for g in range(heads[1]):
            v[b, position[b, g], g] = math.nan
    assert decoded(cache._replace(v=v), **options)[0].isnan().unflatten(2, (heads[1], -1)).any(3).any(1).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rate", "kind"), [(0.0, None), (0.02, "holes"), (0.3, "left"), (0.3, None), (None, None)])
def test_no_row_loses_more_than_eps(rate, kind, seed):
    eps, tokens, heads = 1e-2, 6 * BLOCK + 10, [(2, 2, 2), (4, 2, 4), (4, 2, 2), (4, 2, 1)][seed]
    inputs = draw(heads, 1 + seed % 2, keys=tokens, seed=seed, dtype=torch.float32)
    inputs[3] = draw_gates(*inputs[3].shape, dtype=torch.float32) if rate is None else fast(inputs, rate)[3]
    mask = None if kind is None else padding_mask(kind, 2, tokens)
    cache = cache_of(inputs, mask)
    out, expected = exact(cache)
    bound = cache.q.norm(dim=-1).amax((0, 1, 2)) * cache.k.norm(dim=-1).amax() * scale_of(cache.q)
    for options in ({"rule": "tight"}, {"rule": "paper", "logit_bound": bound.expand(2, heads[0]).to(DEVICE)}):
        found, lse = both(cache, eps=eps, summary=summary_of(cache), **options)
        lost = 1.0 - (lse.double() - expected).masked_fill(torch.isneginf(expected), 0.0).exp()
        assert lost.max() <= eps + 1e-5
        assert (found - out).abs().max() <= 2.0 * eps * cache.v.abs().max() + 1e-5


@pytest.mark.smoke
def test_freed_pages():
    """Missing pages before the kept range are as good as dropped; one within it is seen in the result."""
    heads, eps = (2, 2, 2), 1e-3
    cache = cache_of(fast(draw(heads, keys=6 * BLOCK + 10), 0.1))
    in_pages, pages = paged(cache)
    options: dict[str, Any] = {"eps": eps, "summary": summary_of(cache)}
    kept = kept_blocks(cache, eps, "tight", 0.0)
    assert (kept > 0).all()
    block = torch.arange(pages.shape[-1])
    freed = pages.masked_fill(block < kept[..., None], -1).to(DEVICE)
    out, lse = decoded(in_pages, pages=freed, **options)
    whole, whole_lse = decoded(in_pages, pages=pages.to(DEVICE), **options)
    assert torch.equal(out, whole) and torch.equal(lse, whole_lse)
    # Without pruning, they are known by where what is held starts.
    start = kept.int().to(DEVICE)
    torch.testing.assert_close(decoded(in_pages, pages=freed, start=start), (out, lse), rtol=1e-3, atol=1e-3)
    out, lse = decoded(in_pages, pages=freed)
    assert out.isnan().all() and lse.isnan().all()
    freed[1, 0, kept[1, 0]] = -1
    out, lse = decoded(in_pages, pages=freed, **options)
    assert out[1, 0, 0].isnan().all() and lse[1, 0].isnan().all()
    assert out[0].isfinite().all() and out[1, 0, 1].isfinite().all()


def test_rows_that_see_nothing_need_no_page():
    cache = cache_of(draw((4, 2, 4), 2))
    first = cache.decay.kv_start.clone()
    first[0] = cache.decay.last + 1
    in_pages, pages = paged(cache._replace(decay=cache.decay._replace(kv_start=first)))
    pages[0] = -1
    out, lse = decoded(in_pages, pages=pages.to(DEVICE))
    assert (out[0] == 0.0).all() and torch.isneginf(lse[0]).all()
    assert out[1].isfinite().all()


# ---- As an operator


def test_what_it_takes():
    def q(queries: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(1, queries, heads, head_dim, dtype=dtype, device=DEVICE)

    def can_decode(q: Tensor) -> bool:
        return backend_of(q).can_decode(q, 2)

    assert can_decode(q(1, 2, 64)) and can_decode(q(16, 8, 256, torch.float32))
    for taken in (q(17, 2, 64), q(16, 10, 64), q(1, 2, 257), q(1, 2, 64, torch.float64)):
        assert not can_decode(taken)


def test_errors():
    cache = cache_of(draw())
    with pytest.raises(ValueError, match="logit_bound must be given"):
        decoded(cache, eps=0.1, rule="paper", summary=summary_of(cache))
    with pytest.raises(ValueError, match="eps must be a number in"):
        decoded(cache, eps=2.0)


def test_no_gradient():
    q, k, v, decay, _ = cache_of(draw()).to(DEVICE)
    out, _ = decode_attention(q.requires_grad_(), k, v, decay, scale=1.0)
    with pytest.raises(RuntimeError, match=r"decode_attention.*no autograd formula"):
        out.sum().backward()


def test_operator():
    cache = cache_of(draw())
    q, k, v, (query, key, first, last, *_), _ = cache.to(DEVICE)
    inputs = (q, k, v, query, key, first, last, None, None, None, *summary_of(cache))
    arguments = (*inputs, None, torch.zeros_like(k[0, 0]), 0.0, 0.25, -3.0, "tight")
    torch.library.opcheck(decode._decode, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")
def test_compiled_to_a_graph_while_the_sequence_grows():
    """A captured graph sees more keys, and finds other ranges, with the launches that it has."""
    cache = cache_of(fast(draw((4, 2, 4), keys=TOKENS), 0.02))
    q, k, v, decay, _ = longer(cache, TOKENS).to(DEVICE)
    summary = summary_of(cache)

    def step(position: Tensor) -> tuple[Tensor, Tensor]:
        now = Decay(decay.key.index_select(2, position), decay.key, torch.zeros_like(decay.kv_start), position)
        return decode_attention(q, k, v, now, scale=0.25, summary=summary, eps=1e-3)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for index in (70, 80, 200, 500, TOKENS - 1, 10):
        position = torch.tensor([index], device=DEVICE)
        found = [x.clone() for x in compiled(position)]
        for x, y in zip(found, step(position), strict=True):
            assert torch.equal(x, y)
