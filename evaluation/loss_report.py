"""Loss by position of one or several models on the same text: measured into a folder, row by row, and drawn."""

import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from foxlm.kernels.argument_types import typed

from .loading import (
    load_model,
    load_tokenizer,
    model_name,
    position_limit,
    pruning_as_asked,
    pruning_used,
    trained_length,
)
from .loss_by_position import bootstrap_means, row_losses
from .provenance import provenance
from .results import fingerprint, read_json, reading, require_folder, require_least, require_same, write_json
from .tables import table
from .text import LONGEST, rows

_SAVE_EVERY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What to measure; the command's options of the same names say more."""

    models: Sequence[str]
    text: Path
    length: int
    out: Path
    names: Sequence[str] = ()
    rows: int = 16
    join: bool = False
    edges: str = "log"
    chunk: int = 0
    trained_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    eps: str = "model"
    rule: str = "model"
    overwrite: bool = False


@typed
def measure_losses(options: LossOptions) -> dict[str, Any]:
    """Measure what ``out/loss.json`` does not hold yet, and write it there, also when it is interrupted.

    Returns:
        What the file holds; `summarize` has the numbers to show.

    Raises:
        ValueError: an option is not accepted, the models' tokenizers differ, or the folder holds results of other
            settings.
        OSError: a model or the text cannot be read.
    """
    require_folder(options.out)
    names = model_names(options)
    edges = bin_edges(options.edges, options.length)
    require_least(options, rows=1, chunk=0, trained_length=1)
    loading = {"dtype": options.dtype, "eps": options.eps, "rule": options.rule}
    models: dict[str, dict[str, Any]] = {}
    for name, source in zip(names, options.models, strict=True):
        own = {"source": source, "fingerprint": fingerprint(source), **loading}
        longest = options.trained_length or trained_length(source)
        models[name] = {"name": name, "settings": own, "trained_length": longest, "row_means": [], "not_finite": None}
    digest, count = _same_rows(options, names)
    settings = {"length": options.length, "rows": count, "tokens": digest, "edges": edges}
    path = options.out / "loss.json"
    report: dict[str, Any] = {"kind": "loss", "settings": settings, "text": str(options.text), "models": []}
    if path.exists() and not options.overwrite:
        report = read_json(path, "loss")
    report["rows_wanted"] = options.rows
    with reading(path):
        require_same(report["settings"], settings, str(path))
        measured = {model["name"]: model for model in report["models"]}
        for name in models.keys() & measured:
            require_same(measured[name]["settings"], models[name]["settings"], f"{path}, model {name},")
            models[name] = measured[name] | {"trained_length": models[name]["trained_length"]}
    # Those of the command line first, in its order; earlier ones stay.
    models |= {name: model for name, model in measured.items() if name not in models}
    for name in names:
        report["models"] = [model for other, model in models.items() if other in measured or other == name]
        if len(models[name]["row_means"]) < count:
            with pruning_as_asked(options.eps, options.rule):
                _measure(models[name], options, settings, lambda: write_json(path, report))
        measured[name] = models[name]
    write_json(path, report)
    return report


