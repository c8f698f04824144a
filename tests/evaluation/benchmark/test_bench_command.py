"""The ``foxlm bench`` commands: what they write, print, keep and refuse; and how results are read again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from foxlm import FoxForCausalLM, forgetting_attention
from foxlm.cli.bench import app
from foxlm.evaluation.benchmark import results as module
from foxlm.evaluation.benchmark.attention.implementations import OURS
from foxlm.evaluation.benchmark.tables import render
from models import tiny_config

ON_CPU = ("--device", "cpu", "--rounds", "1")


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*arguments[:1], *(() if arguments[0] == "table" else ON_CPU), *arguments[1:]])


def of_users(folder: Path, variant: str = "pro", **overrides: Any) -> tuple[str, ...]:
    torch.manual_seed(0)
    FoxForCausalLM(tiny_config(variant, initializer_range=0.2, **overrides)).save_pretrained(folder / "mine")
    np.save(folder / "text.npy", np.random.default_rng(0).integers(2, 97, 900))
    return "--model", str(folder / "mine"), "--text", str(folder / "text.npy")


def test_attention_writes_results_and_their_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    result = invoke("attention", "--dtype", "float32", "--case", "1x4x16x256", "--out", str(out))
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert (results["schema"], results["kind"]) == (2, "attention")
    assert {"device", "commit", "torch", "triton", "cuda", "command"} <= set(results["run"])
    assert {one["case"] for one in results["rows"]} == {"1x4x16x256"}
    assert "| foxlm, ACP tight " in result.stdout and "Figures of no use" in result.stdout
    assert "cuDNN, no gate: not run: needs a GPU" in result.stdout
    # Each row as it is measured, on stderr.
    assert "foxlm, ACP tight; B x H x D x T 1 x 4 x 16 x 256; computed tiles" in result.stderr
    assert invoke("table", str(out), "--case", "1x4x16x256").stdout == result.stdout
    refused = invoke("table", str(out), "--case", "2x2x2x2")
    assert refused.exit_code == 1 and "--case must be one of 1x4x16x256, got '2x2x2x2'" in refused.stderr


def test_attention_that_is_wrong_prints_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options):
        return forgetting_attention(q, k, v, 2.0 * log_f, **options)

    monkeypatch.setattr("foxlm.evaluation.benchmark.attention.implementations.forgetting_attention", wrong)
    out = tmp_path / "results.json"
    result = invoke("attention", "--only", "foxlm", "--out", str(out))
    assert result.exit_code == 1
    assert "failed its check and was not timed: output of head 0 is off by" in result.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [one["status"] for one in rows if "gates" not in one["name"]] == ["measured", *["wrong"] * len(OURS)]
    assert not any("forward" in one for one in rows if one["status"] == "wrong")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_and_prints_its_rows(number: int, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ["generate", "--device", "cpu", "--length", "40", "--batch-size", "1", "--rounds", "50", "--new", "1"]
    arguments += ["--only", "decode: foxlm", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "foxlm", "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of processes in the background SIGINT may be ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (out.exists() and '"measured"' in out.read_text()):
        time.sleep(0.2)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["status"] == "measured" and rows[-1]["status"] == "unfinished"
    assert "| foxlm " in stdout and "* interrupted" in stdout
    assert f"interrupted; what was measured is in {out}" in stderr


@pytest.mark.slow
def test_the_commands_measure_a_model_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = of_users(tmp_path)
    out = tmp_path / "results.json"
    for command, arguments in (
        ("attention", ("--length", "150", "--rows", "2", "--only", "foxlm")),
        ("train", ("--length", "100", "--only", "tight")),
        ("generate", ("--length", "200", "--only", "prefill: foxlm", "--batch-size", "6")),
        ("decode", ("--length", "60", "--new", "1", "--batch-size", "1", "--only", "foxlm, static")),
    ):
        monkeypatch.setattr("sys.argv", ["foxlm", "bench", command, *given, *arguments, "--out", str(out)])
        result = invoke(command, *given, *arguments, "--out", str(out), "--json")
        assert result.exit_code == 0, result.output
        results = json.loads(result.stdout)
        assert results == json.loads(out.read_text())
        assert str(tmp_path) not in result.stdout
        assert results["run"]["command"].startswith(f"foxlm bench {command} --model mine --text text.npy")
        assert all(one["status"] == "measured" for one in results["rows"])
        drawn = render(results)
        assert "Figures of no use" in drawn and "mine; text.npy; " in drawn
        if command == "attention":
            assert {(one["case"], one["kv_heads"]) for one in results["rows"]} == {("4x4x8x150", 2)}
        if command == "generate":
            assert results["rows"][0]["text_rows"] == 4 and "4 different rows of text, which repeat" in drawn


def test_a_model_without_forget_gates_is_measured_as_what_it_is_or_refused(tmp_path: Path) -> None:
    given = of_users(tmp_path, "gateless", use_key_shift=False)
    out = ("--out", str(tmp_path / "results.json"))
    result = invoke("attention", *given, *out)
    assert result.exit_code == 1 and "--model must have forget gates to be measured" in result.stderr
    result = invoke("generate", *given, *out, "--only", "paged")
    assert result.exit_code == 1 and "the FoX has no forget gates" in result.stderr
    result = invoke("generate", *given, *out, "--length", "100", "--only", "prefill: foxlm", "--json")
    assert result.exit_code == 0, result.output
    names = ["prefill: foxlm", "prefill: foxlm, chunked prefill"]
    assert [one["name"] for one in json.loads(result.stdout)["rows"]] == names
    result = invoke("train", *given, *out, "--length", "100", "--json")
    assert result.exit_code == 0, result.output
    assert [one["name"] for one in json.loads(result.stdout)["rows"]] == ["foxlm"]


def test_what_is_no_fox_or_too_short_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).save_pretrained(tmp_path / "llama")
    _, model, _, text = of_users(tmp_path)
    wide, words = tmp_path / "wide.npy", tmp_path / "words.txt"
    np.save(wide, np.full(300, 97))
    words.write_text("words")
    too_long = "has no 5000 tokens in a row, at most 900; joining documents may give longer"
    for source, read, more, message in (
        (tmp_path / "llama", text, (), "--model must be a FoX language model, got LlamaForCausalLM"),
        (model, text, ("--length", "5000"), too_long),
        (model, wide, (), "must hold tokens in [0, 97), as the model has them, got 97 to 97"),
        (model, tmp_path / "none.npy", (), "No such file"),
        (model, words, (), "words.txt is text, which needs a model with a tokenizer; without one give .npy"),
        (tmp_path / "nothing", text, (), "nothing"),
    ):
        out = ("--out", str(tmp_path / "results.json"))
        result = invoke("generate", "--only", "prefill", "--model", str(source), "--text", str(read), *more, *out)
        assert result.exit_code == 1 and message in result.stderr, result.stderr
        # After the bar of transformers, which ends no line.
        assert result.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "results.json").exists()
    result = invoke("attention", "--model", model, "--text", text, "--length", "500", "--rows", "2")
    assert result.exit_code == 1 and "has 1 rows of 500 tokens, got 2 as --rows" in result.stderr


@pytest.mark.slow
def test_training_on_two_ranks_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ["--gpus", "2", "--length", "384", "--checkpointing", "--hidden-size", "32", "--layers", "3"]
    result = invoke("train", *arguments, "--only", "tight", "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert results == json.loads(result.stdout)
    assert (
        results["settings"]["changed"] | {"hidden_size": 32, "num_hidden_layers": 3} == results["settings"]["changed"]
    )
    one, everyone = results["rows"]
    assert (one["gpus"], everyone["gpus"], everyone["layout"]) == (1, 2, "FSDP2")
    for row in (one, everyone):
        assert row["status"] == "measured" and row["computed_tiles"] < 1.0
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["gpus"] * 384 / row["step"]["ms"])
    assert 0.0 < everyone["worst_gradient"]["error"] <= everyone["worst_gradient"]["limit"] < 0.2
    assert "| 2 GPUs, FSDP2 |" in render(results)


@pytest.mark.parametrize("old", ["prefill", "decode"])
def test_an_old_command_measures_its_part_and_names_the_new_one(old: str, tmp_path: Path) -> None:
    arguments = (
        "--layers",
        "1",
        "--length",
        "32",
        "--batch-size",
        "1",
        "--new",
        "1",
        "--only",
        "Llama",
        "--no-compile",
    )
    result = invoke(old, *arguments, "--out", str(tmp_path / "results.json"), "--json")
    assert result.exit_code == 0, result.output
    assert f"foxlm bench {old} is deprecated" in result.stderr and f"foxlm bench generate --only {old}" in result.stderr
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == [f"{old}: Llama"]


def test_what_is_raised_between_variants_ends_no_other_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*arguments: Any) -> Any:
        yield from ()
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("foxlm.evaluation.benchmark.public_calls.call_variants", raising)
    names = ("--only", "prefill: Llama", "--only", "train: foxlm")
    arguments = ("--layers", "1", "--length", "32", *names, "--no-compile", "--out", str(tmp_path / "results.json"))
    result = invoke("generate", *arguments)
    assert result.exit_code == 1
    assert "* the rest of a group: failed: OutOfMemoryError: no room" in result.stdout
    assert "| training step |" in result.stdout and "Figures of no use" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        (["attention", "--rounds", "0"], "--rounds must be a positive integer, got 0"),
        (["attention", "--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got"),
        (["attention", "--case", "1x2"], "--case must be four positive integers BxHxDxT such as"),
        (["attention", "--out", "/"], "--out must be a file, got the folder /"),
        (["attention", "--rows", "2"], "--length, --rows and --join require --model and --text"),
        (["train", "--length", "-1"], "--length must be a positive integer, got -1"),
        (["train", "--layers", "0"], "--layers must be a positive integer, got 0"),
        (["train", "--hidden-size", "-64"], "--hidden-size must be a positive integer, got -64"),
        (["train", "--preset", "pro-7b"], "name must be one of"),
        (["train", "--heads", "7"], "--hidden-size must be a multiple of num_attention_heads"),
        (["train", "--only", "compiled"], "--only must be part of one of ['foxlm', 'foxlm, ACP paper',"),
        (["train", "--gpus", "0"], "--gpus must be a positive integer, got 0"),
        (["train", "--gpus", "9"], "--gpus must be at most 8 processes with --device cpu, got 9"),
        (["train", "--model", "x"], "--model and --text go together, got --model without --text"),
        (["train", "--text", "x"], "--model and --text go together, got --text without --model"),
        (["train", "--heads", "2", "--model", "x", "--text", "y"], "--heads is of new models, got it with --model x"),
        (["generate", "--new", "0"], "--new must be a positive integer, got 0"),
        (["generate", "--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["generate", "--only", "vLLM"], "--only must be part of one of ['decode: foxlm', "),
        (["generate", "--model", "x", "--preset", "pro-125m"], "--preset is of new models, got it with"),
        (["generate", "--join"], "--join is of --text, got it without"),
        (["generate", "--chunk", "0"], "--chunk must be a positive integer, got 0"),
        (["generate", "--length", "64", "--length", "-3"], "--length must be a positive integer, got -3"),
        (["generate", "--only", "Llama, static", "--no-compile"], "--no-compile leaves nothing of --only to measure"),
        (["table", "no-such-file.json"], "No such file"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    device = [] if arguments[0] == "table" or "--device" in arguments else ["--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *device])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    result = CliRunner().invoke(app, ["attention"])
    assert result.exit_code == 1 and result.stderr.startswith(
        "error: --device is cuda, but torch sees no CUDA GPU; --device cpu shows"
    )


# Results


def published() -> dict[str, Any]:
    """Results as foxlm 0.1.0 wrote them."""
    timing = {"ms": 2.0, "spread": 0.01, "dense_tflops": 400.0, "done_tflops": 200.0, "of_ceiling": 0.25}
    one = {"name": "foxlm, ACP tight", "rule": "tight", "gated": True, "gate_gradient": True, "status": "measured"}
    one |= {"tiles_kept": 0.5, "peak_bytes": 2e9, "forward": timing, "forward_backward": timing}
    case = {"case": "2x3x64x128", "ceiling_tflops": 800.0, "implementations": [one], "open_gates": [], "bars": {}}
    run = dict.fromkeys(module._SAME_RUN, "a") | {"device": "NVIDIA H100", "foxlm": "0.1.0", "commit": "abc"}
    settings = {"dtype": "bfloat16", "rounds": 15, "eps": 4.5e-5, "tile": [128, 64]}
    return {"schema": 1, "kind": "attention", "run": run, "settings": settings, "cases": [case]}


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(published()))
    result = invoke("table", str(file))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("NVIDIA H100; torch a,")
    row = next(line for line in result.stdout.splitlines() if "ACP tight" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["2 x 3 x 64 x 128", "50%", "2.00", "2.00", "-", "400 / 400", "25% / 25%", "2.0"]
    steps = {"schema": 1, "kind": "train", "run": published()["run"], "settings": published()["settings"]}
    file.write_text(json.dumps(steps | {"steps": [{"name": "foxlm", "status": "measured", "step": {"ms": 4.0}}]}))
    assert "| foxlm " in invoke("table", str(file)).stdout


def test_table_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for text, message in (("{}", "must hold results of foxlm bench"), ("nothing", "is not JSON")):
        file.write_text(text)
        result = invoke("table", str(file))
        assert result.exit_code == 1 and message in result.stderr
    one = {"kind": "attention", "run": dict.fromkeys(module._SAME_RUN, "a"), "settings": {"rounds": 1}, "rows": [1]}
    other = one | {"kind": "train", "rows": [3]}
    assert module.merged([one, one | {"rows": [2]}, other]) == [one | {"rows": [1, 2]}, other]
    for several in ([one, one | {"settings": {"rounds": 1, "model": "m"}}], [one | {"settings": {"model": "m"}}, one]):
        with pytest.raises(ValueError, match=r"must have the same (model|rounds), got"):
            module.merged(several)


def test_commit_is_given_where_it_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foxlm.evaluation.provenance._commit", lambda: "none")
    assert module.new_results("train", "cpu", 0, "abc", {})["run"]["commit"] == "abc"
    assert module.new_results("train", "cpu", 0, None, {})["run"]["commit"] == "none"
    monkeypatch.setattr("foxlm.evaluation.provenance._commit", lambda: "def")
    with pytest.raises(ValueError, match="--commit must not be given in a checkout, which is at def; got 'abc'"):
        module.new_results("train", "cpu", 0, "abc", {})


def test_folders_do_not_get_into_results(tmp_path: Path) -> None:
    assert module._without_folders(f"--model={tmp_path}/mine") == "--model=mine"
    assert module._without_folders("fla-hub/model") == "fla-hub/model"
    assert module._without_folders("2x24x64x16384") == "2x24x64x16384"
