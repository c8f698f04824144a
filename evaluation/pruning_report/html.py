"""HTML pages of one file that need nothing else, readable on a phone."""

from collections.abc import Sequence
from html import escape

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


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page: ``title`` is text, for the browser's tab; ``sections`` are HTML, one after the other."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns: labels, which are text, and values, which are HTML already."""
    cells = "".join(f"<tr><td>{escape(label)}</td><td>{value}</td></tr>" for label, value in rows)
    return f"<table>{cells}</table>"


def image(address: str, text: str) -> str:
    """An image at ``address``, described by ``text``."""
    return f'<img src="{address}" alt="{escape(text)}">'
