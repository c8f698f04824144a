"""Checks of a folder before it is published: what passes, what does not, and that nothing is pushed unasked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from typer.testing import CliRunner

import foxlm
from foxlm.cli import app
from foxlm.conversion.hub import checks as folder_checks
from foxlm.conversion.hub import publish
from foxlm.conversion.hub.model_card import MISSING, write_model_card
from foxlm.conversion.hub.uploaded_files import OF_TRAINING, uploaded_files
from foxlm.evaluation.demo.tokenizer import VOCAB_SIZE, byte_tokenizer
from foxlm.modeling.remote_code import exported_files
from models import tiny_model


class Hub:
    """In place of the Hub: remembers what it is asked for."""

    def __init__(self, private: bool = False, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private, self.error, self.repo_id = private, error, "someone/fox"

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repo_id: str, **kwargs: Any) -> "Hub":
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id} | kwargs))
        return self

    def model_info(self, repo_id: str) -> "Hub":
        return self

    def upload_folder(self, **kwargs: Any) -> None:
        self.calls.append(("upload_folder", kwargs))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", hub)
    monkeypatch.setattr(publish.ModelCard, "validate", lambda card: hub.calls.append(("validate", {})))
    return hub


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["publish", *arguments])


def test_whole_folder_passes_and_is_pushed_when_told_to(publishable: Path, hub: Hub) -> None:
    result = invoke(str(publishable), "--push", "fox", "--private")
    assert result.exit_code == 1, "the repository is public"
    assert result.stderr == (
        "error: someone/fox is there already and is public: choose another name, or make it private first\n"
    )
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in publish._CHECKS]
    assert lines[-1].endswith("the same logits, bit for bit")
    created = ("create_repo", {"repo_id": "fox", "private": True, "exist_ok": True})
    assert hub.calls == [("validate", {}), created], "the Hub sees the card before there is a repository"


@pytest.fixture
def without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loading check takes two processes; it has tests of its own."""
    monkeypatch.setitem(publish._CHECKS, "loading", lambda folder, allowed: "not tried here")


@pytest.mark.usefixtures("without_loading")
def test_push_asks_the_hub_for_the_right_things(publishable: Path, hub: Hub) -> None:
    result = invoke(str(publishable), "--push", "fox")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "uploaded to https://huggingface.co/someone/fox")
    message = f"Upload model, checked by foxlm {foxlm.__version__}"
    assert hub.calls == [
        ("validate", {}),
        ("create_repo", {"repo_id": "fox", "private": None, "exist_ok": True}),
        (
            "upload_folder",
            {"repo_id": "someone/fox", "folder_path": publishable, "commit_message": message}
            | {"ignore_patterns": list(OF_TRAINING)},
        ),
    ]
    hub.calls.clear()
    hub.private = True
    assert invoke(str(publishable), "--push", "fox", "--private").exit_code == 0
    assert [name for name, _ in hub.calls] == ["validate", "create_repo", "upload_folder"]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What Trainer leaves in the folder that it trains in and saves to: checkpoints, metrics, its arguments."""
    folder = tmp_path / "trained"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True
    )
    trainer = Trainer(
        tiny_model(vocab_size=VOCAB_SIZE, dtype=torch.float32),
        arguments,
        data_collator=DataCollatorWithFlattening(),
        train_dataset=[{"input_ids": list(range(8))}] * 2,
        processing_class=byte_tokenizer(),
    )
    trainer.save_metrics("train", trainer.train().metrics)
    trainer.save_state()
    trainer.save_model()
    write_model_card(folder, license="apache-2.0", training_data="Eight bytes.")
    return folder


def test_folder_that_trainer_trained_in_is_published_without_what_is_of_training(trained: Path, hub: Hub) -> None:
    result = invoke(str(trained), "--push", "fox")
    assert result.exit_code == 0, result.output
    (files,) = (line for line in result.stdout.splitlines() if line.startswith("ok    files"))
    assert files.endswith(
        "left out, as of training: all_results.json, checkpoint-1/, checkpoint-2/, train_results.json, "
        "trainer_state.json and 1 more"
    )
    uploaded = hub.calls[-1][1]
    assert {*filter_repo_objects(all_files(trained), ignore_patterns=uploaded["ignore_patterns"])} == {
        *uploaded_files(trained)
    }, "what is uploaded is what was checked"
    assert {path.name for path in trained.iterdir() if path.is_dir()} == {"checkpoint-1", "checkpoint-2"}, "they stay"


def all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("without_loading")
def test_nothing_is_pushed_unasked_or_unready(folder: Path, hub: Hub) -> None:
    result = invoke(str(folder))
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "ready; --push REPO_ID uploads it")
    (folder / "README.md").unlink()
    result = invoke(str(folder), "--push", "fox")
    assert result.exit_code == 1
    assert result.stderr == f"error: {folder} is not ready (card); nothing was uploaded\n"
    assert [line for line in result.stdout.splitlines() if line.startswith("FAIL")] == [
        f"FAIL  card           there is no README.md: foxlm card {folder} writes one"
    ]
    assert not hub.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--private"], "--private needs --push REPO_ID"),
        (["--push", "a/b/c"], "Repo id must be"),
        (["--push", "a..b"], "a..b"),
    ],
)
def test_wrong_options_are_refused_before_any_check(
    publishable: Path, hub: Hub, arguments: list[str], message: str
) -> None:
    result = invoke(str(publishable), *arguments)
    assert result.exit_code == 1 and message in result.stderr and not result.stdout and not hub.calls


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "none"))
    assert result.exit_code == 1 and result.stderr.startswith("error: folder must be one that save_pretrained made")


@pytest.mark.usefixtures("without_loading", "hub")
def test_failing_hub_is_one_line(publishable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "HfApi", Hub(error=ConnectionError("no route to host")))
    result = invoke(str(publishable), "--push", "fox")
    assert (result.exit_code, result.stderr) == (1, "error: pushing to fox failed: no route to host\n")


@pytest.mark.usefixtures("without_loading")
def test_without_network_the_message_says_so(publishable: Path) -> None:
    """The Hub's own client, which the tests have offline."""
    result = invoke(str(publishable), "--push", "fox")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: pushing to fox failed: ") and "offline" in result.stderr.lower()


