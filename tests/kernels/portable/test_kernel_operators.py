"""Kernels as torch operators: inputs left alone, NaN, dropout, bitwise determinism, torch.compile."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian as autograd_hessian
from torch.utils._python_dispatch import TorchDispatchMode

from attention_inputs import (
    attention,
    draw_cotangents,
    draw_inputs,
    forgetting_attention,
    output_and_gradients,
    padding_mask,
    poisoned,
)
from eager import eager_attention
from foxlm.kernels import triton_attention
from foxlm.kernels.decay import LOG_ZERO_GATE, accumulate, sum_gates
from foxlm.kernels.operators import NAMESPACE
from foxlm.kernels.portable import scan
from foxlm.kernels.pruning import search
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS, SOME_DTYPES, on_device

pytestmark = ON_KERNELS

TOKENS = 70 if INTERPRETED else 300


def draw(dtype: torch.dtype = torch.float16, batch: int = 1, heads: tuple[int, int, int] = (2, 1, 2)) -> list[Tensor]:
    return on_device(draw_inputs(TOKENS, batch=batch, heads=heads, head_dim=16, dtype=dtype))


def with_mild_gates(inputs: list[Tensor]) -> list[Tensor]:
    """The same, but every query sees all keys before it."""
    return [*inputs[:3], torch.full_like(inputs[3], -0.01).requires_grad_()]


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


# ---- What comes in and goes out


@pytest.mark.parametrize("name", ["q", "k", "v", "log_f"])
def test_gradient_of_one_input_alone(name):
    inputs = draw()
    index = ["q", "k", "v", "log_f"].index(name)
    expected = torch.autograd.grad(forgetting_attention(*inputs).sum(), inputs)[index]
    alone = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
    forgetting_attention(*alone).sum().backward()
    for i, x in enumerate(alone):
        assert (x.grad is not None) == (i == index)
    torch.testing.assert_close(alone[index].grad, expected, rtol=0.0, atol=0.0)


def test_no_graph_without_gradients():
    inputs = [x.detach() for x in draw()]
    assert not forgetting_attention(*inputs).requires_grad
    with torch.no_grad():
        assert not forgetting_attention(*draw()).requires_grad


def test_gradient_of_the_log_sum_exp_alone():
    q, k, v, log_f = draw(torch.float32)
    leaves = [q, k, log_f]
    found, expected = (torch.autograd.grad(f(q, k, v, log_f)[1].sum(), leaves) for f in (attention, eager_attention))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_starts_its_sums_anew():
    inputs = draw()
    out, lse = attention(*inputs)
    cotangents = [x.to(y) for x, y in zip(draw_cotangents(inputs[0]), (out, lse), strict=True)]
    first = torch.autograd.grad([out, lse], inputs, cotangents, retain_graph=True)
    second = torch.autograd.grad([out, lse], inputs, cotangents)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_inputs_are_left_as_they_were():
    inputs = draw(batch=2)
    copies = [x.detach().clone() for x in inputs]
    output_and_gradients(attention, inputs, attention_mask=padding_mask("holes", 2, TOKENS), eps=1e-3)
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)


def test_non_contiguous_inputs():
    """Heads first, as transformers holds them; every other element; a key broadcast over heads; a slice."""
    q, k, v, log_f = (x.detach() for x in draw(heads=(2, 2, 2), batch=2))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.stack([k, torch.full_like(k, torch.nan)], -1).flatten(-2)[..., ::2]
    v = v[:, :, :1].expand(-1, -1, 2, -1)
    log_f = torch.stack([log_f, log_f - 1.0], -1)[..., 0]
    inputs = [q, k, v, log_f]
    assert not any(x.is_contiguous() for x in inputs)
    copies = [x.contiguous().requires_grad_() for x in inputs]
    actual = output_and_gradients(attention, [x.requires_grad_() for x in inputs], eps=1e-3)
    assert_equal(actual, output_and_gradients(attention, copies, eps=1e-3))


@pytest.mark.smoke
def test_non_contiguous_gradients():
    inputs = draw()
    out = forgetting_attention(*inputs)
    cotangent, _ = draw_cotangents(inputs[0])
    expected = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    strange = cotangent.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    assert not strange.is_contiguous()
    assert all(map(torch.equal, torch.autograd.grad(out, inputs, strange, retain_graph=True), expected))
    # The gradient of a sum has no strides at all.
    expected = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), inputs), expected))


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_the_same_bits_twice(dtype):
    inputs = on_device(draw_inputs(2 * TOKENS, batch=1, heads=(4, 2, 2), head_dim=16, dtype=dtype))
    options: dict[str, Any] = {"eps": 1e-3, "attention_mask": padding_mask("left", 1, 2 * TOKENS)}
    expected = output_and_gradients(attention, inputs, **options)
    for _ in range(1 if INTERPRETED else 20):
        assert_equal(output_and_gradients(attention, inputs, **options), expected)


# ---- NaN


@pytest.mark.parametrize("kind", ["left", "right", "holes", "empty"])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}], ids=str)
def test_nan_in_padding_reaches_nothing(kind, options):
    inputs, mask = draw(batch=2, heads=(1, 1, 1)), padding_mask(kind, 2, TOKENS)
    expected = output_and_gradients(attention, inputs, attention_mask=mask, **options)
    padding = (mask == 0).to(DEVICE)
    actual = output_and_gradients(attention, poisoned(inputs, padding, "qkv"), attention_mask=mask, **options)
    assert_equal(actual, expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_what_is_not_finite_shows(name, value, dtype):
    """Sums in integers would turn it into a number. The token's own gradient shows it; other sequences do not."""
    token, inputs = TOKENS // 2, with_mild_gates(draw(dtype, batch=2, heads=(1, 1, 1)))
    cotangents = draw_cotangents(inputs[0])
    expected = output_and_gradients(attention, inputs, cotangents)
    everything = dict(zip(("q", "k", "v", "log_f", "dout", "dlse"), [*inputs, *cotangents], strict=True))
    with torch.no_grad():
        if name == "dlse":
            everything[name][0, :, token] = value
        else:
            everything[name][0, token] = value
    results = output_and_gradients(attention, inputs, cotangents)
    shown = {"q": ["out", "dq", "dk", "dv"], "k": ["out", "dq"], "v": ["out", "dq"], "dout": ["dq", "dk", "dv"]}
    for result in shown.get(name, ["dq", "dk"]):
        assert not results[result][0, token].isfinite().any(), result
    assert not results["dlog_f"][0, 1 : token + 1].isfinite().any()
    for result, x in results.items():
        assert torch.equal(x[1], expected[result][1]), result


