"""`Decay`: cumulative log gates, hard resets and packed sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_inputs import draw_gates
from foxlm.kernels.decay import Decay, accumulate, running_max, sequence_starts

INF = torch.inf


def gates(*log_f: float) -> torch.Tensor:
    """One sequence with one head."""
    return torch.tensor(log_f, dtype=torch.float64)[None, :, None]


def test_sums_along_the_sequence():
    c, first = accumulate(gates(-1.0, 0.0, -0.5, -2.0))
    assert c.tolist() == [[[-1.0, -1.0, -1.5, -3.5]]]
    assert first.tolist() == [[[0, 0, 0, 0]]]
    assert (c.dtype, first.dtype) == (torch.float64, torch.int64)


def test_a_zero_gate_moves_the_first_visible_key():
    c, first = accumulate(gates(-1.0, -INF, -0.5, -INF, -INF, -2.0))
    assert first.tolist() == [[[0, 1, 1, 3, 4, 4]]]
    assert c.isfinite().all()
    assert (c[0, 0, 2] - c[0, 0, 1]).item() == -0.5


def test_heads_reset_apart():
    log_f = torch.tensor([[0.0, -INF], [-INF, -1.0], [-1.0, -1.0]])[None]
    assert accumulate(log_f)[1].tolist() == [[[0, 1, 1], [0, 0, 0]]]


def test_a_packed_sequence_starts_anew():
    starts = sequence_starts(torch.tensor([0, 2, 5]), 5)
    _, first = accumulate(gates(-1.0, -1.0, -1.0, -INF, -1.0), starts=starts)
    assert first.tolist() == [[[0, 0, 2, 3, 3]]]


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([0, 3], [True, False, False]),
        ([0, 1, 3], [True, True, False]),
        ([0, 0, 1, 1, 3, 3], [True, True, False]),
        ([0, 1, 2, 3], [True, True, True]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequence_starts(offsets, expected, dtype):
    assert sequence_starts(torch.tensor(offsets, dtype=dtype), 3).tolist() == [expected]


def test_sequence_starts_of_no_tokens():
    assert sequence_starts(torch.tensor([0, 0]), 0).shape == (1, 0)


def test_float32_gates_are_summed_in_float64():
    log_f = torch.full((1, 100_000, 1), -0.1)
    # 24 bits of the gate and 17 of the count: exact in float64.
    exact = log_f[0, 0, 0].double() * torch.arange(1, 100_001)
    assert torch.equal(accumulate(log_f)[0][0, 0], exact)
    # Negative control: the same sum in float32.
    assert (log_f.cumsum(1)[0, :, 0] - exact).abs().max() > 1e-4


@given(length=st.integers(1, 40), cut=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_continuing_a_block_equals_the_whole(length, cut, seed):
    cut = min(cut, length)
    generator = torch.Generator().manual_seed(seed)
    log_f = draw_gates(2, length, 3, generator=generator, dtype=torch.float64)
    starts = torch.rand(2, length, generator=generator) < 0.1
    c, first = accumulate(log_f, starts=starts)

    head = accumulate(log_f[:, :cut], starts=starts[:, :cut])
    carry = (head[0][..., -1], head[1][..., -1]) if cut else None
    tail = accumulate(log_f[:, cut:], cut, carry, starts[:, cut:])
    assert torch.equal(torch.cat([head[1], tail[1]], -1), first)
    torch.testing.assert_close(torch.cat([head[0], tail[0]], -1), c, rtol=1e-14, atol=0.0)


def test_the_offset_may_be_a_tensor():
    log_f, carry = gates(-1.0, -INF), (torch.zeros(1, 1).double(), torch.tensor([[2]]))
    expected = accumulate(log_f, 7, carry)[1]
    assert torch.equal(accumulate(log_f, torch.tensor(7), carry)[1], expected)
    assert expected.tolist() == [[[2, 8]]]


def test_no_tokens():
    c, first = accumulate(torch.zeros(2, 0, 3))
    assert c.shape == first.shape == (2, 3, 0)


def test_gradient_is_the_sum_over_later_tokens_and_zero_at_a_reset():
    log_f = gates(-1.0, -INF, -0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(accumulate(log_f)[0], log_f, torch.tensor([[[1.0, 10.0, 100.0]]]).double())
    assert gradient.flatten().tolist() == [111.0, 0.0, 100.0]


def test_bias_is_the_sum_of_the_gates_between():
    log_f = draw_gates(2, 30, 3, dtype=torch.float64)
    c, first = accumulate(log_f)
    bias = Decay(c[..., 10:], c, first[..., 10:], torch.arange(10, 30)).bias()
    for i in range(20):
        for j in range(30):
            expected = log_f[:, j + 1 : i + 11].sum(1) if j <= i + 10 else torch.full((2, 3), -INF)
            torch.testing.assert_close(bias[:, :, i, j], expected.double(), rtol=0.0, atol=1e-10)


def test_bias_hides_padding():
    c = torch.tensor([[[-1.0, -2.0, -3.0]]]).double()
    key = c.masked_fill(torch.tensor([False, True, False]), INF)
    first = torch.tensor([[[0, 2, 0]]])
    bias = Decay(c, key, first, torch.arange(3)).bias()
    assert bias[0, 0].tolist() == [[0.0, -INF, -INF], [-INF, -INF, -INF], [-2.0, -INF, 0.0]]


def test_running_maximum_written_out_for_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(-9, 9, (2, 3, 20))
    expected = running_max(x)
    assert torch.equal(expected, x.cummax(-1).values)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert torch.equal(running_max(x), expected)
