"""Loss by position: the model's own loss, token by token, and intervals that cover it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foxlm.evaluation import loss_by_position as module
from foxlm.evaluation.loss_by_position import by_interval, loss_by_position
from models import tiny_model, tokens


def test_losses_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("pro", dtype=torch.float32).eval(), tokens(3, 50)
    # Parts that do not divide the row.
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7)
    losses = loss_by_position(model, rows)
    assert losses.shape == (3, 49) and losses.dtype == torch.float32
    for end in (2, 30, 50):
        expected = model(rows[:, :end], labels=rows[:, :end]).loss.item()
        assert losses[:, : end - 1].mean().item() == pytest.approx(expected, rel=1e-5)


def test_any_language_model_will_do() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    rows = tokens(2, 20)
    assert loss_by_position(model, rows).mean().item() == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)


def test_intervals_hold_the_mean_of_their_positions() -> None:
    losses = torch.arange(10.0) + 0.1 * torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    first, second = by_interval(losses, [0, 4, 10])
    assert (first["start"], first["end"], second["start"], second["end"]) == (0, 4, 4, 10)
    assert first["mean"] == pytest.approx(losses[:, :4].mean().item(), rel=1e-5)
    assert first["low"] < first["mean"] < first["high"] < second["low"] < second["mean"] < second["high"]
    # 95% of normal means over 40 rows of 4 numbers each.
    assert first["high"] - first["low"] == pytest.approx(2 * 1.96 * 0.1 / 160**0.5, rel=0.3)
    assert by_interval(losses, [0, 10]) == by_interval(losses, [0, 10])
    (same,) = by_interval(losses - losses, [0, 10])
    assert same["low"] == same["high"] == 0.0
