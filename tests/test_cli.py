"""The ``foxlm`` command line: what it refuses, and how."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import foxlm
from checkpoints import write
from foxlm.cli import app
from foxlm.conversion.convert import convert_checkpoint
from test_conversion_fla import EVERYTHING, SIZES, checkpoint


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_help_names_every_option() -> None:
    help_text = re.sub(r"\x1b\[[0-9;]*m", "", invoke("demo", "--help").output)
    for option in ("--out", "--minutes", "--steps", "--seed", "--device", "--quick"):
        assert option in help_text
    assert "demo" in invoke("--help").output


def test_version_through_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "foxlm", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"foxlm {foxlm.__version__}"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
        (["--minutes", "0"], "--minutes must be a positive number up to a day's 1440, got 0.0"),
        (["--minutes", "-1"], "--minutes must be a positive number up to a day's 1440, got -1.0"),
        (["--minutes", "nan"], "--minutes must be a positive number up to a day's 1440, got nan"),
        (["--steps", "0"], "--steps must be a positive integer, got 0"),
        (["--seed", "-1"], "--seed must be in [0, 2**32), got -1"),
    ],
)
def test_demo_refuses_bad_values_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("demo", "--out", str(tmp_path / "new"), *arguments)
    assert result.exit_code == 1
    assert result.stderr == f"error: {message}\n"
    assert not (tmp_path / "new").exists()


def test_demo_refuses_a_file_and_a_folder_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    result = invoke("demo", "--out", str(file))
    assert (result.exit_code, result.stderr) == (1, f"error: --out must be a folder, got the file {file}\n")
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert f"{tmp_path} holds other files" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_demo_refuses_a_missing_gpu(tmp_path: Path) -> None:
    result = invoke("demo", "--device", "cuda", "--out", str(tmp_path))
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --device is cuda, but torch sees no CUDA GPU; use auto or cpu\n",
    )


def test_unknown_options_and_commands_are_refused() -> None:
    assert invoke("demo", "--no-such-option").exit_code == 2
    assert invoke("no-such-command").exit_code == 2


def test_convert_writes_a_folder_to_load(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "new" / "ours"
    theirs.mkdir()
    fields = SIZES | EVERYTHING
    write(theirs, fields, checkpoint(fields))
    (theirs / "tokenizer.json").write_text("{}")
    result = invoke("convert", str(theirs), str(ours))
    assert result.exit_code == 0, result.output
    model = foxlm.FoxForCausalLM.from_pretrained(ours, dtype="auto")
    expected = convert_checkpoint(theirs)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert (ours / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]


def test_convert_refuses_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    for text, message in (
        (None, "must be a folder with a config.json"),
        ('{"model_type": "llama"}', "model_type must be one of ['forgetting_transformer', 'forgetting_transformer-"),
        ('{"model_type": "forgetting_transformer"}', "must hold safetensors files"),
    ):
        if text is not None:
            (theirs / "config.json").write_text(text)
        result = invoke("convert", str(theirs), str(out))
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    result = invoke("convert", str(theirs), str(theirs))
    assert result.exit_code == 1 and "which is there already" in result.stderr
