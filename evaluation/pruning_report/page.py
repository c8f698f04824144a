"""The report's page: one HTML file that needs nothing else, readable on a phone, drawn from its JSON alone."""

import math
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..plots import pruning as plots
from ..plots.figure import data_uri
from ..tables import percent

Report = dict[str, Any]
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0 auto; padding: 16px;
  max-width: 640px; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; } td, th { padding: 4px 8px 4px 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #e4e7eb; } td:first-child { overflow-wrap: normal; }
code { font-size: .9em; } .small { color: #57606a; font-size: .88rem; }
details { border-top: 1px solid #e4e7eb; padding: .4rem 0; } summary { cursor: pointer; padding: .3rem 0; }
.numbers td, .numbers th { font-size: .85rem; line-height: 1.3; overflow-wrap: normal; }
"""


def render(report: Report) -> str:
    """The page as HTML text.

    Args:
        report: what ``report.json`` holds.
    """
    name = report["model"]["source"]
    settings = ("text", "length", "rows", "joined", "eps", "rule", "sampled_rows")
    run = {name.replace("_", " "): report["settings"][name] for name in settings} | report["run"]
    sections = (
        f"<h1>What the forget gates of {escape(name)} do, and what pruning gains</h1>",
        _verdict(report),
        _facts(_headline(report)),
        *(section(report) for section in (_gates, _skipped, _dropped, _kept, _cache, _cost)),
        "<h2>The run</h2>",
        _facts({key: escape(str(value)) for key, value in run.items()}),
    )
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>foxlm report: {escape(name)}</title><style>{_STYLE}</style></head>
<body>
{body}
</body></html>
"""


def _facts(rows: dict[str, str]) -> str:
    """A table of labels, which are text, and values, which are HTML."""
    cells = "".join(f"<tr><td>{escape(label)}</td><td>{value}</td></tr>" for label, value in rows.items())
    return f"<table>{cells}</table>"


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _own(report: Report, grain: str, rule: str | None = None) -> np.ndarray:
    """``[L, H]`` share skipped at the report's own eps."""
    settings = report["settings"]
    return _array(report["skipped"][grain][rule or settings["rule"]][settings["own"]])


def _power(log: float | str, base: str = "e") -> str:
    log = float(log)
    if not math.isfinite(log):
        return "0" if log < 0 else "not a number"
    return f"{base}<sup>{log:.1f}</sup>"


def _pruned_by(settings: dict[str, Any]) -> str:
    return f"rule {settings['rule']}, eps {settings['eps']:.2g} = {_power(settings['log_eps'][settings['own']])}"


def _verdict(report: Report) -> str:
    check, count = report["check"], len(report["settings"]["log_eps"])
    if check["passed"]:
        return (
            f"<p><b>The bound holds.</b> {check['rows']:,} rows of attention were computed exactly. By both rules, at "
            f"{count} values of eps, none lost more than eps of its weight to what is skipped.</p>"
        )
    return (
        '<p style="border: 3px solid #c23b4b; background: #fdecee; padding: 12px">'
        f"<b>THE BOUND IS VIOLATED.</b> Of {check['rows']:,} rows of attention that were computed exactly, some lose "
        f"more than eps of their weight to what is skipped, {check['violations']:,} times in all; the table of largest "
        "weights lost tells by which rule and eps. Pruning must not do that: set acp_eps to None (nothing is pruned), "
        "and report it with this file.</p>"
    )


def _headline(report: Report) -> dict[str, str]:
    model, settings, cache = report["model"], report["settings"], report["cache"]
    heads = f"{model['heads']} heads of {model['head_dim']}"
    if model["kv_heads"] != model["heads"]:
        heads += f" on {model['kv_heads']} key/value heads"
    norm = "no QK-norm" if model["qk_norm"] == "none" else "QK-norm"
    times = _array(report["gates"]["decay_times"])
    tiles, pairs = (percent(_own(report, grain).mean()) for grain in ("tiles", "pairs"))
    lost = _array(report["check"]["largest"]).max()
    held = percent(cache["held_bytes"][-1] / cache["full_bytes"][-1])
    left = report["cost"]["by_length"][-1]
    return {
        "model": f"{model['parameters'] / 1e6:,.1f}M parameters, {model['layers']} layers, {heads}, {norm}, "
        f"{'RoPE' if model['rope'] else 'no RoPE'}",
        "text": f"{escape(settings['text'])}: {settings['rows']} x {settings['length']:,} tokens",
        "pruned by": _pruned_by(settings) + (" (the model itself does not prune)" if model["acp_eps"] is None else ""),
        "decay times of the heads": f"{plots.short_time(times.min())} to {plots.short_time(times.max())} tokens",
        "attention skipped": f"<b>{tiles}</b> in tiles as kernels read them, {pairs} of pairs",
        "most weight that a row lost to it": f"{_power(lost)} = {_power(lost / math.log(10), '10')}",
        "keys and values held after the text": f"{held} of {cache['full_bytes'][-1] / 1e6:,.1f} MB",
        "FLOPs left, forward / training": f"{percent(left['forward']['left'])} / "
        f"{percent(left['forward_backward']['left'])} of all, at {settings['length']:,} tokens",
    }


def _gates(report: Report) -> str:
    gates = report["gates"]
    title = f"Decay time, -1 / mean(log f), over {report['settings']['tokens']:,} tokens"
    times = plots.plot_head_map(_array(gates["decay_times"]), title, unit="tokens")
    spread = plots.plot_gate_spread(_array(gates["quantiles"]), gates["quantiles_at"])
    moves = "may follow the text" if report["model"]["forget_gate"] == "full" else "are the same at every token"
    return f"""<h2>Forget gates</h2>
{_figure(times, "Decay time of each layer and head")}
<p class=small>After so many tokens a head's attention weight has fallen by a factor of e by its gates alone. The gates
of this model {moves}: below, how the decay time at single tokens is spread in each head.</p>
{_figure(spread, "Distribution of decay times over tokens, by head")}"""


def _skipped(report: Report) -> str:
    settings, lengths = report["settings"], report["by_length"]["lengths"]
    by_eps = {
        grain: {rule: _array(values).mean((1, 2)) for rule, values in of_rule.items()}
        for grain, of_rule in report["skipped"].items()
    }
    by_length = {grain: report["by_length"][grain] for grain in by_eps}
    figures = [
        _figure(plots.plot_skipped(settings["log_eps"], by_eps), "Share of attention skipped by eps"),
        _figure(plots.plot_skipped(lengths, by_length, by_length=True), "Share of attention skipped by length"),
    ]
    for rule in report["skipped"]["tiles"]:
        title = f"Tiles skipped in each layer and head by rule {rule}"
        figures.append(_figure(plots.plot_head_map(100 * _own(report, "tiles", rule), title), title))
    figures_text = "\n".join(figures)
    return f"""<h2>What pruning skips</h2>
<p class=small>Keys are left out that together have at most eps of a row's attention weight, whatever their values.
Pairs: each query by itself. Tiles: in blocks of 128 queries by 64 keys, as kernels read them; a block is left out if
all its queries can do without. Rule paper bounds all logits alike, rule tight each row's; rule measured adds up
weights.</p>
{figures_text}"""


def _dropped(report: Report) -> str:
    check, settings = report["check"], report["settings"]
    points = {rule: (_array(one["proven"]), _array(one["lost"])) for rule, one in check["scatter"].items()}
    figure = plots.plot_dropped(points, settings["log_eps"][settings["own"]])
    cells = "".join(
        f"<tr><td>{case['rule']}, {case['grain']}</td><td>{_power(case['log_eps'])}</td>"
        f"<td>{_power(case['largest'])}</td><td>{case['violations']:,}</td></tr>"
        for case in check["cases"]
    )
    return f"""<h2>The weight that is really dropped</h2>
{_figure(figure, "Weight dropped against what is proven of it")}
<p class=small>Each point is a row of attention (pairs, at the eps above): the weight that is proven to be the most it
can lose, and the weight that it loses, computed in float64. Points on the line would lose all that is proven; what is
proven stays below eps. The rows: {settings["sampled_rows"]} of each head and text, one in each part of it, and the
{settings["adversarial_rows"]} whose proven bound is closest to eps, for each rule, with and without tiles.</p>
<details><summary>Largest weight lost by rule and eps</summary><table class=numbers>
<tr><th>rule</th><th>eps</th><th>largest lost</th><th>rows over eps</th></tr>{cells}</table></details>"""


def _kept(report: Report) -> str:
    heads = [
        (
            f"{one['kind']} head: layer {one['layer']}, head {one['head']}, "
            f"decay time {plots.short_time(float(one['decay_time']))} tokens",
            _array([one["queries"], one["pairs"], one["tiles"]]),
        )
        for one in report["kept_region"]
    ]
    figure = plots.plot_kept_region(heads, report["settings"]["length"])
    return f"""<h2>What each token keeps</h2>
{_figure(figure, "Kept keys of each query in three heads")}
<p class=small>By {_pruned_by(report["settings"])}. Each column is a query; it may attend from its first kept key up to
itself.</p>"""


def _cache(report: Report) -> str:
    cache = report["cache"]
    held, full = _array(cache["held_bytes"]), _array(cache["full_bytes"])
    memory = plots.plot_cache(cache["lengths"], held, full)
    heads = "key/value head" if report["model"]["kv_heads"] != report["model"]["heads"] else "head"
    shares = 100 * _array(cache["pages"]) / cache["full_pages"]
    pages = plots.plot_head_map(shares, "Keys and values held after the text", heads)
    return f"""<h2>Memory of an evicting cache</h2>
{_figure(memory, "Bytes of keys and values by tokens so far")}
{_figure(pages, "Share of pages held, by layer and head")}
<p class=small><code>FoxPagedCache</code> at this eps and rule: pages of {cache["page"]} tokens of a head are freed once
no query to come, whatever it is, can give them more than eps. Of later queries it knows only what the weights allow, so
that it frees less than pruning skips; without QK-norm that is little. A sequence of {cache["lengths"][-1]:,} tokens:
{held[-1] / 1e6:,.2f} of {full[-1] / 1e6:,.2f} MB.</p>"""


def _cost(report: Report) -> str:
    flops, length = report["cost"]["flops"], report["settings"]["length"]
    rows = "".join(
        f"<tr><td>{one['length']:,}</td><td>{percent(one['forward']['attention_share'])}</td>"
        f"<td>{percent(one['kept'])}</td><td>{one['forward']['speedup']:.2f}</td>"
        f"<td>{one['forward_backward']['speedup']:.2f}</td></tr>"
        for one in report["cost"]["by_length"]
    )
    return f"""<h2>What it saves</h2>
<table class=numbers><tr><th>tokens</th><th>attention, of all FLOPs</th><th>computed tiles</th>
<th>gain, forward</th><th>gain, training</th></tr>{rows}</table>
<p class=small>FLOPs of matmuls, at {length:,} tokens {flops["linear"] / length / 1e6:,.1f} million a token in linear
layers and {flops["attention"] / length / 1e6:,.1f} in attention without pruning. The gain is how many times as fast a
step is at most: if all matmuls ran at one rate and nothing else took time. By {_pruned_by(report["settings"])}.</p>"""


def _figure(figure: Figure, text: str) -> str:
    return f'<img src="{data_uri(figure)}" alt="{escape(text)}">'
