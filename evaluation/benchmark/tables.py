"""What tables of benchmarks show of a row, by kind."""

from collections.abc import Callable, Mapping
from typing import Any

from ..tables import digits, percent, table
from .results import PASSES, Results, Row

_ON_A_CPU = (
    "**Figures of no use: measured on a CPU**, where foxlm runs in plain PyTorch, without its kernels. They show that "
    "all parts work, and say nothing about a GPU."
)
_STATUS = {"wrong": "failed its check and was not timed", "missing": "not run", "failed": "failed"}

Column = tuple[str, Callable[[Row], str | None]]
"""Its name, and what it shows of a row; None is shown as a dash."""


def _of(path: str, show: Callable[[Any], str] = str) -> Callable[[Row], str | None]:
    """Show what lies under a dotted ``path`` of a row."""

    def get(row: Row) -> str | None:
        value: Any = row
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return None if value is None else show(value)

    return get


def _pair(name: str, show: Callable[[Any], str]) -> Callable[[Row], str | None]:
    def get(row: Row) -> str | None:
        forward, both = (_of(f"{part}.{name}", show)(row) for part in ("forward", "forward_backward"))
        return forward if forward is None or both is None else f"{forward} / {both}"

    return get


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _rate(x: float) -> str:
    return f"{x:,.0f}"


def _attention_name(row: Row) -> str:
    no_gradient = row.get("gated") and not row.get("gate_gradient")
    return row["name"] + (" (no gate gradient)" if no_gradient else "")


def _on(row: Row) -> str:
    return "1 GPU" if row.get("gpus", 1) == 1 else f"{row['gpus']} GPUs, {row['layout']}"


_CASE: Column = ("B x H x D x T", _of("case", lambda case: case.replace("x", " x ")))
_TILES: Column = ("computed tiles", _of("computed_tiles", percent))
_PEAK: Column = ("peak GB", _of("peak_bytes", _gigabytes))
COLUMNS: dict[str, list[Column]] = {
    "attention": [
        ("implementation", _attention_name),
        _CASE,
        _TILES,
        ("forward ms", _of("forward.ms", digits)),
        ("fwd + bwd ms", _of("forward_backward.ms", digits)),
        ("block search ms", _of("search.ms", digits)),
        ("dense TFLOP/s", _pair("dense_tflops", digits)),
        ("of the matmul's", _pair("of_matmul", percent)),
        _PEAK,
    ],
    "train": [
        ("training step", _of("name")),
        ("on", _on),
        _TILES,
        ("ms", _of("step.ms", digits)),
        ("tokens/s", _of("tokens_per_second", _rate)),
        ("MFU", _of("mfu", percent)),
        _PEAK,
    ],
    "prefill": [
        ("prompt", _of("name")),
        ("batch", _of("batch")),
        ("tokens", _of("tokens", _rate)),
        _TILES,
        ("first token ms", _of("first_token.ms", digits)),
        ("prompt tokens/s", _of("tokens_per_second", _rate)),
        _PEAK,
        ("KV cache GB", _of("stored_bytes", _gigabytes)),
    ],
    "decode": [
        ("decoding", lambda row: row["name"] + (", compiled" if row["compiled"] else "")),
        ("batch", _of("batch")),
        ("step ms", _of("step.ms", digits)),
        ("tokens/s", _of("tokens_per_second", _rate)),
        _PEAK,
        ("KV cache GB", _of("stored_bytes", _gigabytes)),
    ],
    "context": [
        ("part", _of("name")),
        _CASE,
        ("1 GPU ms", _of("one.ms", digits)),
        ("all GPUs ms", _of("together.ms", digits)),
        ("times as fast", _of("speedup", digits)),
        ("in a row: 1 GPU ms", _of("one_in_a_row.ms", digits)),
        ("all GPUs ms", _of("together_in_a_row.ms", digits)),
        ("times as fast", _of("speedup_in_a_row", digits)),
        ("moved MB", _of("traffic.moved", lambda count: digits(count / 1e6))),
        ("of a ring's", _of("traffic.share", percent)),
        ("worst error", _of("worst_error", "{:.1e}".format)),
    ],
}
_LEGENDS = {
    "attention": "Pairs: forward / forward and backward. Dense TFLOP/s count the causal matmuls without pruning; "
    "beside them the rate in the computed tiles over that of a large matmul in the same run.",
    "train": "One sequence on each GPU, AdamW, bfloat16 matmuls. MFU: model FLOPs without pruning over the rate of a "
    "large matmul measured in the same run.",
    "prefill": "From an empty cache until the first token. Chunked prefill takes {chunk:,} tokens of each sequence at "
    "a time.",
    "decode": "Wall time of a step after {tokens:,} tokens, mean of {new} steps.",
    "context": "One sequence over {gpus} GPUs, split {split}, rule {rule}: calls from idle GPUs, and "
    "{calls_in_a_row} in a row without waiting. All GPUs take as long as the slowest; one GPU is the fastest of them "
    "with the whole sequence. Moved: bytes of keys, values and gate sums that all receive in a forward pass. Errors "
    "are relative to one GPU, of the worst head.",
}


