"""The code of a model beside its weights, so that `trust_remote_code=True` loads it where foxlm is not installed.

transformers copies the file that ``auto_map`` names and what it imports by ``from .module import name``, all from one
folder. So the modules that `modeling_fox` needs are written as flat files with their imports rewritten,
``kernels/hopper/forward.py`` as ``kernels_hopper_forward.py``. This module is one of them: a model loaded from such
files saves them again by the same code, which then finds everything flat already.
"""

import ast
import functools
import json
import os
import re
import sys
from pathlib import Path

from .versions import NEWEST, OLDEST

_HERE = Path(__file__).parent
# Not where this module was itself written as a flat file.
_IN_FOLDERS = (_HERE.parent / "kernels" / "decay.py").is_file()
# One module for all: classes of a folder on disk that are named by different modules are loaded as different copies.
AUTO_MAP = {
    "AutoConfig": "modeling_fox.FoxConfig",
    "AutoModel": "modeling_fox.FoxModel",
    "AutoModelForCausalLM": "modeling_fox.FoxForCausalLM",
    "AutoModelForSequenceClassification": "modeling_fox.FoxForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_fox.FoxForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_fox.FoxForQuestionAnswering",
}
_STAMP = "# Code of a FoX model, written by foxlm"
# What whoever loads the model has, beside Python itself. transformers asks for all that is imported outside of `try`.
_REQUIRED = {"huggingface_hub", "numpy", "torch", "transformers"}
_OPTIONAL = {"triton"}


def write_bundle(folder: str | os.PathLike) -> None:
    """Write the model's code into a folder that holds its ``config.json``, and name it there; replaces older code.

    Raises:
        ValueError: ``folder`` holds no configuration of a FoX model, or its ``auto_map`` is none.
    """
    folder = Path(folder)
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("model_type") != "fox":
        raise ValueError(f"folder must hold a config.json with model_type 'fox', got {folder}")
    others = fields.get("auto_map") or {}
    if not isinstance(others, dict):
        raise ValueError(f"auto_map in {file} must be an object, got a {type(others).__name__}")
    for name, source in bundle().items():
        _write(folder / name, source)
    for name in stale_files(folder):
        (folder / name).unlink()
    _write(file, json.dumps({**fields, "auto_map": {**others, **AUTO_MAP}}, indent=2, sort_keys=True) + "\n")


def _write(file: Path, text: str) -> None:
    """Write a file, in place of a link and not through it, which may lead into the Hub's cache."""
    if file.is_symlink():
        file.unlink()
    file.write_bytes(text.encode())


def stale_files(folder: Path) -> list[str]:
    """Names of files that an earlier version wrote into ``folder`` and this one does not."""
    others = (path for path in folder.glob("*.py") if path.name not in bundle())
    return sorted(path.name for path in others if path.read_bytes().startswith(_STAMP.encode()))


@functools.cache
def bundle() -> dict[str, str]:
    """The text of each flat file by its name.

    Raises:
        ValueError: a module imports what cannot be bundled; the message names it.
    """
    package = sys.modules[__package__.partition(".")[0]] if __package__ else None
    stamp = (
        f"{_STAMP} {getattr(package, '__version__', '')} for transformers {OLDEST} to {NEWEST} (Apache License 2.0). "
        "Saving the model writes it anew.\n"
    )
    files: dict[str, str] = {}
    left = [_HERE / "modeling_fox.py"]
    while left:
        path = left.pop()
        name = f"{_flat_name(path)}.py"
        if name not in files:
            source, needed = flatten(path)
            # What was flat already keeps the stamp of the version that it comes from.
            files[name] = source if source.startswith(_STAMP) else stamp + source
            left += needed
    return dict(sorted(files.items()))


def flatten(path: Path) -> tuple[str, list[Path]]:
    """A module's text with its imports rewritten for flat files, and the modules of ours that it needs.

    Raises:
        ValueError: it imports in a way that cannot be rewritten, or a package that a user may not have.
    """
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source, path)
    needed: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            needed.append(_imported_file(node, path))
            line, start = lines[node.lineno - 1], node.col_offset
            flat = re.sub(r"\.[\w.]+", f".{_flat_name(needed[-1])}", line[start:], count=1)
            lines[node.lineno - 1] = line[:start] + flat
        elif unknown := sorted(_packages(node) - _REQUIRED - _OPTIONAL - sys.stdlib_module_names):
            raise ValueError(
                f"{path.name}, line {getattr(node, 'lineno', 0)}: a model's code may import modules of its own by "
                f"'from .module import name', Python's own and {sorted(_REQUIRED | _OPTIONAL)}, got {unknown[0]}"
            )
    # In `try`, so that transformers does not refuse to load the model where the package is missing.
    for node in reversed(tree.body):
        if _packages(node) & _OPTIONAL:
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = ["try:\n", *("    " + x for x in lines[first:last]), "except ImportError: raise\n"]
    return "".join(lines), needed


def _imported_file(node: ast.ImportFrom, path: Path) -> Path:
    """The file of ours that a relative import in ``path`` means."""
    parts = node.module.split(".") if node.module else []
    file = path.parents[node.level - 1].joinpath(*parts).with_suffix(".py")
    if not parts or any(alias.name == "*" for alias in node.names) or not file.is_file():
        raise ValueError(
            f"{path.name}, line {node.lineno}: an import of our own must be 'from .module import name' or "
            f"'from ..folder.module import name', got {ast.unparse(node)!r}"
        )
    return file


def _packages(node: ast.AST) -> set[str]:
    """Top-level packages that an absolute import names; none for any other statement."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return {node.module.partition(".")[0]}
    return set()


def _flat_name(path: Path) -> str:
    if path.parent == _HERE:
        return path.stem if path.stem.endswith("_fox") or not _IN_FOLDERS else f"modeling_{path.stem}"
    return "_".join(path.relative_to(_HERE.parent).with_suffix("").parts)