def test_folder_code_is_not_run_unless_it_is_ours(folder: Path) -> None:
    (folder / "modeling_fox.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    found = {check.name: check for check in publish.check_folder(folder)}
    assert not found["code"].passed and "modeling_fox.py" in found["code"].found
    assert (found["loading"].passed, found["loading"].found) == (False, "not tried, because of code")
    # A model is built to know what weights there should be, by code that the configuration may name.
    assert (found["weights"].passed, found["weights"].found) == (False, "not tried, because of code")
    assert not (folder / "ran").exists()


def test_loading_finds_code_that_computes_something_else(folder: Path) -> None:
    (file,) = (path for path in folder.glob("*.py") if "self.scaling = " in path.read_text())
    file.write_text(file.read_text().replace("self.scaling = ", "self.scaling = 0.5 * "))
    with pytest.raises(ValueError, match=r"results differ between foxlm and the folder's own code: generated, logits"):
        folder_checks.check_loading(folder)


def test_task_head_is_loaded_as_what_it_is(folder: Path) -> None:
    model_class = foxlm.FoxForTokenClassification
    tiny_model(model_class=model_class, vocab_size=VOCAB_SIZE, dtype=torch.float32).save_pretrained(folder)
    assert folder_checks.check_configuration(folder) == "FoxForTokenClassification"
    assert folder_checks.check_loading(folder).endswith("the same logits, bit for bit")


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | fields))

    return spoil


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def edit_card(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        text = (folder / "README.md").read_text()
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new, 1))

    return spoil