def _measure(model: dict[str, Any], options: LossOptions, settings: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure the rows that ``model`` lacks."""
    source, length, count = model["settings"]["source"], options.length, settings["rows"]
    loaded = load_model(source, device=options.device, dtype=options.dtype, eps=options.eps, rule=options.rule)
    room = position_limit(loaded)
    if room is not None and length > room:
        raise ValueError(f"length must be at most {room}, the number of learned positions of {source}, got {length}")
    model |= {"pruning": pruning_used(loaded), "dtype": str(loaded.dtype).removeprefix("torch.")}
    model["provenance"] = provenance(str(loaded.device), 0)
    done = len(model["row_means"])
    tokens = (torch.from_numpy(row) for row in itertools.islice(_rows(options, source), done, None))
    saved = time.monotonic()
    try:
        # Rows can be long: the bar counts tokens.
        with tqdm(desc=model["name"], total=count * length, initial=done * length, unit="tok", unit_scale=True) as bar:
            for index, row in enumerate(row_losses(loaded, tokens, options.chunk), done):
                found = row.numpy()
                _note_first_not_finite(model, index, found)
                # Entry t is of the token with t + 1 before it, and edges count those.
                bins = (found[start - 1 : end - 1] for start, end in itertools.pairwise(settings["edges"]))
                model["row_means"].append([_finite(part.mean(dtype=np.float64).item()) for part in bins])
                bar.update(length)
                if time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                    save()
                    saved = time.monotonic()
    finally:
        save()


def _finite(x: float) -> float | None:
    """``x``, or None where JSON has no number for it."""
    return x if math.isfinite(x) else None


def _note_first_not_finite(model: dict[str, Any], row: int, losses: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad) and model["not_finite"] is None:
        model["not_finite"] = {"row": row, "position": int(bad[0]) + 1, "loss": str(losses[bad[0]])}
        message = f"warning: the loss of {model['name']} is {losses[bad[0]]} in row {row} at position {bad[0] + 1}"
        tqdm.write(f"{message}; its bins with such losses are left out", file=sys.stderr)


def summarize(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each model its mean losses by bin with 95% intervals, and the paired difference to the first model.

    Returns:
        For each ``name``, ``trained_length``, ``not_finite`` and ``rows``; ``loss`` and, but for the first,
        ``difference``, each with ``mean``, ``low`` and ``high`` of every bin, None where a loss was not finite (and
        ``low`` and ``high`` with a single row).
    """
    found: list[dict[str, Any]] = []
    first = None
    for model in report["models"]:
        means = torch.from_numpy(np.array(model["row_means"], dtype=np.float64))
        if not len(means):
            continue
        one = {name: model[name] for name in ("name", "trained_length", "not_finite")}
        one |= {"rows": len(means), "loss": _interval(means)}
        if first is not None:
            shared = min(len(first), len(means))
            one["difference"] = _interval(means[:shared] - first[:shared])
        first = means if first is None else first
        found.append(one)
    return found


def _interval(means: torch.Tensor) -> dict[str, list[float | None]]:
    found = bootstrap_means(means)
    if len(means) < 2:
        found[1:] = math.nan
    return {name: [*map(_finite, row)] for name, row in zip(("mean", "low", "high"), found.tolist(), strict=True)}


def loss_table(report: dict[str, Any]) -> str:
    """The losses of `summarize` as text, a line for each bin."""
    models = summarize(report)
    bins = [f"{start:,} to {end - 1:,}" for start, end in itertools.pairwise(report["settings"]["edges"])]
    cells = [[_cell(*values) for values in zip(*model["loss"].values(), strict=True)] for model in models]
    counts = ", ".join(sorted({str(model["rows"]) for model in models}))
    fewer = report["settings"]["rows"] < report["rows_wanted"]
    missing = f" ({report['rows_wanted']} were wanted, {report['text']} has no more)" if fewer else ""
    lines = [
        table(["tokens before", *(model["name"] for model in models)], [*zip(bins, *cells, strict=True)]),
        f"mean loss in nats per token with its 95% interval over {counts} rows{missing}",
    ]
    lines += [
        f"{model['name']}: loss is {bad['loss']} in row {bad['row']} at position {bad['position']}, the first such"
        for model in models
        if (bad := model["not_finite"])
    ]
    return "\n".join(lines)


def _cell(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "not finite"
    return f"{mean:.3f}" if low is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def bin_edges(spec: str, length: int) -> list[int]:
    """Edges of bins over the number of tokens before the predicted one, from 1 to ``length``.

    ``spec`` is ``log`` (two bins for each doubling, with edges at powers of two), a width, or edges with commas.
    """
    if not 2 <= length <= LONGEST:
        raise ValueError(f"length must be from 2 to {LONGEST:,}, got {length}")
    if spec == "log":
        edges = sorted({x for power in range(length.bit_length()) for x in (2**power, 3 * 2**power // 2)})
        edges = [x for x in edges if x < length]
        # No sliver at the end.
        if len(edges) > 2 and length - edges[-1] < (edges[-1] - edges[-2]) // 2:
            edges.pop()
        return [*edges, length]
    try:
        numbers = [int(part) for part in spec.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and 1 <= numbers[0] < length:
        return [1, *range(numbers[0] + 1, length, numbers[0]), length]
    if len(numbers) < 2 or numbers[0] < 1 or numbers[-1] > length or numbers != sorted(set(numbers)):
        raise ValueError(
            f"edges must be log, a width below length, or numbers ascending from at least 1 to at most length "
            f"({length}), got {spec!r}"
        )
    return numbers


def model_names(options: LossOptions) -> list[str]:
    """The names given for the models, or without them `model_name` of each, all different."""
    sources, names = options.models, options.names
    if not sources or (names and len(names) != len(sources)):
        raise ValueError(f"name must be given once for each model, of one or more; got {len(names)} for {len(sources)}")
    found = list(names) or [model_name(source) for source in sources]
    if len(set(found)) < len(found) or not all(found):
        raise ValueError(f"models must have different names, got {', '.join(found)}; give a --name for each, not empty")
    return found


def _rows(options: LossOptions, source: str) -> Iterator[np.ndarray]:
    tokenizer = None if options.text.suffix == ".npy" else load_tokenizer(source)
    return rows(options.text, tokenizer, options.length, options.rows, options.join)


def _same_rows(options: LossOptions, names: Sequence[str]) -> tuple[str, int]:
    """Hash of all tokens to be measured, and the number of rows: the same for each model, or refused."""
    found: list[tuple[str, int]] = []
    for name, source in zip(names, options.models, strict=True):
        hashed, count = hashlib.sha256(), 0
        for row in _rows(options, source):
            hashed.update(row.tobytes())
            count += 1
        found.append((hashed.hexdigest()[:16], count))
        if found[-1] != found[0]:
            raise ValueError(
                f"models must have the same tokenizer, since a loss per token is of its tokens; "
                f"{names[0]} and {name} make different ones of {options.text}"
            )
    return found[0]
