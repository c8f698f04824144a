"""The reference as a torch operator: registration, torch.compile, dropout, memory, second derivatives."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attention_inputs import attention, draw_inputs, forgetting_attention, output_and_gradients, padding_mask
from foxlm.kernels import reference
from foxlm.kernels.decay import accumulate

# ---- torch.library and torch.compile


def operator_arguments(dropout: float = 0.0) -> list:
    q, k, v, log_f = draw_inputs(20, 9, dtype=torch.float32)
    c, first = accumulate(log_f.detach())
    c_q, c_k = (x.clone().requires_grad_() for x in (c[..., 11:], c))
    seed = torch.tensor(1234) if dropout else None
    return [q, k, v, c_q, c_k, first[..., 11:], torch.arange(11, 20), 0.3, dropout, seed]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck_of_the_forward_operator(dropout):
    torch.library.opcheck(reference._forward, tuple(operator_arguments(dropout)))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("need_decay", [False, True])
def test_opcheck_of_the_backward_operator(dropout, need_decay):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in operator_arguments(dropout)]
    *tensors, scale, dropout, seed = arguments
    out, lse = reference._forward(*arguments)
    cotangents = [torch.randn_like(out), torch.randn_like(lse)]
    torch.library.opcheck(reference._backward, (*cotangents, *tensors, lse, scale, dropout, seed, need_decay))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_meta_tensors_have_the_right_shapes(dtype):
    """What a graph is traced with says what the real function returns."""
    inputs = draw_inputs(20, 9, dtype=dtype)
    meta = [x.detach().to("meta").requires_grad_() for x in inputs]
    real, fake = (output_and_gradients(attention, x) for x in (inputs, meta))
    for name, x in real.items():
        assert (x.shape, x.dtype, x.stride()) == (fake[name].shape, fake[name].dtype, fake[name].stride()), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": padding_mask("left", 1, 20)},
        {"cu_seqlens": torch.tensor([0, 7, 20], dtype=torch.int32)},
    ],
    ids=["whole", "padded", "packed"],
)
def test_compiles_as_one_graph(options):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    inputs = draw_inputs(20, 9, batch=1)
    expected = output_and_gradients(attention, inputs, **options)
    actual = output_and_gradients(compiled, inputs, **options)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiles_with_inductor_at_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for keys in (20, 33):
        inputs = draw_inputs(keys, batch=1)
        actual = output_and_gradients(compiled, inputs)
        torch.testing.assert_close(actual, output_and_gradients(attention, inputs), rtol=0.0, atol=1e-12)


def test_a_compiled_graph_draws_new_dropout_each_time():
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(forgetting_attention, dropout=0.5), fullgraph=True, backend="aot_eager")
    inputs = [x.detach() for x in draw_inputs(20)]
    torch.manual_seed(3)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(*inputs), first)


def test_a_second_derivative_is_an_error():
    inputs = draw_inputs(9)
    (gradient,) = torch.autograd.grad(forgetting_attention(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="eager"):
        gradient.sum().backward()


# ---- Dropout


def test_no_dropout_is_the_default():
    inputs = draw_inputs(70)
    state = torch.get_rng_state()
    assert torch.equal(forgetting_attention(*inputs, dropout=0.0), forgetting_attention(*inputs))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_follows_the_seed():
    inputs = draw_inputs(70)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(output_and_gradients(functools.partial(attention, dropout=0.3), inputs))
    for name in ("out", "dq", "dk", "dv", "dlog_f"):
        assert torch.equal(results[0][name], results[1][name]), name
        assert not torch.equal(results[0][name], results[2][name]), name
    assert torch.equal(results[0]["lse"], attention(*inputs)[1])


def dropped_weights(length: int, dropout: float) -> torch.Tensor:
    """The factor on every attention weight ``[B, Tq, H, Tk]``: uniform weights times unit vectors as values."""
    q = torch.zeros(2, length, 3, length, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64)[None, :, None].expand(2, -1, 3, -1)
    out = forgetting_attention(q, q, v, torch.zeros(2, length, 3), dropout=dropout)
    return out * torch.arange(1, length + 1)[None, :, None, None]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_expectation(dropout):
    kept = dropped_weights(150, dropout)
    rows, columns = torch.tril_indices(150, 150)
    values = kept.transpose(1, 2)[..., rows, columns]
    is_kept = values > 0.0
    torch.testing.assert_close(values[is_kept], torch.full_like(values[is_kept], 1.0 / (1.0 - dropout)))
    # 67,950 weights: five standard deviations of their mean.
    error = abs(is_kept.double().mean().item() - (1.0 - dropout))
    assert error < 5.0 * (dropout * (1.0 - dropout) / is_kept.numel()) ** 0.5


def test_dropout_is_independent_between_rows_heads_batches_and_chunks():
    kept = dropped_weights(150, 0.5)[:, 100:, :, :100].transpose(1, 2).flatten(0, 2) > 0.0
    # 300 rows of 100 fair coins: two of them agree on 50 +- 5, and 45,000 pairs stay within seven deviations.
    agreement = (kept[:, None] == kept).sum(-1).triu(1)
    agreement = agreement[agreement > 0]
    assert agreement.min() >= 15
    assert agreement.max() <= 85
    # Negative control: the same row twice.
    assert (kept[0] == kept[0]).sum() == 100


@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 2, 1)], ids=str)
def test_gradients_belong_to_the_dropped_weights(heads, monkeypatch):
    monkeypatch.setattr(reference, "_MIN_CHUNK", 3)
    monkeypatch.setattr(reference, "_MAX_CHUNK", 3)
    q, k, v, _ = draw_inputs(7, 5, batch=1, heads=heads, head_dim=1)
    log_f = (-0.01 - torch.rand(1, 7, heads[2], dtype=torch.float64)).requires_grad_()

    def function(*inputs, seed=5):
        torch.manual_seed(seed)
        return attention(*inputs, dropout=0.4)

    assert not torch.equal(function(q, k, v, log_f, seed=6)[0], function(q, k, v, log_f)[0])
    assert torch.autograd.gradcheck(function, [q, k, v, log_f])


def test_dropout_survives_checkpointing():
    """Recomputing the forward restores the generator, so the same weights are dropped."""
    inputs = draw_inputs(70)
    function = functools.partial(forgetting_attention, dropout=0.3)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
        else:
            out = function(*inputs)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(*gradients, rtol=0.0, atol=0.0)


# ---- Memory


def peak_bytes(function: Callable[[], object], trace: Path) -> int:
    """The most that ``function`` holds at a time beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(trace))
    events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return max(e["Total Allocated"] for e in events) - events[0]["Total Allocated"] + events[0]["Bytes"]


