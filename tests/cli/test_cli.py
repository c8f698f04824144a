"""The ``foxlm`` command line: what it refuses, and how."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import foxlm
from checkpoints import converted, write
from fla_checkpoints import EVERYTHING, FLA_SIZES, fla_checkpoint
from foxlm.cli import app
from hostile_folders import fox_folder


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


def test_no_help_page_waits_for_torch() -> None:
    """Of all commands in one process, in well under the time that importing torch alone takes."""
    code = """
import sys, time
sys.orig_argv[-1] = "foxlm"
from typer.main import get_command
from typer.testing import CliRunner
from foxlm.cli import app
group = get_command(app)
names = [(name,) for name in group.commands] + [("bench", name) for name in group.commands["bench"].commands]
for name in names:
    # serve and lm-eval hand --help on.
    if name[-1] not in ("serve", "lm-eval"):
        result = CliRunner().invoke(app, [*name, "--help"])
        assert result.exit_code == 0, (name, result.output)
assert not {"torch", "transformers", "numpy", "pandas"} & set(sys.modules)
print(len(names), time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands, seconds = done.stdout.split()
    assert int(commands) >= 15 and float(seconds) < 3.0


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


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["graft", "", "out"], ""),
        (["export-code", ""], ""),
        (["loss", "model", "--text", "", "--length", "4"], " after --text"),
        (["demo", "--out="], " after --out"),
        (["bench", "attention", "--out", ""], " after --out"),
    ],
)
def test_empty_arguments_are_refused(arguments: list[str], where: str) -> None:
    result = invoke(*arguments)
    assert result.stderr == f"error: an argument{where} is empty; for the current folder give .\n"
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("eps must be\n  below 1"), "eps must be below 1"),
        (OSError(28, "No space left on device", "out/x"), "out/x: No space left on device"),
        (PermissionError(13, "Permission denied", "x\udcff\x1b[2J"), "x\\udcff\\x1b[2J: Permission denied"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory; fewer tokens at a time or a smaller"),
        (KeyError("x"), "KeyError: 'x'; a bug in foxlm: please report it with the traceback of FOXLM_TRACEBACK=1"),
        (NotImplementedError(), "NotImplementedError: NotImplementedError; a bug in foxlm: please report it"),
        (ValueError("x" * 10**6), "xxx"),
    ],
)
def test_any_failure_is_one_line_and_a_traceback_where_wanted(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("foxlm.conversion.links.check_links", fail)
    result = invoke("export-code", "folder")
    assert result.exit_code == 1 and result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1000
    monkeypatch.setenv("FOXLM_TRACEBACK", "1")
    assert invoke("export-code", "folder").exception is error


def test_absurd_sizes_are_refused_before_work_begins(tmp_path: Path) -> None:
    tokens, model = tmp_path / "tokens.npy", tmp_path / "model"
    np.save(tokens, np.zeros(100, np.int64))
    fox_folder(model)
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    for arguments, named in (
        (["needle", str(model), "--lengths", f"{10**19}"], "lengths"),
        (["loss", str(model), "--text", str(tokens), "--length", f"{10**19}", "--edges", "1"], "length"),
        (["report", str(model), "--text", str(tokens), "--length", f"{10**19}"], "length"),
        (["bench", "attention", "--case", f"1x1x64x{10**19}"], ""),
        (["bench", "decode", "--layers", f"{10**9}"], "num_hidden_layers"),
        (["bench", "train", "--hidden-size", f"{10**12}"], "--hidden-size"),
        (["demo", "--minutes", "1e30"], "--minutes"),
    ):
        result = invoke(*arguments, *out)
        assert result.exit_code == 1, (arguments, result.output)
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ") and named in last and "bug in foxlm" not in last, last


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    fox_folder(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.zeros(100, np.int64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["--text", str(tmp_path / "tokens.npy"), "--length", "16", "--device", "cpu", "--out"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        results = [invoke("loss", str(tmp_path / "model"), *arguments, str(tmp_path / "out"))]
        results.append(invoke("card", str(tmp_path / "model")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for result, name in zip(results, ("loss.json", ""), strict=True):
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 1 and last.startswith("error: ") and name in last and "File too large" in last, last


def test_unknown_options_and_commands_are_refused() -> None:
    assert invoke("demo", "--no-such-option").exit_code == 2
    assert invoke("no-such-command").exit_code == 2


def test_convert_writes_a_folder_to_load(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "new" / "ours"
    theirs.mkdir()
    fields = FLA_SIZES | EVERYTHING
    write(theirs, fields, fla_checkpoint(fields))
    (theirs / "tokenizer.json").write_text("{}")
    result = invoke("convert", str(theirs), str(ours))
    assert result.exit_code == 0, result.output
    model = foxlm.FoxForCausalLM.from_pretrained(ours, dtype="auto")
    expected = converted(theirs, tmp_path / "expected")
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert (ours / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]


def llama(folder: Path) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=7
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true, "eos_token_id": 9}')
    return model


def test_graft_writes_a_folder_to_load(tmp_path: Path) -> None:
    expected = llama(tmp_path / "llama")
    ids = torch.randint(61, (2, 19))
    source, out = str(tmp_path / "llama"), tmp_path / "new" / "fox"
    result = invoke("graft", source, str(out), "--decay-times", "inf", "--forget-gate-heads", "key_value")
    assert result.exit_code == 0, result.output
    model = foxlm.FoxForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert model.config.forget_gate_heads == "key_value" and not model.config.use_output_gate
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.25, 9)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == "{}"

    options = ("--decay-times", "3:70", "--forget-gate", "fixed", "--output-gate", "--remove-rope")
    assert invoke("graft", source, str(tmp_path / "other"), *options).exit_code == 0
    config = foxlm.FoxConfig.from_pretrained(tmp_path / "other")
    assert (config.forget_gate, config.decay_time_min, config.decay_time_max) == ("fixed", 3.0, 70.0)
    assert config.use_output_gate and config.rope_parameters is None
    assert invoke("graft", source, str(tmp_path / "none"), "--forget-gate", "none").exit_code == 0
    model = foxlm.FoxForCausalLM.from_pretrained(tmp_path / "none")
    assert model.config.forget_gate == "none"
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert invoke("graft", source, str(tmp_path / "default")).exit_code == 0
    config = foxlm.FoxConfig.from_pretrained(tmp_path / "default")
    assert (config.decay_time_min, config.decay_time_max) == (64.0, 16 * 2048)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decay-times", "fast"), "--decay-times must be a number or MIN:MAX, got 'fast'"),
        (("--decay-times", "1:2:3"), "--decay-times must be a number or MIN:MAX, got '1:2:3'"),
        (("--decay-times", "-1"), "--decay-times must be positive, got -1.0"),
        (("--decay-times", "9:3"), "--decay-times must be min <= max, both finite, got min 9.0 and max 3.0"),
        (("--forget-gate", "half"), "--forget-gate must be one of ('full', 'bias_only', 'fixed', 'none'), got 'half'"),
        (
            ("--forget-gate", "none", "--decay-times", "inf"),
            "--decay-times has no effect with forget_gate 'none'",
        ),
        (("--forget-gate-heads", "all"), "--forget-gate-heads must be one of ('query', 'key_value'), got 'all'"),
    ],
)
def test_graft_refuses_in_one_line_and_leaves_nothing(tmp_path: Path, arguments: tuple, message: str) -> None:
    llama(tmp_path / "llama")
    result = invoke("graft", str(tmp_path / "llama"), str(tmp_path / "fox"), *arguments)
    assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_graft_refuses_what_is_not_there_and_what_is(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    result = invoke("graft", nowhere, str(tmp_path / "fox"))
    assert result.exit_code == 1 and result.stderr.startswith("error: model must be a folder, or the name of a model")
    assert nowhere in result.stderr and not list(tmp_path.iterdir())
    llama(tmp_path / "llama")
    result = invoke("graft", str(tmp_path / "llama"), str(tmp_path / "llama"))
    assert result.exit_code == 1 and "which is there already" in result.stderr


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


def test_bench_has_the_commands_and_exit_codes_of_the_speed_benchmarks(tmp_path: Path) -> None:
    listed = invoke("bench", "--help")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in ("attention", "context", "generate", "train", "table"))
    assert invoke("bench", "attention", "--device", "tpu").exit_code == 1
    assert invoke("bench", "nothing").exit_code == 2
