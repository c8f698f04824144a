"""What eager training keeps for the backward pass, and that gradients are those of keeping everything."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foxlm import FoxConfig
from foxlm.modeling.layers import block as block_fox
from foxlm.modeling.layers.block import FoxDecoderLayer
from foxlm.modeling.layers.fused_projections import FusableProjections
from foxlm.modeling.layers.saved_activations import cast_once, computed_again
from kernel_device import DEVICES, INTERPRETED, ON_KERNELS

# To Triton's interpreter bfloat16 is integers: what it computes of them overflows.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOKENS, HIDDEN = 40, 64


def layer_of(device: str, **fields: Any) -> FoxDecoderLayer:
    torch.manual_seed(0)
    config = FoxConfig(hidden_size=HIDDEN, intermediate_size=96, num_attention_heads=4, num_hidden_layers=1, **fields)
    return FoxDecoderLayer(config, layer_idx=0).to(device).train()


def output_and_gradients(layer: nn.Module, device: str) -> list[Tensor]:
    hidden = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    with torch.autocast(device, HALF):
        out = layer(hidden)
    layer.zero_grad()
    out.square().sum().backward()
    grads = [hidden.grad, *(x.grad for x in layer.parameters())]
    return [out.detach(), *(grad.clone() for grad in grads if grad is not None)]


def kept_bytes(layer: nn.Module, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Tensors of a type and shape, ``[all tokens, ...]``, that are kept, by the memory that they are in."""
    memories: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.dtype == dtype and (x.flatten(0, -2).shape == shape):
            memories[x.untyped_storage().data_ptr()] = x
        return x

    hidden = torch.randn(2, TOKENS, HIDDEN, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(device, HALF):
        layer(hidden)
    return len(memories)


# ---- One cast


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fields", [{}, {"use_key_shift": False, "use_output_gate": False, "qk_norm": "none"}], ids=str)
def test_one_cast_gives_what_casts_of_each_projection_give(
    fields: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(device, **fields)
    found, kept = output_and_gradients(layer, device), kept_bytes(layer, device, HALF, (2 * TOKENS, HIDDEN))
    monkeypatch.setattr(FusableProjections, "_project_one_cast", lambda self, x: {})
    expected = output_and_gradients(layer, device)
    more = kept_bytes(layer, device, HALF, (2 * TOKENS, HIDDEN))
    assert torch.equal(found[0], expected[0])
    # Sums of the same numbers in another order.
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-4)
    attention = layer.self_attn
    readers = sum(name.partition(".")[0] in dict(attention.named_children()) for name in attention.projections)
    assert more - kept == (readers - 1) + 1


@pytest.mark.parametrize("change", ["hook", "module", "no autocast", "half precision", "eager function"])
def test_projections_are_called_with_what_they_are_given_where_somebody_watches(change: str) -> None:
    layer, seen = layer_of("cpu"), []
    mlp: Any = layer.mlp

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().forward(x)

    if change == "module":
        mlp.up_proj = Watched(HIDDEN, 96, bias=False)
    else:
        mlp.up_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    dtype = HALF if change == "half precision" else torch.float32
    layer.to(dtype)
    with torch.autocast("cpu", HALF, enabled=change != "no autocast"):
        layer(torch.randn(2, TOKENS, HIDDEN, dtype=dtype))
    assert seen == [dtype]


def test_gradients_of_readers_are_added_in_float32() -> None:
    x = torch.ones(3, requires_grad=True)
    one, other, unread = cast_once(x, HALF, 3)
    assert one.dtype == HALF and one.data_ptr() == other.data_ptr() == unread.data_ptr()
    (grad,) = torch.autograd.grad((one * 256).sum(), x, retain_graph=True)
    assert torch.equal(grad, torch.full((3,), 256.0))
    (grad,) = torch.autograd.grad((one * 256).float().sum() + other.float().sum(), x)
    # Which bfloat16 would round to 256.
    assert torch.equal(grad, torch.full((3,), 257.0))


def test_second_derivatives_of_a_shared_cast() -> None:
    def second(read: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        x = torch.tensor([0.5, 2.0], requires_grad=True)
        a, b = read(x)
        (first,) = torch.autograd.grad((a.float() ** 2 * b.float()).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    found = second(lambda x: cast_once(x, HALF, 2))  # type: ignore[arg-type, return-value]
    torch.testing.assert_close(found, second(lambda x: (x.bfloat16(), x.bfloat16())))
    assert found.abs().sum() > 0


# ---- Computed again


def product(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


class Gated(nn.Module):
    """Counts how often `product` is computed."""

    def __init__(self, again: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.again, self.computed = again, 0

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        self.computed += 1
        return product(gate, up)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        activated = self.product(gate, up)
        if not self.again:
            return self.down(activated)
        with computed_again(activated, self.product, gate, up):
            return self.down(activated)


def gradients(module: Gated, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = (call or module)(x)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    # Through the same graph, twice.
    return [first.detach(), *torch.autograd.grad(first.square().sum() + out.sum(), [x, *module.parameters()])]


def test_what_is_computed_again_has_the_same_gradients() -> None:
    module = Gated()
    torch.testing.assert_close(gradients(module), gradients(Gated(again=False)), rtol=0, atol=0)
    assert module.computed > 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_gradient_checkpointing(reentrant: bool) -> None:
    def run(module: Gated) -> list[Tensor]:
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(y.grad for y in module.parameters() if y.grad is not None)]

    torch.testing.assert_close(run(Gated()), run(Gated(again=False)), rtol=0, atol=0)


def test_what_is_offloaded_is_not_computed_again() -> None:
    module = Gated()
    with torch.autograd.graph.save_on_cpu():
        out = module(torch.randn(2, 5, 8))
    out.sum().backward()
    assert module.computed == 1


def test_nothing_is_computed_again_where_hooks_are_forbidden() -> None:
    module = Gated()
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"):
        out = module(torch.randn(2, 5, 8))
    out.sum().backward()
    assert module.computed == 1


@pytest.mark.parametrize("again", [False, True])
def test_a_weight_that_changes_is_an_error(again: bool) -> None:
    module = Gated(again)
    out = module(torch.randn(2, 5, 8))
    with torch.no_grad():
        module.down.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        out.sum().backward()


class TestOnKernels:
    pytestmark = ON_KERNELS

    def test_an_mlp_keeps_no_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kernel_device import DEVICE

        layer, made = layer_of(DEVICE), []

        def noted(x: Tensor, *rest: Any) -> Any:
            made.append(x.shape)
            return computed_again(x, *rest)

        monkeypatch.setattr(block_fox, "computed_again", noted)
        found = output_and_gradients(layer, DEVICE)
        assert made == [(2, TOKENS, 96)]
        monkeypatch.setattr(block_fox, "is_called_as_matmul", lambda module: False)
        expected = output_and_gradients(layer, DEVICE)
        assert len(made) == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