# ---- Dropout


def kept_weights(inputs: list[Tensor], dropout: float, seed: int) -> Tensor:
    """The factor on every attention weight, ``[B, H, Tq, Tk]``: unit vectors as values show the weights."""
    torch.manual_seed(seed)
    q, k, v, log_f = inputs
    units = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)[None, :, None].expand(*v.shape[:3], -1)
    wide = [torch.nn.functional.pad(x, (0, v.shape[1] - x.shape[-1])) for x in (q, k)]
    out = forgetting_attention(*wide, units, log_f, scale=q.shape[-1] ** -0.5, dropout=dropout)
    weights = forgetting_attention(*wide, units, log_f, scale=q.shape[-1] ** -0.5)
    return torch.where(weights > 1e-30, out / weights, 0.0).transpose(1, 2).detach()


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_expectation(dropout):
    inputs = with_mild_gates(draw(torch.float32, batch=2))
    with torch.no_grad():
        inputs[0].mul_(0.1)
    rows, columns = torch.tril_indices(TOKENS, TOKENS) if TOKENS <= 256 else torch.tril_indices(256, 256)
    kept = kept_weights([x[:, :256] for x in inputs], dropout, 0)[..., rows, columns]
    is_kept = kept > 0.0
    torch.testing.assert_close(kept[is_kept], torch.full_like(kept[is_kept], 1.0 / (1.0 - dropout)))
    error = abs(is_kept.double().mean().item() - (1.0 - dropout))
    assert error < 5.0 * (dropout * (1.0 - dropout) / is_kept.numel()) ** 0.5
    # Rows and heads draw apart.
    patterns = is_kept.flatten(0, 1)[:, : len(rows) // 2]
    agreement = (patterns[:, None] == patterns).double().mean(-1).triu(1)
    expected = dropout**2 + (1.0 - dropout) ** 2
    assert (agreement[agreement > 0] - expected).abs().max() < 5.0 * (0.25 / patterns.shape[1]) ** 0.5


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 1)], ids=str)
def test_gradients_belong_to_the_dropped_weights(heads):
    """Forward and backward drop the same: both are those of attention with the weights that the forward pass kept."""
    inputs = [x.detach()[:, :250].requires_grad_() for x in with_mild_gates(draw(torch.float32, heads=heads))]
    kept = kept_weights(inputs, 0.4, seed=5).double()

    def with_dropout(*args: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return attention(*args, dropout=0.4)

    def by_hand(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_f = (x.transpose(1, 2).repeat_interleave(heads[0] // x.shape[2], dim=1) for x in args)
        c = log_f.cumsum(-1)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + c[..., None] - c[..., None, :]
        scores = scores.masked_fill(~torch.ones_like(kept, dtype=torch.bool).tril(), -torch.inf)
        return (scores.softmax(-1) * kept @ v).transpose(1, 2), scores.logsumexp(-1)

    found = output_and_gradients(with_dropout, inputs)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    expected = output_and_gradients(by_hand, leaves, draw_cotangents(inputs[0]))
    for name, x in found.items():
        torch.testing.assert_close(x.double(), expected[name], rtol=1e-4, atol=2e-5, msg=name)
    # Negative control: other weights are dropped with another seed.
    torch.manual_seed(6)
    assert not torch.equal(forgetting_attention(*inputs, dropout=0.4), found["out"])


# ---- torch.library and torch.compile


def operator_arguments(dropout: float = 0.0) -> list:
    q, k, v, log_f = on_device(draw_inputs(20, 9, batch=1, heads=(2, 1, 2), head_dim=16, dtype=torch.float32))
    c, first = accumulate(log_f.detach())
    c_q, c_k = (x.clone().requires_grad_() for x in (c[..., 11:], c))
    seed = torch.tensor(1234, device=DEVICE) if dropout else None
    last = torch.arange(11, 20, device=DEVICE)
    return [q, k, v, c_q, c_k, first[..., 11:], last, 0.3, dropout, seed]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck_of_the_forward_operator(dropout):
    torch.library.opcheck(triton_attention._forward, tuple(operator_arguments(dropout)))


class _Operators(TorchDispatchMode):
    """Names of the operators of this library that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_who_counts_operators_sees_attention_and_gets_the_same(monkeypatch):
    """Where nobody looks, kernels are launched past the dispatcher."""
    inputs = draw()
    options: dict[str, Any] = {"eps": 1e-3}
    with monkeypatch.context() as patch:
        for operator in ("_forward", "_backward"):
            patch.setattr(triton_attention, operator, None)
        patch.setattr(search, "_search_kv_start", None)
        expected = output_and_gradients(attention, inputs, **options)
    with _Operators() as seen:
        found = output_and_gradients(attention, inputs, **options)
    assert {"triton_forward", "triton_backward", "search_kv_start"} <= set(seen.names)
    assert_equal(found, expected)


def test_opcheck_of_the_backward_operator():
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in operator_arguments(0.25)]
    *tensors, scale, dropout, seed = arguments
    out, lse = triton_attention._forward(*arguments)
    cotangents = [torch.randn_like(out), torch.randn_like(lse)]
    torch.library.opcheck(triton_attention._backward, (*cotangents, *tensors, out, lse, scale, dropout, seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": padding_mask("left", 1, TOKENS), "eps": 1e-3},
        {"cu_seqlens": torch.tensor([0, 7, TOKENS], dtype=torch.int32), "eps": 1e-3, "rule": "paper"},
    ],
    ids=["whole", "padded", "packed"],
)
def test_compiles_as_one_graph(options):
    torch._dynamo.reset()
    backend = "aot_eager" if INTERPRETED else "inductor"
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    inputs = draw()
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    actual, expected = (output_and_gradients(f, inputs, **options) for f in (compiled, attention))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_compiled_graph_draws_new_dropout_each_time():
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(forgetting_attention, dropout=0.5), fullgraph=True, backend="aot_eager")
    inputs = [x.detach() for x in draw()]
    assert not torch.equal(compiled(*inputs), compiled(*inputs))


def test_second_derivatives_and_forward_mode_are_errors():
    inputs = draw()
    (gradient,) = torch.autograd.grad(forgetting_attention(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="eager"):
        gradient.sum().backward()
    for i in range(4):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs[i].detach(), torch.ones_like(inputs[i]))
            with pytest.raises(NotImplementedError, match="eager"):
                forgetting_attention(*inputs[:i], dual, *inputs[i + 1 :])


@pytest.mark.parametrize(
    "derivatives",
    [torch.func.grad, torch.func.jacfwd, torch.func.hessian, lambda f: functools.partial(autograd_hessian, f)],
)
def test_sums_of_gates_have_every_derivative(derivatives):
    """So that a model with `eager` attention has them, whose gates are summed by kernels too."""
    log_f = -torch.rand(2, 20, 2, dtype=torch.float64, device=DEVICE)
    log_f[:, ::7] = 2.0 * LOG_ZERO_GATE

    def squares(sum_gates, x):
        # Of what is linear second derivatives are zero.
        return (sum_gates(x)[0] ** 2).sum()

    actual, expected = (
        derivatives(functools.partial(squares, f))(log_f)
        for f in (lambda x: scan.sum_gates(x, None, 0), lambda x: sum_gates(x, None, 0))
    )
    torch.testing.assert_close(actual, expected)
    assert expected.count_nonzero() > 0
