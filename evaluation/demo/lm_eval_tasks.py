"""Two lm-eval tasks made of held-out files, and their run by lm-eval's own command line in a process of its own.

``foxlm_next_lines``: which of four continuations follows some lines of a file; chance is 25%.
``foxlm_bits``: bits per byte of the beginnings of the held-out files, by lm-eval's rolling windows.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .corpus import SourceFile

CHOICES = 4
PREFIX_BYTES, CONTINUATION_BYTES = 192, 64
NEXT_LINES, BITS = "foxlm_next_lines", "foxlm_bits"

NEXT_LINES_TASK: dict[str, Any] = {
    "task": NEXT_LINES,
    "output_type": "multiple_choice",
    "doc_to_text": "prefix",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    # The continuation begins a line of its own: no space between it and the prefix.
    "target_delimiter": "",
    # Raw likelihood mostly finds the blandest continuation; that of a text is divided by what it is without a prefix.
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_mutual_info")
    ],
}
BITS_TASK: dict[str, Any] = {
    "task": BITS,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def next_lines_questions(files: list[SourceFile], count: int, seed: int) -> list[dict[str, Any]]:
    """Questions: a prefix that ends with a line, its real continuation and others from elsewhere.

    Args:
        files: held-out files; parts that are not UTF-8 are left out.
        count: number of questions wanted; there are fewer if the files have fewer passages.
        seed: of the order and of the wrong answers.

    Raises:
        ValueError: the files have too few passages for one question.
    """
    passages = [passage for file in files for passage in _passages(file.data.decode("utf-8", errors="ignore"))]
    if len(passages) < CHOICES:
        raise ValueError(f"files must hold at least {CHOICES} passages, got {len(passages)}")
    rng = random.Random(seed)
    questions: list[dict[str, Any]] = []
    for index in rng.sample(range(len(passages)), min(count, len(passages))):
        prefix, real = passages[index]
        drawn = rng.sample(passages, min(4 * CHOICES, len(passages)))
        others = [other for _, other in drawn if other != real]
        wrong = list(dict.fromkeys(others))[: CHOICES - 1]
        if len(wrong) < CHOICES - 1:
            continue
        answer = rng.randrange(CHOICES)
        choices = [*wrong[:answer], real, *wrong[answer:]]
        questions.append({"prefix": prefix, "choices": choices, "answer": answer})
    return questions


def _passages(text: str) -> list[tuple[str, str]]:
    """Consecutive, disjoint pairs of prefix and continuation, both of them whole in ``text``."""
    found: list[tuple[str, str]] = []
    start = 0
    while True:
        end = text.find("\n", start + PREFIX_BYTES) + 1
        if end == 0 or end + CONTINUATION_BYTES > len(text):
            return found
        continuation = text[end : end + CONTINUATION_BYTES]
        if continuation.strip():
            found.append((text[start:end], continuation))
        start = end + CONTINUATION_BYTES


def write_tasks(folder: Path, files: list[SourceFile], questions: int, bits_bytes: int, seed: int) -> None:
    """Write both tasks with their data into ``folder``.

    Args:
        folder: made if missing.
        files: held-out files.
        questions: number of questions.
        bits_bytes: bytes at the beginning of each file for `BITS`.
        seed: of the questions.
    """
    texts = [file.data[:bits_bytes].decode("utf-8", errors="ignore") for file in files]
    data = {
        NEXT_LINES: next_lines_questions(files, questions, seed),
        BITS: [{"text": text} for text in texts if text],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for task in (NEXT_LINES_TASK, BITS_TASK):
        name = str(task["task"])
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in data[name]), encoding="utf-8")
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(lines.resolve())}},
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        # JSON is YAML too.
        (folder / f"{name}.yaml").write_text(json.dumps(task | source, indent=2), encoding="utf-8")


def run_lm_eval(model: Path, folder: Path, device: str, batch: int) -> dict[str, Any]:
    """Evaluate a saved model with ``python -m foxlm.evaluation``, without network.

    Args:
        model: folder with model and tokenizer.
        folder: as `write_tasks` leaves it; lm-eval's own result file and its log are added.
        device: as lm-eval takes it, e.g. ``"cpu"``.
        batch: sequences per forward pass.

    Returns:
        By task, what lm-eval reports: its metrics, and ``samples``.

    Raises:
        RuntimeError: lm-eval failed; the message holds the end of its log.
    """
    command = [sys.executable, "-m", "foxlm.evaluation", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model.resolve()},dtype=float32"]
    command += ["--tasks", f"{NEXT_LINES},{BITS}", "--include_path", str(folder.resolve())]
    command += ["--device", device, "--batch_size", str(batch), "--output_path", str(folder.resolve())]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Not in the user's own cache of data sets: this one's name would never come again.
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | offline | {"HF_DATASETS_CACHE": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    (folder / "lm_eval.log").write_text(log, encoding="utf-8")
    written = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if done.returncode or not written:
        raise RuntimeError(f"lm-eval ended with {done.returncode}: {log[-2000:]}")
    report = json.loads(written[-1].read_text(encoding="utf-8"))
    return {
        task: report["results"][task] | {"samples": report["n-samples"][task]["effective"]}
        for task in (NEXT_LINES, BITS)
    }
