"""The tables made from results, as Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import several_tables
from .bars import AUTHORS_DECODE_MS, AUTHORS_DECODE_SOURCE, prefill_kind
from .markdown import digits, gigabytes, note, noted, percent, shape_of, subject, table

Results = Mapping[str, Any]

_ON_A_CPU = (
    "**Figures of no use: measured on a CPU**, where foxlm runs in plain PyTorch, without its kernels. They show that "
    "all parts work, and say nothing about a GPU."
)


def render(results: Results) -> str:
    """The tables as Markdown, under a line that says where the figures come from."""
    bodies = {"attention": _attention, "context": several_tables.render_context, "train": _train}
    body = (bodies | {"prefill": _prefill, "decode": _decode})[results["kind"]]
    # Results from before there was this fact are all of a GPU.
    parts = [] if results["run"].get("on_gpu", True) else [_ON_A_CPU]
    return "\n\n".join([*parts, _origin(results), body(results)])


def _origin(results: Results) -> str:
    run, settings = results["run"], results["settings"]
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton", "cuda", "cudnn"))
    commit, changes, _ = run["commit"].partition("+changes")
    apart = percent(max(_spreads(results), default=0.0))
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
        shape = shape_of(case)
        if "recorded" in case:
            notes.append(_recorded(shape, case))
        if "error" in case:
            notes.append(f"{shape}: {case['error'].splitlines()[0]}")
        for one in case["implementations"]:
            if "forward" not in one:
                notes.append(note(shape, one))
                continue
            forward, both = one["forward"], one["forward_backward"]
            name = one["name"] + ("" if one["gate_gradient"] or not one["gated"] else " (no gate gradient)")
            figures = [
                percent(one["tiles_kept"]),
                digits(forward["ms"]),
                digits(both["ms"]),
                f"{digits(forward['dense_tflops'])} / {digits(both['dense_tflops'])}",
                f"{percent(forward['of_ceiling'])} / {percent(both['of_ceiling'])}",
                gigabytes(one["peak_bytes"]),
            ]
            rows.append([shape, name, *figures])
        notes += [note(f"{shape}, gates open", one) for one in case["open_gates"] if "forward" not in one]
    legend = (
        "Dense TFLOP/s count the causal products without pruning. The matmul's rate is that of a large matrix product "
        "timed in between, held against the products of the tiles that are kept. Pairs: forward / forward and backward."
    )
    return "\n\n".join([table(columns, rows), legend, _attention_bars(results["cases"]), *noted(notes)])


def _recorded(shape: str, case: Mapping[str, Any]) -> str:
    of, heads = case["recorded"], int(case["case"].split("x")[1])
    grouped = "" if case["kv_heads"] == heads else f", {case['kv_heads']} heads of keys and values"
    return (
        f"{shape}: what enters attention in all {of['layers']} layers of `{of['model']}`, as one batch, while it reads "
        f"{of['rows']} x {of['length']:,} tokens of `{of['text']}`{grouped}."
    )


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
                both(bars.get("dense_rate_over_cudnn"), digits),
                both(bars.get("acp_over_kept", {}).get(rule), digits),
                both(bars.get("vain_cost", {}).get(rule), percent),
                percent(bars["boundaries_of_forward"][rule]),
                percent(bars["dropped"][rule]),
            ]
            rows.append([shape_of(case), f"`{rule}`", *figures])
    return table(columns, rows)


def _read(facts: Mapping[str, Any], of_preset: str) -> str:
    """What it read."""
    return of_preset if facts.get("text") is None else f"of `{facts['text']}`"


def _train(results: Results) -> str:
    if "gpus" in results:
        return several_tables.render(results)
    columns = ["training step", "tiles kept", "tokens/s", "ms", "peak GB"]
    rows = []
    for one in results["steps"]:
        if "step" in one:
            figures = [percent(one["tiles_kept"]), f"{one['tokens_per_second']:,.0f}"]
            rows.append([one["name"], *figures, digits(one["step"]["ms"]), gigabytes(one["peak_bytes"])])
    what = (
        f"{subject(results)}, {results['parameters'] / 1e6:.3g}M parameters, 1 x {results['tokens']:,} tokens"
        f"{_read(results, '') and ' ' + _read(results, '')}, AdamW, float32 weights under bfloat16 autocast."
    )
    notes = [note("training", one) for one in results["steps"] if "step" not in one]
    return "\n\n".join([what, table(columns, rows), *noted(notes)])


def _sizes(settings: Mapping[str, Any]) -> str:
    return (
        f"{subject(settings)}, {settings['layers']} layers, {settings['parameters'] / 1e6:.3g}M parameters "
        "(the Llama has the same sizes)"
    )


def _repeated(where: str, record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """A note where there was less text than sequences."""
    rows = record.get("text_rows", record["batch"])
    if settings.get("text") is None or rows >= record["batch"]:
        return []
    return [f"{where}: the text has {rows} different sequences, which repeat."]


def _prefill(results: Results) -> str:
    columns = ["batch x tokens", "prompt", "tiles kept", "first token ms", "prompt tokens/s", "rate over the Llama's"]
    columns += ["peak GB", "keys and values GB"]
    rows, notes = [], []
    for prompts in results["prompts"]:
        where = f"{prompts['batch']} x {prompts['tokens']:,}"
        notes += _repeated(where, prompts, results["settings"])
        if "error" in prompts:
            notes.append(f"{where}: {prompts['error'].splitlines()[0]}")
        for one in prompts["ways"]:
            if "first_token" not in one:
                notes.append(note(where, one))
                continue
            of_kind = prompts["bars"].get(prefill_kind(one), {}).get("over_llama", {})
            over = of_kind.get(one["rule"] or "none") if (one["family"], one["cache"]) == ("foxlm", "dynamic") else None
            figures = [
                percent(one["tiles_kept"]) if one["family"] == "foxlm" else "-",
                digits(one["first_token"]["ms"]),
                f"{one['tokens_per_second']:,.0f}",
                "-" if over is None else digits(over),
                gigabytes(one["peak_bytes"]),
                gigabytes(one["stored_bytes"]),
            ]
            rows.append([where, one["name"], *figures])
    settings = results["settings"]
    what = (
        f"{_sizes(settings)}, prompts {_read(settings, 'of random tokens')}. From an empty cache until the first token "
        f"is there; in parts means {settings['chunk']:,} tokens of each sequence at a time. The Llama beside which a "
        "rate stands takes its prompt in the same way."
    )
    return "\n\n".join([what, *([table(columns, rows)] if rows else []), *noted(notes)])


def _decode(results: Results) -> str:
    columns = ["batch", "decoding", "step ms", "of it on the device", "waits for", "tokens/s", "peak GB"]
    columns += ["keys and values GB", "read GB", "keys kept"]
    rows, notes = [], []
    for batch in results["batches"]:
        where = f"batch {batch['batch']}"
        notes += _repeated(where, batch, results["settings"])
        if "error" in batch:
            notes.append(f"{where}: {batch['error'].splitlines()[0]}")
        for one in batch["decoders"]:
            if "step" not in one:
                notes.append(note(where, one))
                continue
            busy, read, kept = (one.get(name) for name in ("device_ms", "read_bytes", "keys_kept"))
            figures = [
                digits(one["step"]["ms"]),
                "-" if busy is None else digits(busy),
                {None: "-", True: "host", False: "device"}[one["host_bound"]],
                f"{one['tokens_per_second']:,.0f}",
                gigabytes(one["peak_bytes"]),
                gigabytes(one["stored_bytes"]),
                gigabytes(read),
                "-" if kept is None else percent(kept),
            ]
            name = one["name"] + (", compiled" if one["compiled"] else "")
            rows.append([str(batch["batch"]), name, *figures])
    settings = results["settings"]
    what = (
        f"{_sizes(settings)}; one token for each sequence after {settings['tokens']:,} "
        f"{_read(settings, 'random ones')} and those decoded before. A call is {settings['new']} steps, timed until "
        "the device has finished. Keys and values: the memory that they take, and what a step must read of it by the "
        "keys that are kept."
    )
    tables = [table(columns, rows)] if rows else []
    bars = _decode_bars(results)
    for one in results["largest_batch"]:
        found = [f"{cache} {one[cache]['batch']}" for cache in ("static", "paged") if "batch" in one[cache]]
        if found:
            tables.append(f"Largest batch, up to {one['most']}, at {one['tokens']:,} tokens: {', '.join(found)}.")
        notes += [note("largest batch", one[cache]) for cache in ("static", "paged") if "batch" not in one[cache]]
    authors = "; ".join(f"batch {n}: {a:.0f} / {b:.0f}" for n, (a, b) in AUTHORS_DECODE_MS.items())
    reference = f"For comparison, {AUTHORS_DECODE_SOURCE}, ms a step without / with pruning: {authors}."
    compared = [reference] if _has_targets(results) else []
    return "\n\n".join([what, *tables, *([bars] if bars else []), *compared, *noted(notes)])


def _has_targets(results: Results) -> bool:
    """Whether what is wanted of a preset on a GPU can be asked of these."""
    return results["run"].get("on_gpu", True) and results["settings"].get("model") is None


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
            asked = [wanted, met] if _has_targets(results) else []
            rows.append([str(where.get("batch", "-")), words[name], digits(bar["value"]), *asked])
    columns = ["batch", "figure", "measured"] + (["wanted on an H100", "met"] if _has_targets(results) else [])
    return table(columns, rows) if rows else ""
