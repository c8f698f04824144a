"""The demo from end to end, in miniature."""

import argparse
import json
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
from foxlm.conversion.hub.evaluation_results import read_results
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
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "results_old.json").write_text("{}")
    (folder / "demo.json").write_text('{"complete": false}')
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out bits per byte" in done.stdout and "it goes on with 'def read_'" in done.stdout
    assert "%|" in done.stderr, "no progress bar was shown"
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict:
    return json.loads((out / "demo.json").read_text())


def test_results_are_those_of_training_and_of_the_other_commands(results: dict, out: Path) -> None:
    assert results["complete"] is True and results["quick"] is True
    losses = results["held_out_bits_per_byte"]
    assert 2.0 < losses["bigram"] < 5.0
    assert losses["fox"] < 8.0, "worse than uniform over bytes: nothing was learned"
    training = results["training"]
    assert training["steps"] == 12
    assert training["tokens"] == 12 * training["batch"] * training["length"]
    assert training["train_bits_per_byte"][-1][1] < training["train_bits_per_byte"][0][1]
    assert len(results["samples"]) == 2
    assert 0.0 <= results["scores"]["foxlm_next_lines"]["acc_mutual_info"] <= 1.0
    assert results["scores"]["foxlm_bits"]["bits_per_byte"] > 0
    written = json.loads((out / "eval" / "results_foxlm_next_lines.json").read_text())
    assert written["n-samples"]["foxlm_next_lines"]["effective"] == 4
    assert not (out / "eval" / "results_old.json").exists()


def test_results_say_what_they_were_made_with(results: dict) -> None:
    run = results["run"]
    assert run["seed"] == 0
    assert run["command"].startswith("python -m foxlm demo --quick --device cpu --out ")
    assert {"commit", "device", "threads", "python", "foxlm", "torch", "transformers"} <= set(run)


def test_report_is_that_of_foxlm_report(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert report["kind"] == "pruning-report" and report["check"]["passed"]
    assert report["settings"]["text"] == "held_out.jsonl"
    page = (out / "report.html").read_text(encoding="utf-8")
    # Nothing is loaded from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_model_card_reads_the_folder(out: Path) -> None:
    found = read_results([out])
    assert found.pruning is not None
    assert ("foxlm_bits", "bits_per_byte") in found.scores


def test_model_folder_is_complete(out: Path, results: dict) -> None:
    assert not list((out / "model").glob("*.bin"))
    with safe_open(out / "model" / "model.safetensors", framework="pt") as weights:
        assert "model.layers.0.self_attn.forget_gate.weight" in weights.keys()  # noqa: SIM118  (no mapping)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert type(model).__name__ == "FoxForCausalLM"
    assert model.num_parameters() == results["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id


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
