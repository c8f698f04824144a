"""The kernels of the MLP's activation: as exact as torch, and with autograd as torch has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foxlm import FoxConfig
from foxlm.kernels.backends import PYTORCH, TRITON, elementwise_backend_of
from foxlm.modeling.layers.block import FoxMLP
from kernel_device import DEVICE, DTYPES, ON_KERNELS

pytestmark = ON_KERNELS

# How many times torch's error is allowed, in the norm and at the largest element.
ALLOWED = {2.0: 2.0, torch.inf: 3.0}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> list[Tensor]:
    """Leaves ``gate`` and ``up``."""
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_() for _ in ("gate", "up")
    ]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU."""
    out = function(*inputs)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    return [x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, inputs, d_out.to(out)))]


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 1100), (5, 1023), (3, 2048), (0, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_near_that_of_torch(dtype, shape):
    inputs = draw(*shape, dtype=dtype)
    d_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out = PYTORCH.silu_product(*wide)
    exact = [out, *torch.autograd.grad(out, wide, d_out.double())]
    ours, theirs = (results(backend.silu_product, inputs) for backend in (TRITON, PYTORCH))
    for name, a, b, c in zip(("out", "gate", "up"), ours, theirs, exact, strict=True):
        for order, times in ALLOWED.items() if c.numel() else ():
            found, limit = (torch.linalg.vector_norm(error, order).item() for error in (a - c, b - c))
            assert found <= times * limit, f"{name}: {found:.1e} against {limit:.1e} of torch, order {order}"


def test_saturated_gates():
    gates = [
        0.0,
        -0.0,
        8.0,
        -8.0,
        20.0,
        -20.0,
        88.0,
        -88.0,
        150.0,
        -150.0,
        3e38,
        -3e38,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    gate = torch.tensor(gates, device=DEVICE, requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    exact = results(PYTORCH.silu_product, [gate.double(), up.double()])
    found = results(TRITON.silu_product, [gate, up])
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-36, equal_nan=True)


def test_inputs_as_they_lie_in_memory():
    gate, up = draw(2, 9, 48)
    expected = TRITON.silu_product(gate, up)
    halves = torch.cat([gate, up], dim=-1).split(48, dim=-1)
    assert torch.equal(TRITON.silu_product(*halves), expected)
    assert torch.equal(
        TRITON.silu_product(gate.mT.contiguous().mT, up.transpose(0, 1).contiguous().mT.mT.transpose(0, 1)), expected
    )
    ours, theirs = (torch.autograd.grad(b.silu_product(gate, up).sum(), [gate, up]) for b in (TRITON, PYTORCH))
    torch.testing.assert_close(ours, theirs)


def test_a_graph_may_be_walked_through_again():
    inputs = draw(3, 40)
    out = TRITON.silu_product(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), inputs), first))


def test_second_derivatives():
    inputs = draw(3, 8)
    found = []
    for function in (TRITON.silu_product, PYTORCH.silu_product):
        # The gate is computed from the other input, whose gradient must not count that path twice.
        out = function(inputs[1].sin() + inputs[0], inputs[1])
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        found += [first, torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), inputs)]
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacfwd])
def test_transforms_of_torch_func(transform):
    gate, up = (x.detach() for x in draw(2, 4))
    ours, theirs = (
        transform(lambda x, f=f: f(x, up).square().sum())(gate) for f in (TRITON.silu_product, PYTORCH.silu_product)
    )
    torch.testing.assert_close(ours, theirs)


def mlp(**fields: str) -> FoxMLP:
    torch.manual_seed(0)
    config = FoxConfig(hidden_size=32, intermediate_size=72, num_attention_heads=2, num_hidden_layers=1, **fields)
    return FoxMLP(config).to(DEVICE)


def test_the_mlp_saves_gate_and_up():
    layer, kept = mlp(), set()
    x = torch.randn(2, 5, 32, device=DEVICE)
    weights = {w.data_ptr() for w in layer.parameters()}

    def pack(saved: Tensor) -> Tensor:
        if saved.data_ptr() not in weights:
            kept.add((saved.data_ptr(), saved.numel()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    # Its input, gate, up, and their product.
    assert sum(numel for _, numel in kept) == 2 * 5 * (32 + 3 * 72)
    assert elementwise_backend_of(x) is TRITON


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu"}], ids=str)
def test_the_mlp(fields):
    layer = mlp(**fields)
    x = torch.randn(2, 5, 32, device=DEVICE, requires_grad=True)
    seen: list[Tensor] = []
    out = layer(x)
    handle = layer.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hooked = layer(x)
    handle.remove()
    torch.testing.assert_close(out, hooked)
    act = nn.functional.gelu if fields else nn.functional.silu
    torch.testing.assert_close(seen, [act(layer.gate_proj(x))])
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, hooked)))
