"""The auxiliary loss on forget gates: its definition, off by default, right under every kind of training."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from foxlm import FoxConfig
from foxlm.modeling.losses import forget_aux_loss
from models import tiny_model, tokens


def loss_of(model: Callable[..., Any], ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, labels=ids, **inputs).loss


def term(coefficient: float, variant: str = "pro", **inputs: Tensor) -> float:
    """By how much a loss in training is more with the term than without."""
    ids = tokens(2, 40)
    losses = [
        loss_of(tiny_model(variant, dtype=torch.float64, forget_aux_loss_coef=x).train(), ids, **inputs)
        for x in (coefficient, 0.0)
    ]
    return (losses[0] - losses[1]).item()


def test_share_is_all_without_decay_and_half_at_thirty_nats() -> None:
    never, half = torch.full((2, 10, 3), 200.0), torch.full((2, 10, 3), math.log(math.exp(-3.0) / -math.expm1(-3.0)))
    assert forget_aux_loss([never], None).item() == 1.0
    assert forget_aux_loss([half], None).item() == pytest.approx(0.5, rel=1e-5)
    assert forget_aux_loss([half, never], None).item() == pytest.approx(0.75, rel=1e-5)
    real = torch.ones(2, 10, dtype=torch.bool)
    real[:, :5] = False
    assert forget_aux_loss([half], real).item() == pytest.approx(30 / 45, rel=1e-5)


@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates"])
def test_loss_in_training_is_more_by_the_share(variant: str) -> None:
    model = tiny_model(variant, dtype=torch.float64)
    logits: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.forget_gate.register_forward_hook(lambda module, args, out: logits.append(out))
    model(tokens(2, 40))
    assert term(0.7, variant) == pytest.approx(0.7 * forget_aux_loss(logits, None).item(), rel=1e-9)


def test_padding_is_not_paid_for() -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[:, :10] = 0
    assert term(1.0, attention_mask=mask) > term(1.0) > 0


def test_evaluation_is_without() -> None:
    ids = tokens(2, 40)
    models = [tiny_model("pro", forget_aux_loss_coef=x).eval() for x in (0.0, 1.0)]
    assert torch.equal(*(loss_of(model, ids) for model in models))
    assert FoxConfig().forget_aux_loss_coef == 0.0


def test_gradient_with_checkpointing() -> None:
    model = tiny_model("pro", dtype=torch.float64, forget_aux_loss_coef=50.0).train()
    plain = tiny_model("pro", dtype=torch.float64, forget_aux_loss_coef=50.0).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(2, 40)
    for one in (model, plain):
        loss_of(one, ids, use_cache=False).backward()
    gates = [layer.self_attn.forget_gate.bias.grad for layer in model.model.layers]
    expected = [layer.self_attn.forget_gate.bias.grad for layer in plain.model.layers]
    for found, right in zip(gates, expected, strict=True):
        torch.testing.assert_close(found, right)
    # It pays for forgetting: descent lowers every gate's bias.
    assert all((grad > 0).all() for grad in gates)


def test_reentrant_checkpointing_would_lose_the_gradient() -> None:
    model = tiny_model("pro", forget_aux_loss_coef=1.0).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        loss_of(model, tokens(2, 40), use_cache=False)


def test_compiled_loss() -> None:
    ids = tokens(2, 40)
    model = tiny_model("pro", forget_aux_loss_coef=1.0).train()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(loss_of(compiled, ids, use_cache=False), loss_of(model, ids, use_cache=False))


def test_gradient_accumulation_of_the_trainer(tmp_path) -> None:
    rows = [{"input_ids": x, "labels": x} for x in tokens(4, 24)]

    def step(batch: int) -> list[nn.Parameter]:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
        )
        model = tiny_model("pro", forget_aux_loss_coef=5.0)
        Trainer(model, arguments, train_dataset=rows).train()
        return list(model.parameters())

    for whole, parts in zip(step(4), step(1), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_shifted_labels_are_what_counts() -> None:
    """As sequence parallelism gives them: a part of a row has the target of its last token too."""
    ids = tokens(2, 40)
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    shifted[:, :30] = -100
    more = [
        loss_of(tiny_model("pro", forget_aux_loss_coef=x).train(), ids, shift_labels=shifted, **given)
        for given in ({}, {"num_items_in_batch": 36})
        for x in (1.0, 0.0)
    ]
    # All there is to predict are 18 tokens.
    torch.testing.assert_close((more[0] - more[1]) / 2, more[2] - more[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["fixed", "none"])
def test_coefficient_set_later_for_gates_that_do_not_learn(gate: str) -> None:
    model = tiny_model("pro", forget_gate=gate).train()
    model.config.forget_aux_loss_coef = 1.0
    with pytest.raises(ValueError, match=f"forget_aux_loss_coef must be 0 with forget_gate '{gate}'"):
        loss_of(model, tokens(2, 40))


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, "much"])
def test_wrong_coefficients(value: object) -> None:
    with pytest.raises(Exception, match="forget_aux_loss_coef"):
        FoxConfig(forget_aux_loss_coef=value)


@pytest.mark.parametrize("gate", ["fixed", "none"])
def test_gates_that_do_not_learn_cannot_be_paid(gate: str) -> None:
    with pytest.raises(Exception, match="forget_aux_loss_coef has no effect"):
        FoxConfig(forget_gate=gate, forget_aux_loss_coef=0.1)