def cells(kind: str, row: Row) -> list[str]:
    """What the table shows of a row."""
    return [show(row) or "-" for _, show in COLUMNS[kind]]


def line(kind: str, row: Row) -> str:
    """A row for whoever watches a measurement."""
    if row["status"] != "measured":
        return _note(row)
    first, *others = zip(COLUMNS[kind], cells(kind, row), strict=True)
    return "; ".join([first[1], *(f"{name} {cell}" for (name, _), cell in others if cell != "-")])


def _note(row: Row) -> str:
    where = "".join(f"{name} {row[name]}, " for name in ("case", "batch", "tokens") if name in row)
    return f"{where}{row['name']}: {_STATUS.get(row['status'], 'not measured')}: {row['reason']}"


def render(results: Results) -> str:
    """The table as Markdown, with where its figures are from, and why rows are missing."""
    kind, rows = results["kind"], results["rows"]
    measured = [row for row in rows if row["status"] == "measured"]
    # Results from before there was this fact are all of a GPU.
    parts = [] if results["run"].get("on_gpu", True) else [_ON_A_CPU]
    parts.append(_origin(results))
    if measured:
        settings = {"chunk": 0, "tokens": 0, **results["settings"]}
        parts += [table([name for name, _ in COLUMNS[kind]], [cells(kind, row) for row in measured])]
        parts += [_LEGENDS[kind].format(**settings)]
    notes = [_note(row) for row in rows if row["status"] != "measured"]
    sequences = {(row["batch"], row["text_rows"]) for row in rows if "text_rows" in row}
    repeated = sorted(x for x in sequences if x[1] < x[0]) if results["settings"].get("text") else []
    notes += [f"batch {batch}: {count} different rows of text, which repeat" for batch, count in repeated]
    notes += [results["error"]] if "error" in results else []
    return "\n\n".join([*parts, *(["\n".join(f"* {note}" for note in notes)] if notes else [])])


def _origin(results: Results) -> str:
    run, settings = results["run"], results["settings"]
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton", "cuda", "cudnn"))
    commit, changes, _ = run["commit"].partition("+changes")
    subject = "".join(f"{settings[name]}; " for name in ("model", "text", "preset") if settings.get(name))
    sizes = "".join(f"{name} {value}; " for name, value in (settings.get("changed") or {}).items())
    parameters = next((x["parameters"] for x in (settings, *results["rows"]) if "parameters" in x), None)
    sizes += "" if parameters is None else f"{parameters / 1e6:.3g}M parameters; "
    spreads = [
        part["spread"]
        for row in results["rows"]
        for part in row.values()
        if isinstance(part, dict) and "spread" in part
    ]
    return (
        f"{subject}{sizes}{run['device']}; {versions}; foxlm {run['foxlm']}, commit {commit[:12]}{changes}; "
        f"{settings['dtype']}; eps = {settings['eps']:.2g}; medians of {PASSES} x {settings['rounds']} calls, at most "
        f"{percent(max(spreads, default=0.0))} apart."
    )
