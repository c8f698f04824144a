"""The pruning rules by their definition in PyTorch: weight lost, keys skipped, arguments refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from attention_inputs import forgetting_attention
from foxlm.kernels.pruning.prune import first_kept, share_skipped
from foxlm.kernels.pruning.rules import Rule

RULES: list[Rule] = ["paper", "tight", "measured"]


def attention_weights(q, k, log_f, scale):
    """Exact weights ``[B, H, Tq, Tk]`` in float64 by the definition, hard resets included."""
    heads, queries, keys = q.shape[2], q.shape[1], k.shape[1]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    log_f = log_f.repeat_interleave(heads // log_f.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    for i in range(queries):
        row = keys - queries + i
        for j in range(keys):
            scores[:, :, i, j] += log_f[:, j + 1 : row + 1].sum(1) if j <= row else -math.inf
    return scores.softmax(-1)


def lost_weight(weights, first, block_q=1):
    """Largest weight that any row loses when its keys before ``first`` are dropped."""
    rows = first.repeat_interleave(block_q, dim=-1)[..., : weights.shape[-2]]
    dropped = torch.arange(weights.shape[-1]) < rows[..., None]
    return (weights * dropped).sum(-1).max().item()


def random_case(seed, keys, queries, heads, kv_heads, gates, gate_scale, logit_scale):
    torch.manual_seed(seed)
    q = torch.randn(2, queries, heads, 8, dtype=torch.double) * logit_scale
    k = torch.randn(2, keys, kv_heads, 8, dtype=torch.double)
    log_f = -gate_scale * torch.rand(2, keys, gates, dtype=torch.double).square()
    return q, k, log_f


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 40),
    fewer=st.integers(0, 5),
    arrangement=st.sampled_from([(2, 2, 2), (4, 2, 4), (4, 2, 2), (4, 2, 1)]),
    gate_scale=st.sampled_from([0.01, 1.0, 30.0]),
    logit_scale=st.sampled_from([0.1, 1.0, 5.0]),
    eps=st.sampled_from([1e-6, math.exp(-10), 1e-2, 0.5]),
    blocks=st.sampled_from([(1, 1), (4, 2), (3, 8)]),
    reset=st.booleans(),
)
def test_no_row_loses_more_than_eps(seed, keys, fewer, arrangement, gate_scale, logit_scale, eps, blocks, reset):
    heads, kv_heads, gates = arrangement
    queries = max(1, keys - fewer)
    q, k, log_f = random_case(seed, keys, queries, heads, kv_heads, gates, gate_scale, logit_scale)
    if reset:
        log_f[:, keys // 2] = -math.inf
    weights = attention_weights(q, k, log_f, 8**-0.5)
    for rule in RULES:
        first = first_kept(q, k, log_f, eps=eps, rule=rule, block_q=blocks[0], block_k=blocks[1])
        assert lost_weight(weights, first, blocks[0]) <= eps
        last = torch.arange(keys - queries, keys)[:: blocks[0]]
        assert (first >= 0).all() and (first <= last).all()


@pytest.mark.parametrize("rule", RULES)
def test_worst_case_logits_stay_within_eps(rule):
    """The far keys get the largest logit and the near ones the smallest: the case that the bounds are made for."""
    keys, eps = 64, 1e-3
    direction = normalize(torch.ones(8, dtype=torch.double), dim=0)
    q = (2.0 * direction).expand(1, keys, 1, 8).clone()
    signs = torch.where(torch.arange(keys) < keys // 2, 1.0, -1.0).double()
    k = (2.0 * direction * signs[:, None])[None, :, None]
    log_f = torch.full((1, keys, 1), -0.5, dtype=torch.double)
    first = first_kept(q, k, log_f, eps=eps, rule=rule)
    assert lost_weight(attention_weights(q, k, log_f, 8**-0.5), first) <= eps
    assert first.max() > 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), keys=st.integers(1, 60), gate_scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_each_rule_drops_at_least_what_the_one_before_drops(seed, keys, gate_scale):
    q, k, log_f = random_case(seed, keys, keys, 2, 2, 2, gate_scale, 1.0)
    paper, tight, measured = (first_kept(q, k, log_f, eps=1e-4, rule=rule) for rule in RULES)
    assert (tight >= paper).all() and (measured >= tight).all()


@pytest.mark.parametrize("rule", RULES)
def test_constant_gate_drops_the_expected_keys(rule):
    """With zero queries every bound is an equality in closed form."""
    keys, rate, eps = 200, 0.25, 1e-4
    q, k = torch.zeros(1, keys, 1, 4), torch.zeros(1, keys, 1, 4)
    log_f = torch.full((1, keys, 1), -rate)
    first = first_kept(q, k, log_f, eps=eps, rule=rule)[0, 0]
    row = torch.arange(keys)
    if rule == "paper":
        distance = math.floor((math.log(keys) - math.log(eps)) / rate)
        expected = (row - distance).clamp(min=0)
    else:
        # sum_{j < n} exp(-rate (i - j)) <= eps, a geometric series
        dropped = torch.exp(-rate * (row[:, None] - row[None]).double()).tril().cumsum(-1)
        expected = ((dropped <= eps) & (row[None] <= row[:, None])).sum(-1)
    assert torch.equal(first, expected)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_dropped_without_forgetting(rule):
    q, k, _ = random_case(0, 50, 50, 2, 2, 2, 1.0, 1.0)
    assert first_kept(q, k, torch.zeros(2, 50, 2), eps=1e-3, rule=rule).max() == 0


def test_share_counts_tiles():
    first = torch.tensor([[[0, 0, 4, 8]]])
    # Tiles of 4 x 4 over 16 tokens: 1 + 2 + 3 + 4 causal, of which 0 + 0 + 1 + 2 are skipped.
    assert share_skipped(first, 16, 4, 4).item() == pytest.approx(3 / 10)
    # The last 6 of 16 tokens in blocks of 4 and 2 rows: they see 14 and 16 keys, 4 tiles each.
    assert share_skipped(torch.tensor([[[4, 8]]]), 16, 4, 4, queries=6).item() == pytest.approx(3 / 8)


def test_bound_from_norm_weights_is_used():
    q, k, log_f = random_case(0, 50, 50, 2, 2, 2, 5.0, 1.0)
    loose = first_kept(q, k, log_f, eps=1e-3, rule="paper", logit_bound=torch.tensor([50.0, 500.0]))
    found = first_kept(q, k, log_f, eps=1e-3, rule="paper")
    assert (loose <= found).all() and (loose < found).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 0.0), ("eps", 1.0), ("eps", math.nan), ("rule", "loose"), ("scale", math.nan), ("scale", math.inf)],
)
def test_bad_input_is_named(name, value):
    q, k, log_f = random_case(0, 4, 4, 2, 2, 2, 1.0, 1.0)
    with pytest.raises(ValueError, match=name):
        first_kept(q, k, log_f, **({"eps": 0.1, "rule": "paper"} | {name: value}))


@pytest.mark.parametrize(
    "value",
    [
        *(math.nan, -1.0, math.inf, torch.tensor([1.0, math.nan]), torch.tensor([1.0, -1.0]), torch.tensor([math.inf])),
        *("3", [3.0, 3.0], torch.ones(3), torch.ones(2, 1, 2), torch.ones(2, dtype=torch.int64)),
    ],
    ids=str,
)
def test_bad_logit_bounds_are_named(value):
    q, k, log_f = random_case(0, 70, 70, 2, 2, 2, 1.0, 1.0)
    with pytest.raises(ValueError, match="logit_bound must be"):
        first_kept(q, k, log_f, eps=0.1, rule="paper", logit_bound=value)
    with pytest.raises(ValueError, match="logit_bound must be"):
        forgetting_attention(q, k, k, log_f, eps=0.1, rule="paper", logit_bound=value)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 2), (2, 1)], ids=str)
def test_logit_bounds_of_every_shape_are_taken(shape):
    q, k, log_f = random_case(0, 50, 50, 2, 2, 2, 5.0, 1.0)
    expected = first_kept(q, k, log_f, eps=1e-3, rule="paper", logit_bound=20)
    assert torch.equal(first_kept(q, k, log_f, eps=1e-3, rule="paper", logit_bound=torch.full(shape, 20.0)), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(1, 4, 2)),
        ("q", [[0.0]]),
        ("k", torch.zeros(1, 4, 2, 3)),
        ("k", torch.zeros(1, 4, 2, 8, dtype=torch.float16)),
        ("log_f", torch.zeros(1, 4, 3)),
        ("log_f", torch.zeros(1, 5, 2)),
        ("log_f", torch.zeros(1, 4, 2, dtype=torch.float16)),
        ("log_f", torch.full((1, 4, 2), 0.1)),
        ("log_f", torch.full((1, 4, 2), math.nan)),
        ("block_q", 0),
        ("block_q", 1.0),
        ("block_k", -1),
        ("block_k", True),
        ("sink", torch.zeros(8)),
        ("sink", 1.0),
    ],
    ids=str,
)
def test_bad_tensors_and_blocks_are_named(name, value):
    q, k, log_f = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2)
    given = {"q": q, "k": k, "log_f": log_f, "eps": 0.1, "rule": "tight"} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name} must (be|have|not)"):
        first_kept(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first", [0, 4]),
        ("first", torch.zeros(1, 1, 3, dtype=torch.int64)),
        ("first", torch.zeros(1, 1, 2)),
        ("first", torch.tensor([[[-4, 0]]])),
        ("first", torch.tensor([[[0, 9]]])),
        ("length", -5),
        ("length", 8.0),
        ("block_q", 0),
        ("block_k", -1),
        ("queries", 9),
        ("queries", 0),
    ],
    ids=str,
)
def test_bad_arguments_of_the_share_are_named(name, value):
    given = {"first": torch.tensor([[[0, 4]]]), "length": 8, "block_q": 4, "block_k": 4} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name} must be|^first must hold|^{name} must hold"):
        share_skipped(**given)
