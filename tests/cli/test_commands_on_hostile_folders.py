"""Every command that reads a model's folder ends in one line that says what is wrong with it, whatever that is."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from foxlm.cli import app
from fuzz import fuzz
from hostile_folders import HOSTILE, edit_json, fla_folder, fox_folder, llama_folder, make_unreadable, mutate

KINDS = {"fox": fox_folder, "llama": llama_folder, "fla": fla_folder}
READ = ["--text", "TOKENS", "--device", "cpu", "--out", "OUT"]
# More tokens than the text has: a folder that can be read costs no measurement.
BENCH = ["--model", "MODEL", *READ]
# By name the kind of folder that a command reads, and its arguments.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "convert": ("fla", ["convert", "MODEL", "OUT"]),
    "convert back": ("fox", ["convert", "MODEL", "OUT", "--to", "authors"]),
    "graft": ("llama", ["graft", "MODEL", "OUT"]),
    "card": ("fox", ["card", "MODEL", "--overwrite"]),
    "export-code": ("fox", ["export-code", "MODEL"]),
    "publish": ("fox", ["publish", "MODEL"]),
    "eval": ("fox", ["eval", "MODEL", "--text", "TEXT", "--device", "cpu", "--out", "OUT"]),
    "loss": ("fox", ["loss", "MODEL", "--length", "16", "--rows", "1", *READ]),
    "needle": ("fox", ["needle", "MODEL", "--lengths", "600", "--device", "cpu", "--out", "OUT"]),
    "report": ("fox", ["report", "MODEL", *READ]),
    "bench attention": ("fox", ["bench", "attention", "--length", "9999", *BENCH]),
    "bench train": ("fox", ["bench", "train", "--length", "9999", *BENCH]),
    "bench generate": ("fox", ["bench", "generate", "--length", "9999", "--only", "decode: foxlm", *BENCH]),
}


class NoTasks:
    """lm-eval's index of its tasks, which takes seconds to read."""

    all_tasks: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any) -> None:
        pass


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a valid one of each kind, and texts."""
    root = tmp_path_factory.mktemp("valid")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("lm_eval.tasks.TaskManager", NoTasks)
    for kind, make in KINDS.items():
        make(root / kind)
    (root / "text.txt").write_text("The well is behind the stable.\n" * 100)
    np.save(root / "tokens.npy", np.arange(2000) % 200)
    yield root
    monkeypatch.undo()


def run(name: str, model: Path, valid: Path, out: Path) -> Any:
    values = {"MODEL": model, "TEXT": valid / "text.txt", "TOKENS": valid / "tokens.npy", "OUT": out}
    return CliRunner().invoke(app, [str(values.get(argument, argument)) for argument in COMMANDS[name][1]])


def message(result: Any) -> str:
    """The one line that a command ends with."""
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code in (1, 2), result.output
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, result.stderr
    assert "Traceback" not in result.output and "a bug in foxlm" not in lines[-1], lines[-1]
    return lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", HOSTILE)
def test_one_line_names_what_is_wrong(case: str, command: str, valid: Path, tmp_path: Path) -> None:
    change, named = HOSTILE[case]
    model = tmp_path / "model"
    shutil.copytree(valid / COMMANDS[command][0], model)
    change(model)
    result = run(command, model, valid, tmp_path / "out")
    if result.exit_code:
        said = message(result)
        assert named in said or str(model) in said, said
    assert not (tmp_path / "out").is_dir() or result.exit_code == 0 or not list((tmp_path / "out").glob("*.json"))


@pytest.mark.fuzz
def test_one_line_whatever_is_done_to_a_folder(valid: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"

    def case(rng: random.Random) -> None:
        name = rng.choice(sorted(set(COMMANDS) - {"eval"}))
        for old in (model, out):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(valid / COMMANDS[name][0], model)
        mutate(model, rng)
        result = run(name, model, valid, out)
        if result.exit_code:
            message(result)

    fuzz(case, seconds=6.0)


def test_what_may_not_be_read(valid: Path, tmp_path: Path) -> None:
    for name, (kind, _) in COMMANDS.items():
        model = Path(shutil.copytree(valid / kind, tmp_path / name))
        if not make_unreadable(model):
            pytest.skip("this user may read everything")
        assert str(model) in message(run(name, model, valid, tmp_path / "out"))


def _results(valid: Path, folder: Path) -> dict[str, Path]:
    """Results of each command that draws them anew."""
    for name in ("loss", "report"):
        assert run(name, valid / "fox", valid, folder / name).exit_code == 0
    (folder / "needle").mkdir()
    cell: dict[str, Any] = {
        "length": 600,
        "depth": 0.5,
        "found": 0.5,
        "recall": None,
        "loss": 2.0,
        "accuracy": 0.0,
        "samples": [],
    }
    needle = {
        "kind": "needle",
        "settings": {"mode": "easy", "samples": 1, "text": None},
        "name": "fox",
        "cells": [cell],
    }
    (folder / "needle" / "needle.json").write_text(json.dumps(needle | {"trained_length": 256}))
    return {name: folder / name / f"{name}.json" for name in ("loss", "report", "needle")}


@pytest.mark.fuzz
def test_one_line_whatever_results_hold(valid: Path, tmp_path: Path) -> None:
    """As they are, damaged by hand, and with numbers that are none."""
    results = _results(valid, tmp_path)
    contents = {name: path.read_text() for name, path in results.items()}
    runner = CliRunner()
    for name, path in results.items():
        assert runner.invoke(app, [name, "--redraw", str(path)]).exit_code == 0
        for text in ("", "[1]", "{", '{"kind": NaN}', '{"kind": 1e999}', "9" * 5000, "[" * 100_000, "\0"):
            path.write_text(text)
            assert str(path) in message(runner.invoke(app, [name, "--redraw", str(path)]))

    def case(rng: random.Random) -> None:
        name, path = rng.choice(sorted(results.items()))
        path.write_text(contents[name])
        edit_json(path, rng)
        result = runner.invoke(app, [name, "--redraw", str(path)])
        if result.exit_code:
            assert str(path.parent) in message(result)

    fuzz(case, seconds=6.0)
