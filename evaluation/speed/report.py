"""Results as JSON: what they start with, how they are written, read and put together."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..provenance import provenance
from ..results import parse_json, write_whole

SCHEMA = 1
KINDS = ("attention", "context", "train", "prefill", "decode")
# Lists that may come from several runs.
_LISTS = {
    "attention": ("cases",),
    "context": ("cases",),
    "prefill": ("prompts",),
    "decode": ("batches", "largest_batch"),
}
# What must agree for results to stand in one table.
_SAME_RUN = ("device", "commit", "torch", "triton", "cuda", "cudnn")

Results = dict[str, Any]


def new_results(kind: str, device: str, seed: int, commit: str | None, settings: Mapping[str, Any]) -> Results:
    """What every result starts with.

    Args:
        kind: one of `KINDS`.
        device: ``"cuda"`` or ``"cpu"``.
        seed: of the run.
        commit: what is measured, where that cannot be found out.
        settings: how it was measured.

    Returns:
        ``schema``, ``kind``, ``run`` (see `provenance`; also the versions of CUDA and cuDNN, and whether it is
        ``on_gpu``) and ``settings``.

    Raises:
        ValueError: ``commit`` is given in a checkout, which knows its own.
    """
    run = provenance(device, seed, ("triton", "flash-linear-attention"))
    if commit is not None:
        if run["commit"] != "none":
            raise ValueError(f"--commit must not be given in a checkout, which is at {run['commit']}; got {commit!r}")
        run["commit"] = commit
    run["command"] = shlex.join(["foxlm", "bench", kind, *_arguments(kind)])
    run |= {"cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version() or "none"}
    run["on_gpu"] = device == "cuda"
    return {"schema": SCHEMA, "kind": kind, "run": run, "settings": dict(settings)}


def _arguments(kind: str) -> list[str]:
    """The command's arguments after its name, of paths only the last part: the rest is of one machine alone."""
    given = sys.argv[sys.argv.index(kind) + 1 :] if kind in sys.argv else []
    return [_without_folders(one) for one in given]


def _without_folders(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    return f"{option}{equals}{path.name if path.is_absolute() or (len(path.parts) > 1 and path.exists()) else value}"


def to_json(results: Any) -> str:
    """As JSON, in which what is no number is null."""
    return json.dumps(_finite(results), indent=1, allow_nan=False)


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write(results: Results, path: Path) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, to_json(results) + "\n")


def read(path: Path) -> Results:
    """Read what `write` wrote.

    Raises:
        ValueError: it is something else.
    """
    results = parse_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or results.get("kind") not in KINDS:
        raise ValueError(f"{path} must hold results of this benchmark, schema {SCHEMA}, of a kind in {list(KINDS)}")
    return results


def merged(several: Sequence[Results]) -> list[Results]:
    """Results of attention with their cases together, as one, those of the other kinds with lists likewise; others as
    they are.

    Raises:
        ValueError: they were not measured alike.
    """
    together = []
    for kind in KINDS:
        alike = [results for results in several if results["kind"] == kind]
        if kind in _LISTS and alike:
            for results in alike[1:]:
                _require_alike(results, alike[0])
            alike = [alike[0] | {name: [x for results in alike for x in results[name]] for name in _LISTS[kind]}]
        together += alike
    return together


def _require_alike(results: Results, first: Results) -> None:
    settings = dict.fromkeys((*first["settings"], *results["settings"]))
    for part, names in (("run", _SAME_RUN), ("settings", settings)):
        for name in names:
            found, wanted = results[part].get(name), first[part].get(name)
            if found != wanted:
                raise ValueError(f"results shown together must have the same {name}, got {wanted} and {found}")


def only_cases(results: Results, cases: Sequence[str]) -> Results:
    """``results`` with only the named cases, where it has cases; all of them for no names.

    Raises:
        ValueError: one of ``cases`` is not among the results.
    """
    if not cases or "cases" not in results:
        return results
    known = [one["case"] for one in results["cases"]]
    for case in cases:
        if case not in known:
            raise ValueError(f"--case must be one of {known}, got {case!r}")
    return results | {"cases": [one for one in results["cases"] if one["case"] in cases]}


def insert(text: str, kind: str, tables: str) -> str:
    """Put ``tables`` between ``<!-- speed:KIND -->`` and ``<!-- /speed:KIND -->`` in ``text``.

    Raises:
        ValueError: the two markers are not there, once each and in this order.
    """
    start, end = f"<!-- speed:{kind} -->", f"<!-- /speed:{kind} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"--readme must hold the lines {start} and {end}, once each and in this order")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{tables}\n{end}{rest.partition(end)[2]}"
