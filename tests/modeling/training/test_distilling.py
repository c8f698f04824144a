"""What finetunes a graft: the distance to its base as a loss, and a share of skipped attention as a goal."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from base_models import base
from foxlm import training as training_fox
from foxlm.conversion.graft import graft
from foxlm.training import DistillingTrainer, FoxTrainer, SkippedShareRamp, distance
from models import tokens


def rows(count: int = 8, length: int = 40) -> list[dict[str, Tensor]]:
    return [{"input_ids": x, "labels": x} for x in tokens(count, length)]


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 3e-2, "seed": 0}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **(options | changed))


def grafted(**options: Any) -> Any:
    return graft(base(), **({"decay_times": (4, 64)} | options)).train()


def expected_distance(model: Any, teacher: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        ours, theirs = (x(ids).logits.double().log_softmax(-1) for x in (model, teacher))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


def test_distance_is_the_mean_divergence_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_fox, "_TOKENS_OF_A_CHUNK", 3)
    logits, expected = torch.randn(2, 2, 5, 7).unbind()
    logits.requires_grad_()
    real = torch.rand(2, 5) < 0.6
    theirs = expected.softmax(-1)
    each = (theirs * (expected.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    for mask, wanted in ((None, each.mean()), (real, each[real].mean())):
        found = distance(logits, expected, mask)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True) for x in (found, wanted)))
    assert distance(logits, logits.detach()).abs() < 1e-6
    assert distance(logits, expected, torch.zeros(2, 5, dtype=torch.bool)) == 0


def test_the_loss_is_the_distance_and_the_regularisation(tmp_path: Path) -> None:
    teacher, ids = graft(base(), forget_gate="none"), tokens(2, 40)
    for coefficient in (0.0, 2.0):
        model = grafted()
        model.config.forget_aux_loss_coef = coefficient
        trainer = DistillingTrainer(model, arguments(tmp_path), teacher=teacher)
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        with torch.no_grad():
            outputs = model(ids, labels=torch.full_like(ids, -100))
        torch.testing.assert_close(loss.double(), expected_distance(model, teacher, ids) + outputs.loss.double())
        assert (outputs.loss > 0) == (coefficient > 0)


def test_padding_is_no_part_of_the_loss(tmp_path: Path) -> None:
    model, teacher, ids = grafted(), graft(base(), forget_gate="none"), tokens(1, 40)
    trainer = DistillingTrainer(model, arguments(tmp_path), teacher=teacher)
    padded, mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1), torch.ones(1, 49, dtype=torch.long)
    mask[:, :9] = 0
    found = trainer.compute_loss(model, {"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(found, trainer.compute_loss(model, {"input_ids": ids}), rtol=1e-4, atol=1e-6)


def test_gates_learn_to_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model, source = grafted(), base()
    teacher = graft(source, forget_gate="none")
    for name, weight in model.named_parameters():
        weight.requires_grad_(".forget_gate." in name)
    before = expected_distance(model, teacher, tokens(8, 40))
    kept = {name: weight.clone() for name, weight in teacher.named_parameters()}
    trainer = DistillingTrainer(model, arguments(tmp_path, max_steps=30), teacher=teacher, train_dataset=rows())
    trainer.train()
    assert expected_distance(model, teacher, tokens(8, 40)) < 0.7 * before
    for name, weight in teacher.named_parameters():
        assert torch.equal(weight, kept[name]) and not weight.requires_grad
    assert trainer.evaluate(rows(2))["eval_loss"] > 0


def test_micro_batches_have_the_gradient_of_their_batch(tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (1, 4)):
        model = grafted()
        changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        # SGD: the change of a weight is its gradient.
        training = arguments(tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **changed)
        before = [x.detach().clone() for x in model.parameters()]
        teacher = graft(base(), forget_gate="none")
        DistillingTrainer(model, training, teacher=teacher, train_dataset=rows(4)).train()
        found.append([a - b for a, b in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_distilled_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher must have the vocabulary of the model, 97 tokens, got 98"):
        DistillingTrainer(grafted(), arguments(tmp_path), teacher=base(vocab_size=98))
    model = grafted()
    model.config.loss_chunk_size = 64
    with pytest.raises(ValueError, match="loss_chunk_size must be None to be distilled, got 64"):
        DistillingTrainer(model, arguments(tmp_path), teacher=base())


# ---- The ramp


def follow(ramp: SkippedShareRamp, shares: list[float]) -> list[float]:
    """Weights after each log of a share, one every ten steps."""
    model: Any = SimpleNamespace(config=SimpleNamespace())
    ramp.on_train_begin(None, None, None, model=model)
    weights = []
    for index, share in enumerate(shares):
        logs = {"skipped_share": share}
        state: Any = SimpleNamespace(global_step=10 * index, log_history=[dict(logs)])
        ramp.on_log(None, state, None, model=model, logs=logs)
        assert logs["forget_aux_loss_coef"] == state.log_history[-1]["forget_aux_loss_coef"]
        weights.append(model.config.forget_aux_loss_coef)
    return weights


def test_the_weight_follows_what_is_missing() -> None:
    # Wanted are 0.1, 0.3, 0.5 and 0.5.
    found = follow(SkippedShareRamp(0.5, 20, coefficient=0.2, gain=1.0), [0.1, 0.1, 0.6, 0.5])
    wanted = [0.2 * torch.tensor(x).exp().item() for x in (0.0, 0.2, 0.1, 0.1)]
    assert found == pytest.approx(wanted)
    ramp = SkippedShareRamp(0.5, 20)
    ramp.on_log(None, None, None, logs={"loss": 1.0})
    assert ramp.first_share is None


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def train(steps: int, **changed: Any) -> SkippedShareRamp:
        torch.manual_seed(0)
        ramp = SkippedShareRamp(0.9, 4, coefficient=0.5)
        training = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2, **changed)
        model = grafted()
        trainer = FoxTrainer(model, training, train_dataset=rows(8, 300), callbacks=[ramp])
        trainer.train(resume_from_checkpoint=bool(changed) or None)
        (used,) = (x for x in trainer.callback_handler.callbacks if isinstance(x, SkippedShareRamp))
        assert model.config.forget_aux_loss_coef == used.coefficient
        return used

    whole = train(4)
    assert whole.coefficient != 0.5
    (tmp_path / "checkpoint-4").rename(tmp_path / "finished")
    resumed = train(4, restore_callback_states_from_checkpoint=True)
    assert (resumed.coefficient, resumed.first_share) == pytest.approx((whole.coefficient, whole.first_share))


def test_attention_is_skipped_that_was_not(tmp_path: Path) -> None:
    model = grafted(decay_times=1000.0)
    model.config.acp_eps = 1e-2
    trainer = FoxTrainer(
        model,
        arguments(tmp_path, max_steps=60, learning_rate=0.1),
        train_dataset=rows(4, 512),
        callbacks=[SkippedShareRamp(0.3, 30, coefficient=1.0)],
    )
    trainer.train()
    shares = [log["skipped_share"] for log in trainer.state.log_history if "skipped_share" in log]
    assert shares[0] < 0.05 and max(shares) > 0.2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"goal": 1.0}, r"goal must be a share in \(0, 1\), got 1.0"), ({"steps": 0}, "steps must be above 0, got 0")]
    + [({name: value}, f"{name} must be above 0") for name in ("coefficient", "gain") for value in (0.0, -1.0)],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SkippedShareRamp(**({"goal": 0.5, "steps": 10} | wrong))
