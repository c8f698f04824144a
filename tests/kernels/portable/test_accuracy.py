"""Kernels are as accurate as torch in the same dtype, for every shape, layout, head size and gate."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_inputs import attention, draw_cotangents, draw_inputs, output_and_gradients, padding_mask
from eager import eager_attention
from foxlm.kernels import triton_attention
from foxlm.kernels.backends import TRITON, backend_of
from foxlm.kernels.decay import sum_gates
from foxlm.kernels.portable import scan
from foxlm.kernels.tiles import choose_tiles
from kernel_device import DEVICE, DTYPES, INTERPRETED, ON_KERNELS, SOME_DTYPES, on_device
from rounding_errors import assert_as_exact_as_torch, exact_results, rounding_errors

pytestmark = ON_KERNELS

HEAD_DIMS = [16, 40, 64, 80, 96, 128, 192, 256]
# The small tiles of float32 are slow to interpret: there, one head size for each choice of tiles.
SOME_HEAD_DIMS = [40, 128, 256] if INTERPRETED else HEAD_DIMS
TYPES = [(x, dtype) for dtype in DTYPES for x in (SOME_HEAD_DIMS if dtype == torch.float32 else HEAD_DIMS)]
# Tokens: more than two blocks of queries on either device, and no multiple of anything.
TOKENS = 139 if INTERPRETED else 331
# Heads of queries, of keys and values, and of gates.
HEADS = (2, 1, 2) if INTERPRETED else (4, 2, 4)
BATCH = 1 if INTERPRETED else 2

# Queries, and options of attention.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (TOKENS, {}),
    "fewer queries": (TOKENS - 67, {}),
    **{f"{kind} padding": (TOKENS, {"attention_mask": kind}) for kind in ("left", "right", "holes", "empty")},
    "padding, fewer queries": (70, {"attention_mask": "holes"}),
    "packed": (TOKENS, {"cu_seqlens": torch.tensor([0, 1, 66, 66, 100, TOKENS])}),
    "packed, fewer queries": (70, {"cu_seqlens": torch.tensor([0, 90, TOKENS - 3, TOKENS], dtype=torch.int32)}),
    "packed and padded": (TOKENS, {"cu_seqlens": torch.tensor([0, 80, TOKENS]), "attention_mask": "left"}),
}


def draw(
    layout: str = "whole",
    heads: tuple[int, int, int] = HEADS,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    tokens: int = TOKENS,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs and options of a layout."""
    queries, options = LAYOUTS[layout]
    batch = 1 if "cu_seqlens" in options else max(BATCH, 2) if "attention_mask" in options else BATCH
    if "attention_mask" in options:
        options = options | {"attention_mask": padding_mask(options["attention_mask"], batch, tokens)}
    queries = min(queries, tokens) if layout != "whole" else tokens
    return on_device(draw_inputs(tokens, queries, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)), options


@pytest.mark.smoke
def test_kernels_are_what_runs():
    inputs, _ = draw()
    assert backend_of(inputs[0]) is TRITON and TRITON.attention is triton_attention.triton_attention
    out = attention(*inputs)[0]
    assert type(out.grad_fn).__name__ == f"{triton_attention._Attention.__name__}Backward"


@pytest.mark.parametrize(("head_dim", "dtype"), TYPES, ids=str)
@pytest.mark.parametrize("layout", ["whole"] if INTERPRETED else ["whole", "holes padding", "packed", "fewer queries"])
def test_error_is_near_that_of_torch(layout, head_dim, dtype):
    inputs, options = draw(layout, head_dim=head_dim, dtype=dtype)
    assert_as_exact_as_torch(inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_in_every_layout(layout, dtype):
    inputs, options = draw(layout, dtype=dtype)
    assert_as_exact_as_torch(inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0.0, -1e-6, -0.03, -1.0])
