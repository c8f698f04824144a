"""The report's page: one HTML file that needs nothing else, readable on a phone, drawn from its JSON alone."""

import math
from html import escape
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..plots.figure import data_uri
from ..plots.gates import plot_decay_times, plot_head_map
from ..plots.pruning import (
    plot_cache,
    plot_dropped,
    plot_gate_spread,
    plot_kept_region,
    plot_skipped_by_eps,
    plot_skipped_by_length,
)
from .html import facts, image, page

Report = dict[str, Any]
_TILES = "128 queries by 64 keys"


def render(report: Report) -> str:
    """The page as HTML text.

    Args:
        report: what ``report.json`` holds.
    """
    model, settings = report["model"], report["settings"]
    name = model["source"]
    sections = [
        f"<h1>What the forget gates of {escape(name)} do, and what pruning gains</h1>",
        _verdict(report),
        facts(_headline(report)),
        *_gates(report),
        *_skipped(report),
        *_dropped(report),
        *_kept(report),
        *_cache(report),
        *_cost(report),
        "<h2>The run</h2>",
        facts([*_settings(settings), *((key, escape(str(value))) for key, value in report["run"].items())]),
    ]
    return page(f"foxlm report: {name}", sections)


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _own(report: Report, grain: str, rule: str | None = None) -> np.ndarray:
    """``[L, H]`` share skipped at the report's own eps."""
    settings = report["settings"]
    return _array(report["skipped"][grain][rule or settings["rule"]][settings["own"]])


def _power(log: float, base: str = "e") -> str:
    if not math.isfinite(log):
        return "0" if log < 0 else "not a number"
    return f"{base}<sup>{log:.1f}</sup>"


def _eps(settings: dict[str, Any]) -> str:
    return f"{settings['eps']:.2g} = {_power(settings['log_eps'][settings['own']])}"


def _verdict(report: Report) -> str:
    check = report["check"]
    if check["passed"]:
        return (
            f"<p><b>The bound holds.</b> {check['rows']:,} rows of attention were computed exactly. By both rules, at "
            f"{len(report['settings']['log_eps'])} values of eps, none lost more than eps of its weight to what is "
            "skipped.</p>"
        )
    broken = [case for case in check["cases"] if case["violations"]]
    listed = "; ".join(
        f"rule {case['rule']}, {case['grain']}, eps {_power(case['log_eps'])}: {case['violations']:,} rows, up to "
        f"{_power(float(case['largest']))}"
        for case in broken
    )
    return (
        '<p style="border: 3px solid #c23b4b; background: #fdecee; padding: 12px">'
        f"<b>THE BOUND IS VIOLATED.</b> Of {check['rows']:,} rows of attention that were computed exactly, some lose "
        f"more than eps of their weight to what is skipped ({listed}). Pruning must not do that: set acp_eps to None "
        "(nothing is pruned), and report it with this file.</p>"
    )


def _headline(report: Report) -> list[tuple[str, str]]:
    model, settings, cache = report["model"], report["settings"], report["cache"]
    times = _array(report["gates"]["decay_times"])
    part = report["cost"]["by_length"][-1]
    held = cache["held_bytes"][-1] / cache["full_bytes"][-1]
    own = _array(report["check"]["largest"]).max()
    return [
        ("model", f"{model['parameters'] / 1e6:,.1f}M parameters, {_shape(model)}"),
        ("text", f"{escape(settings['text'])}: {settings['rows']} x {settings['length']:,} tokens"),
        ("pruned by", f"rule {settings['rule']}, eps {_eps(settings)}{_not_own(report)}"),
        ("decay times of the heads", f"{_short(times.min())} to {_short(times.max())} tokens"),
        (
            "attention skipped",
            f"<b>{_percent(_own(report, 'tiles').mean())}</b> in tiles as kernels read them, "
            f"{_percent(_own(report, 'pairs').mean())} of pairs",
        ),
        (
            "most weight that a row lost to it",
            f"{_power(own)} = {_power(own / math.log(10), '10')}" if math.isfinite(own) else "none",
        ),
        ("keys and values held after the text", f"{_percent(held)} of {cache['full_bytes'][-1] / 1e6:,.1f} MB"),
        (
            "FLOPs left, forward / training",
            f"{_percent(part['forward']['left'])} / {_percent(part['forward_backward']['left'])} of all, "
            f"at {part['length']:,} tokens",
        ),
    ]


