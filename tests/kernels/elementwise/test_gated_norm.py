"""The kernels of the output norm and gate: as exact as torch, deterministic, and with autograd as torch has it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foxlm.kernels.backends import PYTORCH, TRITON, backend_of
from foxlm.kernels.elementwise.gated_norm import ACTIVATIONS
from foxlm.modeling.layers.norm import FoxRMSNorm
from kernel_device import DEVICE, DTYPES, ON_KERNELS, ONLY_COMPILED

pytestmark = ON_KERNELS

EPS = 1e-6
# How many times torch's error is allowed, in the norm and at the largest element.
ALLOWED = {2.0: 2.0, torch.inf: 3.0}


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, shared: bool = False, gated: bool = True, scale: float = 1.0
) -> list[Tensor]:
    """Leaves: ``x [*shape]``, weight and, if ``gated``, the projections that the gate is a part of."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, size = shape[-2:]
    inputs = [normal(*shape) * scale, 1 + 0.5 * normal(size if shared else heads * size)]
    if gated:
        inputs.append(2 * normal(*shape[:-2], heads * size + 16))
    return [x.to(DEVICE, dtype).requires_grad_() for x in inputs]


def run(function: Callable[..., Tensor], inputs: list[Tensor], activation: str = "sigmoid") -> Tensor:
    x, weight, *projections = inputs
    gate = projections[0][..., 16:] if projections else None
    return function(x, weight, EPS, gate, activation)


