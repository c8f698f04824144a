"""Needle in a haystack: does a model find a sentence in a long text, by its depth and the length of the text."""

import collections
import hashlib
import logging
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foxlm.kernels.argument_types import typed
from foxlm.modeling.versions import CACHE, cache_of

from .loading import (
    load_model,
    load_tokenizer,
    model_name,
    position_limit,
    pruning_as_asked,
    pruning_used,
    trained_length,
)
from .loss_by_position import new_cache
from .needle_prompts import STARTS, PromptMaker, draw_needle, haystack_tokens
from .provenance import provenance
from .results import fingerprint, read_json, reading, require_folder, require_least, require_same, write_json
from .tables import table
from .text import LONGEST, check_tokens


@dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """What to measure; the command's options of the same names say more."""

    model: str
    out: Path
    lengths: Sequence[int] = ()
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    mode: str = "easy"
    text: Path | None = None
    answer_tokens: int | None = None
    score_only: bool = False
    seed: int = 0
    batch_size: int = 4
    chunk: int = 0
    trained_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    eps: str = "model"
    rule: str = "model"
    overwrite: bool = False


@typed
def measure_needle(options: NeedleOptions) -> dict[str, Any]:
    """Measure the cells that ``out/needle.json`` does not hold yet; it is written after each.

    Returns:
        What the file holds: ``settings``, ``provenance``, ``trained_length``, and ``cells``, each with ``length``,
        ``depth``, the means ``found``, ``recall``, ``loss`` and ``accuracy`` (as of `ask`), and its ``samples``.

    Raises:
        ValueError: an option is not accepted, or the folder holds results of other settings.
        OSError: the model or the text cannot be read.
    """
    _check(options)
    require_folder(options.out)
    trained = options.trained_length or trained_length(options.model)
    tokenizer = load_tokenizer(options.model)
    lengths = list(options.lengths) or [int(share * (trained or 8192)) for share in (0.125, 0.25, 0.5, 1, 2)]
    if not max(lengths) <= LONGEST:
        raise ValueError(f"lengths must be at most {LONGEST:,} tokens, got {max(lengths)}; give --lengths")
    haystack, repeats = haystack_tokens(options.text, tokenizer, max(lengths) + STARTS, options.seed)
    check_tokens(int(haystack.min()), int(haystack.max()), len(tokenizer), str(options.text))
    maker = PromptMaker(tokenizer, options.mode, haystack, options.seed)
    # A chat model may say more than the answer.
    room = options.answer_tokens or maker.answer_tokens(options.samples) * (2 if options.mode == "chat" else 1)
    least = maker.least(options.samples) + room
    if not options.lengths and max(lengths) >= least:
        lengths = [length for length in lengths if length >= least]
    if min(lengths) < least:
        raise ValueError(f"lengths must be at least {least} to hold question, needle and answer, got {min(lengths)}")
    names = ("model", "mode", "samples", "seed", "score_only", "dtype", "eps", "rule")
    settings = {name: getattr(options, name) for name in names} | {
        "fingerprint": fingerprint(options.model),
        "answer_tokens": room,
        "text": options.text and str(options.text),
        # Longer lengths read on in the same text.
        "text_begins": options.text and hashlib.sha256(haystack[:4096].tobytes()).hexdigest()[:16],
    }
    path = options.out / "needle.json"
    report: dict[str, Any] = {"kind": "needle", "settings": settings, "name": model_name(options.model), "cells": []}
    if path.exists() and not options.overwrite:
        report = read_json(path, "needle")
    report |= {"trained_length": trained, "haystack_repeats_after": repeats}
    with reading(path):
        require_same(report["settings"], settings, str(path))
        done = {(cell["length"], cell["depth"]) for cell in report["cells"]}
    missing = [(length, depth) for length in lengths for depth in options.depths if (length, depth) not in done]
    if missing:
        with pruning_as_asked(options.eps, options.rule):
            _measure(report, maker, options, missing)
    write_json(path, report)
    return report


