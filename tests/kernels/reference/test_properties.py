"""Properties that follow from the definition of forgetting attention, for random inputs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_inputs import (
    assert_same,
    attention,
    draw_cotangents,
    draw_inputs,
    forgetting_attention,
    output_and_gradients,
    padding_mask,
)
from foxlm.kernels import reference
from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.reference import reference_attention

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.integers(1, 40)
HEADS = st.sampled_from([(4, 2, 4), (4, 2, 2), (4, 2, 1), (3, 1, 3), (2, 2, 2)])


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks of queries at these lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_MIN_CHUNK", 7)
        patch.setattr(reference, "_MAX_CHUNK", 7)
        yield


def part(inputs: list[torch.Tensor], tokens: slice) -> list[torch.Tensor]:
    """Those tokens alone, as new leaves."""
    return [x.detach()[:, tokens].requires_grad_() for x in inputs]


def split(results: dict[str, torch.Tensor], tokens: slice | torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``results`` say of those tokens."""
    return {name: x[..., tokens] if name == "lse" else x[:, tokens] for name, x in results.items()}


@given(length=LENGTHS, heads=HEADS, seed=SEEDS)
def test_gate_one_is_softmax_attention(length, heads, seed):
    q, k, v, log_f = draw_inputs(length, heads=heads, seed=seed)
    out = forgetting_attention(q, k, v, torch.zeros_like(log_f))
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    cotangent, _ = draw_cotangents(q)
    actual, expected = ([x, *torch.autograd.grad(x, [q, k, v], cotangent)] for x in (out, plain))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@given(length=st.integers(2, 40), heads=HEADS, seed=SEEDS, data=st.data())
def test_no_token_sees_a_later_one(length, heads, seed, data):
    cut = data.draw(st.integers(1, length - 1))
    inputs = draw_inputs(length, heads=heads, seed=seed)
    others = draw_inputs(length, heads=heads, seed=seed + 1)
    changed = [torch.cat([x[:, :cut], y[:, cut:]], 1) for x, y in zip(inputs, others, strict=True)]
    before, after = attention(*inputs), attention(*changed)
    torch.testing.assert_close(before[0][:, :cut], after[0][:, :cut], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(before[1][..., :cut], after[1][..., :cut], rtol=0.0, atol=1e-12)
    # Negative control: the later tokens did change.
    assert not torch.allclose(before[0][:, cut:], after[0][:, cut:])
    for gradient in torch.autograd.grad(before[0][:, :cut].sum(), inputs):
        assert (gradient[:, cut:] == 0.0).all()


@given(length=LENGTHS, heads=HEADS, seed=SEEDS, shift=st.integers(-(10**6), 10**6))
def test_a_constant_added_to_the_running_sum_changes_nothing(length, heads, seed, shift):
    q, k, v, log_f = draw_inputs(length, heads=heads, seed=seed)
    # In steps of 2^-20, so that a sum of any of these and the shift is exact.
    c, first = accumulate((log_f.detach().clamp(min=-1e4) * 2**20).round() / 2**20)
    results = []
    for moved in (c, c + shift):
        c_q, c_k = (moved.clone().requires_grad_() for _ in range(2))
        decay = Decay(c_q, c_k, first, torch.arange(length))
        out, lse = reference_attention(q, k, v, decay, scale=0.3)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), [q, k, v, c_q, c_k])])
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


@given(length=st.integers(2, 40), heads=HEADS, seed=SEEDS, data=st.data())
def test_a_zero_gate_hides_all_history(length, heads, seed, data):
    """The tokens from the reset on are as if alone, and those before it get nothing back from them."""
    cut = data.draw(st.integers(1, length - 1))
    inputs = draw_inputs(length, heads=heads, seed=seed)
    with torch.no_grad():
        inputs[3][:, cut] = -torch.inf
        # A history that has forgotten a lot leaves no trace in the running sum.
        inputs[3][:, :cut] -= 1000.0
    cotangents = draw_cotangents(inputs[0])
    cotangents[0][:, :cut], cotangents[1][..., :cut] = 0.0, 0.0
    whole = output_and_gradients(attention, inputs, cotangents)
    suffix = slice(cut, None)
    alone = output_and_gradients(
        attention, part(inputs, suffix), (cotangents[0][:, suffix], cotangents[1][..., suffix])
    )
    assert_same(split(whole, suffix), alone)
    for name in ("dq", "dk", "dv"):
        assert (whole[name][:, :cut] == 0.0).all(), name
    # The gradients of all later tokens cancel, to rounding.
    assert whole["dlog_f"][:, :cut].abs().max() < 1e-12


