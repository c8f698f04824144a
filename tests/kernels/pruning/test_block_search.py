"""Pruning with ``eps``: no row loses more than that share of its weight, and every block the rule allows is skipped.

In PyTorch on the CPU, by kernels on a GPU, and by kernels on the CPU in Triton's interpreter (`make test-slow`).
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_inputs import attention, draw_inputs, forgetting_attention, output_and_gradients, padding_mask
from foxlm.kernels.backends import HAS_TRITON, backend_of
from foxlm.kernels.decay import Decay, accumulate, hide_padding, sequence_starts
from foxlm.kernels.pruning.prune import first_kept, prune
from foxlm.kernels.pruning.rules import Rule, centered, key_center
from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES
from kernel_device import DEVICES, INTERPRETED
from one_rank import Alone

RULES: list[Rule] = ["paper", "tight", "measured"]
KINDS = ["random", "far keys fit", "own key does not fit", "outlier", "one gate forgets", "long past", "common part"]


@pytest.fixture(params=DEVICES, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(
    kind: str, keys: int, queries: int, heads: tuple[int, int, int], rate: float, size: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, log_f`` with gates of about ``exp(-rate)`` and logits of about ``size``; ``kind`` makes the rules' worst.

    A rule must stand far keys that fit the query when near ones do not, one key that is much larger than all others,
    forgetting that happens all at once, and running sums whose past is much larger than what is asked of them.
    """
    generator = torch.Generator().manual_seed(seed)
    h, g, hf = heads
    q = torch.randn(2, queries, h, 16, generator=generator)
    k = torch.randn(2, keys, g, 16, generator=generator)
    log_f = -2.0 * rate * torch.rand(2, keys, hf, generator=generator)
    near = (torch.arange(keys) >= keys // 2)[:, None, None]
    if kind == "far keys fit":
        q, k = torch.ones_like(q), torch.where(near, -torch.ones_like(k), 1.0)
    elif kind == "own key does not fit":
        q, k = torch.ones_like(q), torch.ones_like(k)
        k[:, -1] = -1.0
    elif kind == "outlier":
        k[:, seed % keys] *= 30.0
    elif kind == "one gate forgets":
        log_f = torch.zeros_like(log_f)
        log_f[:, keys // 2] = -20.0 * rate - 10.0
    elif kind == "long past":
        log_f[:, : keys // 4] -= 5000.0
    elif kind == "common part":
        k = k + 10.0 * torch.randn(2, 1, g, 16, generator=generator)
    return q * (size / 4.0), k, log_f


def decay_of(log_f: Tensor, queries: int, mask: Tensor | None = None, offsets: Tensor | None = None) -> Decay:
    keys = log_f.shape[1]
    starts = None if offsets is None else sequence_starts(offsets.to(log_f.device), keys)
    real = None if mask is None else mask.to(log_f.device).bool()
    c, first = accumulate(log_f if real is None else log_f.masked_fill(~real[..., None], 0.0), starts=starts)
    last = torch.arange(keys - queries, keys, device=log_f.device)
    decay = Decay(c[..., keys - queries :], c, first[..., keys - queries :], last)
    return decay if real is None else hide_padding(decay, real)


def exact_weights(q: Tensor, k: Tensor, decay: Decay, scale: float, sink: Tensor | None = None) -> Tensor:
    """``[B, H, Tq, Tk]`` float64 beside a sink ``[G, D]``; zero in rows that see nothing."""
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2)
    bias = decay.bias()
    bias = bias.repeat_interleave(q.shape[2] // bias.shape[1], dim=1)
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale + bias
    if sink is None:
        return logits.softmax(-1).nan_to_num()
    of_sink = torch.einsum("bihd,hd->bhi", q.double(), sink.double().repeat_interleave(groups, dim=0)) * scale
    return torch.cat([of_sink[..., None], logits], -1).softmax(-1)[..., 1:]


def pruned_first(q: Tensor, k: Tensor, decay: Decay, device: str, **options: Any) -> Tensor:
    """First keys ``[B, H, Tq]`` by what runs on ``device``, on the CPU."""
    options["sink"] = None if options.get("sink") is None else options["sink"].to(device)
    moved = Decay(*(x.to(device) for x in decay))
    q, k = q.to(device), k.to(device)
    return prune(moved, q, k, **options, search=backend_of(q).search_kv_start).kv_start.cpu()


@settings(max_examples=8 if INTERPRETED else 60)
@given(
    kind=st.sampled_from(KINDS),
    keys=st.integers(PRUNED_KEYS + 1, 400),
    fewer=st.sampled_from([0, 0, 1, 64, 200, 400]),
    heads=st.sampled_from([(2, 2, 2), (4, 2, 4), (4, 2, 2), (4, 2, 1)]),
    rate=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    scale=st.sampled_from([1.0, -1.0, 0.0]),
    eps=st.sampled_from([1e-6, math.exp(-10), 1e-2, 0.5]),
    hidden=st.sampled_from(["nothing", "left", "right", "holes", "empty", "packed"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    centers=st.booleans(),
    sink_size=st.sampled_from([None, 0.0, 1.0, 10.0]),
    seed=st.integers(0, 2**20),
)
def test_no_row_loses_more_than_eps(
    device, kind, keys, fewer, heads, rate, size, scale, eps, hidden, dtype, centers, sink_size, seed
):
    queries = max(1, keys - fewer)
    q, k, log_f = draw(kind, keys, queries, heads, rate, size, seed)
    q, k = q.to(dtype), k.to(dtype)
    mask = offsets = None
    if hidden == "packed":
        q, k, log_f = q[:1], k[:1], log_f[:1]
        offsets = torch.tensor([0, keys // 5, keys // 5, keys // 2, keys])
    elif hidden != "nothing":
        mask = padding_mask(hidden, 2, keys)
    decay = decay_of(log_f, queries, mask, offsets)
    sink = None if sink_size is None else sink_size * q[0, -1, : heads[1]]
    weights = exact_weights(q, k, decay, scale, sink)
    visible = decay.kv_start.repeat_interleave(heads[0] // heads[2], dim=1)
    bounded = k
    if centers:
        bounded, sink = centered(k), None if sink is None else sink - key_center(k)[:, 0]
    found = {}
    for rule in RULES:
        first = found[rule] = pruned_first(q, bounded, decay, device, eps=eps, rule=rule, scale=scale, sink=sink)
        dropped = torch.arange(keys) < first[..., None]
        assert (weights * dropped).sum(-1).max() <= eps, rule
        assert (first >= visible).all(), rule
        assert torch.equal(first <= decay.last, visible <= decay.last), rule
    # The norms that bound the logits here are those of all keys and queries.
    assert (found["tight"] >= found["paper"]).all()
    assert (found["measured"] >= found["tight"]).all()


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("queries", [400, 130])
@pytest.mark.parametrize("has_sink", [False, True])
def test_blocks_are_dropped_as_defined(device, rule, heads, queries, has_sink):
    q, k, log_f = draw("random", 400, queries, heads, 0.2, 1.0, seed=0)
    log_f[:, 300, 0] = -torch.inf
    q[..., 0] = 1.0
    options: dict[str, Any] = {"eps": 1e-4, "rule": rule, "scale": 0.25}
    without = pruned_first(q, k, decay_of(log_f, queries), device, **options)
    if has_sink:
        # Of all rows most of the weight, which lets `tight` and `measured` drop more.
        options["sink"] = torch.zeros(heads[1], 16)
        options["sink"][:, 0] = 40.0
    first = pruned_first(q, k, decay_of(log_f, queries), device, **options)
    more = (first > without).any()
    assert more == (has_sink and rule != "paper")
    defined = first_kept(q, k, log_f, **options, block_q=PRUNED_QUERIES, block_k=PRUNED_KEYS)
    defined = defined.repeat_interleave(PRUNED_QUERIES, dim=-1)[..., :queries]
    visible = decay_of(log_f, queries).kv_start
    visible = visible.repeat_interleave(heads[0] // heads[2], dim=1)
    assert torch.equal(first, torch.maximum(defined, visible))
    assert (first > visible).any()


@pytest.mark.smoke
@pytest.mark.parametrize("rule", RULES)
def test_constant_gates_drop_the_expected_blocks(device, rule):
    """With zero queries every bound is an equality in closed form."""
    keys, rate, eps = 1000, 0.05, 1e-4
    zeros, log_f = torch.zeros(1, keys, 1, 16), torch.full((1, keys, 1), -rate)
    first = pruned_first(zeros, zeros, decay_of(log_f, keys), device, eps=eps, rule=rule, scale=1.0)[0, 0]
    row = torch.arange(0, keys, PRUNED_QUERIES)
    if rule == "paper":
        kept = (row - math.floor((math.log(keys) - math.log(eps)) / rate)).clamp(min=0)
    else:
        weights = torch.exp(-rate * (row[:, None] - torch.arange(keys)).double())
        weights[torch.arange(keys) > row[:, None]] = 0.0
        kept = (weights.cumsum(-1) <= eps).sum(-1)
        if rule == "measured":
            # Of the nearest keys together, where the bound takes the own one.
            near = row - 64 - (row - kept // PRUNED_KEYS * PRUNED_KEYS) // 8
            is_near = torch.arange(keys) >= (near // PRUNED_KEYS * PRUNED_KEYS)[:, None]
            total = (weights * is_near).sum(-1, keepdim=True)
            assert (kept < (weights.cumsum(-1) <= eps * total).sum(-1))[2:].all()
            kept = (weights.cumsum(-1) <= eps * total).sum(-1)
    expected = (kept // PRUNED_KEYS * PRUNED_KEYS).repeat_interleave(PRUNED_QUERIES)[:keys]
    assert torch.equal(first, expected)
    assert first.max() >= 512


# What is measured does not suffer from it.
@pytest.mark.parametrize("rule", ["paper", "tight"])
def test_what_all_keys_have_in_common_does_not_keep_them_once_centered(device, rule):
    q, k, log_f = draw("common part", 1000, 1000, (2, 2, 2), 0.2, 1.0, seed=0)
    decay = decay_of(log_f, 1000)
    as_they_are, better, without = (
        pruned_first(q, keys, decay, device, eps=1e-4, rule=rule, scale=1.0).sum()
        for keys in (k, centered(k), k - k.mean(1, keepdim=True))
    )
    assert as_they_are < 0.8 * better
    assert better > 0.9 * without


@pytest.mark.parametrize("rule", ["paper", "tight"])
def test_a_shard_is_pruned_as_a_whole_with_any_strides(device, rule):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 384, heads, 16, generator=generator) for heads in (4, 2))
    # What reads along another dimension takes some queries for short ones.
    q[..., 8:] *= 6.0
    log_f = -1.2 * torch.rand(1, 384, 2, generator=generator)
    q, k, log_f = (x.to(device) for x in (q, k, log_f))
    c, first = accumulate(log_f)
    decay = Decay(c, c, first, torch.arange(384, device=device))
    options: Any = {"eps": 1e-4, "rule": rule, "scale": 0.25}
    backend = backend_of(q)
    expected = prune(decay, q, k, **options, search=backend.search_kv_start).kv_start
    assert expected.any()
    for x, y in ((q, k), (q.mT.contiguous().mT, k.mT.contiguous().mT)):
        found = Alone(384).prune(decay, x, y, **options, logit_bound=None, backend=backend)
        assert torch.equal(found.kv_start, expected)


def test_shards_refuse_to_measure(device):
    q, k, log_f = draw("random", 128, 128, (2, 2, 2), 0.1, 1.0, seed=0)
    with pytest.raises(ValueError, match="rule must be 'tight' or 'paper' with context parallelism, got 'measured'"):
        Alone(128).prune(
            decay_of(log_f, 128), q, k, eps=1e-4, rule="measured", scale=0.25, logit_bound=None, backend=backend_of(q)
        )


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_dropped_without_forgetting(device, rule):
    q, k, log_f = draw("random", 300, 300, (2, 2, 2), 0.0, 1.0, seed=0)
    assert pruned_first(q, k, decay_of(log_f, 300), device, eps=1e-2, rule=rule, scale=1.0).max() == 0


@pytest.mark.parametrize("rule", RULES)
def test_padding_does_not_keep_what_others_drop(device, rule):
    """Rows that see nothing share blocks with those that do; hidden keys have no decay and no norm."""
    q, k, log_f = draw("random", 500, 500, (2, 2, 2), 1.0, 1.0, seed=0)
    mask = torch.ones(2, 500, dtype=torch.int64)
    mask[:, 390:400] = mask[:, :10] = mask[:, 480:] = 0
    q, k = (x.masked_fill(mask[..., None, None] == 0, 0.0) for x in (q, k))
    first = pruned_first(q, k, decay_of(log_f, 500, mask), device, eps=1e-4, rule=rule, scale=0.25)
    assert (first[..., 400:480] >= 256).all()
    assert (first[..., 390:400] > torch.arange(390, 400)).all()
    assert (first[..., 480:] > torch.arange(480, 500)).all()


def test_more_blocks_than_a_scan_holds(device, monkeypatch):
    """As a sequence of over 16,384 tokens has them."""
    if HAS_TRITON:
        monkeypatch.setattr("foxlm.kernels.pruning.search._SCAN", 16)
    keys = 64 * 18 + 3
    q, k, log_f = draw("random", keys, 200, (1, 1, 1), 0.1, 1.0, seed=0)
    k[:, :64] *= 3.0
    for rule in RULES:
        first = pruned_first(q, k, decay_of(log_f, 200), device, eps=1e-4, rule=rule, scale=0.25)
        expected = first_kept(q, k, log_f, eps=1e-4, rule=rule, scale=0.25, block_q=PRUNED_QUERIES, block_k=PRUNED_KEYS)
        assert torch.equal(first[..., ::PRUNED_QUERIES], expected)
        assert first.min() > 0


@pytest.mark.parametrize("bound", [3.0, torch.tensor([3.0, 30.0], dtype=torch.float64)], ids=["number", "tensor"])
def test_a_given_bound_is_used(device, bound):
    q, k, log_f = draw("random", 500, 500, (2, 2, 2), 0.2, 0.1, seed=0)
    options: dict[str, Any] = {"eps": 1e-4, "rule": "paper", "scale": 0.25}
    first = pruned_first(q, k, decay_of(log_f, 500), device, logit_bound=bound, **options)
    threshold = -2.0 * torch.as_tensor(bound).expand(2).double() - math.log(500) + math.log(1e-4)
    bias = decay_of(log_f, 500).bias()[:, :, ::PRUNED_QUERIES]
    kept = (bias < threshold[:, None, None]).long().cumprod(-1).sum(-1) // PRUNED_KEYS * PRUNED_KEYS
    assert torch.equal(first[..., ::PRUNED_QUERIES], kept)


# ---- The public function


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
def test_attention_loses_no_more_than_eps(device, layout, rule):
    """The output moves by at most 2 eps times the largest value, and gradients by as little."""
    eps, batch = 1e-4, 1 if layout == "packed" else 2
    inputs = draw_inputs(280, 24, batch=batch, heads=(1, 1, 1), head_dim=16, dtype=torch.float32)
    q, k, v, log_f = (x.detach().to(device) for x in inputs)
    inputs = [x.requires_grad_() for x in (q, k, v, log_f.clamp(min=-0.2) - 0.3)]
    options: dict[str, Any] = {}
    if layout == "padded":
        options["attention_mask"] = padding_mask("holes", 2, 280)
    elif layout == "packed":
        options["cu_seqlens"] = torch.tensor([0, 20, 280])
    whole = output_and_gradients(attention, inputs, **options)
    pruned = output_and_gradients(attention, inputs, eps=eps, rule=rule, **options)
    for name, x in pruned.items():
        size = whole[name].nan_to_num(neginf=0.0).abs().max()
        torch.testing.assert_close(x, whole[name], rtol=0.0, atol=20.0 * eps * size.item(), msg=name)
    assert (whole["out"] - pruned["out"]).abs().max() <= 2.0 * eps * v.abs().max() + 1e-5
    # Negative control: something was left out.
    assert not torch.equal(pruned["dv"], whole["dv"])


@pytest.mark.parametrize("rule", RULES)
def test_dropped_keys_have_no_gradient(device, rule):
    """Forward and backward drop the same: what no query keeps is not even looked at."""
    q, k, v, log_f = (
        x.detach().to(device) for x in draw_inputs(400, 100, batch=1, heads=(1, 1, 1), head_dim=16, dtype=torch.float32)
    )
    log_f = torch.full_like(log_f, -1.0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, first = forgetting_attention(*leaves, log_f, eps=1e-4, rule=rule, return_kv_start=True)
    _, dk, dv = torch.autograd.grad(out.sum(), leaves)
    start = first.amin((0, 1, 2)).item()
    assert start >= 192 and start % PRUNED_KEYS == 0
    for gradient in (dk, dv):
        assert (gradient[:, :start] == 0.0).all()
        assert (gradient[:, start + PRUNED_KEYS :] != 0.0).any()


@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 2, 2), (4, 2, 1)], ids=str)
def test_first_keys_are_returned_per_query_and_head(device, heads):
    inputs = [x.detach().to(device) for x in draw_inputs(70, 50, heads=heads, head_dim=16, dtype=torch.float32)]
    inputs[3].clamp_(min=-1.0)[:, 40] = -torch.inf
    out, lse, first = forgetting_attention(*inputs, return_lse=True, return_kv_start=True)
    assert (first.shape, first.dtype) == ((2, 4, 50), torch.int64)
    assert first[..., :20].max() == 0 and (first[..., 20:] == 40).all()
    assert torch.equal(forgetting_attention(*inputs), out) and lse.shape == first.shape
    mask = padding_mask("left", 2, 70).to(device)
    _, first = forgetting_attention(*inputs, attention_mask=mask, return_kv_start=True)
    seen = mask[:, None, 20:].bool().expand(-1, 4, -1)
    last = torch.arange(20, 70, device=device).expand_as(first)
    assert torch.equal(first <= last, seen)


def test_older_name_of_the_first_keys_works_with_a_warning(device):
    inputs = [x.detach().to(device) for x in draw_inputs(20, heads=(2, 1, 2), head_dim=16, dtype=torch.float32)]
    with pytest.warns(FutureWarning, match="return_kv_start"):
        _, first = forgetting_attention(*inputs, return_first=True)
    assert torch.equal(first, forgetting_attention(*inputs, return_kv_start=True)[1])
    compiled = torch.compile(forgetting_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs, return_first=True)[1], first)
