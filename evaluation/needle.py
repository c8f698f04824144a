"""Needle in a haystack: does a model find a sentence in a long text, by its depth and the length of the text."""

import collections
import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from foxlm.modeling.versions import CACHE, cache_of

from .loading import load_model, load_tokenizer, model_name, position_limit, pruning_used, trained_length
from .loss_by_position import new_cache
from .needle_prompts import MODES, STARTS, Prompt, PromptMaker, draw_needle, haystack_tokens
from .provenance import provenance
from .results import fingerprint, read_json, reading, require_folder, require_same, write_json
from .text import LONGEST, check_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Depends on a model's trained length unless it is given.
_DEFAULT_LENGTHS = (0.125, 0.25, 0.5, 1, 2)


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
    batch: int = 4
    chunk: int = 0
    trained_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    eps: str = "model"
    rule: str = "model"
    overwrite: bool = False


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
    lengths = list(options.lengths) or [int(share * (trained or 8192)) for share in _DEFAULT_LENGTHS]
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
        raise ValueError(
            f"lengths must be at least {least}, what question, needle and answer take of this model's tokens, "
            f"got {min(lengths)}"
        )
    settings = _settings(options, haystack if options.text else None, room)
    path = options.out / "needle.json"
    report: dict[str, Any] = {"kind": "needle", "settings": settings, "name": model_name(options.model), "cells": []}
    if path.exists() and not options.overwrite:
        report = read_needle(path)
        require_same(report["settings"], settings, str(path))
    report |= {"trained_length": trained, "haystack_repeats_after": repeats}
    done = {(cell["length"], cell["depth"]) for cell in report["cells"]}
    missing = [(length, depth) for length in lengths for depth in options.depths if (length, depth) not in done]
    if missing:
        _measure(report, tokenizer, maker, options, missing)
    write_json(path, report)
    return report


def _measure(
    report: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    maker: PromptMaker,
    options: NeedleOptions,
    missing: Sequence[tuple[int, float]],
) -> None:
    """Add the missing cells to ``report``, writing it after each."""
    model = load_model(options.model, device=options.device, dtype=options.dtype, eps=options.eps, rule=options.rule)
    limit, longest = position_limit(model), max(length for length, _ in missing)
    if limit is not None and longest > limit:
        raise ValueError(f"lengths must be at most {limit}, the learned positions of the model, got {longest}")
    report |= {"pruning": pruning_used(model), "dtype": str(model.dtype).removeprefix("torch.")}
    report["provenance"] = provenance(str(model.device), options.seed)
    room = report["settings"]["answer_tokens"]
    with tqdm(total=len(missing) * options.samples, desc="needles", unit="prompt") as bar:
        for length, depth in missing:
            start = time.perf_counter()
            samples = _measure_cell(model, tokenizer, maker, options, length - room, depth, room, bar)
            cell: dict[str, Any] = {"length": length, "depth": depth, **_means(samples)}
            cell |= {"seconds": round(time.perf_counter() - start, 2), "samples": samples}
            report["cells"] = sorted([*report["cells"], cell], key=lambda x: (x["length"], x["depth"]))
            write_json(options.out / "needle.json", report)


