"""Token shift, QK-norm and RoPE in one kernel: against float64, and no less exact than torch in the same dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import PYTORCH, TRITON
from foxlm.kernels.elementwise import triton_prologue
from foxlm.kernels.elementwise.prologue import PrologueInputs
from kernel_device import DEVICE, DTYPES, INTERPRETED, ON_KERNELS, SOME_DTYPES

pytestmark = ON_KERNELS

EPS = 1e-5
# More than two blocks of tokens, and no multiple of anything.
TOKENS = 37 if INTERPRETED else 331
HEADS = (2, 1) if INTERPRETED else (6, 3)
DIFFERENTIABLE = ("q", "k", "v", "key_logits", "value_logits", "q_weight", "k_weight")

CASES: dict[str, dict[str, Any]] = {
    "pro": {},
    "rope": {"rotated": 16},
    "partial rope": {"rotated": 6},
    "rope of each sequence": {"rotated": 16, "positions_of_each": True},
    "shared norm": {"norm": "shared", "rotated": 16},
    "no norm": {"norm": None, "rotated": 16},
    "only rope, no shift": {"norm": None, "rotated": 16, "shifted": ()},
    "only norm": {"shifted": ()},
    "only shift": {"norm": None},
    "only keys": {"shifted": ("key",)},
    "only values": {"shifted": ("value",)},
    "only values, nothing else": {"shifted": ("value",), "norm": None},
    "one token": {"tokens": 1, "rotated": 16},
    "one token with a past": {"tokens": 1, "past": True},
    "past": {"past": True, "rotated": 16},
    "packed": {"packed": True, "rotated": 16},
    "views of one projection": {"strided": True, "rotated": 16},
    "a head for each": {"heads": (2, 2), "rotated": 16},
    "head of 80": {"head_dim": 80, "rotated": 80},
    "head of 96": {"head_dim": 96, "rotated": 32},
    "head of 128": {"head_dim": 128, "rotated": 128},
    "head of 256": {"head_dim": 256, "tokens": 19},
    "odd head": {"head_dim": 5},
    "odd head, partial rope": {"head_dim": 5, "rotated": 2},
    # With a norm it would have no gradient but what rounding leaves.
    "head of 1": {"head_dim": 1, "norm": None},
}
PADDED: dict[str, dict[str, Any]] = {
    "padded": {"padded": True},
    "padded with a past": {"padded": True, "past": True, "rotated": 16},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few tokens."""
    if INTERPRETED:
        monkeypatch.setattr(triton_prologue, "_PROLOGUE_TILE", 256)


