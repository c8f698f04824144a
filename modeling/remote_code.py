"""The code of a model beside its weights, so that `trust_remote_code=True` loads it where foxlm is not installed.

transformers copies the file that ``auto_map`` names and what it imports by ``from .module import name``, all from one
folder: `code_files` merges our modules into such files. This module travels with them, so that a model loaded from a
folder is saved with the same files.
"""

import functools
import importlib
import json
import os
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .versions import NEWEST, OLDEST

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


def export_code(folder: str | os.PathLike) -> None:
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
    for name, source in exported_files().items():
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
    """Names of files that another version wrote into ``folder`` and this one does not."""
    others = (path for path in folder.glob("*.py") if path.name not in exported_files())
    return sorted(path.name for path in others if path.read_bytes().startswith(_STAMP.encode()))


@functools.cache
def exported_files() -> dict[str, str]:
    """The text of each file by its name.

    Raises:
        ValueError: a module imports what cannot be exported; the message names it.
    """
    here = Path(__file__)
    if here.read_text(encoding="utf-8").startswith(_STAMP):
        # Exported itself: the model was loaded from such files.
        entry = here.with_name("modeling_fox.py")
        paths = {entry, *map(Path, get_relative_import_files(entry))}
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(paths)}
    # By its name, which exported code does not follow: there it has nothing to do.
    code_files = importlib.import_module(".code_files", __package__)
    stamp = (
        f"{_STAMP} {sys.modules['foxlm'].__version__} for transformers {OLDEST} to {NEWEST} (Apache License 2.0). "
        "Saving the model writes it anew.\n"
    )
    return {name: stamp + text for name, text in code_files.merge(here.with_name("modeling_fox.py")).items()}
