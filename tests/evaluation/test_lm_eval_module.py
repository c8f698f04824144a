"""``foxlm lm-eval``: lm-eval's own command line with FoX registered, and the provenance of results."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from byte_models import byte_model
from foxlm.evaluation.demo.corpus import load_corpus
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.evaluation.lm_eval.run import TASKS
from foxlm.evaluation.lm_eval.tasks.own_text import next_lines_questions
from foxlm.evaluation.provenance import provenance


def test_provenance_names_the_run() -> None:
    facts = provenance("cpu", 7, ("no-such-distribution",))
    assert facts["seed"] == 7
    assert facts["torch"] == torch.__version__
    assert facts["no-such-distribution"] == "not installed"
    assert facts["commit"]


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foxlm", "lm-eval", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=os.environ | offline | environment, capture_output=True, text=True, check=False)


def test_lm_eval_loads_a_saved_fox(tmp_path) -> None:
    """lm-eval's own command line, unchanged but for FoX being known: a folder without code beside its weights."""
    pytest.importorskip("lm_eval")
    model = byte_model(max_position_embeddings=512)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    documents = [file.data.decode(errors="ignore") for file in load_corpus().held_out[:4]]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    task = "foxlm_next_lines"
    done = run_module(
        *("run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"),
        *("--tasks", task, "--include_path", str(TASKS), "--device", "cpu", "--limit", "4"),
        *(
            "--metadata",
            json.dumps({"text": str(tmp_path / "text.jsonl")}),
            "--batch_size",
            "4",
            "--output_path",
            str(tmp_path / "results"),
        ),
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(written.read_text())["results"][task]
    assert 0.0 <= results["acc,none"] <= 1.0

    # The same questions answered here: the continuation with the highest likelihood.
    rows = next_lines_questions(documents, 200, seed=0)[:4]
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor([list((row["prefix"] + choice).encode())])
            start = len(row["prefix"].rstrip().encode())
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(log_p[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item())
        right += int(np.argmax(sums)) == row["answer"]
    assert results["acc,none"] == pytest.approx(right / len(rows))


def test_without_lm_eval_one_line_says_what_to_install(tmp_path) -> None:
    # Found first, and no package: what `find_spec` sees where lm-eval is not installed.
    script = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'lm_eval' else found(name, *rest)\n"
        "from foxlm.cli import app; app(['lm-eval'], prog_name='foxlm')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: lm-eval is not installed; it comes with: pip install 'foxlm[eval]'"
    )