def _measure(
    report: dict[str, Any], maker: PromptMaker, options: NeedleOptions, missing: Sequence[tuple[int, float]]
) -> None:
    """Add the missing cells to ``report``, writing it after each."""
    model = load_model(options.model, device=options.device, dtype=options.dtype, eps=options.eps, rule=options.rule)
    limit, longest = position_limit(model), max(length for length, _ in missing)
    if limit is not None and longest > limit:
        raise ValueError(f"lengths must be at most {limit}, the learned positions of the model, got {longest}")
    report |= {"pruning": pruning_used(model), "dtype": str(model.dtype).removeprefix("torch.")}
    report["provenance"] = provenance(str(model.device), options.seed)
    room = report["settings"]["answer_tokens"]
    new_tokens = 0 if options.score_only else room
    with tqdm(total=len(missing) * options.samples, desc="needles", unit="prompt") as bar:
        for length, depth in missing:
            start, samples = time.perf_counter(), []
            for first in range(0, options.samples, options.batch_size):
                numbers = range(first, min(first + options.batch_size, options.samples))
                prompts = [maker.prompt(sample, length - room, depth) for sample in numbers]
                answers = [draw_needle(options.seed, sample).answer for sample in numbers]
                samples += ask(model, maker.tokenizer, prompts, answers, new_tokens, options.chunk)
                bar.update(len(numbers))
            cell: dict[str, Any] = {"length": length, "depth": depth, **_means(samples)}
            cell |= {"seconds": round(time.perf_counter() - start, 2), "samples": samples}
            report["cells"] = sorted([*report["cells"], cell], key=lambda x: (x["length"], x["depth"]))
            write_json(options.out / "needle.json", report)


def _check(options: NeedleOptions) -> None:
    require_least(options, samples=1, batch_size=1, chunk=0, answer_tokens=1, trained_length=1)
    if not options.depths or not all(0 <= depth <= 1 for depth in options.depths):
        raise ValueError(f"depths must be shares from 0 (the beginning) to 1 (the end), got {list(options.depths)}")
    if any(length < 1 for length in options.lengths):
        raise ValueError(f"lengths must be positive, got {list(options.lengths)}")


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[np.ndarray, np.ndarray]],
    answers: Sequence[str],
    new_tokens: int,
    chunk: int = 0,
) -> list[dict[str, Any]]:
    """Let a model answer prompts of one length, as a batch.

    The answer's own tokens are scored first. Where each of them is the likeliest after those before it, they are what
    greedy decoding writes; only the others are generated.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        prompts, answers: of `PromptMaker`, of one length, and for each the text that must appear in what is written.
        new_tokens: most that is written. With 0 an answer is found if greedy decoding gives its very tokens.
        chunk: tokens of the prompts that are taken in at once; 0 is all.

    Returns:
        For each prompt ``answer``, ``written``, ``found`` (whether the one is in the other, without regard to case,
        punctuation and spaces), ``recall`` (share of the answer's words that were written, ROUGE-1), ``loss`` (mean
        nats of the answer's tokens, None if not finite) and ``accuracy`` (share of them that was the likeliest).
        ``written`` and ``recall`` are None where nothing was written.
    """
    tokens = torch.from_numpy(np.stack([prompt for prompt, _ in prompts])).to(model.device)
    scores = answer_scores(model, tokens, [torch.from_numpy(answer) for _, answer in prompts], chunk)
    texts: list[str | None] = [tokenizer.decode(answer) for _, answer in prompts]
    missed = [index for index, (_, accuracy) in enumerate(scores) if accuracy < 1]
    written = _generate(model, tokens[missed], new_tokens, chunk) if missed and new_tokens else [None] * len(missed)
    for index, ids in zip(missed, written, strict=True):
        texts[index] = None if ids is None else tokenizer.decode(ids, skip_special_tokens=True)
    return [
        {
            "answer": answer,
            "written": text,
            "found": text is not None and contains(text, answer),
            "recall": None if text is None else word_recall(text, answer),
            "loss": loss if np.isfinite(loss) else None,
            "accuracy": accuracy,
        }
        for answer, text, (loss, accuracy) in zip(answers, texts, scores, strict=True)
    ]


