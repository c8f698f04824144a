"""The whole demo, from text to report."""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from ..provenance import provenance
from ..requirements import require_lm_eval, require_matplotlib
from ..results import write_json
from .analyze import LOG_EPS, TILE, Analysis, analyze
from .bigram import BigramModel
from .corpus import load_corpus, to_tokens, windows
from .lm_eval_tasks import BITS, CHOICES, NEXT_LINES, run_lm_eval, write_tasks
from .page import render
from .reload import reload_and_generate
from .tokenizer import byte_tokenizer
from .train import GPU_RECIPE, QUICK_RECIPE, Recipe, Training, bits_per_byte, train

REPORT = "report.json"
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
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / REPORT).is_file():
            raise ValueError(
                f"--out must be a new or empty folder, or one of an earlier demo; {self.out} holds other files"
            )


@dataclass(frozen=True)
class _Amounts:
    """How much of the held-out text each part reads."""

    scored_windows: int = 300
    rescored_windows: int = 40
    analyzed_windows: int = 4
    analyzed_length: int = 1024
    snippet: int = 256
    questions: int = 100
    bits_bytes: int = 1024
    new_tokens: int = 240


_QUICK_AMOUNTS = _Amounts(
    scored_windows=8, analyzed_windows=1, analyzed_length=128, snippet=64, questions=4, bits_bytes=64, new_tokens=8
)


def run_demo(options: Options) -> dict[str, Any]:
    """Run the demo and write ``model/``, ``lm_eval/``, ``report.html`` and ``report.json`` into ``options.out``.

    Returns:
        What ``report.json`` holds.

    Raises:
        ImportError: lm-eval or matplotlib is missing.
        ValueError: there is no text to train on.
        RuntimeError: one of the processes that the demo starts failed.
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
    amounts = _QUICK_AMOUNTS if options.quick else _Amounts()
    steps = 12 if options.quick and options.steps is None else options.steps
    options.out.mkdir(parents=True, exist_ok=True)
    # Marks the folder as the demo's own, also if this run is interrupted.
    write_json(options.out / REPORT, {"complete": False})

    # Now, not when the report is written: a checkout can move on meanwhile.
    run = provenance(device, options.seed, ("lm_eval", "matplotlib", "safetensors"))
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
    model_folder = options.out / "model"
    training.model.save_pretrained(model_folder)
    byte_tokenizer().save_pretrained(model_folder)
    fox = bits_per_byte(training.model, held_out, recipe.batch, _bar("scoring held-out files", "batch"))
    _say(f"FoX: {fox:.3f} held-out bits per byte")

    with tqdm(total=4, desc="analyzing gates", unit="part") as bar:
        long_windows = windows(corpus.held_out, amounts.analyzed_length, amounts.analyzed_windows)
        analysis = analyze(training.model, long_windows, amounts.snippet)
        bar.update()
        bar.set_description("reloading and generating in a new process")
        # Enough to show that what was saved is what was trained.
        sample = windows(corpus.held_out, recipe.length, amounts.rescored_windows)
        request = {
            "prompts": PROMPTS,
            "windows": sample.tolist(),
            "device": device,
            "seed": options.seed,
            "new_tokens": amounts.new_tokens,
            "batch": recipe.batch,
        }
        reloaded = reload_and_generate(model_folder, request)
        bar.update()
        bar.set_description("lm-eval on local tasks in a new process")
        evaluated = options.out / "lm_eval"
        shutil.rmtree(evaluated, ignore_errors=True)
        write_tasks(evaluated, corpus.held_out, amounts.questions, amounts.bits_bytes, options.seed)
        lm_eval = run_lm_eval(model_folder, evaluated, device, 4 * recipe.batch)
        bar.update()
        bar.set_description("writing the report")
        report: dict[str, Any] = {
            "complete": True,
            "seconds": time.monotonic() - began,
            "quick": options.quick,
            "corpus": counts,
            "model": {
                "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
                **{name: getattr(recipe, name) for name in ("hidden_size", "intermediate_size", "layers", "heads")},
            },
            "training": _training(training, recipe),
            "held_out_bits_per_byte": {
                "fox": fox,
                "bigram": bigram,
                "bytes": int((held_out[:, 1:] < 256).sum()),
                "window": recipe.length,
            },
            "pruning": _pruning(analysis),
            "reload": {
                **reloaded,
                "bits_per_byte_before_saving": bits_per_byte(training.model, sample, recipe.batch),
            },
            "lm_eval": _lm_eval(lm_eval),
            "run": run,
        }
        write_json(options.out / REPORT, report)
        page = options.out / "report.html"
        page.write_text(render(report, training, analysis), encoding="utf-8")
        bar.update()
    lines = report["lm_eval"]["next_lines"]
    _say(
        f"lm-eval: {100 * lines['acc_mutual_info']:.1f}% of {lines['samples']} questions (chance {100 / CHOICES:.0f}%)"
    )
    _say(f"done in {report['seconds']:.0f} s: {page}, {model_folder}")
    return report


def _training(training: Training, recipe: Recipe) -> dict[str, Any]:
    return {
        "seconds": training.seconds,
        "steps": training.steps,
        "tokens": training.tokens,
        "tokens_per_second": training.tokens / training.seconds,
        "batch": recipe.batch,
        "length": recipe.length,
        "stopped_early": training.stopped_early,
        "train_bits_per_byte": training.train_losses,
        "held_out_bits_per_byte": training.held_out_losses,
    }


def _pruning(analysis: Analysis) -> dict[str, Any]:
    """Shares are means over layers and heads, one per `log_eps`."""
    return {
        "decay_times": analysis.decay_times.tolist(),
        "length": analysis.length,
        "tokens": analysis.tokens,
        "log_eps": LOG_EPS,
        "tile": TILE,
        "skipped_pairs": {rule: shares.mean((1, 2)).tolist() for rule, shares in analysis.pairs.items()},
        "skipped_tiles": {rule: shares.mean((1, 2)).tolist() for rule, shares in analysis.tiles.items()},
    }


def _lm_eval(results: dict[str, Any]) -> dict[str, Any]:
    lines, bits = results[NEXT_LINES], results[BITS]
    return {
        "next_lines": {
            "acc": lines["acc,none"],
            "acc_stderr": lines["acc_stderr,none"],
            "acc_mutual_info": lines["acc_mutual_info,none"],
            "acc_mutual_info_stderr": lines["acc_mutual_info_stderr,none"],
            "samples": lines["samples"],
            "choices": CHOICES,
        },
        "bits": {"bits_per_byte": bits["bits_per_byte,none"], "samples": bits["samples"]},
    }


def _bar(description: str, unit: str):
    return lambda items: tqdm(items, desc=description, unit=unit)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
