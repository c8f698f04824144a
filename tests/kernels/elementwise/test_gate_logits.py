"""Logits of forget gates by a kernel: against float64, and no less exact than torch in float32."""

import pytest
import torch

from foxlm.kernels.backends import PYTORCH, TRITON
from foxlm.kernels.elementwise import triton_gate_logits
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS

pytestmark = ON_KERNELS

DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "gates", "hidden"), [(70, 3, 96), (64, 16, 128), (101, 33, 200), (1, 5, 40), (17, 24, 1100)]
)
def test_logits(tokens, gates, hidden, dtype, monkeypatch):
    # A view of something larger, whose rows are not contiguous.
    x = torch.randn(2, tokens, hidden + 5).to(DEVICE, dtype)[..., 3:-2]
    weight, bias = torch.randn(gates, hidden).to(DEVICE), 3.0 * torch.randn(gates).to(DEVICE)
    exact = x.double() @ weight.double().T + bias.double()
    expected = PYTORCH.gate_logits(x, weight, bias)
    called = []
    monkeypatch.setattr(triton_gate_logits, "gate_logits_in_pytorch", lambda *_: called.append(1))
    with torch.no_grad():
        found = TRITON.gate_logits(x, weight, bias)
    assert not called and found.dtype == torch.float32
    error, of_torch = ((y - exact).norm().item() for y in (found, expected))
    assert error <= 2.0 * max(of_torch, 1e-7 * exact.norm().item())


@pytest.mark.parametrize("case", ["gradients", "no tokens", "float32", "16-bit weights", "too many gates"])
def test_what_is_left_to_torch(case):
    x = torch.randn(
        1, 0 if case == "no tokens" else 70, 32, dtype=torch.float32 if case == "float32" else torch.float16
    )
    weight = torch.randn(65 if case == "too many gates" else 2, 32)
    weight = weight.half() if case == "16-bit weights" else weight
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    bias = torch.zeros_like(weight[:, 0])
    with torch.set_grad_enabled(case == "gradients"):
        assert torch.equal(TRITON.gate_logits(x, weight, bias), PYTORCH.gate_logits(x, weight, bias))


@pytest.mark.parametrize("tokens", [1, 70])
def test_log_sigmoid(tokens):
    """Each value rounded once: those of slow gates are tiny, and of what never forgets zero."""
    x, weight = torch.zeros(tokens, 32, device=DEVICE, dtype=torch.float16), torch.randn(64, 32, device=DEVICE)
    bias = torch.cat([torch.linspace(-100.0, 80.0, 60), torch.tensor([0.0, 13.9, 128.0, -2e4])]).to(DEVICE)
    exact = torch.nn.functional.logsigmoid(bias.double())
    with torch.no_grad():
        found = TRITON.gate_logits(x, weight, bias, log_sigmoid=True)
        logits = TRITON.gate_logits(x, weight, bias)
        expected = PYTORCH.gate_logits(x, weight, bias, log_sigmoid=True)
    assert torch.equal(logits, bias.expand(tokens, -1)) and found.dtype == torch.float32
    assert ((found - exact).abs() <= 2.0**-23 * exact.abs() + 2.0**-149).all()
    torch.testing.assert_close(found, expected, rtol=2.0**-22, atol=0.0)