@torch.no_grad()
def answer_scores(
    model: PreTrainedModel, prompts: Tensor, answers: Sequence[Tensor], chunk: int = 0
) -> list[tuple[float, float]]:
    """How likely answers, ``[A]`` int64 of any lengths, are after ``prompts``, ``[B, L]`` int64.

    Returns:
        Of each the mean negative log-likelihood of its tokens in nats, and the share of them that is likeliest.
    """
    longest = max(map(len, answers))
    # What is put behind a shorter answer follows all that is looked at.
    padded = torch.stack([nn.functional.pad(answer, (0, longest - len(answer))) for answer in answers])
    whole = torch.cat([prompts, padded.to(prompts)[:, :-1]], dim=1)
    kept = prompts.shape[1] - 1
    if chunk:
        cache = new_cache(model, whole.shape[1])
        for part in whole[:, :kept].split(chunk, dim=1):
            # Positions that no logits are wanted of.
            out = model(input_ids=part, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            cache = cache_of(out)
        logits = model(input_ids=whole[:, kept:], use_cache=True, **{CACHE: cache}).logits
    else:
        logits = model(input_ids=whole, use_cache=False, logits_to_keep=longest).logits
    found = [(row[: len(answer)], answer) for row, answer in zip(logits.float().cpu(), answers, strict=True)]
    return [
        (nn.functional.cross_entropy(row, answer).item(), (row.argmax(-1) == answer).double().mean().item())
        for row, answer in found
    ]


def _generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int, chunk: int) -> list[Tensor]:
    # Greedy whatever the model's own settings are.
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    greedy |= {"max_new_tokens": new_tokens, "use_cache": True, "prefill_chunk_size": chunk or None}
    # Neither lengths beyond the trained one nor padding behind an end are reasons for a warning here.
    warnings = logging.getLogger("transformers.generation")
    level = warnings.level
    warnings.setLevel(logging.ERROR)
    try:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **greedy)
    finally:
        warnings.setLevel(level)
    return list(out[:, prompts.shape[1] :].cpu())


def contains(text: str, answer: str) -> bool:
    """Whether the words of ``answer`` stand in ``text`` one after the other."""
    return f" {' '.join(_words(answer))} " in f" {' '.join(_words(text))} "


def word_recall(text: str, answer: str) -> float:
    """Share of the words of ``answer``, each as often as it is there, that ``text`` has: recall of ROUGE-1."""
    wanted, given = collections.Counter(_words(answer)), collections.Counter(_words(text))
    return (wanted & given).total() / wanted.total()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _means(samples: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    columns = {name: [sample[name] for sample in samples] for name in ("found", "recall", "loss", "accuracy")}
    return {name: None if None in values else statistics.fmean(values) for name, values in columns.items()}


def grid(cells: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float], np.ndarray]:
    """Lengths and depths, ascending, and ``name`` of their cells: ``[depths, lengths]``, NaN where it is missing."""
    values = {(cell["length"], cell["depth"]): cell[name] for cell in cells}
    lengths, depths = (sorted({place[axis] for place in values}) for axis in (0, 1))
    rows = [[values.get((length, depth)) for length in lengths] for depth in depths]
    return lengths, depths, np.array(rows, dtype=float)


def needle_table(report: dict[str, Any]) -> str:
    """Shares found as text: a line for each depth, a column for each length."""
    mode, samples = (report["settings"][name] for name in ("mode", "samples"))
    means = _means(report["cells"])
    lengths, depths, found = grid(report["cells"], "found")
    rows = [
        [f"{depth:.0%}", *("-" if np.isnan(share) else f"{share:.0%}" for share in row)]
        for depth, row in zip(depths, found, strict=True)
    ]
    words = "" if means["recall"] is None else f"; {means['recall']:.1%} of the answers' words written"
    loss = "not finite" if means["loss"] is None else f"{means['loss']:.3f} nats per token"
    lines = [
        table(["depth", *(f"{length:,}" for length in lengths)], rows),
        f"needles found: {means['found']:.1%}{words}; loss of the answers: {loss}",
        f"mode {mode}, {samples} needles for each length and depth",
    ]
    if repeats := report.get("haystack_repeats_after"):
        lines.append(f"note: {report['settings']['text']} has {repeats:,} tokens; haystacks that end later repeat it")
    return "\n".join(lines)
