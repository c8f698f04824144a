"""The text that chosen tokens still see, as HTML without scripts: shaded by attention, faint where it is skipped."""

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

# Attention weights from which each shade is used.
_SHADES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
STYLE = """<style>
.seen { white-space: pre-wrap; font: 12px/1.7 ui-monospace, monospace; background: #fff; border: 1px solid #d0d7de;
  padding: 8px; margin: .3rem 0 1rem; overflow-wrap: anywhere; }
.seen s { text-decoration: none; color: #a8b0b8; }
.seen b, .key b { outline: 2px solid #c23b4b; font-weight: 600; }
.k1 { background: #e8f0f9; } .k2 { background: #c9ddf2; } .k3 { background: #93bde6; }
.k4 { background: #4a8fd0; color: #fff; } .k5 { background: #12487f; color: #fff; }
details { border-top: 1px solid #e4e7eb; padding: .4rem 0; } summary { cursor: pointer; padding: .3rem 0; }
.numbers td, .numbers th { font-size: .85rem; line-height: 1.3; overflow-wrap: normal; }
.key span, .key s, .key b { padding: 1px 5px; margin-right: 4px; text-decoration: none; } .key s { color: #a8b0b8; }
</style>"""


def legend() -> str:
    """What the shades mean."""
    spans = [f'<span class="k{shade}">{_power(weight)}</span>' for shade, weight in enumerate(_SHADES, 1)]
    return (
        f'<p class="small key">Attention weight from {" ".join(spans)}; without color: kept, with less; '
        "<s>faint: skipped</s>; <b>framed</b>: the token that looks back.</p>"
    )


def seen_text(views: Sequence[dict[str, Any]]) -> str:
    """A fold-out part for each chosen token, with the text as each chosen head sees it.

    Args:
        views: of the report.
    """
    return "\n".join(_view(view, is_open=index == len(views) - 1) for index, view in enumerate(views))


def _view(view: dict[str, Any], is_open: bool) -> str:
    query = view["query"]
    name = escape(_visible(view["pieces"][-1]).strip() or "(space)")
    parts = [f"<details{' open' if is_open else ''}><summary>Token {query:,}: <code>{name}</code></summary>"]
    for head in view["heads"]:
        kept, before = query + 1 - head["kept_from"], view["start"]
        parts.append(
            f"<p class=small>{escape(head['kind'].capitalize())} head (layer {head['layer']}, head {head['head']}, "
            f"decay time {float(head['decay_time']):,.1f} tokens): may see <b>{kept:,}</b> of {query + 1:,} tokens."
            f"{_earlier(head, before)}</p>"
        )
        parts.append(f'<div class="seen">{_spans(view["pieces"], view["start"], head)}</div>')
    return "".join([*parts, "</details>"])


def _earlier(head: dict[str, Any], start: int) -> str:
    """What is said of the tokens before those shown."""
    if start == 0:
        return ""
    kept = max(0, start - head["kept_from"])
    return f" Of {start:,} tokens before these it may see {kept:,}."


def _spans(pieces: Sequence[str], start: int, head: dict[str, Any]) -> str:
    kinds = [_kind(start + index >= head["kept_from"], float(log)) for index, log in enumerate(head["log_weights"])]
    kinds[-1] = "b"
    found = []
    for kind, run in itertools.groupby(zip(kinds, pieces, strict=True), key=lambda pair: pair[0]):
        text = escape(_visible("".join(piece for _, piece in run)))
        if not text:
            continue
        opening = {"": "", "s": "<s>", "b": "<b>"}.get(kind, f'<span class="{kind}">')
        closing = {"": "", "s": "</s>", "b": "</b>"}.get(kind, "</span>")
        found.append(opening + text + closing)
    return "".join(found)


def _kind(kept: bool, log_weight: float) -> str:
    """``s`` for skipped, ``""`` for kept with next to no weight, else the class of a shade."""
    if not kept:
        return "s"
    shade = sum(log_weight >= math.log(weight) for weight in _SHADES)
    return f"k{shade}" if shade else ""


def _visible(text: str) -> str:
    """With line ends that can be seen, and without characters that HTML forbids."""
    kept = "".join(c if c in "\n\t" or ord(c) >= 32 else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\r", ""))
    return kept.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")


def _power(weight: float) -> str:
    return f"10<sup>{round(math.log10(weight))}</sup>"