def _check(options: NeedleOptions) -> None:
    if options.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {options.mode!r}")
    for name, least in (("samples", 1), ("batch", 1), ("chunk", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")
    for name in ("answer_tokens", "trained_length"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if not options.depths or not all(0 <= depth <= 1 for depth in options.depths):
        raise ValueError(f"depths must be shares from 0 (the beginning) to 1 (the end), got {list(options.depths)}")
    if any(length < 1 for length in options.lengths):
        raise ValueError(f"lengths must be positive, got {list(options.lengths)}")


def _settings(options: NeedleOptions, haystack: np.ndarray | None, room: int) -> dict[str, Any]:
    return {
        "model": options.model,
        "fingerprint": fingerprint(options.model),
        "mode": options.mode,
        "samples": options.samples,
        "seed": options.seed,
        "answer_tokens": room,
        "score_only": options.score_only,
        # Longer lengths read on in the same text.
        "text": None if haystack is None else str(options.text),
        "text_begins": None if haystack is None else hashlib.sha256(haystack[:4096].tobytes()).hexdigest()[:16],
        "dtype": options.dtype,
        "eps": options.eps,
        "rule": options.rule,
    }


def _measure_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    maker: PromptMaker,
    options: NeedleOptions,
    length: int,
    depth: float,
    room: int,
    bar: tqdm,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for first in range(0, options.samples, options.batch):
        numbers = range(first, min(first + options.batch, options.samples))
        prompts = [maker.prompt(sample, length, depth) for sample in numbers]
        answers = [draw_needle(options.seed, sample).answer for sample in numbers]
        found += ask(model, tokenizer, prompts, answers, 0 if options.score_only else room, options.chunk)
        bar.update(len(numbers))
    return found


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    new_tokens: int,
    chunk: int = 0,
) -> list[dict[str, Any]]:
    """Let a model answer prompts of one length, as a batch.

    The answer's own tokens are scored first. Where each of them is the likeliest after those before it, they are what
    greedy decoding writes; only the others are generated.

    Args:
        model: a causal language model.
        tokenizer: its.
        prompts: all of one length.
        answers: text that must appear in what is written.
        new_tokens: most that is written. 0 is nothing: an answer is then found if greedy decoding gives its
            very tokens.
        chunk: tokens of the prompts that are taken in at once; 0 is all.

    Returns:
        For each prompt ``answer``, ``written``, ``found`` (whether the one is in the other, without regard to case,
        punctuation and spaces), ``recall`` (share of the answer's words that were written, ROUGE-1), ``loss`` (mean
        nats of the answer's tokens, None if not finite) and ``accuracy`` (share of them that was the likeliest).
        ``written`` and ``recall`` are None where nothing was written.
    """
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).to(model.device)
    scores = answer_scores(model, tokens, [torch.from_numpy(prompt.answer) for prompt in prompts], chunk)
    texts: list[str | None] = [tokenizer.decode(prompt.answer) for prompt in prompts]
    missed = [index for index, (_, accuracy) in enumerate(scores) if accuracy < 1]
    if missed:
        written = _generate(model, tokens[missed], new_tokens, chunk) if new_tokens else []
        for position, index in enumerate(missed):
            texts[index] = tokenizer.decode(written[position], skip_special_tokens=True) if new_tokens else None
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
    """How likely answers are after prompts.

    Args:
        model: a causal language model.
        prompts: ``[B, L]`` int64.
        answers: B of ``[A]`` int64, of any lengths.
        chunk: tokens of the prompts that are taken in at once; 0 is all.

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
    found = []
    for row, answer in zip(logits.float().cpu(), answers, strict=True):
        likeliest = (row[: len(answer)].argmax(-1) == answer).double().mean().item()
        found.append((nn.functional.cross_entropy(row[: len(answer)], answer).item(), likeliest))
    return found


def _generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int, chunk: int) -> list[Tensor]:
    ends = model.generation_config.eos_token_id
    padding = model.generation_config.pad_token_id
    if padding is None:
        padding = (ends[0] if isinstance(ends, list) else ends) or 0
    # Greedy whatever the model's own settings are.
    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=padding,
        prefill_chunk_size=chunk or None,
    )
    # That a length is beyond the trained one is the point, and no reason for a warning.
    warnings = logging.getLogger("transformers.generation.stopping_criteria")
    level = warnings.level
    warnings.setLevel(logging.ERROR)
    try:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy)
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
    found: dict[str, float | None] = {}
    for name in ("found", "recall", "loss", "accuracy"):
        values = [sample[name] for sample in samples]
        found[name] = None if None in values else float(np.mean(values))
    return found


def read_needle(path: Path) -> dict[str, Any]:
    """What `measure_needle` wrote.

    Raises:
        ValueError, OSError: there is no such file, or it holds something else.
    """
    report = read_json(path, "needle", ("settings", "name", "trained_length", "cells"))
    with reading(path):
        sorted((cell["length"] + 0, cell["depth"] + 0) for cell in report["cells"])
    return report


def needle_table(report: dict[str, Any]) -> str:
    """Shares found as text: a line for each depth, a column for each length."""
    cells = {(cell["length"], cell["depth"]): cell for cell in report["cells"]}
    lengths, depths = (sorted({key[index] for key in cells}) for index in (0, 1))
    lines = [f"{'depth':>6}" + "".join(f"{length:>9,}" for length in lengths)]
    for depth in depths:
        row = [cells.get((length, depth)) for length in lengths]
        lines.append(
            f"{depth:>6.0%}" + "".join(f"{'-' if cell is None else f'''{cell['found']:.0%}''':>9}" for cell in row)
        )
    if not cells:
        raise LookupError("no cells")
    settings, means = report["settings"], _means(list(cells.values()))
    words = "" if means["recall"] is None else f"; {means['recall']:.1%} of the answers' words written"
    loss = "not finite" if means["loss"] is None else f"{means['loss']:.3f} nats per token"
    lines.append(f"needles found: {means['found']:.1%}{words}; loss of the answers: {loss}")
    lines.append(f"mode {settings['mode']}, {settings['samples']} needles for each length and depth")
    if repeats := report.get("haystack_repeats_after"):
        lines.append(f"note: {settings['text']} has {repeats:,} tokens; haystacks that end later repeat it")
    return "\n".join(lines)


def draw_needle_map(report: dict[str, Any]) -> "Figure":
    """The heat map of what `measure_needle` wrote. Needs matplotlib."""
    from .plots.needle import plot_needle

    return plot_needle(report)