def draw(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    tokens: int = TOKENS,
    heads: tuple[int, int] = HEADS,
    head_dim: int = 16,
    norm: str | None = "per_head",
    shifted: tuple[str, ...] = ("key", "value"),
    rotated: int = 0,
    positions_of_each: bool = False,
    past: bool = False,
    packed: bool = False,
    padded: bool = False,
    strided: bool = False,
) -> PrologueInputs:
    """Random inputs on the kernels' device, of which the differentiable ones are leaves."""
    h, g = heads

    def random(*shape: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(DEVICE, of)

    sizes = [h * head_dim, g * head_dim, g * head_dim, g, g]
    if strided:
        parts = list(random(batch, tokens, sum(sizes) + 1)[..., 1:].split(sizes, -1))
    else:
        parts = [random(batch, tokens, size) for size in sizes]
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in parts[:3])
    weights = {None: (None, None), "shared": (head_dim, head_dim), "per_head": (h * head_dim, g * head_dim)}[norm]
    angles = 10.0 * torch.randn(batch if positions_of_each else 1, tokens, max(1, rotated // 2))
    # Not the same in both halves, as transformers has them: nothing says so.
    cos, sin = (x.repeat(1, 1, 2).to(DEVICE, dtype) for x in (angles.cos(), angles.sin()))
    cos[..., -1], sin[..., 0] = 0.75, -0.25
    real = torch.rand(batch, tokens) < 0.6
    return PrologueInputs(
        q=q,
        k=k,
        v=v,
        key_logits=2.0 * parts[3] if "key" in shifted else None,
        value_logits=2.0 * parts[4] if "value" in shifted else None,
        key_past=random(batch, 3, g, head_dim)[:, -1] if past and "key" in shifted else None,
        value_past=random(batch, 3, g, head_dim)[:, -1] if past and "value" in shifted else None,
        q_weight=None if weights[0] is None else random(weights[0]),
        k_weight=None if weights[1] is None else random(weights[1], of=torch.float32),
        cos=cos if rotated else None,
        sin=sin if rotated else None,
        starts=(torch.rand(batch, tokens) < 0.2).to(DEVICE) if packed else None,
        last_real=last_real(real).to(DEVICE) if padded else None,
    )


def last_real(real: Tensor) -> Tensor:
    index = torch.where(real, torch.arange(real.shape[1]), -1).cummax(1).values
    return torch.cat([torch.full((len(real), 1), -1), index], 1)


def converted(inputs: PrologueInputs, dtype: torch.dtype | None = None) -> PrologueInputs:
    """Copies as leaves of the same strides; of floating-point numbers in ``dtype``, if given."""
    values = {}
    for name, x in inputs._asdict().items():
        if x is not None and x.is_floating_point():
            x = x.detach() if dtype is None else x.detach().to(dtype)
            x = x.requires_grad_(name in DIFFERENTIABLE)
        values[name] = x
    return PrologueInputs(**values)


def in_pytorch(inputs: PrologueInputs) -> list[Tensor]:
    """As a model computes it without kernels: each part in float32 or wider, and rounded."""
    x = inputs
    q, k, v = x.q, x.k, x.v
    wide = torch.promote_types(q.dtype, torch.float32)

    def shift(states: Tensor, logits: Tensor | None, past: Tensor | None) -> Tensor:
        if logits is None:
            return states
        before = torch.zeros_like(states[:, :1]) if past is None else past[:, None]
        extended = torch.cat([before, states], 1)
        if x.last_real is None:
            previous = extended[:, :-1]
        else:
            previous = torch.stack([row[index[:-1] + 1] for row, index in zip(extended, x.last_real, strict=True)])
        if x.starts is not None:
            previous = previous.masked_fill(x.starts[..., None, None], 0.0)
        alpha = logits.to(wide).sigmoid()[..., None]
        return torch.lerp(states.to(wide), previous.to(wide), alpha).to(states.dtype)

    def normalize(states: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return states
        states = states.to(wide)
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + EPS)
        weight = weight if weight.numel() == states.shape[-1] else weight.view(-1, states.shape[-1])
        return (weight * states).to(q.dtype)

    def rotate(states: Tensor) -> Tensor:
        if x.cos is None or x.sin is None:
            return states
        size = x.cos.shape[-1]
        first, second = states[..., :size].chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        turned = states[..., :size] * x.cos[:, :, None] + turned * x.sin[:, :, None]
        return torch.cat([turned.to(states.dtype), states[..., size:]], -1)

    k, v = shift(k, x.key_logits, x.key_past), shift(v, x.value_logits, x.value_past)
    return [rotate(normalize(q, x.q_weight)), rotate(normalize(k, x.k_weight)), v]


def results(function: Any, inputs: PrologueInputs, cotangents: list[Tensor] | None) -> dict[str, Tensor]:
    """Outputs by name and, with cotangents, gradients by ``d`` and name."""
    out = function(inputs)
    found = dict(zip(("new q", "new k", "new v"), out, strict=True))
    if cotangents is not None:
        leaves = {n: x for n, x in inputs._asdict().items() if x is not None and x.requires_grad}
        outputs = [(x, y.to(x.dtype)) for x, y in zip(out, cotangents, strict=True)]
        grads = torch.autograd.grad([x for x, _ in outputs], list(leaves.values()), [y for _, y in outputs])
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def on_kernels(inputs: PrologueInputs) -> tuple[Tensor, Tensor, Tensor]:
    out = TRITON.prologue(inputs, EPS)
    assert out is not None
    return out


def check(inputs: PrologueInputs, *, gradients: bool = True) -> None:
    """No output or gradient is more than twice as far from float64's as torch's in the same dtype."""
    dtype = inputs.q.dtype
    cotangents = [torch.randn(x.shape).to(DEVICE, dtype) for x in inputs[:3]] if gradients else None
    if cotangents:
        # Not contiguous, as attention's may be.
        cotangents = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in cotangents]
    exact = results(in_pytorch, converted(inputs, torch.float64), cotangents)
    expected = results(in_pytorch, converted(inputs), cotangents)
    with torch.set_grad_enabled(gradients):
        found = results(on_kernels, converted(inputs), cotangents)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype and x.shape == expected[name].shape, name
        error, of_torch = ((y.double() - exact[name]).norm().item() for y in (x, expected[name]))
        # A few values may be rounded well by luck.
        least = 0.5 * torch.finfo(x.dtype).eps * exact[name].norm().item()
        assert error <= 2.0 * max(of_torch, least), f"{name}: {error:.2e}, of torch {of_torch:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case: str, dtype: torch.dtype) -> None:
    inputs = draw(dtype, **CASES[case])
    check(inputs)
    check(inputs, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PADDED)
def test_padding_is_skipped(case: str, dtype: torch.dtype) -> None:
    check(draw(dtype, **PADDED[case]), gradients=False)


@pytest.mark.smoke
def test_the_kernel_is_what_runs() -> None:
    inputs = draw(torch.float32, rotated=16)
    out = TRITON.prologue(converted(inputs), EPS)
    assert out is not None and all(x.grad_fn is not None and "Prologue" in str(x.grad_fn) for x in out)
    assert PYTORCH.prologue(inputs, EPS) is None
    check(inputs)


@pytest.mark.parametrize("case", ["one token", "past", "only values", "padded with a past"])
def test_a_past_in_a_ring_is_the_state_that_the_slot_names(case: str) -> None:
    inputs = draw(SOME_DTYPES[0], **(CASES | PADDED)[case] | {"past": True})
    ring = {
        name: torch.randn(len(x), 4, *x.shape[1:]).to(x)
        for name in ("key_past", "value_past")
        if (x := getattr(inputs, name)) is not None
    }
    for slot in (0, 3):
        alone = inputs._replace(**{name: x[:, slot] for name, x in ring.items()})
        slots = torch.tensor([slot, 1], device=DEVICE)
        with torch.no_grad():
            found, expected = on_kernels(inputs._replace(**ring, past_slot=slots)), on_kernels(alone)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["one token", "pro", "only values", "views of one projection", "head of 80"])