def dense_attention(q, k, v, log_f):
    """The negative control: all scores at once."""
    c = log_f.cumsum(1).transpose(1, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + c[..., None] - c[..., None, :]
    weights = scores.masked_fill(torch.ones_like(scores).triu(1) > 0.0, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def run_backward(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
    function(*inputs).sum().backward()


def growth_of_memory(function: Callable[..., torch.Tensor], trace: Path) -> float:
    """Peak of forward and backward at 2,048 tokens over that at 512."""
    peaks = []
    for tokens in (512, 2048):
        inputs = draw_inputs(tokens, batch=1, heads=(2, 2, 2), dtype=torch.float32)
        peaks.append(peak_bytes(functools.partial(run_backward, function, inputs), trace))
    return peaks[1] / peaks[0]


def test_memory_is_linear_in_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_MIN_CHUNK", 16)
    monkeypatch.setattr(reference, "_MAX_CHUNK", 16)
    assert growth_of_memory(forgetting_attention, tmp_path / "trace.json") < 4.2


def test_the_memory_measurement_sees_quadratic_growth(tmp_path):
    """Negative control."""
    assert growth_of_memory(dense_attention, tmp_path / "trace.json") > 12.0


def test_scores_held_at_a_time_stay_within_the_budget(monkeypatch):
    """A large batch gets smaller chunks, never fewer than the least."""
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * 4 * 100 * 30)
    monkeypatch.setattr(reference, "_MIN_CHUNK", 8)
    sizes = {}
    for batch in (1, 2, 100):
        q, k, _, log_f = draw_inputs(100, batch=batch)
        c, first = accumulate(log_f)
        chunks = reference._Chunks(q, k, c, c, first, torch.arange(100), 1.0)
        sizes[batch] = next(iter(chunks))[0].stop
    assert sizes == {1: 60, 2: 30, 100: 8}


TRANSFORMS: dict[str, Callable[..., object]] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "autograd.hessian": lambda f, x: torch.autograd.functional.hessian(lambda y: f(y).sum(), x),
    "autograd.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),
}


@pytest.mark.parametrize("name", ["q", "k", "v", "log_f"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_an_error_that_says_what_to_do(transform, name):
    inputs = {x: torch.randn(1, 20, 2, 4) for x in ("q", "k", "v")} | {"log_f": -torch.rand(1, 20, 2)}
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms.*eager"):
        TRANSFORMS[transform](lambda x: forgetting_attention(**(inputs | {name: x})), inputs[name])


def test_jacobians_of_reverse_mode_work():
    inputs = [x.detach() for x in draw_inputs(5, batch=1)]
    looped, batched = (
        torch.autograd.functional.jacobian(forgetting_attention, tuple(inputs), vectorize=x) for x in (False, True)
    )
    torch.testing.assert_close(looped, batched)


@pytest.mark.parametrize("name", ["q", "k", "v", "log_f"])
def test_forward_mode_is_an_error_not_a_zero(name):
    inputs = {x: torch.randn(1, 5, 2, 4) for x in ("q", "k", "v")} | {"log_f": -torch.rand(1, 5, 2)}
    with torch.autograd.forward_ad.dual_level():
        inputs[name] = torch.autograd.forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match="eager"):
            forgetting_attention(**inputs)
