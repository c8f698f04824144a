"""The kernels of an attention sink: as exact as torch, deterministic, and with autograd as torch has it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_inputs import attention, draw_inputs, draw_sink, output_and_gradients, with_sink
from foxlm.kernels.backends import PYTORCH, TRITON, Backend
from kernel_device import DEVICE, DTYPES, ON_KERNELS

pytestmark = ON_KERNELS

NAMES = ("out", "lse", "d_out", "d_lse", "dq", "dsink_k", "dsink_v")
# How many times torch's error is allowed, in the norm and at the largest element.
ALLOWED = {2.0: 2.0, torch.inf: 3.0}


def draw(batch: int, length: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Leaves: attention's output and log-sum-exp, queries, and key and value of a sink; one row sees no key."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out, q = normal(batch, length, heads, size), normal(batch, length, heads, size)
    lse, sinks = 3.0 * normal(batch, heads, length), 2.0 * normal(2, kv_heads, size)
    out[0, 0], lse[0, :, 0] = 0.0, -torch.inf
    tensors = [x.to(dtype) for x in (out, q, *sinks)]
    tensors.insert(1, lse)
    return [x.to(DEVICE).requires_grad_() for x in tensors]


def results(backend: Backend, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Output, log-sum-exp and gradients, in float64 on the CPU."""
    found = backend.add_sink(*inputs, inputs[2].shape[-1] ** -0.5)
    gradients = torch.autograd.grad(found, inputs, grads)
    return [x.detach().cpu().double() for x in (*found, *gradients)]


def assert_as_exact_as_torch(inputs: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in inputs[:2]]
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = results(PYTORCH, wide, [x.cpu().double() for x in grads])
    ours, theirs = (results(backend, inputs, grads) for backend in (TRITON, PYTORCH))
    for name, a, b, c in zip(NAMES, ours, theirs, exact, strict=True):
        assert a.isfinite().all(), name
        for order, times in ALLOWED.items():
            found, limit = (torch.linalg.vector_norm(error, order).item() for error in (a - c, b - c))
            assert found <= times * limit + 1e-30, f"{name}: {found:.1e} against {limit:.1e} of torch, order {order}"


@pytest.mark.smoke
@pytest.mark.parametrize("size", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_near_that_of_torch(dtype, size):
    assert_as_exact_as_torch(draw(2, 37, 4, 2, size, dtype))


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 1, 1, 1), (1, 700, 2, 2), (1, 131, 33, 3)], ids=str)
def test_error_in_every_shape(shape: tuple[int, int, int, int]):
    assert_as_exact_as_torch(draw(*shape, size=64, dtype=torch.float32))


def test_gradients_are_deterministic_and_of_what_is_asked():
    inputs = draw(2, 300, 4, 2, 64, torch.bfloat16)
    d_out = torch.ones_like(inputs[0])
    first, second = (
        torch.autograd.grad(TRITON.add_sink(*inputs, 0.125)[0], inputs[2:], d_out, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        assert not TRITON.add_sink(*inputs, 0.125)[0].requires_grad


def test_views_are_read_where_they_lie():
    inputs = draw(2, 20, 4, 2, 16, torch.float32)
    expected = TRITON.add_sink(*inputs, 0.25)
    moved = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    for a, b in zip(TRITON.add_sink(*moved, 0.25), expected, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_torchs():
    inputs = [x.detach().requires_grad_() for x in draw(1, 5, 2, 1, 16, torch.float32)]
    found = []
    for backend in (TRITON, PYTORCH):
        out, _ = backend.add_sink(*inputs, 0.25)
        (dq,) = torch.autograd.grad(out.square().sum(), inputs[2], create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), inputs[3])[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2}, {"eps": 1e-2, "rule": "measured"}], ids=str)
def test_attention_on_kernels_is_that_in_pytorch(options: dict[str, Any]):
    inputs = draw_sink(draw_inputs(200, batch=2, head_dim=16, dtype=torch.float32))
    exact = output_and_gradients(with_sink(attention), [x.detach().double().requires_grad_() for x in inputs])
    moved = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    found = output_and_gradients(with_sink(attention), moved, **options)
    for name, x in found.items():
        worst = (x.cpu().double() - exact[name]).abs().max()
        # A row may lose so much of its weight, and what it loses is within the range of values.
        allowed = 2.0 * options.get("eps", 0.0) * inputs[2].abs().max() if name == "out" else torch.inf
        assert worst <= max(allowed if options else 0.0, 2e-5 * exact[name].abs().max()), f"{name}: {worst:.1e}"