def test_a_past_of_each_token_takes_the_place_of_the_token_before(case: str) -> None:
    inputs = draw(SOME_DTYPES[0], **CASES[case] | {"past": True})

    def before(states: Tensor, past: Tensor | None) -> Tensor | None:
        return None if past is None else torch.cat([past[:, None], states[:, :-1]], 1)

    of_each = inputs._replace(
        key_past=before(inputs.k, inputs.key_past), value_past=before(inputs.v, inputs.value_past)
    )
    for one, other in zip(on_kernels(inputs), on_kernels(of_each), strict=True):
        assert torch.equal(one, other)
    of_each = converted(of_each)
    assert TRITON.prologue(of_each, EPS) is None
    with torch.no_grad():
        assert TRITON.prologue(of_each, EPS) is not None


def test_gradients_are_the_same_bits_each_time() -> None:
    inputs = draw(SOME_DTYPES[0], rotated=16, norm="shared")
    cotangents = [torch.randn_like(x) for x in inputs[:3]]
    first, second = (results(on_kernels, converted(inputs), cotangents) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_large_state_does_not_blur_a_small_one() -> None:
    """A gate that takes all of the state before leaves nothing of the own one, however large."""
    inputs = draw(torch.float32, norm=None, tokens=8)
    assert inputs.key_logits is not None
    inputs.key_logits.fill_(100.0)
    inputs.k[:, 1::2] *= 1e6
    out = on_kernels(inputs)
    torch.testing.assert_close(out[1][:, 1::2], inputs.k[:, 0::2], rtol=1e-6, atol=0.0)


def test_nothing_to_do_returns_what_came() -> None:
    inputs = draw(torch.float32, norm=None, shifted=())
    assert all(x is y for x, y in zip(on_kernels(inputs), inputs[:3], strict=True))
    inputs = draw(torch.float32, shifted=("key",))
    assert on_kernels(inputs)[2] is inputs.v


@pytest.mark.parametrize(
    "refused",
    ["float64", "mixed dtypes", "no tokens", "gradient of a past", "gradient of padding", "gradient of angles", "meta"],
)
def test_what_is_left_to_pytorch(refused: str) -> None:
    inputs = draw(torch.float32, rotated=16, past=True)
    if refused == "float64":
        inputs = converted(inputs, torch.float64)
    elif refused == "mixed dtypes":
        inputs = inputs._replace(v=inputs.v.half())
    elif refused == "no tokens":
        inputs = draw(torch.float32, tokens=0)
    elif refused == "meta":
        assert inputs.q_weight is not None
        inputs = inputs._replace(q_weight=inputs.q_weight.to("meta"))
    else:
        name = {"past": "key_past", "angles": "cos"}.get(refused.split()[-1], "q")
        x = getattr(inputs, name)
        inputs = inputs._replace(**{name: x.requires_grad_()})
        if name == "q":
            inputs = inputs._replace(last_real=last_real(torch.ones(2, TOKENS, dtype=torch.bool)).to(DEVICE))
    assert TRITON.prologue(inputs, EPS) is None


def test_forward_mode_and_transforms_are_left_to_pytorch() -> None:
    inputs = draw(torch.float32, norm=None)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.make_dual(inputs.k, torch.ones_like(inputs.k))
        assert TRITON.prologue(inputs._replace(k=tangent), EPS) is None
    taken = []

    def mapped(k: Tensor) -> Tensor:
        taken.append(TRITON.prologue(inputs._replace(k=k), EPS))
        return k

    torch.func.vmap(mapped)(inputs.k[None])
    assert taken == [None]


def test_a_second_derivative_is_refused() -> None:
    inputs = converted(draw(torch.float32, tokens=3))
    (grad,) = torch.autograd.grad(on_kernels(inputs)[1].sum(), inputs.k, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