def test_error_when_all_gates_are_equal(gate, dtype):
    (q, k, v, log_f), _ = draw(dtype=dtype)
    assert_as_exact_as_torch([q, k, v, torch.full_like(log_f, gate).requires_grad_()])


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 2, 1), (3, 3, 3), (3, 3, 1), (3, 1, 3)], ids=str)
def test_error_with_shared_keys_and_gates(heads):
    inputs, options = draw("packed", heads, dtype=torch.float16)
    assert_as_exact_as_torch(inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Interpreted, products are numpy's, whose BLAS sums q kᵀ and k qᵀ in different orders for some processors: what the
# backward pass computes anew then differs by the rounding of logits, which must not be large.
@pytest.mark.parametrize("scale", [-0.5, 0.5 if INTERPRETED else 1.5])
def test_error_at_other_scales(scale, dtype):
    inputs, _ = draw(dtype=dtype)
    assert_as_exact_as_torch(inputs, scale=scale)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_with_the_tiles_of_every_gpu(dtype, capability, monkeypatch):
    """Blocks of keys of 128 have two float64 bases."""
    monkeypatch.setattr(triton_attention, "_tiles", lambda q: choose_tiles(q.shape[-1], q.dtype, capability))
    inputs, _ = draw(heads=(1, 1, 1), head_dim=128, dtype=dtype, tokens=299)
    with torch.no_grad():
        inputs[3].clamp_(min=-0.05)
    assert_as_exact_as_torch(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k", "v", "k and v"])
def test_an_outlier_costs_the_rows_before_it_nothing(name, dtype):
    """Integer sums of gradients of queries are in units of the largest key and value."""
    inputs, _ = draw(dtype=dtype)
    with torch.no_grad():
        for x in (x for x, letter in zip(inputs, "qkv", strict=False) if letter in name):
            x[:, -20] *= 300.0
    # A gate's gradient is a sum over later tokens, the outlier among them.
    assert_as_exact_as_torch(inputs, tokens=slice(0, -20), without=("dlog_f",))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decay_after_a_row_costs_it_no_digits(head_dim):
    """Keys share a float64 base in blocks of 64, some of which a row does not see."""
    inputs = on_device(draw_inputs(100, 60, batch=1, heads=(1, 1, 1), head_dim=head_dim, dtype=torch.float32))
    with torch.no_grad():
        inputs[3].fill_(-0.01)
        inputs[3][:, 60] = -9999.0
    assert_near(inputs)


# ---- Indices: an error in one of these is as large as the result


def assert_near(inputs: list[Tensor], **options: Any) -> None:
    """Each element is within some roundings of what stands behind it, which are numbers of about one."""
    cotangents = draw_cotangents(inputs[0])
    exact = exact_results(inputs, cotangents, **options)
    for name, error in rounding_errors(attention, inputs, exact, cotangents, **options).items():
        size = max(1.0, exact[name][exact[name].isfinite()].abs().max().item() if exact[name].numel() else 0.0)
        assert (error.abs() <= 32 * torch.finfo(inputs[0].dtype).eps * size).all(), name


@pytest.mark.parametrize(
    ("keys", "queries"),
    [(n, n) for n in (1, 2, 16, 17, 63, 64, 65, 127, 128, 129)]
    + [(64, 1), (65, 1), (65, 64), (128, 65), (129, 128), (129, 2), (192, 129)],
)
@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_lengths_at_the_edges_of_blocks(keys, queries, dtype):
    assert_near(on_device(draw_inputs(keys, queries, batch=1, heads=(2, 1, 2), head_dim=16, dtype=dtype)))


@pytest.mark.parametrize("head_dim", [1, 8, 17, 33])
def test_any_head_size(head_dim):
    assert_near(on_device(draw_inputs(70, batch=1, heads=(1, 1, 1), head_dim=head_dim, dtype=torch.float32)))


@pytest.mark.parametrize("gate", [-50.0, -1e4, -1e30, -torch.inf])
def test_gates_that_hide_all_history(gate):
    inputs, _ = draw(dtype=SOME_DTYPES[0])
    with torch.no_grad():
        inputs[3].clamp_(min=-0.3)
        inputs[3][:, [0, 3, 64, 65, 128]] = gate
    assert_near(inputs)
    with torch.no_grad():
        inputs[3].fill_(gate)
    assert_near(inputs)


@pytest.mark.smoke
def test_scale_zero_is_the_mean_by_decay():
    inputs, _ = draw(dtype=SOME_DTYPES[0])
    assert_near(inputs, scale=0.0)


@pytest.mark.parametrize(
    ("batch", "keys", "queries"), [(0, 5, 5), (0, 5, 2), (2, 0, 0), (0, 0, 0), (2, 5, 0), (2, 70, 0)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"eps": 1e-3, "rule": "paper"}], ids=str)
def test_nothing_in_nothing_out(batch, keys, queries, options):
    inputs = on_device(draw_inputs(keys, queries, batch=batch, dtype=torch.float16))
    results = output_and_gradients(attention, inputs, **options)
    assert results["out"].shape == inputs[0].shape
    assert results["lse"].shape == (batch, 4, queries)
    for name, x in zip(("dq", "dk", "dv", "dlog_f"), inputs, strict=True):
        assert results[name].shape == x.shape
        assert (results[name] == 0.0).all()


# ---- Numbers of any size


@pytest.mark.parametrize("exponent", [-66, 40, 66])
@pytest.mark.parametrize("dtype", [x for x in DTYPES if x != torch.float16], ids=str)
def test_gradients_of_any_size_are_as_exact(exponent, dtype):
    """Powers of two from 1e-20 to 1e20 in the cotangents come out of the gradients as they went in."""
    inputs, _ = draw(dtype=dtype)
    cotangents = draw_cotangents(inputs[0])
    results = output_and_gradients(attention, inputs, cotangents)
    scaled = output_and_gradients(attention, inputs, [x * 2.0**exponent for x in cotangents])
    for name in ("dq", "dk", "dv", "dlog_f"):
        expected, found = results[name].double(), scaled[name].double() * 2.0**-exponent
        error = (found - expected).norm() / expected.norm()
        assert error <= 2.0 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"


@pytest.mark.parametrize("exponent", [-66, 40, 66])
def test_values_of_any_size_are_as_exact(exponent):
    (q, k, v, log_f), _ = draw()
    cotangents = draw_cotangents(q)
    results = output_and_gradients(attention, [q, k, v, log_f], cotangents)
    large = (v.detach() * 2.0**exponent).requires_grad_()
    scaled = output_and_gradients(attention, [q, k, large, log_f], [cotangents[0], cotangents[1] * 2.0**exponent])
    assert torch.equal(scaled["lse"], results["lse"])
    torch.testing.assert_close(scaled["dv"], results["dv"], rtol=1e-6, atol=0.0)
    for name in ("out", "dq", "dk", "dlog_f"):
        expected, found = results[name].double(), scaled[name].double() * 2.0**-exponent
        error = (found - expected).norm() / expected.norm()
        assert error <= 2.0 * torch.finfo(torch.float32).eps, f"{name}: {error:.1e}"


# ---- Running sums


@pytest.mark.parametrize("tokens", [1, 1024, 2500])
def test_sums_of_gates_are_those_of_torch(tokens):
    _, _, _, log_f = draw_inputs(tokens, heads=(1, 1, 1), head_dim=1, dtype=torch.float32)
    check_sums(log_f, None, 0)
    check_sums(log_f, torch.rand(2, tokens) < 0.01, -(1 << 31))


def test_sums_of_more_chunks_than_a_chunk_holds(monkeypatch):
    """As a sequence of over a million tokens has them."""
    monkeypatch.setattr(scan, "_CHUNK", 16)
    _, _, _, log_f = draw_inputs(16 * 37 + 5, batch=1, heads=(1, 1, 1), head_dim=1, dtype=torch.float32)
    check_sums(log_f, torch.rand(1, log_f.shape[1]) < 0.01, 0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sums_go_on_where_those_before_ended(dtype: torch.dtype) -> None:
    _, _, _, log_f = draw_inputs(700, heads=(3, 3, 3), head_dim=1, dtype=torch.float32)
    c, first = sum_gates(log_f, None, 0)
    (moved,), past = on_device([log_f]), 400
    before = scan.sum_gates(moved[:, :past], None, 0)
    # Parts of what a cache holds.
    carry = before[0][..., -1], before[1].to(dtype)[..., -1]
    for offset in (past, torch.tensor(past, device=DEVICE)):
        found, visible = scan.sum_gates(moved[:, past:], None, -(1 << 31), offset, carry)
        assert visible.dtype == torch.int64 and torch.equal(visible.cpu(), first[..., past:])
        torch.testing.assert_close(found.cpu(), c[..., past:], rtol=1e-13, atol=0.0)


def check_sums(log_f: Tensor, starts: Tensor | None, no_reset: int) -> None:
    (moved,) = on_device([log_f])
    marks = None if starts is None else starts.to(DEVICE)
    expected, resets = sum_gates(log_f, starts, no_reset)
    c, first = scan.sum_gates(moved, marks, no_reset)
    assert torch.equal(first.cpu(), resets)
    torch.testing.assert_close(c.cpu(), expected, rtol=1e-13, atol=0.0)
    dc = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(c, moved, dc.to(DEVICE))
    (exact,) = torch.autograd.grad(expected, log_f, dc)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=1e-6, atol=1e-6)


# ---- Controls


def test_the_comparison_sees_a_type_below():
    """Negative control: eager attention in float16 passed off as float32 is more than twice as wrong."""

    def worse(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = eager_attention(q.half(), k.half(), v.half(), log_f, **options)
        return out.float(), lse

    inputs, _ = draw()
    with pytest.raises(AssertionError, match=r"out, norm.*; dq, norm.*; dk, norm.*; dv, norm.*; dlog_f, norm"):
        assert_as_exact_as_torch(inputs, function=worse)
