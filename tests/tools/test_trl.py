"""TRL's trainers on a FoX model: supervised, with preferences, with rewards, and of reward models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foxlm import FoxForCausalLM
from foxlm.modeling.modeling_fox import FoxForSequenceClassification
from foxlm.training import FoxTrainer
from models import tiny_model
from word_tokenizer import sentence, word_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

TEXTS = [{"text": sentence(7 * i, 5 + i % 7)} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": sentence(i, 3)}, {"role": "assistant", "content": sentence(i + 3, 4)}]}
    for i in range(8)
]
PAIRS = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w{i + 2}", "rejected": f" w{i + 5}"} for i in range(8)]


def model_for(model_class: Any = FoxForCausalLM, **overrides: Any) -> Any:
    sizes: dict[str, Any] = {"initializer_range": 0.1, "eos_token_id": 2}
    return tiny_model(model_class=model_class, dtype=torch.float32, **sizes, **overrides)


def train(trainer: str, rows: list[dict[str, Any]], folder: Path, model: Any = None, **options: Any) -> Any:
    """The trainer after 2 steps on the CPU, each on all rows in their order unless ``options`` say otherwise."""
    given = {name: options.pop(name) for name in ("ref_model", "reward_funcs", "peft_config") if name in options}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(rows),
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    kind = getattr(trl, f"{trainer}Trainer")
    done = (type("Mine", (FoxTrainer, kind), {}) if options.pop("watched", False) else kind)(
        model_for() if model is None else model,
        args=getattr(trl, f"{trainer}Config")(**settings | options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        **given,
    )
    done.train()
    return done


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("layout", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 128}])
def test_supervised_on_rows_without_padding_gives_the_loss_of_padded_rows(layout: dict, tmp_path: Path) -> None:
    """Decay and token shift restart at each text, also where TRL warns of contamination without FlashAttention."""
    expected = losses(train("SFT", TEXTS, tmp_path, max_length=128))
    # All texts fit one packed row.
    found = losses(train("SFT", TEXTS, tmp_path, **layout))
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[1] < found[0]


def test_supervised_on_what_the_assistant_says(tmp_path: Path) -> None:
    trainer = train("SFT", CHATS, tmp_path, max_length=32, assistant_only_loss=True)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    # Four words and the end of each answer.
    assert (labels != -100).sum(1).tolist() == [5] * len(CHATS)
    first, second = losses(trainer)
    assert second < first


def test_supervised_with_lora_and_trained_gates(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["forget_gate"])
    trainer = train("SFT", TEXTS, tmp_path, max_length=32, peft_config=config, watched=True)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["skipped_share"] == 0 for entry in logged)
    gate = trainer.model.get_base_model().model.layers[0].self_attn.forget_gate
    assert (gate.modules_to_save["default"].bias != gate.original_module.bias).any()


@pytest.mark.parametrize("lora", [False, True])
def test_preferences(lora: bool, tmp_path: Path) -> None:
    reference = {"peft_config": peft.LoraConfig(r=4, task_type="CAUSAL_LM")} if lora else {"ref_model": model_for()}
    first, second = losses(train("DPO", PAIRS, tmp_path, **reference))
    # The model and its reference are still the same: -log sigmoid(0).
    assert first == pytest.approx(0.6931, abs=1e-4)
    assert second < first


def test_rewards_of_what_is_generated(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float("w7" in completion) + len(completion) for completion in completions]

    prompts = [{"prompt": sentence(i, 2)} for i in range(4)]
    trainer = train("GRPO", prompts, tmp_path, reward_funcs=reward, num_generations=4, max_completion_length=6)
    assert len(losses(trainer)) == 2 and len(seen) == 8
    assert all(len(completion.split()) <= 6 for completion in seen)


@pytest.mark.parametrize("lora", [False, True])
def test_reward_model(lora: bool, tmp_path: Path) -> None:
    model = model_for(FoxForSequenceClassification, num_labels=1)
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = train("Reward", PAIRS, tmp_path, model, max_length=32, **{"peft_config": config} if lora else {})
    first, second = losses(trainer)
    assert second < first
