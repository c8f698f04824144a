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


def _name(row: Row) -> str:
    """Without the part, which the table says."""
    return row["name"].removeprefix(f"{row.get('part')}: ")


def _beside(row: Row) -> str | None:
    """The rate over that of another call of the same model."""
    if "over_own" not in row:
        return None
    return f"{digits(row['over_own'])} x {row['against']['own'].partition(': ')[2]}"


def _seconds(ms: float) -> str:
    return digits(ms / 1e3)


def _on(row: Row) -> str:
    return "1 GPU" if row.get("gpus", 1) == 1 else f"{row['gpus']} GPUs, {row['layout']}"


_CASE: Column = ("B x H x D x T", _of("case", lambda case: case.replace("x", " x ")))
_TILES: Column = ("computed tiles", _of("computed_tiles", percent))
_PEAK: Column = ("peak GB", _of("peak_bytes", _gigabytes))
_TOKENS: Column = ("tokens", _of("tokens", _rate))
_RATIOS: list[Column] = [("rate over Llama's", _of("over_llama", digits)), ("over ours", _beside)]
_FIRST_CALL: Column = ("first call: s more", _of("compile_seconds", digits))
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
        ("training step", _name),
        ("on", _on),
        _TOKENS,
        _TILES,
        ("ms", _of("step.ms", digits)),
        ("tokens/s", _of("tokens_per_second", _rate)),
        ("MFU", _of("mfu", percent)),
        _PEAK,
        *_RATIOS,
    ],
    "prefill": [
        ("prompt", _name),
        ("batch", _of("batch")),
        _TOKENS,
        _TILES,
        ("ms", _of("first_token.ms", digits)),
        ("prompt tokens/s", _of("tokens_per_second", _rate)),
        *_RATIOS,
        _FIRST_CALL,
        _PEAK,
        ("KV cache GB", _of("stored_bytes", _gigabytes)),
    ],
    "decode": [
        ("decoding", lambda row: _name(row) + (", compiled" if row["compiled"] else "")),
        ("batch", _of("batch")),
        _TOKENS,
        ("ms a token", _of("step.ms", digits)),
        ("tokens/s", _of("tokens_per_second", _rate)),
        *_RATIOS,
        ("first token s", _of("first_token.ms", _seconds)),
        ("whole call: ms a token", _of("call_ms_a_token", digits)),
        _FIRST_CALL,
        _PEAK,
        ("KV cache GB", _of("stored_bytes", _gigabytes)),
    ],
    "start": [
        ("new process", _name),
        _TOKENS,
        ("first s", _of("first.ms", _seconds)),
        ("again s", _of("again.ms", _seconds)),
        *_RATIOS,
        ("import s", _of("import_seconds", digits)),
        ("load s", _of("load_seconds", digits)),
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
    "generate": "Calls as people write them, with their time on the host; eager but for what says compiled. Decoding: "
    "model.generate after so many tokens; ms a token is the difference of calls of {new} and of twice as many tokens, "
    "over {new}; the first token is a call for one, with its prompt; a whole call gives {new} with theirs; the first "
    "call compiles and captures, its seconds are those beyond a later one's. Prompts: model(ids, use_cache=True, "
    "logits_to_keep=1), or generate in chunks of {chunk:,} of each sequence. New processes: from a loaded model to 16 "
    "tokens, or one forward and backward pass. Training: one sequence, AdamW, float32 weights, bfloat16 matmuls.",
    "context": "One sequence over {gpus} GPUs, split {split}, rule {rule}: calls from idle GPUs, and "
    "{calls_in_a_row} in a row without waiting. All GPUs take as long as the slowest; one GPU is the fastest of them "
    "with the whole sequence. Moved: bytes of keys, values and gate sums that all receive in a forward pass. Errors "
    "are relative to one GPU, of the worst head.",
}


# Whose tables have no columns in which nothing is shown.
_SPARSE = ("generate", "prefill", "decode", "train")


def line(kind: str, row: Row) -> str:
    """A row for whoever watches a measurement."""
    if row["status"] != "measured":
        return _note(row)
    columns = COLUMNS[row.get("part", kind)]
    first, *others = [(column, column[1](row) or "-") for column in columns]
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
        by_part: dict[str, list[Row]] = {}
        for row in measured:
            by_part.setdefault(row.get("part", kind), []).append(row)
        parts += [_table(kind, part, of_part) for part, of_part in by_part.items()]
        parts += [_LEGENDS[kind].format(**settings)]
    notes = [_note(row) for row in rows if row["status"] != "measured"]
    sequences = {(row["batch"], row["text_rows"]) for row in rows if "text_rows" in row}
    repeated = sorted(x for x in sequences if x[1] < x[0]) if results["settings"].get("text") else []
    notes += [f"batch {batch}: {count} different rows of text, which repeat" for batch, count in repeated]
    notes += [results["error"]] if "error" in results else []
    return "\n\n".join([*parts, *(["\n".join(f"* {note}" for note in notes)] if notes else [])])


def _table(kind: str, part: str, rows: list[Row]) -> str:
    columns = [(name, show) for name, show in COLUMNS[part] if kind not in _SPARSE or any(map(show, rows))]
    return table([name for name, _ in columns], [[show(row) or "-" for _, show in columns] for row in rows])


def _origin(results: Results) -> str:
    run, settings = results["run"], results["settings"]
    versions = ", ".join(
        f"{name} {run[name]}" for name in ("torch", "transformers", "triton", "cuda", "cudnn") if name in run
    )
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
