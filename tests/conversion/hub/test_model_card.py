"""The model card: what it says, where that comes from, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from foxlm import FoxForTokenClassification
from foxlm.cli import app
from foxlm.conversion.hub.evaluation_results import Score, read_results
from foxlm.conversion.hub.model_card import MISSING, write_model_card
from models import LLAMA, ROPE, tiny_model

LM_EVAL: dict[str, Any] = {
    "results": {
        "niah": {
            "alias": "niah",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact,strict": 1,
            "exact_stderr,strict": "N/A",
            "sample_len": 7,
            "sample_count,none": {"a": 1},
        },
        "bits": {"bits_per_byte,none": 2.25, "bits_per_byte_stderr,none": "N/A"},
    },
    "n-shot": {"niah": 3},
    "n-samples": {"niah": {"original": 9, "effective": 8}},
    "lm_eval_version": "0.4.13",
    "date": 20.0,
}
REPORT: dict[str, Any] = {
    "complete": True,
    "run": {"foxlm": "0.1.0", "command": "foxlm demo"},
    "pruning": {
        "log_eps": [-5.0, -10.0],
        "length": 128,
        "tokens": 4096,
        "tile": [64, 64],
        "skipped_pairs": {"paper": [0.25, 0.125], "tight": [0.5, 0.375]},
        "skipped_tiles": {"paper": [0.2, 0.1], "tight": [0.4, 0.3]},
    },
}


PRUNING_REPORT: dict[str, Any] = {
    "kind": "pruning-report",
    "run": {"foxlm": "0.1.0", "command": "foxlm report tiny-fox --text book.txt"},
    "settings": {"log_eps": [-10.0], "length": 256, "tokens": 512},
    "skipped": {
        "pairs": {"paper": [[[0.1, 0.3]]], "tight": [[[0.2, 0.6]]]},
        "tiles": {"paper": [[[0.0, 0.2]]], "tight": [[[0.1, 0.5]]]},
    },
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "tiny-fox")
    return tmp_path / "tiny-fox"


def test_card_holds_what_is_known(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "demo/lm_eval/x/results_2026.json", LM_EVAL)
    write(tmp_path / "demo/report.json", REPORT)
    written = write(tmp_path / "scores.json", {"mine": {"f1": 0.75}})
    path = write_model_card(
        model,
        license="apache-2.0",
        languages=["en"],
        base_model="someone/base",
        datasets=["someone/data"],
        training_data="A page of text.",
        evaluations=[tmp_path / "demo", written],
    )
    card = ModelCard.load(path)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.language, data.base_model, data.datasets) == (["en"], "someone/base", ["someone/data"])
    assert "custom_code" in data.tags
    found = {(x.dataset_type, x.metric_type): x.metric_value for x in data.eval_results}
    assert found == {
        ("niah", "acc"): 0.5,
        ("niah", "exact (strict)"): 1,
        ("bits", "bits_per_byte"): 2.25,
        ("mine", "f1"): 0.75,
    }
    parameters = sum(weight.numel() for weight in tiny_model().parameters())
    for line in (
        "# tiny-fox",
        f"| parameters | {parameters:,} |",
        "| heads | 4 of 8, 2 for keys and values |",
        "| niah | 3 | 8 | acc | 0.5 ± 0.1 |",
        "| niah | 3 | 8 | exact (strict) | 1 |",
        "| e^-10 | `tight` | 38% | 30% |",
        "| e^-5 | `paper` | 25% | 20% |",
        "A page of text.",
    ):
        assert line in card.text.splitlines()
    assert "eps = 4.5e-05 and rule `tight`" in card.text
    assert "arXiv:2504.06949" in card.text and "2503.02130" in card.text
    assert MISSING not in card.content


def test_card_takes_what_foxlm_report_measured(model: Path, tmp_path: Path) -> None:
    ruler = {"results": {"niah_single_1": {"4096,none": 0.5}}, "lm_eval_version": "0.4.13"}
    write(tmp_path / "results/eval/results_niah_single_1_4096.json", ruler)
    write(tmp_path / "results/report/report.json", PRUNING_REPORT)
    text = write_model_card(model, evaluations=[tmp_path / "results"]).read_text()
    assert "| e^-10 | `paper` | 20% | 10% |" in text
    assert "| e^-10 | `tight` | 40% | 30% |" in text
    assert "Measured on 512 held-out tokens in windows of 256:" in text
    assert "tiles of 128 x 64 left out" in text
    # RULER names its metrics after the length alone.
    assert "| score at 4,096 tokens | 0.5 |" in text


def test_card_says_where_keys_are_measured(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"acp_rule": "measured"}))
    assert "and rule `measured` in training, `tight` elsewhere." in write_model_card(model).read_text()


def test_what_is_not_known_is_marked(model: Path) -> None:
    text = write_model_card(model).read_text()
    assert text.count(MISSING) == 2
    assert "license:" not in text.split("---")[1]
    assert "was not measured" in text and "No results" in text


def test_snippet_runs(model: Path) -> None:
    """Up to the tokenizer, which a random model has not."""
    text = write_model_card(model).read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    lines = match[1].replace("path/to/this/folder", str(model)).splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(line for line in lines if not line.startswith("tokenizer")), names)
    assert type(names["model"]).__name__ == "FoxForCausalLM"


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        (
            {"forget_gate": "none", "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
            ["| position embeddings | RoPE (default) |", "Without forget gates nothing can be pruned."],
        ),
        (
            {"forget_gate": "none"},
            [
                "A Transformer, in the code of the Forgetting Transformer",
                "without its forget gates",
                "| forget gates | none: nothing is forgotten |",
                "| position embeddings | none |",
            ],
        ),
        (
            ROPE | LLAMA | {"qk_norm": "all_heads", "norm_position": "post", "nope_layers": [0, 1]},
            [
                "| block | LLaMA with QK-norm over all heads, norms after attention and MLP |",
                "| RoPE (default), but none in layers 0, 1, counted from 0 |",
            ],
        ),
        ({"qk_norm": "shared"}, ["| block | Pro (QK-norm shared by heads, key shift, "]),
        ({"grafted_from": "llama"}, ["Forget gates were grafted onto a pretrained model (`llama`)."]),
        ({"tie_word_embeddings": True}, ["| vocabulary | 97, embeddings tied |"]),
        ({"acp_eps": None}, ["leave out nothing (`acp_eps` is null)"]),
        ({"use_key_shift": False}, ["LLaMA with QK-norm, value shift, output gate, output norm"]),
    ],
)
def test_card_follows_the_configuration(tmp_path: Path, fields: dict[str, Any], lines: list[str]) -> None:
    tiny_model(dtype=torch.float32, **fields).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    for line in lines:
        assert line in text


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "It was made from [a/b](https://huggingface.co/a/b)."),
        ({"grafted_from": "llama"}, "Forget gates were grafted onto [a/b](https://huggingface.co/a/b) (`llama`)."),
        (
            {"grafted_from": "llama", "forget_gate": "none"},
            "It has the weights of [a/b](https://huggingface.co/a/b) (`llama`) to start from.",
        ),
    ],
)
def test_card_names_the_base_model(tmp_path: Path, fields: dict[str, Any], line: str) -> None:
    tiny_model(dtype=torch.float32, **fields).save_pretrained(tmp_path)
    assert line in write_model_card(tmp_path, base_model="a/b").read_text().splitlines()


def test_task_follows_the_class(tmp_path: Path) -> None:
    tiny_model(model_class=FoxForTokenClassification, dtype=torch.float32).save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(tmp_path))
    assert card.data.pipeline_tag == "token-classification"
    assert "AutoModelForTokenClassification.from_pretrained" in card.text


def test_a_card_written_by_hand_is_kept(model: Path) -> None:
    (model / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        write_model_card(model)
    assert (model / "README.md").read_text() == "mine"
    write_model_card(model, overwrite=True)
    assert "Forgetting Transformer" in (model / "README.md").read_text()


def test_hostile_text_stays_text(model: Path) -> None:
    card = ModelCard.load(write_model_card(model, name="a: [b]\n- c | d", languages=["x: {y"], training_data="---\n|"))
    assert card.data.language == ["x: {y"]


def test_latest_result_of_a_task_counts(tmp_path: Path) -> None:
    newer = LM_EVAL | {"results": {"niah": {"acc,none": 0.9}}, "date": 30.0}
    write(tmp_path / "results_a.json", newer)
    write(tmp_path / "results_b.json", LM_EVAL)
    scores = read_results([tmp_path]).scores
    assert scores["niah", "acc"] == Score("niah", "acc", 0.9, None, 3, 8)
    assert scores["bits", "bits_per_byte"].value == 2.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold a JSON object"),
        ({}, "must be of lm-eval, a report or .*no numbers"),
        ({"task": 1.0}, "must be of lm-eval, a report or .*'float' object"),
        ({"task": {"acc": "0.5"}}, "must be of lm-eval, a report or .*not all are numbers"),
        ({"task": {"acc": True}}, "must be of lm-eval, a report or .*not all are numbers"),
        ({"task": {"acc": float("nan")}}, "must hold finite numbers, got nan for task, acc"),
        ({"complete": False}, "this one was interrupted"),
        (LM_EVAL | {"results": {}}, "must be of lm-eval, .*no results"),
        (LM_EVAL | {"results": {"niah": 3}, "date": "today"}, "must be of lm-eval, .*'int' object"),
        ({"pruning": REPORT["pruning"]}, "must be of lm-eval, .*'run'"),
        (REPORT | {"pruning": REPORT["pruning"] | {"log_eps": [-5.0]}}, "must be of lm-eval, .*zip"),
    ],
)
def test_wrong_results_are_refused(model: Path, tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_model_card(model, evaluations=[write(tmp_path / "results_x.json", content)])
    assert not (model / "README.md").exists()


def test_missing_and_broken_files_are_refused(model: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", model):
        with pytest.raises(ValueError, match="evaluation must be a JSON file, or a folder that holds"):
            write_model_card(model, evaluations=[path])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        write_model_card(model, evaluations=[tmp_path / "broken.json"])
    with pytest.raises(ValueError, match="model_type 'fox'"):
        write_model_card(tmp_path)
    (model / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        write_model_card(model)


@pytest.mark.parametrize("license", ["", "\n", "Apache 2.0", "../x"])
def test_a_license_that_the_hub_has_not_is_refused(license: str, model: Path) -> None:
    with pytest.raises(ValueError, match=r"license must be written as on the Hub"):
        write_model_card(model, license=license)


def test_command(model: Path, tmp_path: Path) -> None:
    scores = write(tmp_path / "scores.json", {"mine": {"f1": 0.75}})
    arguments = ["card", str(model), "--license", "mit", "--evaluation", str(scores), "--language", "en"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, f"wrote {model}/README.md; places to fill in: 1\n")
    data = ModelCard.load(model / "README.md").data
    assert (data.license, data.language, data.eval_results[0].metric_value) == ("mit", ["en"], 0.75)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and "--overwrite" in result.stderr