def add(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


GATE = "model.layers.0.self_attn.forget_gate.weight"
SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no configuration": ("configuration", remove("config.json"), "must hold a config.json"),
    "another model": ("configuration", edit_json("config.json", model_type="llama"), "model_type 'fox'"),
    "bad field": ("configuration", edit_json("config.json", qk_norm="batch"), "qk_norm"),
    "broken JSON": ("configuration", add("config.json", b"{"), "config.json is not valid JSON"),
    "a list": ("configuration", add("config.json", b"[]"), "must hold a JSON object"),
    "unknown class": ("configuration", edit_json("config.json", architectures=["Mine"]), "architectures of"),
    "no weights": ("weights", remove("model.safetensors"), "must hold safetensors files"),
    "cut off": ("weights", add("model.safetensors", b"\0" * 64), "is not a whole safetensors file"),
    "missing weight": (
        "weights",
        edit_weights(lambda x: x.pop(GATE)),
        f"weights are missing from the checkpoint: {GATE}",
    ),
    "extra weight": ("weights", edit_weights(lambda x: x.update(extra=torch.zeros(1))), "no place for: extra"),
    "shape": ("weights", edit_weights(lambda x: x.update({GATE: x[GATE][:2].clone()})), f"{GATE} must have shape"),
    "NaN": ("weights", edit_weights(lambda x: x[GATE].view(-1)[3:4].fill_(torch.nan)), f"finite.*{GATE}"),
    "integers": (
        "weights",
        edit_weights(lambda x: x.update({GATE: x[GATE].int()})),
        f"{GATE} must be one of float64, .*int32",
    ),
    "8 bits": (
        "weights",
        edit_weights(lambda x: x.update({GATE: x[GATE].to(torch.float8_e4m3fn)})),
        f"{GATE} must be one of float64, .*float8_e4m3fn",
    ),
    "an adapter": (
        "configuration",
        lambda x: shutil.move(x / "config.json", x / "adapter_config.json"),
        "whole model, got the adapter .* merge it first",
    ),
    "second file": ("weights", lambda x: save_file({"a": torch.ones(1)}, x / "b.safetensors"), r"b\.safetensors"),
    "index of nothing": (
        "weights",
        add("model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}'),
        "holds both model.safetensors and",
    ),
    "index of a list": ("weights", add("model.safetensors.index.json", b"[]"), "must hold a JSON object"),
    "index without map": ("weights", add("model.safetensors.index.json", b"{}"), "weight_map"),
    "no tokenizer": ("tokenizer", remove("tokenizer_config.json"), "there is none"),
    "half a tokenizer": ("tokenizer", remove("tokenizer.json"), "it cannot be loaded|its tokens must be"),
    "large vocabulary": ("tokenizer", edit_json("config.json", vocab_size=200, pad_token_id=0), "vocab_size of 200"),
    "changed code": ("code", add("modeling_fox.py", b"#"), "not those of this version.*modeling_fox"),
    "missing code": ("code", remove("modeling_layers.py"), "files are missing .*foxlm export-code .*modeling_layers"),
    "older code": ("code", add("old.py", b"# Code of a FoX model, written by foxlm 0.0.1"), "left over.*old.py"),
    "auto_map": ("code", edit_json("config.json", auto_map={"AutoModel": "x.Y"}), "auto_map.*AutoConfig, AutoModel, "),
    "environment": ("files", add(".env"), r"none of a model's.*\.env"),
    "stranger": ("files", add("notes.docx"), "none of a model's.*notes.docx"),
    "sub-folder": ("files", add("old/config.json"), "none of a model's.*old/config.json"),
    "no license": ("card", edit_card("license: apache-2.0\n", ""), "must give: license"),
    "other license": ("card", edit_card("apache-2.0", "other"), "must give: license_link, license_name"),
    "license in words": ("card", edit_card("apache-2.0", "Apache 2.0"), "must be written as on the Hub.*'Apache 2.0'"),
    "no task": ("card", edit_card("pipeline_tag: text-generation\n", ""), "must give: pipeline_tag"),
    "no metadata": ("card", add("README.md", b"# A model\n"), "must give: library_name, license, pipeline_tag"),
    "bad metadata": ("card", add("README.md", b"---\na: [\n---\n"), "must be valid YAML"),
    "not filled in": ("card", edit_card("Nothing: its weights are random.", MISSING), "still has .*line "),
    "no loading": ("card", edit_card("trust_remote_code=True", ""), "must say how to load"),
}


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_is_found_by_its_check(folder: Path, case: str) -> None:
    name, spoil, message = SPOILT[case]
    spoil(folder)
    found = {check.name: check for check in publish.check_folder(folder)}
    assert not found[name].passed
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[name].found)


def test_control_the_folder_before_it_is_spoilt_passes(folder: Path, without_loading: None) -> None:
    assert all(check.passed for check in publish.check_folder(folder))


@pytest.mark.usefixtures("without_loading")
def test_sharded_and_tied_weights_pass(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = tiny_model("tied", vocab_size=VOCAB_SIZE, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = {check.name: check for check in publish.check_folder(folder)}
    assert all(check.passed for check in found.values()), found
    assert "bfloat16" in found["weights"].found
    next(folder.glob("model-*.safetensors")).unlink()
    assert not {check.name: check.passed for check in publish.check_folder(folder)}["weights"]


def test_export_code_renews_the_code(folder: Path) -> None:
    (folder / "modeling_fox.py").write_text("")
    result = CliRunner().invoke(app, ["export-code", str(folder)])
    assert (result.exit_code, result.output) == (0, f"wrote the code into {folder}\n")
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == exported_files()
    result = CliRunner().invoke(app, ["export-code", str(folder.parent)])
    assert result.exit_code == 1 and result.stderr.startswith("error: folder must hold a config.json")
