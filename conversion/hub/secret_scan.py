"""Find passwords, tokens and keys in files, by the rules of detect-secrets and a few of our own."""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

# No secret is shorter.
_SHORTEST = 16
# Longer lines are searched in pieces, since some rules take the square of a line's length; pieces overlap.
_LONGEST, _OVERLAP = 10_000, 1_000
_LONGEST_HEADER = 100_000_000
# These rules match ordinary words and numbers, of which any vocabulary has some.
_GUESSES = {"ArtifactoryDetector", "IPPublicDetector"}
# Tokens for which detect-secrets has no rule, as their issuers describe them.
_TOKENS = {
    "Hugging Face Token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "GitHub Fine-Grained Token": re.compile(r"\bgithub_pat_\w{60,}"),
    "Anthropic Key": re.compile(r"\bsk-ant-[\w-]{60,}"),
    "Google API Key": re.compile(r"\bAIza[\w-]{35}(?![\w-])"),
}

Rule = Callable[[str], Iterable[str]]


def secret_rules() -> dict[str, Rule]:
    """Rules by the kind of secret that each finds.

    Raises:
        ValueError: detect-secrets is not installed.
    """
    if find_spec("detect_secrets") is None:
        raise ValueError(
            "detect-secrets, whose rules find passwords and keys, is not installed, and no folder is ready without it; "
            "it comes with: pip install 'foxlm[publish]'"
        )
    from detect_secrets import plugins
    from detect_secrets.plugins.base import RegexBasedDetector

    for module in pkgutil.iter_modules(plugins.__path__):
        importlib.import_module(f"{plugins.__name__}.{module.name}")
    detectors = [kind() for kind in RegexBasedDetector.__subclasses__() if kind.__name__ not in _GUESSES]
    return {kind: rule.findall for kind, rule in _TOKENS.items()} | {x.secret_type: x.analyze_string for x in detectors}


def secret_in(file: Path, rules: dict[str, Rule]) -> str | None:
    """The kind of the first secret found in ``file``, or None. Of safetensors only the header is read."""
    text = "\n".join(_pieces(_text(file)))
    return next((kind for kind, find in rules.items() if any(True for _ in find(text))), None)


def _text(file: Path) -> Iterator[str]:
    content = _header(file) if file.suffix == ".safetensors" else file.read_bytes()
    try:
        # Scan the strings of JSON: escapes may hide a secret, and a vocabulary may be one line of megabytes.
        yield from _strings(json.loads(content))
    except (ValueError, RecursionError):
        # Without zero bytes UTF-16 and UTF-32 read as ASCII; in binary files zero bytes separate strings.
        for zeros in (b"", b"\n") if b"\0" in content else (b"\0",):
            yield from content.replace(b"\0", zeros).decode("latin-1").splitlines()


def _header(file: Path) -> bytes:
    """The header of a safetensors file."""
    with file.open("rb") as opened:
        length = opened.read(8)
        header = opened.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
    return header if header.startswith(b"{") else length + header


def _strings(content: object) -> Iterator[str]:
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            # Some rules match the key together with its value.
            yield from (f'"{key}": "{x}"' if isinstance(x, str) else key for key, x in value.items())
            left += [x for x in value.values() if isinstance(x, dict | list)]
        elif isinstance(value, list):
            yield from (x for x in value if isinstance(x, str))
            left += [x for x in value if isinstance(x, dict | list)]
        elif isinstance(value, str):
            yield value


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            if len(line) >= _SHORTEST:
                step = _LONGEST - _OVERLAP
                yield from (line[start : start + _LONGEST] for start in range(0, max(1, len(line) - _OVERLAP), step))
