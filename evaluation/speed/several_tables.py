"""The tables made from results on several GPUs, of training and of context parallelism, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import digits, gigabytes, note, noted, percent, shape_of, subject, table

Results = Mapping[str, Any]

_BARS = {
    "scaling_efficiency": "tokens/s over those of one GPU times the GPUs",
    "mfu": "MFU",
}


def render(results: Results) -> str:
    """Steps, bars and predictions."""
    steps = sorted(results["steps"], key=lambda one: one["gpus"])
    timed = [one for one in steps if "step" in one]
    notes = [note(one["layout"], one) for one in steps if "step" not in one]
    one_gpu = results.get("one_gpu", {"status": "measured"})
    if one_gpu["status"] != "measured":
        notes.append(note("one GPU", one_gpu | {"name": "all steps"}))
    parts = [_what(results), *([_steps(timed)] if timed else []), *([_rates(results)] if timed else []), _bars(results)]
    parts += [_predictions(results)] if results.get("scaling") else []
    return "\n\n".join([*(part for part in parts if part), *noted(notes)])


def _what(results: Results) -> str:
    sizes, read = results["sizes"], results.get("text")
    checkpointing = ", gradient checkpointing" if results["checkpointing"] else ""
    return (
        f"{subject(results)}, {results['parameters'] / 1e6:.3g}M parameters ({sizes['num_hidden_layers']} layers, "
        f"{sizes['num_attention_heads']} heads of {sizes['head_dim']}, width {sizes['hidden_size']:,}), "
        f"{results['layout']} on {results['gpus']} GPUs of one host, 1 x {results['tokens']:,} tokens on each"
        f"{'' if read is None else f' of `{read}`'}, AdamW{checkpointing}. Gradients of the first "
        f"{results['checked_layers']} layers were held to those of single GPUs."
    )


def _steps(timed: list[Mapping[str, Any]]) -> str:
    columns = ["training step", "on", "tiles kept", "ms", "tokens/s", "for each GPU", "MFU", "of kept tiles", "done"]
    columns += ["peak GB"]
    rows = []
    for one in timed:
        where = one["layout"] if one["gpus"] == 1 else f"{one['layout']} on {one['gpus']} GPUs"
        shares = ["-" if one[name] is None else percent(one[name]) for name in ("mfu", "mfu_kept", "hfu")]
        rate = one["tokens_per_second"]
        figures = [percent(one["tiles_kept"]), digits(one["step"]["ms"]), f"{rate:,.0f}", f"{rate / one['gpus']:,.0f}"]
        rows.append([one["name"], where, *figures, *shares, gigabytes(one["peak_bytes"])])
    return table(columns, rows)


def _rates(results: Results) -> str:
    peak, links = results["datasheet_flops"], results["bandwidths"]
    of = "over the (unknown) data sheet's" if peak is None else f"over the data sheet's {peak / 1e12:.0f}"
    matmul = f"{results['matmul_flops'] / 1e12:.3g}"
    gathered, scattered = (f"{links[name] / 1e9:.3g}" for name in ("all_gather", "reduce_scatter"))
    return (
        f"MFU: 6 N T + 12 L H D T^2 / 2 operations, N without the input embedding, {of} TFLOP/s; of kept tiles: with "
        "only those of attention; done: with what backward computes again. A large matrix product reached "
        f"{matmul} TFLOP/s in this run. Each GPU received a layer's weights at {gathered} GB/s, and its gradients at "
        f"{scattered}."
    )


def _bars(results: Results) -> str:
    rows = []
    for bar, values in results.get("bars", {}).items():
        for name, one in values.items():
            asked = f"at least {one['at_least']:g}" if "at_least" in one else "-"
            met = ("yes" if one["value"] >= one["at_least"] else "no") if "at_least" in one else "-"
            rows.append([name, _BARS[bar], digits(one["value"]), asked, met])
    return table(["training step", "figure", "measured", "wanted on an H100", "met"], rows) if rows else ""


def _predictions(results: Results) -> str:
    columns = ["training step", "GPUs", "hosts", "predicted ms", "measured ms", "tokens/s", "efficiency", "waits for"]
    rows = []
    for one in results["scaling"]:
        for step in one["predictions"]:
            measured = step.get("measured_ms")
            against = "-" if measured is None else f"{digits(measured)} ({step['error']:+.1%})"
            figures = [str(step["gpus"]), str(step["hosts"]), digits(step["step_ms"]), against]
            figures += [f"{step['tokens_per_second']:,.0f}", percent(step["efficiency"]), step["waits_for"]]
            rows.append([one["name"], *figures])
    model = results["scaling"][0]["model"]
    network, calibrated = model["network"], model["calibrated_on"]
    source = f"the step on {calibrated} GPUs itself, which is no test of it" if calibrated else "FSDP2 on one GPU"
    bandwidth = f"{network['host_bandwidth'] / 1e9:g} GB/s"
    return (
        f"{table(columns, rows)}\n\nPredicted from {source}: the longer of computing and of what is sent meanwhile, "
        f"then what nothing hides. Hosts of {network['host_gpus']} GPUs; {bandwidth} into each from the others is "
        "assumed, not measured."
    )


def render_context(results: Results) -> str:
    """Times of attention on one GPU and on several, what was moved, and how near both are."""
    settings = results["settings"]
    gpus, pruned = settings["gpus"], "" if settings["rule"] == "none" else f", pruned by the rule `{settings['rule']}`"
    what = (
        f"One attention layer by context parallelism on {gpus} GPUs of one host, {settings['split']} split{pruned}: "
        f"from idle GPUs, and {settings['calls_in_a_row']} calls in a row without waiting, as a model makes them. All "
        f"together take as long as the slowest of them; one is the fastest of {gpus} that each compute the whole."
    )
    measured = [one for one in results["cases"] if "times" in one]
    others = [one | {"name": "context parallelism"} for one in results["cases"] if "times" not in one]
    notes = [note(shape_of(one), one) for one in others]
    drawn = [_context_times(measured, gpus), _moved(measured)] if measured else []
    return "\n\n".join([what, *drawn, *noted(notes)])


def _context_times(cases: Sequence[Mapping[str, Any]], gpus: int) -> str:
    columns = ["B x H x D x T", "part", "1 GPU ms", f"{gpus} GPUs ms", "times as fast"]
    columns += ["in a row: 1 GPU ms", f"{gpus} GPUs ms", "times as fast"]
    rows = []
    for case in cases:
        for name, part in (("forward", "forward"), ("fwd + bwd", "forward_backward")):
            times, figures = case["times"][part], []
            for how in ("idle", "in_a_row"):
                figures += [digits(times[who][how]["ms"]) for who in ("one", "together")]
                figures.append(digits(times["speedup"][how]))
            rows.append([shape_of(case), name, *figures])
    return table(columns, rows)


def _moved(cases: Sequence[Mapping[str, Any]]) -> str:
    columns = ["B x H x D x T", "moved MB", "by a ring MB", "share", "off one GPU: output", "dq", "dk", "dv", "gates"]
    columns += ["worst head", "allowed", "same bits twice"]
    rows = []
    for case in cases:
        traffic = case["traffic"]
        figures = [digits(traffic[name] / 1e6) for name in ("moved", "ring")] + [f"{traffic['share']:.3f}"]
        figures += [f"{case['errors'][name]:.1e}" for name in ("out", "q", "k", "v", "log_f")]
        figures += [f"{max(case['errors_of_heads'].values()):.1e}", f"{case['limit']:.1e}"]
        rows.append([shape_of(case), *figures, "yes" if case["same_bits"] else "no"])
    legend = (
        "Moved: keys, values and gate sums that all GPUs receive in a forward pass; backward moves as many, in "
        "gradients. A ring moves all keys and values to all. Off one GPU: relative to the norm, of all heads together, "
        "and of the one head where anything is off most."
    )
    return f"{table(columns, rows)}\n\n{legend}"
