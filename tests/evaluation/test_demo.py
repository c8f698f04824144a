"""The demo from end to end, in miniature."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from foxlm import FoxPagedCache
from foxlm.modeling.versions import cache_of

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")


def run_demo(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foxlm", "demo", "--quick", "--device", "cpu", "--out", str(out)]
    # One thread: this may run beside other tests, and more would fight over the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    # What an interrupted run leaves behind: the demo must start over on it.
    (folder / "lm_eval").mkdir(parents=True)
    (folder / "lm_eval" / "results_old.json").write_text("{}")
    (folder / "report.json").write_text('{"complete": false}')
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out bits per byte" in done.stdout
    assert "%|" in done.stderr, "no progress bar was shown"
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_report_holds_finite_measurements(report: dict) -> None:
    assert report["complete"] is True
    assert report["quick"] is True
    found = numbers(report)
    assert len(found) > 50
    assert all(map(math.isfinite, found))
    losses = report["held_out_bits_per_byte"]
    reload = report["reload"]
    assert reload["bits_per_byte"] == pytest.approx(reload["bits_per_byte_before_saving"], abs=1e-4)
    assert 2.0 < losses["bigram"] < 5.0
    assert losses["fox"] < 8.0, "worse than uniform over bytes: nothing was learned"
    training = report["training"]
    assert training["steps"] == 12
    assert training["tokens"] == 12 * training["batch"] * training["length"]
    assert training["train_bits_per_byte"][-1][1] < training["train_bits_per_byte"][0][1]
    assert report["lm_eval"]["next_lines"]["samples"] == 4
    assert 0.0 <= report["lm_eval"]["next_lines"]["acc_mutual_info"] <= 1.0
    assert report["lm_eval"]["bits"]["bits_per_byte"] > 0


def test_report_says_what_it_was_made_with(report: dict) -> None:
    run = report["run"]
    assert run["seed"] == 0
    assert run["command"].startswith("python -m foxlm demo --quick --device cpu --out ")
    assert {"commit", "device", "threads", "python", "foxlm", "torch", "transformers", "lm_eval"} <= set(run)


def test_pruning_shares_fall_with_eps(report: dict) -> None:
    pruning = report["pruning"]
    model = report["model"]
    assert [len(row) for row in pruning["decay_times"]] == [model["heads"]] * model["layers"]
    for shares in (*pruning["skipped_pairs"].values(), *pruning["skipped_tiles"].values()):
        assert shares == sorted(shares, reverse=True)
        assert len(shares) == len(pruning["log_eps"])
    assert all(
        tight >= paper
        for tight, paper in zip(pruning["skipped_pairs"]["tight"], pruning["skipped_pairs"]["paper"], strict=True)
    )


def test_model_folder_is_complete(out: Path, report: dict) -> None:
    assert not list((out / "model").glob("*.bin"))
    with safe_open(out / "model" / "model.safetensors", framework="pt") as weights:
        assert "model.layers.0.self_attn.forget_gate.weight" in weights.keys()  # noqa: SIM118  (no mapping)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert type(model).__name__ == report["reload"]["class"] == "FoxForCausalLM"
    assert model.num_parameters() == report["model"]["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_page_is_one_readable_file(out: Path, report: dict) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 4
    assert 'name="viewport"' in page
    # Nothing is loaded from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for value in ("fox", "bigram"):
        assert f"{report['held_out_bits_per_byte'][value]:.3f}" in page
    assert report["run"]["commit"] in page


def test_results_of_earlier_runs_are_gone(out: Path) -> None:
    assert not (out / "lm_eval" / "results_old.json").exists()
    assert len(list((out / "lm_eval").rglob("results_*.json"))) == 1


@torch.no_grad()
def test_freeing_dead_keys_changes_no_greedy_token(out: Path) -> None:
    """Of a trained model: where a token differs, both candidates were as likely as the bound lets them be."""
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    text = Path(argparse.__file__).read_bytes()[:1500]
    prompt = torch.tensor([list(text[:700]), list(text[700:1400])])
    greedy = {"max_new_tokens": 300, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    expected = model.generate(prompt, output_logits=True, **greedy)
    freeing = model.generate(prompt, cache=FoxPagedCache(model.config, 1000), **greedy)
    held = cache_of(freeing).held_bytes() / sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache_of(expected).layers
    )
    assert held < 0.9, "nothing to speak of was freed"
    for row in range(2):
        differ = (freeing.sequences[row] != expected.sequences[row]).nonzero()
        if len(differ):
            best = expected.logits[differ[0].item() - prompt.shape[1]][row].topk(2).values
            assert best[0] - best[1] < 1e-2
