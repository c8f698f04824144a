"""Results in a JSON file: written whole or not at all, gone on with only where model and settings are the same."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foxlm.modeling.model_files import read_config

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as `write_whole` does; a NaN or an infinity in it is a ValueError."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, making its folder; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        # A full disk names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def require_folder(out: Path) -> None:
    """Refuse a file where a folder of results is to be, before anything is measured."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Results of ``foxlm loss`` or ``foxlm needle``, which is ``kind``; a ValueError where the file holds others."""
    content = parse_json(path)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path} holds no results of foxlm {kind}")
    return content


def parse_json(path: Path) -> Any:
    """What a JSON file holds, all of its numbers finite.

    Raises:
        ValueError: it is not JSON, or holds a NaN, an infinity, or a number beyond those of float64.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {text:.20}")
    return number


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


@contextmanager
def reading(*paths: Path) -> Iterator[None]:
    """Where old results are read: what they lack is a ValueError that names ``paths``, and no error of the program."""
    path = ", ".join(map(str, paths))
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def fingerprint(source: str) -> str | None:
    """A short hash by which weights trained further are told from those measured before.

    Of a folder: its configuration and tokenizer, and of its files of weights the size and 64 samples of 4 KiB each.
    Of a name on the Hub: its commit. None if there is neither.
    """
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(read_config(source), "_commit_hash", None)
        return commit[:16] if commit else None
    found = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    for file in sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)}):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for sample in range(_SAMPLES):
                weights.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                found.update(weights.read(_SAMPLE_BYTES))
    return found.hexdigest()[:16]


def require_least(options: Any, **least: int) -> None:
    """Refuse a field of ``options`` that is less than what is given for its name; None is accepted."""
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Refuse to mix results of different settings: the ValueError names the first that is another one in ``old``."""
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"{where} has results with {name} {old.get(name)!r}, now it is {value!r}; "
                "give another --out, or --overwrite"
            )
