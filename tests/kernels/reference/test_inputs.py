"""Attention's arguments: what is refused, empty inputs, and NaN in padding."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from attention_inputs import (
    attention,
    draw_inputs,
    forgetting_attention,
    output_and_gradients,
    padding_mask,
    poisoned,
)


def good() -> dict[str, torch.Tensor]:
    """Inputs with 10 keys, 6 queries, 4 query heads and 2 key/value heads."""
    tensors = draw_inputs(10, 6, dtype=torch.float32)
    return {name: x.detach() for name, x in zip(("q", "k", "v", "log_f"), tensors, strict=True)}


def packed(offsets: list, dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    return {name: x[:1] for name, x in good().items()} | {"cu_seqlens": torch.tensor(offsets, dtype=dtype)}


NAN_GATES, POSITIVE_GATES, INFINITE_GATES = (torch.full((2, 10, 4), x) for x in (torch.nan, 1e-6, torch.inf))

# The argument the message must begin with, what it must also say, and the inputs.
BAD = {
    "q-list": ("q", "list", {"q": [[[[1.0]]]]}),
    "k-numpy": ("k", "ndarray", {"k": np.zeros((2, 10, 2, 8), np.float32)}),
    "v-string": ("v", "str", {"v": "v"}),
    "log_f-number": ("log_f", "int", {"log_f": 0}),
    "q-sparse": ("q", "sparse", {"q": torch.zeros(2, 6, 4, 8).to_sparse()}),
    "k-nested": (
        "k",
        "nested: True",
        {"k": torch.nested.nested_tensor([torch.zeros(10, 2, 8)] * 2, layout=torch.jagged)},
    ),
    "scale-string": ("scale", "'1'", {"scale": "1"}),
    "scale-tensor": ("scale", "tensor(1.)", {"scale": torch.tensor(1.0)}),
    "scale-bool": ("scale", "True", {"scale": True}),
    "scale-infinite": ("scale", "inf", {"scale": -torch.inf}),
    "eps-string": ("eps", "'x'", {"eps": "x"}),
    "eps-tensor": ("eps", "tensor(0.1", {"eps": torch.tensor(0.1)}),
    "rule-number": ("rule", "1", {"eps": 0.1, "rule": 1}),
    "rule-none": ("rule", "None", {"eps": 0.1, "rule": None}),
    "rule-without-eps": ("rule", "'tihgt'", {"rule": "tihgt"}),
    "dropout-none": ("dropout", "None", {"dropout": None}),
    "dropout-string": ("dropout", "'0.1'", {"dropout": "0.1"}),
    "mask-list": ("attention_mask", "list", {"attention_mask": [[1] * 10] * 2}),
    "mask-none-shape": ("attention_mask", "[]", {"attention_mask": torch.tensor(True)}),
    "mask-complex": ("attention_mask", "complex64", {"attention_mask": torch.ones(2, 10, dtype=torch.complex64)}),
    "mask-nan": ("attention_mask", "nan", {"attention_mask": torch.full((2, 10), torch.nan)}),
    "mask-device": ("attention_mask", "meta", {"attention_mask": torch.ones(2, 10, device="meta")}),
    "mask-bool-shape": ("attention_mask", "[10, 2]", {"attention_mask": torch.ones(10, 2, dtype=torch.bool)}),
    "cu_seqlens-list": ("cu_seqlens", "list", {"cu_seqlens": [0, 10]} | {name: x[:1] for name, x in good().items()}),
    "cu_seqlens-number": ("cu_seqlens", "int", {"cu_seqlens": 10} | {name: x[:1] for name, x in good().items()}),
    "log_f-none": ("log_f", "NoneType", {"log_f": None}),
    "additive-mask": ("attention_mask", "additive", {"attention_mask": torch.zeros(2, 10) - 1e9}),
    "scale-nan": ("scale", "nan", {"scale": torch.nan}),
    "q-rank": ("q", "[2, 6, 32]", {"q": torch.zeros(2, 6, 32)}),
    "k-rank": ("k", "[10, 8]", {"k": torch.zeros(10, 8)}),
    "v-rank": ("v", "[2, 10, 2, 8, 1]", {"v": torch.zeros(2, 10, 2, 8, 1)}),
    "q-integer": ("q", "torch.int64", {"q": torch.zeros(2, 6, 4, 8, dtype=torch.int64)}),
    "k-integer": ("k", "torch.int32", {"k": torch.zeros(2, 10, 2, 8, dtype=torch.int32)}),
    "q-complex": ("q", "torch.complex64", {"q": torch.zeros(2, 6, 4, 8, dtype=torch.complex64)}),
    "k-type": ("k", "torch.bfloat16", {"k": torch.zeros(2, 10, 2, 8, dtype=torch.bfloat16)}),
    "v-type": ("v", "torch.float64", {"v": torch.zeros(2, 10, 2, 8, dtype=torch.float64)}),
    "k-device": ("k", "meta", {"k": torch.zeros(2, 10, 2, 8, device="meta")}),
    "v-device": ("v", "meta", {"v": torch.zeros(2, 10, 2, 8, device="meta")}),
    "log_f-device": ("log_f", "meta", {"log_f": torch.zeros(2, 10, 4, device="meta")}),
    "k-batch": ("k", "[1, 10, 2, 8]", {"k": torch.zeros(1, 10, 2, 8)}),
    "k-head-size": ("k", "[2, 10, 2, 16]", {"k": torch.zeros(2, 10, 2, 16)}),
    "v-tokens": ("v", "[2, 9, 2, 8]", {"v": torch.zeros(2, 9, 2, 8)}),
    "v-heads": ("v", "[2, 10, 4, 8]", {"v": torch.zeros(2, 10, 4, 8)}),
    "v-head-size": ("v", "[2, 10, 2, 4]", {"v": torch.zeros(2, 10, 2, 4)}),
    "more-queries": ("q", "11 queries for 10 keys", {"q": torch.zeros(2, 11, 4, 8)}),
    "heads-no-multiple": ("q", "5 query heads", {"q": torch.zeros(2, 6, 5, 8)}),
    "fewer-query-heads": ("q", "1 query heads", {"q": torch.zeros(2, 6, 1, 8)}),
    "no-query-heads": ("q", "0 query heads", {"q": torch.zeros(2, 6, 0, 8)}),
    "no-key-heads": (
        "q",
        "0 key/value heads",
        {"k": torch.zeros(2, 10, 0, 8), "v": torch.zeros(2, 10, 0, 8)},
    ),
    "no-head-size": (
        "q",
        "head size 0",
        {"q": torch.zeros(2, 6, 4, 0), "k": torch.zeros(2, 10, 2, 0), "v": torch.zeros(2, 10, 2, 0)},
    ),
    "log_f-rank": ("log_f", "[2, 10]", {"log_f": torch.zeros(2, 10)}),
    "log_f-batch": ("log_f", "[1, 10, 4]", {"log_f": torch.zeros(1, 10, 4)}),
    "log_f-tokens": ("log_f", "[2, 6, 4]", {"log_f": torch.zeros(2, 6, 4)}),
    "log_f-heads": ("log_f", "one of [1, 2, 4]", {"log_f": torch.zeros(2, 10, 3)}),
    "log_f-heads-first": ("log_f", "[2, 4, 10]", {"log_f": torch.zeros(2, 4, 10)}),
    "log_f-bfloat16": ("log_f", "torch.bfloat16", {"log_f": torch.zeros(2, 10, 4, dtype=torch.bfloat16)}),
    "log_f-float16": ("log_f", "torch.float16", {"log_f": torch.zeros(2, 10, 4, dtype=torch.float16)}),
    "log_f-integer": ("log_f", "torch.int64", {"log_f": torch.zeros(2, 10, 4, dtype=torch.int64)}),
    "log_f-positive": ("log_f", "<= 0", {"log_f": POSITIVE_GATES}),
    "log_f-infinite": ("log_f", "<= 0", {"log_f": INFINITE_GATES}),
    "log_f-nan": ("log_f", "NaN", {"log_f": NAN_GATES}),
    "mask-rank": ("attention_mask", "[2, 1, 6, 10]", {"attention_mask": torch.ones(2, 1, 6, 10)}),
    "mask-queries": ("attention_mask", "[2, 6]", {"attention_mask": torch.ones(2, 6)}),
    "mask-batch": ("attention_mask", "[1, 10]", {"attention_mask": torch.ones(1, 10)}),
    "cu_seqlens-batch": ("cu_seqlens", "batch of 2", {"cu_seqlens": torch.tensor([0, 10])}),
    "cu_seqlens-falling": ("cu_seqlens", "[0, 7, 5, 10]", packed([0, 7, 5, 10])),
    "cu_seqlens-end": ("cu_seqlens", "[0, 5, 9]", packed([0, 5, 9])),
    "cu_seqlens-past-end": ("cu_seqlens", "[0, 5, 11]", packed([0, 5, 11])),
    "cu_seqlens-start": ("cu_seqlens", "[1, 10]", packed([1, 10])),
    "cu_seqlens-negative": ("cu_seqlens", "[0, -1, 10]", packed([0, -1, 10])),
    "cu_seqlens-float": ("cu_seqlens", "torch.float32", packed([0, 10], torch.float32)),
    "cu_seqlens-bool": ("cu_seqlens", "torch.bool", packed([0, 1], torch.bool)),
    "cu_seqlens-rank": ("cu_seqlens", "[1, 2]", packed([[0, 10]])),
    "cu_seqlens-short": ("cu_seqlens", "[1]", packed([0])),
    "cu_seqlens-empty": ("cu_seqlens", "[0]", packed([])),
    "eps-zero": ("eps", "0.0", {"eps": 0.0}),
    "eps-one": ("eps", "1.0", {"eps": 1.0}),
    "eps-nan": ("eps", "nan", {"eps": float("nan")}),
    "rule-unknown": ("rule", "'loose'", {"eps": 0.1, "rule": "loose"}),
    "dropout-one": ("dropout", "1.0", {"dropout": 1.0}),
    "dropout-negative": ("dropout", "-0.1", {"dropout": -0.1}),
    "dropout-nan": ("dropout", "nan", {"dropout": float("nan")}),
}


@pytest.mark.parametrize(("argument", "says", "inputs"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_an_error_that_names_it(argument, says, inputs):
    with pytest.raises(ValueError, match=rf"^{argument}\b.*{re.escape(says)}"):
        forgetting_attention(**(good() | inputs))


def test_the_good_inputs_are_good():
    """Negative control: what the bad ones are made from raises nothing."""
    forgetting_attention(**good())
    forgetting_attention(**packed([0, 10]))


def test_options_are_by_name_only():
    with pytest.raises(TypeError):
        forgetting_attention(*good().values(), 0.5)


@pytest.mark.parametrize(
    ("batch", "keys", "queries"), [(0, 5, 5), (0, 5, 2), (2, 0, 0), (0, 0, 0), (2, 5, 0), (1, 1, 1)], ids=str
)
@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 2, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_in_nothing_out(batch, keys, queries, heads, masked):
    inputs = draw_inputs(keys, queries, batch=batch, heads=heads)
    options: dict[str, Any] = {"attention_mask": torch.ones(batch, keys)} if masked else {}
    results = output_and_gradients(attention, inputs, **options)
    assert results["out"].shape == inputs[0].shape
    assert results["lse"].shape == (batch, heads[0], queries)
    for name, x in zip(("dq", "dk", "dv", "dlog_f"), inputs, strict=True):
        assert results[name].shape == x.shape
        assert results[name].isfinite().all()
        if not queries:
            assert (results[name] == 0.0).all()


def test_no_packed_tokens():
    inputs = draw_inputs(0, batch=1)
    assert forgetting_attention(*inputs, cu_seqlens=torch.tensor([0, 0, 0])).shape == (1, 0, 4, 8)


def test_one_token_returns_its_value():
    q, k, v, log_f = draw_inputs(1)
    out = forgetting_attention(q, k, v, log_f)
    torch.testing.assert_close(out, v.repeat_interleave(2, 2), rtol=0.0, atol=1e-15)


def test_inputs_are_left_as_they_were():
    inputs = draw_inputs(70)
    copies = [x.detach().clone() for x in inputs]
    output_and_gradients(attention, inputs, attention_mask=padding_mask("holes", 2, 70))
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("kind", ["left", "right", "holes", "empty"])
@pytest.mark.parametrize("names", ["q", "k", "v", "f", "qkvf"])
def test_nan_in_padding_reaches_nothing(kind, names):
    """Padding may be memory that nobody wrote: its numbers are not to be looked at, forward or backward."""
    inputs, mask = draw_inputs(70), padding_mask(kind, 2, 70)
    expected = output_and_gradients(attention, inputs, attention_mask=mask)
    actual = output_and_gradients(attention, poisoned(inputs, mask == 0, names), attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_padding_may_hold_anything(value):
    inputs, mask = draw_inputs(20), padding_mask("holes", 2, 20)
    expected = output_and_gradients(attention, inputs, attention_mask=mask)
    with torch.no_grad():
        for x in inputs:
            x[mask == 0] = value
    actual = output_and_gradients(attention, inputs, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("keys", [0, 20])
def test_no_queries_or_no_tokens_with_a_mask(keys):
    q, k, v, log_f = (x.detach() for x in draw_inputs(20))
    mask = padding_mask("left", 2, 20)[:, :keys]
    out = forgetting_attention(q[:, :0], k[:, :keys], v[:, :keys], log_f[:, :keys], attention_mask=mask)
    assert out.shape == q[:, :0].shape


def test_nan_gates_beside_padding_are_an_error():
    """Negative control: only those of padding are not looked at."""
    q, k, v, log_f = (x.detach() for x in draw_inputs(20))
    log_f[0, -1] = torch.nan
    with pytest.raises(ValueError, match="log_f"):
        forgetting_attention(q, k, v, log_f, attention_mask=padding_mask("left", 2, 20))


@pytest.mark.parametrize("number", [np.float32(0.3), np.float64(0.3), 1])
def test_numbers_of_numpy_are_numbers(number):
    inputs = [x.detach() for x in draw_inputs(20)]
    out = forgetting_attention(*inputs, scale=number)
    torch.testing.assert_close(out, forgetting_attention(*inputs, scale=float(number)), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_in_a_real_token_is_not_hidden(name):
    """Negative control: and a NaN that is attended to comes out, at its token and after it."""
    tokens = torch.zeros(2, 70, dtype=torch.bool)
    tokens[:, 66] = True
    inputs = draw_inputs(70)
    with torch.no_grad():
        inputs[3].fill_(-0.1)
    out = forgetting_attention(*poisoned(inputs, tokens, name))
    assert out[:, 66].isnan().any()
    assert out[:, 67:].isnan().any() == (name != "q")