def _shape(model: dict[str, Any]) -> str:
    heads = f"{model['heads']} heads of {model['head_dim']}"
    if model["kv_heads"] != model["heads"]:
        heads += f" on {model['kv_heads']} key/value heads"
    norm = {"none": "no QK-norm"}.get(model["qk_norm"], "QK-norm")
    return f"{model['layers']} layers, {heads}, {norm}, {'RoPE' if model['rope'] else 'no RoPE'}"


def _not_own(report: Report) -> str:
    model, settings = report["model"], report["settings"]
    if model["acp_eps"] is None:
        return " (the model itself does not prune)"
    return "" if math.isclose(model["acp_eps"], settings["eps"], rel_tol=1e-3) else " (not the model's own)"


def _gates(report: Report) -> list[str]:
    gates, settings = report["gates"], report["settings"]
    times = plot_decay_times(_array(gates["decay_times"]), settings["tokens"])
    spread = plot_gate_spread(_array(gates["quantiles"]), gates["quantiles_at"])
    moves = "may follow the text" if report["model"]["forget_gate"] == "full" else "are the same at every token"
    return [
        "<h2>Forget gates</h2>",
        _figure(times, "Decay time of each layer and head"),
        "<p class=small>After so many tokens a head's attention weight has fallen by a factor of e by its gates alone. "
        f"The gates of this model {moves}: below, how the decay time at single tokens is spread in each head.</p>",
        _figure(spread, "Distribution of decay times over tokens, by head"),
    ]


def _skipped(report: Report) -> list[str]:
    settings, length = report["settings"], report["settings"]["length"]
    log_eps = settings["log_eps"]
    by_eps = {
        grain: {rule: _array(values).mean((1, 2)) for rule, values in of_rule.items()}
        for grain, of_rule in report["skipped"].items()
    }
    by_length = {grain: report["by_length"][grain] for grain in by_eps}
    shown = [
        _figure(plot_skipped_by_eps(log_eps, by_eps, length), "Share of attention skipped by eps"),
        _figure(
            plot_skipped_by_length(report["by_length"]["lengths"], by_length, log_eps[settings["own"]]),
            "Share of attention skipped by length",
        ),
    ]
    maps = [
        _figure(
            plot_head_map(
                100 * _own(report, "tiles", rule),
                Normalize(0, 100),
                f"Tiles skipped by rule {rule}, {length:,} tokens",
                "%",
                lambda value: f"{value:.0f}",
            ),
            f"Tiles skipped in each layer and head by rule {rule}",
        )
        for rule in report["skipped"]["tiles"]
    ]
    return [
        "<h2>What pruning skips</h2>",
        "<p class=small>Keys are left out that together have at most eps of a row's attention weight, whatever their "
        f"values. Pairs: each query by itself. Tiles: in blocks of {_TILES}, as kernels read them; a block is left out "
        "if all its queries can do without. Rule paper bounds all logits alike, rule tight each row's.</p>",
        *shown,
        *maps,
    ]


def _dropped(report: Report) -> list[str]:
    check, settings = report["check"], report["settings"]
    own = settings["log_eps"][settings["own"]]
    points = {rule: (_array(one["proven"]), _array(one["lost"])) for rule, one in check["scatter"].items()}
    cells = "".join(
        f"<tr><td>{case['rule']}, {case['grain']}</td><td>{_power(case['log_eps'])}</td>"
        f"<td>{_power(float(case['largest']))}</td><td>{case['violations']:,}</td></tr>"
        for case in check["cases"]
    )
    return [
        "<h2>The weight that is really dropped</h2>",
        _figure(plot_dropped(points, own), "Weight dropped against what is proven of it"),
        "<p class=small>Each point is a row of attention (pairs, at the eps above): the weight that is proven to be "
        "the most it can lose, and the weight that it loses, computed in float64. Points on the line would lose "
        "all that is proven; what is proven stays below eps. The rows: "
        f"{settings['sampled_rows']} of each head and text, one in each part of it, and the "
        f"{settings['adversarial_rows']} whose proven bound is closest to eps, for each rule, with and without "
        f"tiles.</p><p class=small>In tiles, by rule {settings['rule']}: {_lost(check['quantiles'])}.</p>",
        "<details><summary>Largest weight lost by rule and eps</summary><table class=numbers>"
        f"<tr><th>rule</th><th>eps</th><th>largest lost</th><th>rows over eps</th></tr>{cells}</table></details>",
    ]


