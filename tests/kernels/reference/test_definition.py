"""The reference equals a second implementation of the paper's equations in float64: output and every gradient."""

from typing import Any

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from attention_inputs import (
    assert_same,
    attention,
    draw_inputs,
    draw_sink,
    forgetting_attention,
    output_and_gradients,
    padding_mask,
    with_sink,
)
from foxlm.kernels import reference
from naive import naive_attention

# Heads of queries, of keys and values, and of gates.
HEADS = [(4, 2, 4), (4, 2, 2), (4, 2, 1), (3, 3, 3), (3, 3, 1), (6, 1, 6), (6, 1, 1), (1, 1, 1)]
# Keys and queries.
LENGTHS = [(1, 1), (2, 2), (2, 1), (63, 63), (64, 64), (65, 65), (64, 7), (65, 1), (130, 130), (130, 70)]
PACKINGS = [
    [0, 70],
    [0, 1, 70],
    [0, 33, 34, 70],
    [0, 0, 20, 20, 20, 65, 70, 70],
    list(range(71)),
]


@pytest.fixture(params=[None, 5], ids=["chunks-default", "chunks-5"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the chunks of queries as they are (up to 64), and with small ones that no length divides."""
    if request.param:
        set_chunks(monkeypatch, request.param)


def set_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Make every chunk hold ``rows`` queries."""
    monkeypatch.setattr(reference, "_MIN_CHUNK", rows)
    monkeypatch.setattr(reference, "_MAX_CHUNK", rows)


def assert_agrees_with_naive(inputs, **options) -> None:
    actual = output_and_gradients(attention, inputs, **options)
    assert_same(actual, output_and_gradients(naive_attention, inputs, **options))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("keys", "queries"), LENGTHS)
def test_agrees_with_naive(keys, queries, heads, chunks):
    seed = LENGTHS.index((keys, queries))
    assert_agrees_with_naive(draw_inputs(keys, queries, heads=heads, seed=seed))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", ["left", "right", "holes", "empty"])
@pytest.mark.parametrize("queries", [1, 20, 67])
def test_agrees_with_naive_on_padding(kind, queries, heads, chunks):
    inputs = draw_inputs(67, queries, batch=3, heads=heads)
    assert_agrees_with_naive(inputs, attention_mask=padding_mask(kind, 3, 67))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("offsets", PACKINGS, ids=["one", "short-first", "three", "empty-ones", "singles"])
@pytest.mark.parametrize("queries", [1, 37, 70])
def test_agrees_with_naive_on_packing(offsets, queries, heads, chunks):
    inputs = draw_inputs(70, queries, batch=1, heads=heads)
    assert_agrees_with_naive(inputs, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("kind", ["left", "right", "holes", "empty"])
def test_agrees_with_naive_on_padding_inside_packing(kind, chunks):
    inputs = draw_inputs(70, 40, batch=1)
    offsets = torch.tensor([0, 20, 20, 45, 70], dtype=torch.int32)
    assert_agrees_with_naive(inputs, attention_mask=padding_mask(kind, 1, 70), cu_seqlens=offsets)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("options", ["plain", "padding", "packing"])
def test_agrees_with_naive_on_a_sink(options, heads):
    batch = 1 if options == "packing" else 3
    given: dict[str, dict[str, Any]] = {
        "plain": {},
        "padding": {"attention_mask": padding_mask("holes", batch, 70)},
        "packing": {"cu_seqlens": torch.tensor([0, 33, 34, 70])},
    }
    inputs = draw_sink(draw_inputs(70, 40, batch=batch, heads=heads))
    actual = output_and_gradients(with_sink(attention), inputs, **given[options])
    assert_same(actual, output_and_gradients(with_sink(naive_attention), inputs, **given[options]))


@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0, -0.5])
def test_agrees_with_naive_at_other_scales(scale, chunks):
    assert_agrees_with_naive(draw_inputs(66), scale=scale)


@pytest.mark.parametrize("gate", [0.0, -1e-6, -1.0, -50.0, -1e4, -1e30, -torch.inf])
def test_agrees_with_naive_when_all_gates_are_equal(gate, chunks):
    q, k, v, log_f = draw_inputs(66)
    assert_agrees_with_naive([q, k, v, torch.full_like(log_f, gate).requires_grad_()])


@pytest.mark.parametrize("gate", [-1e5, -1e10, -1e20, torch.finfo(torch.float32).min])
def test_a_huge_finite_gate_spares_the_gates_after_it(gate, chunks):
    """In a running sum that has passed it, every later gate would be lost to rounding."""
    q, k, v, _ = draw_inputs(66)
    log_f = torch.full((2, 66, 4), -0.3, dtype=torch.float64)
    log_f[:, 3] = gate
    assert_agrees_with_naive([q, k, v, log_f.requires_grad_()])