def results(function: Callable[..., Tensor], inputs: list[Tensor], activation: str, d_out: Tensor) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU."""
    out = run(function, inputs, activation)
    found = out, *torch.autograd.grad(out, inputs, d_out)
    return [x.detach().cpu().double() for x in found]


def assert_as_exact_as_torch(inputs: list[Tensor], activation: str = "sigmoid") -> None:
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = results(PYTORCH.gated_norm, wide, activation, d_out.cpu().double())
    ours, theirs = (results(backend.gated_norm, inputs, activation, d_out) for backend in (TRITON, PYTORCH))
    for name, a, b, c in zip(("out", "x", "weight", "gate"), ours, theirs, exact, strict=False):
        assert a.isfinite().all(), name
        for order, times in ALLOWED.items():
            found, limit = (torch.linalg.vector_norm(error, order).item() for error in (a - c, b - c))
            assert found <= times * limit, f"{name}: {found:.1e} against {limit:.1e} of torch, order {order}"


@pytest.mark.smoke
def test_the_kernels_are_what_runs():
    inputs = draw(2, 5, 2, 32)
    assert backend_of(inputs[0]) is TRITON
    assert "_GatedNorm" in str(run(TRITON.gated_norm, inputs).grad_fn)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_near_that_of_torch(dtype, size, activation):
    assert_as_exact_as_torch(draw(2, 37, 3, size, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2, 64), (3, 1, 1, 80), (700, 2, 16), (1, 131, 33, 64)], ids=str)
def test_error_in_every_shape(shape, dtype):
    """One token, one head, no batch; and more tokens than a program of the backward pass takes at once."""
    assert_as_exact_as_torch(draw(*shape, dtype=dtype))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_without_a_gate(dtype, shared):
    assert_as_exact_as_torch(draw(2, 37, 3, 80, dtype=dtype, shared=shared, gated=False))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e18])
def test_error_at_every_magnitude(scale):
    assert_as_exact_as_torch(draw(1, 19, 2, 64, scale=scale))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zeros_and_saturated_gates(activation):
    x, weight, projections = draw(1, 13, 1, 64)
    with torch.no_grad():
        x[:, 1:3] = 0.0
        gates = torch.tensor([0.0, -0.0, 8.0, -8.0, 20.3, -20.3, -45.3, -60.7, -70.1, 88.0, -88.0, 1e30, -1e30])
        projections[..., 16:] = gates.to(x).view(1, -1, 1)
    inputs = [x, weight, projections]
    assert_as_exact_as_torch(inputs, activation)
    # Each gate by itself: small ones do not show beside large ones.
    exact = run(PYTORCH.gated_norm, [leaf.double() for leaf in inputs], activation)
    torch.testing.assert_close(run(TRITON.gated_norm, inputs, activation).double(), exact, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row(value):
    x, weight, projections = draw(1, 6, 2, 32)
    with torch.no_grad():
        x[0, 1, 0, 3] = value
        projections[0, 4, 20] = value
    ours, theirs = (run(backend.gated_norm, [x, weight, projections], "silu") for backend in (TRITON, PYTORCH))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours[0, [0, 2, 3, 5]].isfinite().all() and ours[0, 1, 1].isfinite().all()


def test_inputs_as_they_lie_in_memory():
    x, weight, projections = draw(2, 9, 3, 48)
    expected = run(TRITON.gated_norm, [x, weight, projections])
    others = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.mT.contiguous().mT,
        torch.stack([x, x], dim=-2)[..., 1, :],
    ]
    for other in others:
        assert not other.is_contiguous()
        assert torch.equal(run(TRITON.gated_norm, [other, weight, projections]), expected)
    scattered = projections.mT.contiguous().mT
    assert torch.equal(run(TRITON.gated_norm, [x, weight, scattered]), expected)
    # The gradient of a sum is one value at stride zero.
    ours, theirs = (
        torch.autograd.grad(run(b.gated_norm, [x, weight, projections]).sum(), x)[0] for b in (TRITON, PYTORCH)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1536, 8192])
def test_rows_of_a_whole_layer(size):
    """Of mixed dtypes, as norms in float32 beside a model in half precision are."""
    x, weight = draw(1, 3, 1, size, dtype=torch.float16, shared=True, gated=False)
    assert_as_exact_as_torch([x, weight.detach().float().requires_grad_()])


def test_weights_of_another_dtype():
    x, weight, projections = draw(2, 9, 3, 48, dtype=torch.float16)
    weight = weight.detach().float().requires_grad_()
    assert_as_exact_as_torch([x, weight, projections])
    out = run(TRITON.gated_norm, [x, weight, projections])
    assert out.dtype == torch.float16 and torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32
    # And a gate of another dtype, which torch takes care of.
    ours, theirs = (run(backend.gated_norm, [x, weight, projections.float()]) for backend in (TRITON, PYTORCH))
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32


def test_no_tokens():
    inputs = draw(2, 0, 3, 32)
    out = run(TRITON.gated_norm, inputs)
    assert out.shape == (2, 0, 3, 32)
    assert [grad.abs().sum() for grad in torch.autograd.grad(out.sum(), inputs)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_deterministic(dtype):
    inputs = draw(2, 150, 3, 64, dtype=dtype)
    first, second = (results(TRITON.gated_norm, inputs, "silu", torch.ones_like(inputs[0])) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        assert torch.equal(run(TRITON.gated_norm, inputs, "silu").cpu().double(), first[0])


@pytest.mark.parametrize("needed", [[0], [1], [2], [0, 2]], ids=str)
def test_gradients_of_some_inputs_only(needed):
    inputs = draw(2, 9, 3, 32)
    for i, x in enumerate(inputs):
        x.requires_grad_(i in needed)
    leaves = [inputs[i] for i in needed]
    ours, theirs = (torch.autograd.grad(run(b.gated_norm, inputs).square().sum(), leaves) for b in (TRITON, PYTORCH))
    torch.testing.assert_close(ours, theirs)


def second_derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    first = torch.autograd.grad(run(function, inputs, "silu").square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum((x.square().sum() for x in first), torch.zeros((), device=DEVICE)), inputs)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("own_gate", [True, False])
def test_second_derivatives(own_gate):
    found = []
    for backend in (TRITON, PYTORCH):
        inputs = draw(1, 4, 2, 16)
        if not own_gate:
            # Computed from the norm's input, whose gradient must not count that path twice.
            inputs[2] = nn.functional.pad(inputs[0].sin().flatten(-2), (16, 0))
        found.append(second_derivatives(backend.gated_norm, inputs))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform):
    x, weight, projections = (leaf.detach() for leaf in draw(1, 2, 2, 16))
    ours, theirs = (
        TRANSFORMS[transform](lambda y, f=f: run(f, [y, weight, projections]), x)
        for f in (TRITON.gated_norm, PYTORCH.gated_norm)
    )
    torch.testing.assert_close(ours, theirs)


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """What autograd keeps for backward, less weights."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_with_weights_for_each_head_saves_its_inputs(gated):
    x, gate = (torch.randn(2, 40, 4, 64, device=DEVICE, dtype=torch.float16, requires_grad=True) for _ in range(2))
    norm = FoxRMSNorm(4 * 64, EPS).to(x)
    assert saved_bytes(lambda: norm(x, gate.flatten(-2)) if gated else norm(x)) == x.nbytes * (2 if gated else 1)