@given(lengths=st.lists(st.integers(0, 15), min_size=1, max_size=5), heads=HEADS, seed=SEEDS)
def test_packed_sequences_are_as_if_apart(lengths, heads, seed):
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    inputs = draw_inputs(offsets[-1], batch=1, heads=heads, seed=seed)
    cotangents = draw_cotangents(inputs[0])
    packed = output_and_gradients(attention, inputs, cotangents, cu_seqlens=torch.tensor(offsets))
    for start, stop in itertools.pairwise(offsets):
        own = slice(start, stop)
        alone = output_and_gradients(attention, part(inputs, own), (cotangents[0][:, own], cotangents[1][..., own]))
        assert_same(split(packed, own), alone)


@given(length=LENGTHS, heads=HEADS, seed=SEEDS, kind=st.sampled_from(["left", "right", "holes", "empty"]))
def test_padded_sequences_are_as_if_unpadded(length, heads, seed, kind):
    inputs = draw_inputs(length, heads=heads, seed=seed)
    cotangents = draw_cotangents(inputs[0])
    mask = padding_mask(kind, 2, length)
    padded = output_and_gradients(attention, inputs, cotangents, attention_mask=mask)
    for b in range(2):
        row = {name: x[b : b + 1] for name, x in padded.items()}
        real, padding = (mask[b] == value for value in (1, 0))
        own = [x.detach()[b : b + 1, real].requires_grad_() for x in inputs]
        alone = output_and_gradients(
            attention, own, (cotangents[0][b : b + 1, real], cotangents[1][b : b + 1, :, real])
        )
        assert_same(split(row, real), alone)
        for name, x in split(row, padding).items():
            assert (x == (-torch.inf if name == "lse" else 0.0)).all(), name


@given(length=LENGTHS, heads=HEADS, seed=SEEDS, data=st.data())
def test_the_last_queries_alone_equal_the_whole(length, heads, seed, data):
    queries = data.draw(st.integers(0, length))
    q, k, v, log_f = draw_inputs(length, heads=heads, seed=seed)
    rows = slice(length - queries, None)
    cotangents = draw_cotangents(q)
    cotangents[0][:, : length - queries], cotangents[1][..., : length - queries] = 0.0, 0.0
    whole = output_and_gradients(attention, [q, k, v, log_f], cotangents)
    own = [q.detach()[:, rows].requires_grad_(), k, v, log_f]
    last = output_and_gradients(attention, own, (cotangents[0][:, rows], cotangents[1][..., rows]))
    for name in ("out", "lse", "dq"):
        whole[name] = split({name: whole[name]}, rows)[name]
    assert_same(last, whole)


@given(length=LENGTHS, heads=HEADS, seed=SEEDS, factor=st.integers(-6, 6))
def test_scaling_values_scales_the_output(length, heads, seed, factor):
    q, k, v, log_f = draw_inputs(length, heads=heads, seed=seed)
    scaled = forgetting_attention(q, k, v * 2.0**factor, log_f)
    assert torch.equal(scaled, forgetting_attention(q, k, v, log_f) * 2.0**factor)


@given(length=LENGTHS, heads=HEADS, seed=SEEDS)
def test_outputs_are_convex_combinations_of_values(length, heads, seed):
    q, k, v, log_f = draw_inputs(length, heads=heads, seed=seed)
    out = forgetting_attention(q, k, v, log_f)
    values = v.repeat_interleave(heads[0] // heads[1], 2)
    assert (out <= values.cummax(1).values + 1e-12).all()
    assert (out >= values.cummin(1).values - 1e-12).all()
    constant = forgetting_attention(q, k, torch.ones_like(v), log_f)
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=0.0, atol=1e-12)


@given(length=LENGTHS, seed=SEEDS)
def test_shared_gates_and_keys_equal_copies_of_them(length, seed):
    """Gradients of what is shared are the sums over its copies."""
    inputs = draw_inputs(length, heads=(4, 2, 1), seed=seed)
    q, k, v, log_f = (x.detach() for x in inputs)
    copies = [q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), log_f.repeat_interleave(4, 2)]
    expected = output_and_gradients(attention, [x.clone().requires_grad_() for x in copies])
    expected["dk"] = expected["dk"].unflatten(2, (2, 2)).sum(3)
    expected["dv"] = expected["dv"].unflatten(2, (2, 2)).sum(3)
    expected["dlog_f"] = expected["dlog_f"].sum(2, keepdim=True)
    assert_same(output_and_gradients(attention, inputs), expected)
