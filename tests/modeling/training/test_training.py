"""Training by transformers' Trainer and by hand: what should not change a result does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from foxlm.modeling.versions import CACHE, cache_of
from models import IMPLEMENTATIONS, assert_close, tiny_model, tokens


def patterns(count: int, length: int = 12) -> list[dict[str, list[int]]]:
    """Sequences that repeat a short random word: to be learned by looking back."""
    return [
        {"input_ids": (ids := tokens(4, seed=seed).repeat(length // 4).tolist()), "labels": ids}
        for seed in range(count)
    ]


def trainer(model: Any, folder: Path, data: list, **arguments: Any) -> Trainer:
    collator = arguments.pop("data_collator", None)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(defaults | arguments)),
        train_dataset=data,
        **({} if collator is None else {"data_collator": collator}),
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trainable(variant: str = "pro", **overrides: Any) -> Any:
    return tiny_model(variant, dtype=torch.float32, initializer_range=0.1, **overrides).train()


@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_trainer_learns(variant: str, tmp_path: Path) -> None:
    run = trainer(trainable(variant), tmp_path, patterns(16), max_steps=40, logging_steps=4)
    run.train()
    history = losses(run)
    assert history[0] > 3.5 and history[-1] < 0.5 * history[0], history


@pytest.mark.versions
def test_trainer_learns_from_packed_sequences(tmp_path: Path) -> None:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    run = trainer(trainable(), tmp_path, patterns(16), max_steps=30, logging_steps=3, data_collator=collator)
    run.train()
    history = losses(run)
    assert history[-1] < 0.6 * history[0], history


def test_trainer_with_label_smoothing(tmp_path: Path) -> None:
    run = trainer(trainable(), tmp_path, patterns(8), max_steps=20, label_smoothing_factor=0.1)
    run.train()
    history = losses(run)
    assert history[-1] < 0.8 * history[0], history


@pytest.mark.versions
def test_language_modeling_collator_pads_and_trains(tmp_path: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(97)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")), pad_token="t0"
    )
    data = [{"input_ids": entry["input_ids"][: 5 + index % 6]} for index, entry in enumerate(patterns(16))]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert (collator(data[:2])["attention_mask"] == 0).any()
    run = trainer(trainable(), tmp_path, data, max_steps=30, data_collator=collator)
    run.train()
    history = losses(run)
    assert history[-1] < 0.7 * history[0], history


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path) -> None:
    """The batches have different numbers of labels: a mean of their means would differ."""
    data = patterns(4)
    for index, entry in enumerate(data):
        entry["labels"] = [-100] * (3 * index) + entry["labels"][3 * index :]
    results = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        run = trainer(
            tiny_model(dtype=torch.float64),
            tmp_path,
            data,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
        )
        run.train()
        results.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
    start = dict(tiny_model(dtype=torch.float64).named_parameters())
    for name, expected in results[0].items():
        assert (expected - start[name]).abs().max() > 1e-6, f"{name} did not move"
        for other in results[1:]:
            assert_close(other[name], expected, 1e-7)  # transformers takes the loss in float32


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    data = patterns(16)
    whole = trainer(trainable(), tmp_path, data, max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(trainable(), tmp_path / "again", data, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout: float, implementation: str) -> None:
    model = tiny_model(attention_dropout=dropout).train()
    model.set_attn_implementation(implementation)
    expected = gradients(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        actual = gradients(model)
        for name, gradient in actual.items():
            assert_close(gradient, expected[name], 1e-12)


def gradients(model: Any, seed: int = 11, length: int = 9) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    ids = tokens(2, length)
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_acts_in_training_alone(implementation: str) -> None:
    model, plain = tiny_model(attention_dropout=0.5), tiny_model()
    model.set_attn_implementation(implementation)
    plain.set_attn_implementation(implementation)
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    plain.train()
    torch.manual_seed(1)
    first = model(ids).logits
    assert (first - plain(ids).logits).abs().max() > 1e-2
    assert (first - model(ids).logits).abs().max() > 1e-2, "two passes drop the same weights"
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["pro", "llama", "bias-only"])
def test_autocast_keeps_the_gates_in_float32(variant: str, implementation: str) -> None:
    model = trainable(variant)
    model.set_attn_implementation(implementation)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.forget_gate.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    ids = tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert len(seen) == 2
    for layer, (x, logits) in zip(model.model.layers, seen, strict=True):
        assert logits.dtype == torch.float32
        gate = layer.self_attn.forget_gate
        expected = gate.bias.expand_as(logits)
        if variant != "bias-only":
            expected = x.double() @ gate.weight.double().T + gate.bias.double()
        # bfloat16 would be off by 4e-3.
        assert_close(logits.double(), expected.double(), 1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert_close(out.logits.float(), model(ids).logits, 0.1)


def test_trainer_in_bfloat16(tmp_path: Path) -> None:
    run = trainer(trainable(), tmp_path, patterns(16), max_steps=30, bf16=True)
    run.train()
    history = losses(run)
    assert history[-1] < 0.7 * history[0], history


@pytest.mark.parametrize(
    ("variant", "implementation", "backend"),
    [("pro", "fox_reference", "aot_eager"), ("rope", "sdpa", "eager"), ("olmo", "fox_reference", "aot_eager")],
)
def test_compiled_is_eager(variant: str, implementation: str, backend: str) -> None:
    """One graph, without breaks, for lengths that change; forward and backward."""
    model = tiny_model(variant, num_hidden_layers=1).train()
    model.set_attn_implementation(implementation)
    expected = {length: gradients(model, length=length) for length in (9, 12, 31)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length, wanted in expected.items():
        for name, gradient in gradients(compiled, length=length).items():
            assert_close(gradient, wanted[name.removeprefix("_orig_mod.")], 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "compiled anew for each length"


def test_compiled_with_padding_and_packing() -> None:
    model = tiny_model(num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    ids = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = mask[1, 7:] = 0
    kept = mask.bool()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[kept]
        assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits[kept], expected)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        expected = model(ids[:1], position_ids=positions).logits
        assert_close(compiled(ids[:1], position_ids=positions, use_cache=False).logits, expected)


def test_checkpointing_beside_earlier_tokens_is_refused() -> None:
    """transformers takes the cache from checkpointed layers: their queries would see tokens to come."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    model(tokens(1, 4), cache=DynamicCache(config=model.config)).logits.sum().backward()
    cache = cache_of(tiny_model()(tokens(1, 4), use_cache=True))
    with pytest.raises(ValueError, match=rf"{CACHE} must be empty"):
        model(tokens(1, 4), cache=cache)
