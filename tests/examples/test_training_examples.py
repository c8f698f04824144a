"""The scripts that pretrain and finetune, end to end, tiny, as a user would run them, and what they save."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from example_scripts import QUIET, TINY, load_script, losses


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    trainer = load_script("pretrain").main(
        [
            *("--text", str(text), "--output_dir", str(out), "--length", "48", *TINY, *QUIET),
            *("--max_steps", "20", "--learning_rate", "1e-2", "--save_steps", "10"),
        ]
    )
    history = losses(trainer)
    assert len(history) == 20
    assert history[-1] < 0.8 * history[0]
    assert "eval_loss" in trainer.evaluate()
    return out


def test_pretraining_saves_what_auto_classes_load(pretrained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    inputs = tokenizer("the quick", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, len("the quick") + 4)


def has_both_numbers(history: list[dict[str, float]]) -> bool:
    logged = [entry for entry in history if "loss" in entry]
    return bool(logged) and all(x["tokens_per_second"] > 0 and 0 <= x["skipped_share"] < 1 for x in logged)


def test_pretraining_logs_tokens_per_second_and_the_skipped_share(pretrained: Path) -> None:
    state = json.loads((pretrained / "checkpoint-20" / "trainer_state.json").read_text())
    assert has_both_numbers(state["log_history"])


def test_pretraining_resumes(pretrained: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = load_script("pretrain").main(
        [
            *("--text", str(text), "--output_dir", str(pretrained), "--length", "48", *TINY, *QUIET),
            *("--max_steps", "22", "--learning_rate", "1e-2", "--resume", "--gradient_checkpointing"),
        ]
    )
    assert trainer.state.global_step == 22
    assert len(losses(trainer)) == 22, "steps before the checkpoint come from its history, two are new"


def test_pretraining_packs_documents_without_mixing_them(text: Path) -> None:
    """The collator's restarting positions reach the model: packed documents score as they do alone."""
    script = load_script("pretrain")
    tokenizer = script.byte_tokenizer()
    sequences = script.Sequences(script.read_documents([str(text)], ".txt"), tokenizer, 48)
    batch = script.DataCollatorWithFlattening()([sequences[0], sequences[1]])
    config = script.build_config(
        script.PretrainingArguments(text=[], hidden_size=32, num_hidden_layers=1, num_attention_heads=2), tokenizer
    )
    model = script.FoxForCausalLM(config).eval()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([sequences[i]["input_ids"]]), use_cache=False).logits for i in (0, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_pretraining_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--text must name text files or folders with \*\.txt files"):
        load_script("pretrain").main(["--text", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_finetuning_the_whole_model_on_text(tmp_path: Path, pretrained: Path) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(f"a note, number {index}" for index in range(8)))
    trainer = load_script("finetune").main(
        [
            *("--model", str(pretrained), "--data", str(tmp_path / "notes.txt"), *QUIET),
            *("--output_dir", str(tmp_path / "out"), "--max_steps", "12", "--learning_rate", "3e-3"),
        ]
    )
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert has_both_numbers(trainer.state.log_history)
    before = AutoModelForCausalLM.from_pretrained(pretrained)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = "model.layers.0.self_attn.forget_gate.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_finetuning_by_lora_on_conversations(tmp_path: Path, pretrained: Path) -> None:
    peft = pytest.importorskip("peft")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "plain"}]))
    trainer = load_script("finetune").main(
        [
            *("--model", str(pretrained), "--data", str(tmp_path / "chats.jsonl"), "--lora", *QUIET),
            *("--output_dir", str(tmp_path / "out"), "--max_steps", "15", "--learning_rate", "3e-2"),
        ]
    )
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert has_both_numbers(trainer.state.log_history)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(97, 110)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits)
    assert any("output_gate.lora_A" in name for name, _ in loaded.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    gate = "model.layers.0.self_attn.forget_gate"
    saved = loaded.get_base_model().get_submodule(gate)
    assert not torch.equal(base.get_submodule(gate).weight, saved.modules_to_save["default"].weight)
    # Going on from an adapter would train a new one on the old base.
    with pytest.raises(ValueError, match=r"--model must be a whole model"):
        load_script("finetune").main(
            [
                *("--model", str(tmp_path / "out"), "--data", str(tmp_path / "chats.jsonl")),
                *("--output_dir", str(tmp_path / "again")),
            ]
        )


def test_finetuning_names_a_bad_line(tmp_path: Path, pretrained: Path) -> None:
    for line in ('{"txet": "typo"}', '{"text": 5}', "[]", "{broken"):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "fine \u2028 still"}}\n\n{line}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=r"bad\.jsonl:3 must"):
            load_script("finetune").main(
                [
                    *("--model", str(pretrained), "--data", str(tmp_path / "bad.jsonl")),
                    *("--output_dir", str(tmp_path / "out")),
                ]
            )