@ONLY_COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_norm_of_one_dtype_saves_its_input_and_a_value_for_each_row(dtype):
    x = torch.randn(2, 40, 512, device=DEVICE, dtype=dtype, requires_grad=True)
    norm = FoxRMSNorm(512, EPS).to(x)
    assert saved_bytes(lambda: norm(x)) == x.nbytes + 2 * 40 * 4


@ONLY_COMPILED
@pytest.mark.parametrize("rows", [300, 70_000])
@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_of_a_norm_of_one_dtype(dtype, size, rows):
    """Torch's kernel, or ours where that rounds sums of the weight's gradient: see `_torch_fuses`."""
    torch.manual_seed(0)
    x = torch.randn(rows, size, device=DEVICE, dtype=dtype, requires_grad=True)
    norm = FoxRMSNorm(size, EPS).to(x)
    d_out = torch.randn_like(x)
    # Parts of this sum cancel.
    d_out[rows // 2 :] = -d_out[: rows - rows // 2]
    with torch.no_grad():
        x[rows // 2 :] = x[: rows - rows // 2] + 1e-2 * torch.randn_like(x[rows // 2 :])
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, norm.weight)]
    exact = results(PYTORCH.gated_norm, wide, "sigmoid", d_out.cpu().double())
    theirs = results(PYTORCH.gated_norm, [x, norm.weight], "sigmoid", d_out)
    out = norm(x)
    ours = [y.detach().cpu().double() for y in (out, *torch.autograd.grad(out, [x, norm.weight], d_out))]
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 64, 1536, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_after_a_residual_connection(dtype: torch.dtype, size: int) -> None:
    """The sum is torch's; the norm of it as exact as torch's, for any strides."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 7, size + 3, generator=generator).to(DEVICE, dtype)[..., :size] for _ in range(2))
    weight = (1 + 0.5 * torch.randn(size, generator=generator)).to(DEVICE, dtype)
    total, found = TRITON.add_and_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert found.dtype == dtype and found.is_contiguous()
    by_torch = nn.functional.rms_norm(total, (size,), weight, EPS).cpu().double()
    exact = nn.functional.rms_norm(total.cpu().double(), (size,), weight.cpu().double(), EPS)
    for order, times in ALLOWED.items():
        errors = [torch.linalg.vector_norm(a - exact, order).item() for a in (found.cpu().double(), by_torch)]
        assert errors[0] <= times * errors[1] + 1e-12


def test_the_norm_after_a_residual_connection_has_gradients() -> None:
    x, residual = (torch.randn(2, 5, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    total, found = TRITON.add_and_norm(x, residual, weight, EPS)
    assert total.requires_grad and found.requires_grad
    assert len(torch.autograd.grad(found.square().sum() + total.sum(), [x, residual, weight])) == 3
