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
from ..pruning_report.run import Options as ReportOptions
from ..pruning_report.run import draw, run_report
from ..requirements import require_lm_eval, require_matplotlib
from ..results import write_json
from .bigram import BigramModel
from .corpus import SourceFile, load_corpus, to_tokens, windows
from .tokenizer import byte_tokenizer
from .train import GPU_RECIPE, QUICK_RECIPE, Recipe, bits_per_byte, train

RESULTS = "demo.json"
PROMPTS = ("def read_", "import os\n\n\nclass ")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        out: folder for everything the demo writes.
        minutes: training time.
        steps: optimizer steps instead of a time.
        seed: of weights, training windows, questions and sampling.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        quick: a much smaller model, and little of everything: shows that all parts work, not what they reach.
    """

    out: Path = Path("foxlm-demo")
    minutes: float = 2.0
    steps: int | None = None
    seed: int = 0
    device: str = "auto"
    quick: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda, but torch sees no CUDA GPU; use auto or cpu")
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"--minutes must be a positive number up to a day's 1440, got {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be a positive integer, got {self.steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in [0, 2**32), got {self.seed}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out must be a folder, got the file {self.out}")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / RESULTS).is_file():
            raise ValueError(
                f"--out must be a new or empty folder, or one of an earlier demo; {self.out} holds other files"
            )


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


def run_demo(options: Options) -> dict[str, Any]:
    """Run the demo and write into ``options.out``.

    ``model/``, ``report.html`` and ``report.json`` of ``foxlm report``, ``eval/`` of ``foxlm eval``, ``held_out.jsonl``
    that both read, and ``demo.json``.

    Returns:
        What ``demo.json`` holds.

    Raises:
        ImportError: lm-eval or matplotlib is missing.
        ValueError: there is no text to train on.
        RuntimeError: a part failed.
    """
    require_lm_eval()
    require_matplotlib()
    began = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = QUICK_RECIPE if options.quick else GPU_RECIPE if device == "cuda" else Recipe()
    amounts = _QUICK if options.quick else _Amounts()
    steps = 12 if options.quick and options.steps is None else options.steps
    out, folder = options.out, options.out / "model"
    out.mkdir(parents=True, exist_ok=True)
    # Marks the folder as the demo's own, also if this run is interrupted.
    write_json(out / RESULTS, {"complete": False})

    corpus = load_corpus()
    counts = corpus.describe()
    _say(
        f"text: Python's standard library, {counts['train_files']} files ({counts['train_bytes'] / 1e6:.1f} MB) to "
        f"train on, {counts['held_out_files']} other files ({counts['held_out_bytes'] / 1e6:.2f} MB) held out"
    )
    held_out = windows(corpus.held_out, recipe.length, amounts.scored_windows)
    bigram = BigramModel(to_tokens(corpus.train)).bits_per_byte(held_out)
    _say(f"byte bigrams: {bigram:.3f} held-out bits per byte")
    training = train(corpus, recipe, device, options.seed, minutes=options.minutes, steps=steps)
    training.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    fox = bits_per_byte(model, held_out, recipe.batch, lambda parts: tqdm(parts, desc="scoring", unit="batch"))
    _say(f"FoX, saved and loaded: {fox:.3f} held-out bits per byte")
    samples = [_generate(model, folder, prompt, amounts.new_tokens, options.seed) for prompt in PROMPTS]
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        _say(f"--- it goes on with {prompt!r}:\n{prompt}{sample}\n---")

    text = _write_text(out / "held_out.jsonl", corpus.held_out, amounts.bytes_of_a_file)
    report = run_report(
        ReportOptions(
            model=str(folder),
            text=text,
            out=out,
            length=amounts.report_length,
            count=amounts.report_rows,
            join=True,
            device=device,
            seed=options.seed,
            overwrite=True,
        )
    )
    page = draw(report, out)
    scores = _evaluate(folder, text, out / "eval", amounts.questions, device, options.seed)
    results = {
        "complete": True,
        "quick": options.quick,
        "seconds": time.monotonic() - began,
        "corpus": counts,
        "parameters": model.num_parameters(),
        "training": training.facts,
        "held_out_bits_per_byte": {"fox": fox, "bigram": bigram},
        "samples": samples,
        "scores": scores,
        "run": report["run"],
    }
    write_json(out / RESULTS, results)
    _say(f"lm-eval: {100 * scores['foxlm_next_lines']['acc_mutual_info']:.1f}% of the right lines (chance 25%)")
    _say(f"done in {results['seconds']:.0f} s: {page}, {folder}")
    return results


def _generate(model: Any, folder: Path, prompt: str, new_tokens: int, seed: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.6, top_p=0.95, top_k=0)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _write_text(path: Path, files: list[SourceFile], count: int) -> Path:
    """The first ``count`` bytes of each file."""
    texts = [file.data[:count].decode("utf-8", errors="ignore") for file in files]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text), encoding="utf-8")
    return path


def _evaluate(folder: Path, text: Path, out: Path, questions: int, device: str, seed: int) -> dict[str, Any]:
    """Scores by task and metric."""
    shutil.rmtree(out, ignore_errors=True)
    options = EvalOptions(model=str(folder), out=out, text=text, limit=questions, device=device, seed=seed)
    outcome = evaluate(options, _say)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.failed:
        raise RuntimeError(f"lm-eval's tasks failed; see {out}")
    scores: dict[str, Any] = {}
    for row in outcome.rows:
        scores.setdefault(row.task, {})[row.metric] = row.value
    return scores


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