def _lost(sample: dict[str, Any]) -> str:
    """What rows that were drawn evenly lose."""
    losing = f"{_percent(sample['dropping'] / sample['rows'])} of the rows drawn evenly over the text lose something"
    if not sample["dropping"]:
        return losing
    quantiles = (
        f"{_power(float(value))} or less in {100 * at:g}%"
        for at, value in zip(sample["at"], sample["values"], strict=True)
    )
    return f"{losing}, of these {', '.join(quantiles)}"


def _kept(report: Report) -> list[str]:
    settings = report["settings"]
    heads = [
        (
            f"{one['kind']} head: layer {one['layer']}, head {one['head']}, "
            f"decay time {_short(one['decay_time'])} tokens",
            _array(one["queries"]),
            _array(one["pairs"]),
            _array(one["tiles"]),
        )
        for one in report["kept_region"]
    ]
    return [
        "<h2>What each token keeps</h2>",
        _figure(plot_kept_region(heads, settings["length"]), "Kept keys of each query in three heads"),
        f"<p class=small>Rule {settings['rule']}, eps {_eps(settings)}. Each column is a query; it may attend from its "
        "first kept key up to itself.</p>",
    ]


def _cache(report: Report) -> list[str]:
    cache, settings = report["cache"], report["settings"]
    held, full = _array(cache["held_bytes"]), _array(cache["full_bytes"])
    shares = 100 * _array(cache["pages"]) / cache["full_pages"]
    heads = "key/value head" if report["model"]["kv_heads"] != report["model"]["heads"] else "head"
    figures = [
        _figure(plot_cache(cache["lengths"], held, full), "Bytes of keys and values by tokens so far"),
        _figure(
            plot_head_map(
                shares, Normalize(0, 100), "Keys and values held after the text", "%", lambda x: f"{x:.0f}", heads
            ),
            "Share of pages held of each layer and head",
        ),
    ]
    return [
        "<h2>Memory of an evicting cache</h2>",
        *figures,
        f"<p class=small><code>FoxPagedCache</code> at this eps and rule: pages of {cache['page']} tokens of a "
        "head are freed once no query to come, whatever it is, can give them more than eps. Of later queries it knows "
        "only what the weights allow, so that it frees less than pruning skips; without QK-norm that is little. "
        f"A sequence of {settings['length']:,} tokens: {held[-1] / 1e6:,.2f} of {full[-1] / 1e6:,.2f} MB.</p>",
    ]


def _cost(report: Report) -> list[str]:
    cost, settings = report["cost"], report["settings"]
    rows = "".join(
        f"<tr><td>{one['length']:,}</td><td>{_percent(one['forward']['attention_share'])}</td>"
        f"<td>{_percent(one['kept'])}</td><td>{one['forward']['speedup']:.2f}</td>"
        f"<td>{one['forward_backward']['speedup']:.2f}</td></tr>"
        for one in cost["by_length"]
    )
    return [
        "<h2>What it saves</h2>",
        "<table class=numbers><tr><th>tokens</th><th>attention, of all FLOPs</th><th>computed tiles</th>"
        f"<th>gain, forward</th><th>gain, training</th></tr>{rows}</table>",
        f"<p class=small>FLOPs of matmuls, at {settings['length']:,} tokens "
        f"{cost['flops']['linear'] / settings['length'] / 1e6:,.1f} million a token in linear layers and "
        f"{cost['flops']['attention'] / settings['length'] / 1e6:,.1f} in attention without pruning. The gain is how "
        "many times as fast a step is at most: if all matmuls ran at one rate and nothing else took time. Rule "
        f"{settings['rule']}, eps {_eps(settings)}.</p>",
    ]


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    named = ("text", "length", "rows", "joined", "eps", "rule", "sampled_rows")
    return [(name.replace("_", " "), escape(str(settings[name]))) for name in named]


def _figure(figure: Figure, text: str) -> str:
    return image(data_uri(figure), text)


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "under 0.1%"
    return f"{100 * share:.0f}%" if not 0 < share < 0.095 else f"{100 * share:.1f}%"


def _short(time: Any) -> str:
    time = float(time)
    if not math.isfinite(time):
        return "∞"
    return f"{time:.1f}" if time < 10 else f"{time:,.0f}"
