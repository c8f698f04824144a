"""The output norm with the output gate, as one kernel and as two modules that somebody watches or replaces."""

from typing import Any

import pytest
import torch
from torch import nn

from foxlm import FoxConfig
from foxlm.kernels.elementwise.gated_norm import ACTIVATIONS
from foxlm.modeling.layers.attention import FoxAttention
from foxlm.modeling.layers.block import FoxDecoderLayer
from foxlm.modeling.layers.norm import FoxRMSNorm
from kernel_device import DEVICES


def attention(device: str, **fields: Any) -> FoxAttention:
    torch.manual_seed(0)
    config = FoxConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, **fields)
    layer = FoxAttention(config, layer_idx=0).to(device)
    nn.init.normal_(layer.output_norm.weight, 1.0, 0.5)
    return layer


def output_and_gradients(layer: FoxAttention, device: str) -> list[torch.Tensor]:
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    out, _ = layer(hidden)
    out.square().sum().backward()
    return [out.detach(), hidden.grad, layer.output_norm.weight.grad, layer.output_gate.weight.grad]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("watched", ["output_norm", "output_gate_act"])
def test_hooks_see_norm_and_gate_apart(watched, activation, device):
    expected = output_and_gradients(attention(device, output_gate_act=activation), device)
    layer, seen = attention(device, output_gate_act=activation), []
    getattr(layer, watched).register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    torch.testing.assert_close(output_and_gradients(layer, device), expected)
    (inputs, output), *others = seen
    assert not others and len(inputs) == 1
    if watched == "output_norm":
        normalized = output / layer.output_norm.weight.view(4, 16)
        torch.testing.assert_close(normalized.square().mean(-1), torch.ones(2, 9, 4, device=device), rtol=1e-2, atol=0)
    else:
        torch.testing.assert_close(output, ACTIVATIONS[activation](inputs[0]))


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_a_hook_sees_the_norm_before_the_mlp(device):
    config = FoxConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    layer, seen = FoxDecoderLayer(config, layer_idx=0).to(device).eval(), []
    nn.init.normal_(layer.post_attention_layernorm.weight, 1.0, 0.5)
    hidden = torch.randn(2, 9, 64, device=device)
    expected = layer(hidden)
    layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    torch.testing.assert_close(layer(hidden), expected)
    ((total, normalized),) = seen
    torch.testing.assert_close(total + layer.mlp(normalized), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_in_place_of_the_activation(device):
    layer = attention(device)
    layer.output_gate_act = nn.Tanh()
    hidden = torch.randn(1, 5, 64, device=device)
    expected = []
    layer.output_norm.register_forward_hook(lambda module, inputs, output: expected.append(output.flatten(-2)))
    taken = []
    layer.o_proj.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    layer(hidden)
    layer.output_norm._forward_hooks.clear()
    layer(hidden)
    gate = layer.output_gate(hidden).tanh()
    torch.testing.assert_close(taken, [expected[0] * gate] * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_in_place_of_the_norm(device):
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer: Any = attention(device)
    layer.output_norm = Doubled()
    hidden = torch.randn(1, 5, 64, device=device)
    with torch.no_grad():
        out, _ = layer(hidden)
        layer.output_norm = nn.Identity()
        plain, _ = layer(hidden)
    torch.testing.assert_close(out, 2 * plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", ["whole", "heads"])
@torch.no_grad()
def test_a_trace_holds_the_norm(weight, device):
    """A kernel that is launched past the dispatcher would be a constant in it."""
    norm = FoxRMSNorm(32 if weight == "whole" else 3 * 32, 1e-6).to(device)
    x, gate = torch.randn(2, 4, 3, 32, device=device), torch.randn(2, 4, 96, device=device)
    examples = (x,) if weight == "whole" else (x, gate)
    traced = torch.jit.trace(norm, examples)
    others = tuple(2 * example + 1 for example in examples)
    torch.testing.assert_close(traced(*others), norm(*others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype(dtype):
    norm = FoxRMSNorm(64, 1e-6)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
        with torch.no_grad():
            assert norm(x).dtype == dtype
    assert out.dtype == dtype
    torch.testing.assert_close(out, nn.functional.rms_norm(x.float(), (64,), norm.weight, 1e-6).to(dtype))
