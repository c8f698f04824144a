"""``foxlm demo``: a small model is trained, saved, and then measured by the commands that any model is measured by."""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..lm_eval.options import Options as EvalOptions
from ..lm_eval.run import evaluate
from ..loading import resolve_device
from ..pruning_report.run import Options as ReportOptions
from ..pruning_report.run import draw, run_report
from ..requirements import require
from ..results import require_folder, write_json, write_whole
from .corpus import SEPARATOR, bigram_costs, load_corpus, to_tokens, windows
from .tokenizer import byte_tokenizer
from .train import GPU_RECIPE, QUICK_RECIPE, Recipe, bits_per_byte, train

RESULTS = "demo.json"
PROMPTS = ("def read_", "import os\n\n\nclass ")


@dataclass(frozen=True)
class _Amounts:
    """How much each part reads and writes: windows and bytes of held-out files, questions, tokens."""

    scored_windows: int = 300
    bytes_of_a_file: int = 2048
    report_length: int = 1024
    report_rows: int = 4
    questions: int = 50
    new_tokens: int = 240


_QUICK = _Amounts(scored_windows=8, bytes_of_a_file=512, report_length=128, report_rows=1, questions=4, new_tokens=8)


def run_demo(out: Path, *, minutes: float, steps: int | None, seed: int, device: str, quick: bool) -> None:
    """Run the demo and write ``model/``, what ``foxlm report`` and ``foxlm eval`` write, and ``demo.json``.

    Args:
        out: folder for all of it: new, empty, or of an earlier demo.
        minutes: training time.
        steps: optimizer steps instead of a time.
        seed: of weights, training windows, questions and sampling.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        quick: a much smaller model, and little of everything: shows that all parts work, not what they reach.

    Raises:
        ImportError: lm-eval or matplotlib is missing.
        ValueError: an argument cannot be, or there is no text to train on.
        RuntimeError: a part failed.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA GPU; use auto or cpu")
    if not 0 < minutes <= 24 * 60:
        raise ValueError(f"minutes must be a positive number up to a day's 1440, got {minutes}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    require_folder(out)
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).is_file():
        raise ValueError(f"out must be a new or empty folder, or one of an earlier demo; {out} holds other files")
    require("lm-eval")
    require("matplotlib")
    began = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, folder = resolve_device(device), out / "model"
    recipe = QUICK_RECIPE if quick else GPU_RECIPE if device == "cuda" else Recipe()
    amounts = _QUICK if quick else _Amounts()
    steps = 12 if quick and steps is None else steps
    # Marks the folder as the demo's own, also if this run is interrupted.
    write_json(out / RESULTS, {"complete": False})

    corpus = load_corpus()
    counts = corpus.describe()
    _say(
        f"text: Python's standard library, {counts['train_files']} files ({counts['train_bytes'] / 1e6:.1f} MB) to "
        f"train on, {counts['held_out_files']} other files ({counts['held_out_bytes'] / 1e6:.2f} MB) held out"
    )
    held_out = windows(corpus.held_out, recipe.length, amounts.scored_windows)
    before, after = held_out[:, :-1], held_out[:, 1:]
    scored = after != SEPARATOR
    bigram = float(bigram_costs(to_tokens(corpus.train))[before[scored], after[scored]].mean())
    _say(f"byte bigrams: {bigram:.3f} held-out bits per byte")
    trained, training = train(corpus, recipe, device, seed, minutes=minutes, steps=steps)
    trained.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    fox = bits_per_byte(model, held_out)
    _say(f"FoX, saved and loaded: {fox:.3f} held-out bits per byte")
    samples = [_generate(model, folder, prompt, amounts.new_tokens, seed) for prompt in PROMPTS]
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        _say(f"--- it goes on with {prompt!r}:\n{prompt}{sample}\n---")

    # The first bytes of each file, which both of the following read.
    text = out / "held_out.jsonl"
    texts = [file.data[: amounts.bytes_of_a_file].decode("utf-8", errors="ignore") for file in corpus.held_out]
    write_whole(text, "".join(json.dumps({"text": one}) + "\n" for one in texts if one))
    report = run_report(
        ReportOptions(
            model=str(folder),
            text=text,
            out=out,
            length=amounts.report_length,
            rows=amounts.report_rows,
            join=True,
            device=device,
            seed=seed,
            overwrite=True,
        )
    )
    page = draw(report, out)
    scores = _evaluate(folder, text, out / "eval", amounts.questions, device, seed)
    results = {
        "complete": True,
        "quick": quick,
        "seconds": time.monotonic() - began,
        "corpus": counts,
        "parameters": model.num_parameters(),
        "training": training,
        "held_out_bits_per_byte": {"fox": fox, "bigram": bigram},
        "samples": samples,
        "scores": scores,
        "run": report["run"],
    }
    write_json(out / RESULTS, results)
    _say(f"lm-eval: {100 * scores['foxlm_next_lines']['acc_mutual_info']:.1f}% of the right lines (chance 25%)")
    _say(f"done in {results['seconds']:.0f} s: {page}, {folder}")


def _generate(model: Any, folder: Path, prompt: str, new_tokens: int, seed: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.6, top_p=0.95, top_k=0)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _evaluate(folder: Path, text: Path, out: Path, questions: int, device: str, seed: int) -> dict[str, Any]:
    """Scores by task and metric."""
    shutil.rmtree(out, ignore_errors=True)
    options = EvalOptions(model=str(folder), out=out, text=text, limit=questions, device=device, seed=seed)
    outcome = evaluate(options, _say)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.failed:
        raise RuntimeError(f"lm-eval's tasks failed; see {out}")
    tasks = {row.task for row in outcome.rows}
    return {task: {row.metric: row.value for row in outcome.rows if row.task == task} for task in sorted(tasks)}


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
