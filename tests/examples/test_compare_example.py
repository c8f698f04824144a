"""The script that compares models trained alike, end to end, tiny, as a user would run it."""

import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from example_scripts import load_script

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
