"""Results as JSON, and the tables made from them."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..provenance import provenance
from .bars import AUTHORS_DECODE_MS, AUTHORS_DECODE_SOURCE

SCHEMA = 1
KINDS = ("attention", "train", "decode")
# Lists that may come from several runs.
_LISTS = {"attention": ("cases",), "decode": ("batches", "largest_batch")}
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
        ``schema``, ``kind``, ``run`` (see `provenance`; also the versions of CUDA and cuDNN) and ``settings``.

    Raises:
        ValueError: ``commit`` is given in a checkout, which knows its own.
    """
    run = provenance(device, seed, ("triton", "flash-linear-attention"))
    if commit is not None:
        if run["commit"] != "none":
            raise ValueError(f"--commit must not be given in a checkout, which is at {run['commit']}; got {commit!r}")
        run["commit"] = commit
    run["command"] = f"python -m foxlm.evaluation.speed {shlex.join(sys.argv[1:])}"
    run |= {"cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version() or "none"}
    return {"schema": SCHEMA, "kind": kind, "run": run, "settings": dict(settings)}


def write(results: Results, path: Path) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> Results:
    """Read what `write` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or results.get("kind") not in KINDS:
        raise ValueError(f"{path} must hold results of this benchmark, schema {SCHEMA}, of a kind in {list(KINDS)}")
    return results


def merged(several: Sequence[Results]) -> list[Results]:
    """Results of attention with their cases together, as one, those of decoding likewise; others as they are.

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
    for part, names in (("run", _SAME_RUN), ("settings", tuple(first["settings"]))):
        for name in names:
            found, wanted = results[part][name], first[part][name]
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


def render(results: Results) -> str:
    """The tables as Markdown, under a line that says where the figures come from."""
    body = {"attention": _attention, "train": _train, "decode": _decode}[results["kind"]]
    return f"{_origin(results)}\n\n{body(results)}"


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


def _origin(results: Results) -> str:
    run, settings = results["run"], results["settings"]
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton", "cuda", "cudnn"))
    commit, changes, _ = run["commit"].partition("+changes")
    apart = _percent(max(_spreads(results), default=0.0))
    return (
        f"{run['device']}; {versions}; foxlm {run['foxlm']}, commit {commit[:12]}{changes}; {settings['dtype']}; "
        f"eps = {settings['eps']:.2g}; medians of 2 x {settings['rounds']} calls in turn, at most {apart} apart."
    )


def _spreads(results: object) -> Iterator[float]:
    """How far apart the two passes of each measurement are."""
    if isinstance(results, dict):
        if "spread" in results:
            yield results["spread"]
        results = list(results.values())
    if isinstance(results, list):
        for part in results:
            yield from _spreads(part)


def _attention(results: Results) -> str:
    columns = ["B x H x D x T", "implementation", "tiles kept", "forward ms", "fwd + bwd ms"]
    columns += ["dense TFLOP/s", "of the matmul's rate", "peak GB"]
    rows, notes = [], []
    for case in results["cases"]:
        shape = _shape(case)
        if "error" in case:
            notes.append(f"{shape}: {case['error'].splitlines()[0]}")
        for one in case["implementations"]:
            if "forward" not in one:
                notes.append(_note(shape, one))
                continue
            forward, both = one["forward"], one["forward_backward"]
            name = one["name"] + ("" if one["gate_gradient"] or not one["gated"] else " (no gate gradient)")
            figures = [
                _percent(one["tiles_kept"]),
                _digits(forward["ms"]),
                _digits(both["ms"]),
                f"{_digits(forward['dense_tflops'])} / {_digits(both['dense_tflops'])}",
                f"{_percent(forward['of_ceiling'])} / {_percent(both['of_ceiling'])}",
                _gigabytes(one["peak_bytes"]),
            ]
            rows.append([shape, name, *figures])
        notes += [_note(f"{shape}, gates open", one) for one in case["open_gates"] if "forward" not in one]
    legend = (
        "Dense TFLOP/s count the causal products without pruning. The matmul's rate is that of a large matrix product "
        "timed in between, held against the products of the tiles that are kept. Pairs: forward / forward and backward."
    )
    return "\n\n".join([_table(columns, rows), legend, _attention_bars(results["cases"]), *_noted(notes)])


def _attention_bars(cases: Sequence[Mapping[str, Any]]) -> str:
    def both(values: Mapping[str, float] | None, show: Callable[[float], str]) -> str:
        return "-" if values is None else f"{show(values['forward'])} / {show(values['forward_backward'])}"

    columns = ["B x H x D x T", "rule", "rate without pruning over cuDNN's", "time over (time without x tiles kept)"]
    columns += ["cost where nothing can be pruned", "finding boundaries, of forward", "tiles dropped"]
    rows = []
    for case in cases:
        bars = case["bars"]
        for rule in bars.get("dropped", {}):
            figures = [
                both(bars.get("dense_rate_over_cudnn"), _digits),
                both(bars.get("acp_over_kept", {}).get(rule), _digits),
                both(bars.get("vain_cost", {}).get(rule), _percent),
                _percent(bars["boundaries_of_forward"][rule]),
                _percent(bars["dropped"][rule]),
            ]
            rows.append([_shape(case), f"`{rule}`", *figures])
    return _table(columns, rows)


def _train(results: Results) -> str:
    columns = ["training step", "tiles kept", "tokens/s", "ms", "peak GB"]
    rows = []
    for one in results["steps"]:
        if "step" in one:
            figures = [_percent(one["tiles_kept"]), f"{one['tokens_per_second']:,.0f}"]
            rows.append([one["name"], *figures, _digits(one["step"]["ms"]), _gigabytes(one["peak_bytes"])])
    what = (
        f"`{results['preset']}`, {results['parameters'] / 1e6:.3g}M parameters, 1 x {results['tokens']:,} tokens, "
        "AdamW, float32 weights under bfloat16 autocast."
    )
    notes = [_note("training", one) for one in results["steps"] if "step" not in one]
    return "\n\n".join([what, _table(columns, rows), *_noted(notes)])


def _decode(results: Results) -> str:
    columns = ["batch", "decoding", "step ms", "of it on the device", "waits for", "tokens/s", "peak GB"]
    columns += ["keys and values GB", "read GB", "keys kept"]
    rows, notes = [], []
    for batch in results["batches"]:
        where = f"batch {batch['batch']}"
        if "error" in batch:
            notes.append(f"{where}: {batch['error'].splitlines()[0]}")
        for one in batch["decoders"]:
            if "step" not in one:
                notes.append(_note(where, one))
                continue
            busy, read, kept = (one.get(name) for name in ("device_ms", "read_bytes", "keys_kept"))
            figures = [
                _digits(one["step"]["ms"]),
                "-" if busy is None else _digits(busy),
                {None: "-", True: "host", False: "device"}[one["host_bound"]],
                f"{one['tokens_per_second']:,.0f}",
                _gigabytes(one["peak_bytes"]),
                _gigabytes(one["stored_bytes"]),
                _gigabytes(read),
                "-" if kept is None else _percent(kept),
            ]
            name = one["name"] + (", compiled" if one["compiled"] else "")
            rows.append([str(batch["batch"]), name, *figures])
    settings = results["settings"]
    what = (
        f"`{settings['preset']}`, {settings['layers']} layers, {settings['parameters'] / 1e6:.3g}M parameters "
        f"(the Llama has the same sizes); one token for each sequence after {settings['tokens']:,} random ones and "
        f"those decoded before. A call is {settings['new']} steps, timed until the device has finished. Keys and "
        "values: the memory that they take, and what a step must read of it by the keys that are kept."
    )
    tables = [_table(columns, rows)] if rows else []
    bars = _decode_bars(results)
    for one in results["largest_batch"]:
        found = [f"{cache} {one[cache]['batch']}" for cache in ("static", "paged") if "batch" in one[cache]]
        if found:
            tables.append(f"Largest batch, up to {one['most']}, at {one['tokens']:,} tokens: {', '.join(found)}.")
        notes += [_note("largest batch", one[cache]) for cache in ("static", "paged") if "batch" not in one[cache]]
    authors = "; ".join(f"batch {n}: {a:.0f} / {b:.0f}" for n, (a, b) in AUTHORS_DECODE_MS.items())
    reference = f"For comparison, {AUTHORS_DECODE_SOURCE}, ms a step without / with pruning: {authors}."
    return "\n\n".join([what, *tables, *([bars] if bars else []), reference, *_noted(notes)])


def _decode_bars(results: Results) -> str:
    words = {
        "step_ms": "ms a step, static cache, ACP",
        "tokens_per_second": "tokens/s, static cache, ACP",
        "acp_speedup": "static cache, rate with ACP over without",
        "paged_bytes": "memory of the paged cache over all keys and values",
        "paged_rate": "rate, paged over static cache",
        "rate_over_llama": "rate, static cache, ACP, over a compiled Llama",
        "largest_batch": "largest batch, paged over static cache",
    }
    rows = []
    for where in (*results["batches"], *results["largest_batch"]):
        for name, bar in where["bars"].items():
            wanted, met = "-", "-"
            if "at_most" in bar:
                wanted, met = f"at most {bar['at_most']:g}", "yes" if bar["value"] <= bar["at_most"] else "no"
            elif "at_least" in bar:
                wanted, met = f"at least {bar['at_least']:g}", "yes" if bar["value"] >= bar["at_least"] else "no"
            rows.append([str(where.get("batch", "-")), words[name], _digits(bar["value"]), wanted, met])
    return _table(["batch", "figure", "measured", "wanted on an H100", "met"], rows) if rows else ""


def _shape(case: Mapping[str, Any]) -> str:
    return case["case"].replace("x", " x ")


def _note(where: str, record: Mapping[str, Any]) -> str:
    words = {"wrong": "failed its check and was not timed", "missing": "not run", "failed": "failed"}
    return f"{where}, {record['name']}: {words[record['status']]}: {record['reason']}"


def _noted(notes: Sequence[str]) -> list[str]:
    return ["\n".join(f"* {note}" for note in notes)] if notes else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _digits(x: float) -> str:
    """Three significant digits, none of them in an exponent."""
    decimals = next((n for n, least in enumerate((100.0, 10.0, 1.0)) if abs(x) >= least), 3)
    return f"{x:.{decimals}f}"


def _percent(x: float) -> str:
    return f"{100 * x:.0f}%" if abs(x) >= 0.1 else f"{100 * x:.1f}%"


def _gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f}"
