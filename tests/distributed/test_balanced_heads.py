"""Balancing heads over ranks by decay time leaves the model's outputs as they were."""

import pytest
import torch

from foxlm.conversion.balance_heads import balance_heads
from models import assert_close, tiny_model, tokens

# Every weight that has a part for each head, and those that look as if they had.
LAYOUTS = [
    "pro",
    "llama",
    "shared-qk-norm",
    "all-heads-qk-norm",
    "biases",
    "key-value-gates",
    "bias-only",
    "fixed",
    "rope",
]


@pytest.mark.parametrize("variant", LAYOUTS)
def test_the_model_computes_what_it_did(variant: str) -> None:
    model = tiny_model(variant, num_attention_heads=8, num_key_value_heads=4)
    ids = tokens(2, 19)
    expected = model(ids).logits
    before = {name: x.clone() for name, x in model.state_dict().items()}
    balance_heads(model, 2)
    assert_close(model(ids).logits, expected)
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("gates", ["query", "key_value"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_remembers_as_long(ranks: int, gates: str) -> None:
    model = tiny_model(num_attention_heads=16, num_key_value_heads=8, forget_gate_heads=gates)
    layer = model.model.layers[0].self_attn
    # As in a new model: decay times ascend over the heads.
    with torch.no_grad():
        layer.forget_gate.bias.copy_(torch.arange(layer.forget_gate.bias.numel()))
    balance_heads(model, ranks)
    shares = layer.forget_gate.bias.view(8, -1).amax(-1).view(ranks, -1)
    assert shares.sum(-1).unique().numel() == 1
    assert torch.equal(shares, shares.sort(descending=True).values)
    # The longest memories are on different ranks.
    assert (
        shares[:, 0].tolist()
        == layer.forget_gate.bias.view(8, -1).amax(-1).sort(descending=True).values[:ranks].tolist()
    )


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks must be positive, got 0"):
        balance_heads(tiny_model(), 0)
    with pytest.raises(ValueError, match=r"^ranks must divide num_key_value_heads \(2\), got 4"):
        balance_heads(tiny_model(), 4)
    with pytest.raises(ValueError, match="model must have forget gates"):
        balance_heads(tiny_model("gateless"), 2)