def test_agrees_with_naive_on_non_contiguous_inputs(chunks):
    """Heads first, as transformers holds them; every other element; and one key broadcast over heads."""
    q, k, v, log_f = draw_inputs(67)
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.stack([k.detach(), torch.zeros_like(k)], -1).flatten(-2)[..., ::2]
    v = v.detach()[:, :, :1].expand(-1, -1, 2, -1)
    log_f = log_f.detach().transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [q, k, v, log_f]
    assert not any(x.is_contiguous() for x in inputs)
    assert_agrees_with_naive([x.requires_grad_() for x in inputs])


def test_takes_non_contiguous_gradients():
    inputs = draw_inputs(67)
    out = forgetting_attention(*inputs)
    weights = torch.randn(2, 4, 8, 67, dtype=torch.float64).permute(0, 3, 1, 2)
    expected = torch.autograd.grad(out, inputs, weights.contiguous(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, weights), expected, rtol=0.0, atol=0.0)


def test_takes_float32_gates_with_float64_queries():
    q, k, v, log_f = draw_inputs(67)
    inputs = [q, k, v, log_f.detach().float().requires_grad_()]
    actual = output_and_gradients(attention, inputs)
    assert actual["dlog_f"].dtype == torch.float32
    expected = output_and_gradients(naive_attention, inputs)
    assert_same({**actual, "dlog_f": expected["dlog_f"]}, expected)
    torch.testing.assert_close(actual["dlog_f"], expected["dlog_f"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_attention_mask_may_have_any_type(dtype):
    inputs, mask = draw_inputs(67), padding_mask("holes", 2, 67)
    expected = forgetting_attention(*inputs, attention_mask=mask)
    assert torch.equal(forgetting_attention(*inputs, attention_mask=mask.to(dtype)), expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "log_f"])
def test_gradient_of_one_input_alone(name):
    inputs = draw_inputs(67)
    index = ["q", "k", "v", "log_f"].index(name)
    expected = torch.autograd.grad(forgetting_attention(*inputs).sum(), inputs)[index]
    alone = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
    forgetting_attention(*alone).sum().backward()
    torch.testing.assert_close(alone[index].grad, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 2, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (7, {}),
        (3, {}),
        (7, {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 0]])}),
        (4, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 0, 1]])}),
        (7, {"cu_seqlens": torch.tensor([0, 2, 2, 6, 7])}),
        (5, {"cu_seqlens": torch.tensor([0, 3, 7]), "scale": 1.5}),
    ],
    ids=["whole", "fewer", "padded", "padded-fewer", "packed", "packed-fewer"],
)
@pytest.mark.parametrize("resets", [False, True])
def test_gradcheck(heads, queries, options, resets, monkeypatch):
    set_chunks(monkeypatch, 3)
    q, k, v, _ = draw_inputs(7, queries, batch=1, heads=heads, head_dim=1)
    # Away from 0, so that the small steps of the check stay gates.
    log_f = -0.01 - torch.rand(1, 7, heads[2], dtype=torch.float64)
    if resets:
        log_f[:, 4, 0] = -torch.inf

    def function(*inputs):
        out, lse = attention(*inputs, **options)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    assert torch.autograd.gradcheck(function, [q, k, v, log_f.requires_grad_()])


def test_gradcheck_of_heads_with_several_elements():
    q, k, v, _ = draw_inputs(4, batch=2, heads=(2, 2, 2), head_dim=3)
    log_f = (-0.01 - torch.rand(2, 4, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(attention, [q, k, v, log_f])


def test_the_comparison_sees_a_wrong_gate():
    """Negative control: one gate off by 1e-8 is found in the output and in the gradients."""
    inputs = draw_inputs(65)
    with torch.no_grad():
        inputs[3].fill_(-0.1)
    expected = output_and_gradients(naive_attention, inputs)
    with torch.no_grad():
        inputs[3][0, 30, 0] -= 1e-8
    actual = output_and_gradients(attention, inputs)
    for name in ("out", "lse", "dq", "dk", "dv", "dlog_f"):
        with pytest.raises(AssertionError, match=name):
            assert_same({name: actual[name]}, {name: expected[name]})


def test_the_gradient_check_sees_a_lost_gradient(monkeypatch):
    """Negative control: without the gradient of the running sums, gradcheck fails."""
    monkeypatch.setattr(reference, "_reduce_heads", lambda x, gates: torch.zeros_like(x.flatten(1, 2)))
    q, k, v, _ = draw_inputs(5, batch=1, heads=(2, 2, 2), head_dim=2)
    log_f = (-0.5 * torch.ones(1, 5, 2, dtype=torch.float64)).requires_grad_()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(forgetting_attention, [q, k, v, log_f])
