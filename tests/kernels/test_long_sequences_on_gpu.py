"""Kernels where only a GPU can show it: long sequences, large tensors, CUDA graphs, no host synchronisation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_inputs import attention, draw_inputs, forgetting_attention, output_and_gradients, padding_mask
from foxlm.kernels.decay import sum_gates
from foxlm.kernels.portable import scan
from foxlm.kernels.pruning.prune import first_kept
from foxlm.kernels.pruning.rules import Rule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "padded": {"attention_mask": padding_mask("left", 1, 300)},
    "packed": {"cu_seqlens": torch.tensor([0, 100, 300])},
    "tight": {"eps": 1e-4},
    "paper": {"eps": 1e-4, "rule": "paper"},
    "paper, bounded": {"eps": 1e-4, "rule": "paper", "logit_bound": torch.full((4,), 10.0)},
    "dropout": {"dropout": 0.2},
}


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def gpu_inputs(
    tokens: int, heads: int, head_dim: int, memory: float, dtype: torch.dtype, batch: int = 1
) -> list[Tensor]:
    """``[q, k, v, log_f]`` with gates of which a product of ``memory`` is about 1 / e."""
    q, k, v = (draw(batch, tokens, heads, head_dim, dtype=dtype) for _ in range(3))
    log_f = -torch.exp(0.5 * draw(batch, tokens, heads, dtype=torch.float32)) / memory
    return [x.requires_grad_() for x in (q, k, v, log_f)]


def option_tensors_on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}


# ---- Long sequences


def errors_in_window(
    inputs: list[Tensor], cotangent: Tensor, gradients: list[Tensor], window: slice, margin: int
) -> list[float]:
    """Relative errors of output and gradients at tokens that have forgotten, or are by, what is ``margin`` away."""
    start, stop = max(0, window.start - margin), min(window.stop + margin, cotangent.shape[1])
    leaves = [x.detach()[:, start:stop].double().requires_grad_() for x in inputs]
    out = forgetting_attention(*leaves)
    exact = [out, *torch.autograd.grad(out, leaves, cotangent[:, start:stop].double())]
    own = slice(window.start - start, window.stop - start)
    pairs = [(x.double()[:, window], y[:, own]) for x, y in zip(gradients, exact, strict=True)]
    return [((x - y).norm() / y.norm()).item() for x, y in pairs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("eps", [None, 1e-9])
def test_long_sequences_are_as_exact_as_short_ones(dtype, eps):
    """At the start, where gradients of gates have summed over all that follows, in the middle and at the end."""
    tokens, short, margin = 131_072, 1024, 1024
    torch.manual_seed(0)
    inputs = gpu_inputs(tokens, 4, 64, 10.0, dtype)
    cotangent = draw(*inputs[0].shape, dtype=dtype)

    def run(part: slice) -> list[Tensor]:
        leaves = [x.detach()[:, part].requires_grad_() for x in inputs]
        out = forgetting_attention(*leaves, eps=eps)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent[:, part])]

    alone = slice(0, short)
    first = [x.detach()[:, alone] for x in inputs]
    bound = errors_in_window(first, cotangent[:, alone], run(alone), alone, 0)
    results = run(slice(0, tokens))
    for begin in (0, tokens // 2, tokens - short):
        errors = errors_in_window(inputs, cotangent, results, slice(begin, begin + short), margin)
        for name, error, limit in zip(("out", "dq", "dk", "dv", "dlog_f"), errors, bound, strict=True):
            assert error <= 1.5 * limit, f"{name} at {begin}: {error:.1e}, alone {limit:.1e}"


def test_sums_of_more_than_a_million_gates():
    log_f = -torch.rand(1, 2**20 + 5000, 2)
    log_f[:, 1000] = log_f[:, 2**20 + 3] = -torch.inf
    moved = log_f.cuda().requires_grad_()
    log_f.requires_grad_()
    expected, resets = sum_gates(log_f, None, 0)
    c, first = scan.sum_gates(moved, None, 0)
    assert torch.equal(first.cpu(), resets)
    torch.testing.assert_close(c.cpu(), expected, rtol=1e-13, atol=0.0)
    dc = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(c, moved, dc.cuda())
    torch.testing.assert_close(gradient.cpu(), torch.autograd.grad(expected, log_f, dc)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rule", ["paper", "tight"])
def test_pruning_of_a_long_sequence_is_as_defined(rule: Rule):
    q, k, _, log_f = (x.detach() for x in gpu_inputs(100_000, 2, 64, 1000.0, torch.bfloat16))
    _, first = forgetting_attention(q, k, k, log_f, eps=1e-4, rule=rule, return_kv_start=True)
    defined = first_kept(q, k, log_f, eps=1e-4, rule=rule, block_q=128, block_k=64)
    # A boundary within rounding of the bound may fall on either side.
    assert (first[..., ::128] != defined).float().mean() < 0.01
    assert (first[..., ::128] - defined).abs().max() <= 64


# ---- Large tensors


def test_more_elements_than_fit_in_31_bits():
    """The last of many packed sequences is as if alone."""
    tokens, heads, head_dim, length = 2**17 + 256, 128, 128, 256
    q, k, v, cotangent = (draw(1, tokens, heads, head_dim) for _ in range(4))
    log_f = -torch.rand(1, tokens, heads, device="cuda")
    assert q.numel() > 2**31
    offsets = torch.arange(0, tokens + 1, length, device="cuda")
    inputs = [x.requires_grad_() for x in (q, k, v, log_f)]
    out = forgetting_attention(*inputs, cu_seqlens=offsets)
    results = [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]
    last = slice(tokens - length, tokens)
    alone = [x.detach()[:, last].clone().requires_grad_() for x in inputs]
    out = forgetting_attention(*alone)
    expected = [out.detach(), *torch.autograd.grad(out, alone, cotangent[:, last])]
    for name, x, y in zip(("out", "dq", "dk", "dv", "dlog_f"), results, expected, strict=True):
        error = (x[:, last].double() - y.double()).norm() / y.double().norm()
        assert error < 5e-3, f"{name}: {error:.1e}"


def test_batches_with_more_elements_than_fit_in_31_bits():
    batch, tokens, heads, head_dim = 2**13 + 1, 64, 32, 128
    inputs = [x.detach() for x in gpu_inputs(tokens, heads, head_dim, 10.0, torch.bfloat16, batch)]
    assert inputs[0].numel() > 2**31
    out = forgetting_attention(*inputs, eps=1e-4)
    assert torch.equal(out[-1:], forgetting_attention(*(x[-1:] for x in inputs), eps=1e-4))


def test_more_sequences_than_a_grid_has_rows():
    """65,535 is the most programs along all dimensions of a grid but the first."""
    inputs = gpu_inputs(70, 1, 16, 10.0, torch.bfloat16, batch=2**16 + 3)
    out = forgetting_attention(*inputs, eps=1e-4)
    gradients = torch.autograd.grad(out.sum(), inputs)
    alone = [x.detach()[-2:].requires_grad_() for x in inputs]
    last = forgetting_attention(*alone, eps=1e-4)
    assert torch.equal(out[-2:], last)
    for x, y in zip(gradients, torch.autograd.grad(last.sum(), alone), strict=True):
        torch.testing.assert_close(x[-2:], y, rtol=1e-2, atol=1e-2)


# ---- The host


@pytest.fixture
def no_waiting():
    """Turn every wait of the host for the device into an error."""
    torch.cuda.synchronize()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_host_never_waits(name, no_waiting):
    inputs = [x.detach().cuda().requires_grad_() for x in draw_inputs(300, batch=1, head_dim=64, dtype=torch.bfloat16)]
    options = option_tensors_on_gpu(OPTIONS[name])
    cotangents = [torch.ones(1, 300, 4, 64, device="cuda"), torch.ones(1, 4, 300, device="cuda")]
    output_and_gradients(attention, inputs, cotangents, **options)
    no_waiting()
    output_and_gradients(attention, inputs, cotangents, **options)


def test_waiting_is_seen(no_waiting):
    """Negative control."""
    x = torch.ones(1, device="cuda")
    no_waiting()
    with pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cuda_graph_replays_with_other_inputs(name):
    options = option_tensors_on_gpu(OPTIONS[name])

    def random_inputs(seed: int) -> list[Tensor]:
        return [x.detach().cuda() for x in draw_inputs(300, batch=1, head_dim=64, dtype=torch.bfloat16, seed=seed)]

    static = [x.requires_grad_() for x in random_inputs(0)]
    cotangents = [torch.ones(1, 300, 4, 64, device="cuda"), torch.ones(1, 4, 300, device="cuda")]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        output_and_gradients(attention, static, cotangents, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = output_and_gradients(attention, static, cotangents, **options)
    for seed in (1, 2):
        others = random_inputs(seed)
        with torch.no_grad():
            for x, y in zip(static, others, strict=True):
                x.copy_(y)
        graph.replay()
        found = {key: x.clone() for key, x in results.items()}
        if name == "dropout":
            graph.replay()
            assert not torch.equal(found["out"], results["out"])
            continue
        expected = output_and_gradients(attention, [x.requires_grad_() for x in others], cotangents, **options)
        for key, x in found.items():
            assert torch.equal(x, expected[key]), key


def test_any_current_device_and_stream():
    inputs = [x.detach().cuda().requires_grad_() for x in draw_inputs(300, batch=1, head_dim=64, dtype=torch.bfloat16)]
    expected = output_and_gradients(attention, inputs, eps=1e-4)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = output_and_gradients(attention, inputs, eps=1e-4)
    stream.synchronize()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name
