"""Results of benchmarks as JSON: how they begin, grow row by row, and are read again."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..provenance import provenance
from ..results import parse_json

SCHEMA = 2
# The last two are those of earlier versions.
KINDS = ("attention", "context", "train", "generate", "prefill", "decode")
PASSES = 2
# Of results of schema 1: the list of groups, and in each of them (or in the results themselves) the list of rows.
_OLD_ROWS = {
    "attention": ("cases", "implementations"),
    "context": (None, "cases"),
    "train": (None, "steps"),
    "prefill": ("prompts", "ways"),
    "decode": ("batches", "decoders"),
}
# What a row's rate is taken from: the first of these that it has.
_RATED = ("step", "first_token", "first")
# What must agree for results to be shown in one table.
_SAME_RUN = ("device", "commit", "torch", "triton", "cuda", "cudnn")

Results = dict[str, Any]
Row = dict[str, Any]
"""One measured variant: facts, ``status`` (``measured``, ``wrong``, ``missing``, ``failed``, or ``unfinished``) with a
``reason``, and by name the timing of each thing that was timed, as of `timing_of`."""


def new_results(kind: str, device: str, seed: int, commit: str | None, settings: Mapping[str, Any]) -> Results:
    """Results without rows.

    Args:
        kind: one of `KINDS`.
        device: ``"cuda"`` or ``"cpu"``.
        seed: of the run.
        commit: what is measured, where that cannot be found out.
        settings: how it is measured.

    Returns:
        ``schema``, ``kind``, ``run`` (see `provenance`; also the versions of CUDA and cuDNN, and whether it is
        ``on_gpu``), ``settings`` and ``rows``.

    Raises:
        ValueError: ``commit`` is given in a checkout, which knows its own.
    """
    run = provenance(device, seed, ("triton", "flash-linear-attention", "flash-attn-4"))
    if commit is not None:
        if run["commit"] != "none":
            raise ValueError(f"--commit must not be given in a checkout, which is at {run['commit']}; got {commit!r}")
        run["commit"] = commit
    given = sys.argv[sys.argv.index("bench") + 1 :] if "bench" in sys.argv else [kind]
    run["command"] = shlex.join(["foxlm", "bench", *map(_without_folders, given)])
    run |= {"cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version() or "none"}
    run["on_gpu"] = device == "cuda"
    return {"schema": SCHEMA, "kind": kind, "run": run, "settings": dict(settings), "rows": []}


def _without_folders(argument: str) -> str:
    """Of an argument that is a path only the last part: the rest is of one machine alone."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    return f"{option}{equals}{path.name if path.is_absolute() or (len(path.parts) > 1 and path.exists()) else value}"


def add_ratios(rows: list[Row]) -> None:
    """Add ``over_X`` to rows with ``against``, which maps X to a name: the rate over that of the row of this name.

    Batch and tokens of both rows are the same. Where one of them is not measured there is no ratio.
    """

    def time_of(row: Row) -> float | None:
        return next((row[name]["ms"] for name in _RATED if name in row), None) if row["status"] == "measured" else None

    by_facts = {(row["name"], row.get("batch"), row.get("tokens")): row for row in rows if "against" in row}
    for row in by_facts.values():
        for what, name in row["against"].items():
            other = by_facts.get((name, row.get("batch"), row.get("tokens")))
            own, others = time_of(row), None if other is None else time_of(other)
            # The difference of two calls may be lost in noise.
            if own is not None and others is not None and min(own, others) > 0.0:
                row[f"over_{what}"] = others / own


def to_json(results: Any) -> str:
    """As JSON, with null for NaN and infinities."""
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, allow_nan=False)


def read(path: Path) -> Results:
    """Results that a benchmark wrote, also those of schema 1, of which only rows are taken over.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    results = parse_json(path)
    kind = results.get("kind") if isinstance(results, dict) else None
    if kind not in KINDS or results.get("schema") not in (1, SCHEMA):
        raise ValueError(f"{path} must hold results of foxlm bench, schema 1 or {SCHEMA}, of a kind in {list(KINDS)}")
    if results["schema"] == 1:
        outer, inner = _OLD_ROWS[kind]
        groups = results[outer] if outer else [results]
        shared = [{x: group[x] for x in ("case", "kv_heads", "batch", "tokens") if x in group} for group in groups]
        rows = [{**facts, **row} for facts, group in zip(shared, groups, strict=True) for row in group[inner]]
        if kind == "attention":
            rows += [
                facts | {"name": "matmul", "status": "measured", "forward": {"dense_tflops": group["ceiling_tflops"]}}
                for facts, group in zip(shared, groups, strict=True)
            ]
        results = {name: results[name] for name in ("kind", "run", "settings")} | {"schema": SCHEMA, "rows": rows}
        for row in rows:
            row["computed_tiles"] = row.pop("tiles_kept", None)
            # Over the peak of a data sheet.
            row.pop("mfu", None)
            for part in ("forward", "forward_backward"):
                if "done_tflops" in row.get(part, ()):
                    row[part] |= {"computed_tflops": row[part]["done_tflops"], "of_matmul": row[part]["of_ceiling"]}
    return results


def merged(several: Sequence[Results]) -> list[Results]:
    """Results of the same kind with their rows together.

    Raises:
        ValueError: they were not measured alike.
    """
    together: dict[str, Results] = {}
    for results in several:
        first = together.setdefault(results["kind"], results | {"rows": []})
        for part, names in (("run", _SAME_RUN), ("settings", {**first["settings"], **results["settings"]})):
            for name in names:
                found, wanted = results[part].get(name), first[part].get(name)
                if found != wanted:
                    raise ValueError(f"results shown together must have the same {name}, got {wanted} and {found}")
        first["rows"] += results["rows"]
    return list(together.values())
