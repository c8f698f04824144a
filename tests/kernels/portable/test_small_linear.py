"""Linear layers of one row: as exact as torch's matmul, and that itself where their kernel does not run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.backends import HAS_TRITON, PYTORCH, TRITON
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.portable import small_linear

pytestmark = ON_KERNELS

DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
# Sizes that no block divides, and of the presets.
SIZES = [(48, 32), (100, 37), (5, 1)] if INTERPRETED else [(1536, 6208), (4096, 1536), (700, 250), (5, 1)]


def draw(rows: tuple[int, ...], size: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(*rows, size), torch.randn(features, size) / size**0.5, torch.randn(features)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch from now on."""
    found: list[int] = []
    launch = small_linear._launch_linear

    def counted(x: Tensor, *more: Any) -> Tensor:
        found.append(x.shape[:-1].numel())
        return launch(x, *more)

    monkeypatch.setattr(small_linear, "_launch_linear", counted)
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("rows", [(1, 1), (1,)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_error_is_near_that_of_torch(dtype, sizes, rows, gated, monkeypatch):
    size, features = sizes
    x, weight, bias = draw(rows, size, features * (1 + gated), dtype)
    reference: Any = PYTORCH.gated_linear if gated else nn.functional.linear
    launched = launches(monkeypatch)
    for with_bias in (None, bias):
        exact, theirs = (
            reference(*(None if one is None else one.to(kind) for one in (x, weight, with_bias)))
            for kind in (torch.float64, dtype)
        )
        found = (TRITON.gated_linear if gated else TRITON.linear)(x, weight, with_bias)
        assert found.shape == (*rows, features) and found.dtype == dtype
        error, of_torch = ((one.double() - exact).norm().item() for one in (found, theirs))
        assert error <= 2.0 * max(of_torch, 0.5 * torch.finfo(dtype).eps * exact.norm().item())
    assert len(launched) == 2


@pytest.mark.parametrize(
    "case", ["gradients", "two rows", "float32", "no rows", "autocast", "strided weight", "strided input", "mixed"]
)
def test_what_is_left_to_torch(case, monkeypatch):
    x, weight, _ = draw(({"two rows": 2, "no rows": 0}.get(case, 1),), 48, 32, DTYPES[0])
    launched = launches(monkeypatch)
    if case == "float32":
        x, weight = x.float(), weight.float()
    if case == "strided weight":
        weight = weight.repeat(1, 2)[:, ::2]
    if case == "strided input":
        x = x.repeat(1, 2)[:, ::2]
    with torch.set_grad_enabled(case == "gradients"):
        if case == "mixed":
            with pytest.raises(RuntimeError, match="dtype"):
                TRITON.linear(x, weight.float())
        elif case == "autocast":
            with torch.autocast(torch.device(DEVICE).type, DTYPES[0]):
                TRITON.linear(x, weight)
        else:
            for function in (TRITON.linear, TRITON.gated_linear):
                assert function(x, weight).shape[:-1] == x.shape[:-1]
    assert launched == []


@torch.no_grad()
def test_shapes_that_do_not_fit_are_torchs_error():
    x, weight, bias = draw((1,), 48, 32, DTYPES[0])
    for given in ((x[:, :40].contiguous(), weight), (x, weight, bias[:7].contiguous())):
        for function in (TRITON.linear, TRITON.gated_linear):
            with pytest.raises(RuntimeError):
                function(*given)


@torch.no_grad()
def test_an_mlp_alone_takes_any_number_of_dimensions():
    config = FoxConfig.preset("pro-125m", num_hidden_layers=1, hidden_size=64, num_attention_heads=2, vocab_size=64)
    mlp = FoxForCausalLM(config).to(DEVICE, DTYPES[0]).eval().model.layers[0].mlp
    x = torch.randn(64, device=DEVICE).to(DTYPES[0])
    for shape in ((64,), (1, 64), (1, 1, 64)):
        assert mlp(x.view(shape)).shape == shape


def step(model: FoxForCausalLM, rows: int) -> Tensor:
    """Logits of a token after others."""
    ids = torch.arange(rows * 9, device=DEVICE).view(rows, 9) % 64
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        return model(ids[:, 8:], past_key_values=cache).logits.float()


@pytest.mark.parametrize("watched", ["nothing", "mlp.down_proj", "self_attn.o_proj", "mlp.act_fn", "mlp.up_proj"])
def test_a_step_of_one_sequence(watched, monkeypatch):
    """All matmuls of a layer but those that somebody watches; and the same logits as with matmuls of torch."""
    config = FoxConfig.preset("pro-125m", num_hidden_layers=1, hidden_size=64, num_attention_heads=2, vocab_size=64)
    model = FoxForCausalLM(config).to(DEVICE, DTYPES[0]).eval()
    model.fuse_projections()
    seen: list[Tensor] = []
    if watched != "nothing":
        model.model.layers[0].get_submodule(watched).register_forward_hook(lambda *given: seen.append(given[2]))
    launched = launches(monkeypatch)
    logits = step(model, 1)
    # Projections of attention and of the MLP, and the two that follow them.
    assert launched == [1] * {"nothing": 4, "mlp.act_fn": 3}.get(watched, 3)
    assert len(seen) == (0 if watched == "nothing" else 2)
    monkeypatch.setattr(small_linear, "_takes", lambda *_: False)
    torch.testing.assert_close(step(model, 1), logits, rtol=0.02, atol=0.02)
    launched.clear()
    step(model, 2)
    assert launched == []
