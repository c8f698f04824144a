"""Read models of transformers from a folder or the Hub, of any model type; every failure becomes an error of one line.

`conversion/` and `evaluation/` both begin here. The code that a saved model carries does not.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from .config_fields import LARGEST_LABELS


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        OSError, ValueError: there is no configuration, or one that transformers rejects; the message names the field.
    """
    file = Path(source) / "config.json"
    if file.exists():
        fields = read_fields(Path(source))
        for name, value in (("model_type", fields.get("model_type")), *_class_names(fields.get("auto_map"))):
            if not isinstance(value, str):
                raise ValueError(f"{file}: {name} must be a string, got {value!r:.80}")
    try:
        # Without an explicit value transformers asks on the terminal whether to run a folder's code.
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise OSError(
            f"{source} is no model's folder, and on the Hugging Face Hub none is found: {reason(error)}"
        ) from None
    except Exception as error:  # a file edited by hand may be wrong in any way
        raise ValueError(f"{file} does not describe a model: {reason(error)}") from error


def read_model(source: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a causal language model; also returns which weights were missing, unexpected or misshapen.

    Args:
        source: folder, or name on the Hugging Face Hub.
        options: of ``from_pretrained``.

    Raises:
        ValueError: it cannot be loaded; the message names the file where one is broken.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, **options
        )
    except MemoryError:
        raise
    except Exception as error:  # errors of transformers, torch and safetensors do not name the file
        raise ValueError(_broken_file(Path(source)) or f"{source} cannot be loaded: {reason(error)}") from error


def reason(error: Exception) -> str:
    """An error of another library in one line, with its type where the message alone does not explain it."""
    # An error of `@strict` names the field and has the reason in its cause.
    shown = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    lines = [line.strip() for line in str(shown).splitlines() if line.strip()]
    # A first line that ends in a colon says nothing without the others.
    text = " ".join(lines) if lines and lines[0].endswith(":") else "".join(lines[:1])
    known = isinstance(error, ValueError | OSError | StrictDataclassError)
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _class_names(auto_map: Any) -> list[tuple[str, Any]]:
    """The entries of ``auto_map`` with their names; a value that is no mapping is returned as is, to be refused."""
    if not isinstance(auto_map, dict):
        return [] if auto_map is None else [("auto_map", auto_map)]
    return [(f"auto_map[{name!r}]", value) for name, value in auto_map.items() if not isinstance(value, list)]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises a `ValueError` that names the file if there is none."""
    content = read_any_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_any_json(file: Path) -> Any:
    """The content of a JSON file; raises a `ValueError` that names the file if it is not valid JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def read_fields(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder; raises a `ValueError` if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"the source must be a folder with a config.json, got {folder}")
    fields = read_json(folder / "config.json")
    # transformers assumes a mapping.
    if not isinstance(fields.get("auto_map") or {}, dict):
        raise ValueError(f"auto_map in {folder / 'config.json'} must be an object, got {fields['auto_map']!r:.60}")
    labels = fields.get("num_labels")
    # A configuration of transformers creates a name for each label.
    if isinstance(labels, int | float) and not labels <= LARGEST_LABELS:
        raise ValueError(f"num_labels in {folder / 'config.json'} must be at most {LARGEST_LABELS:,}, got {labels}")
    names = fields.get("id2label") or {}
    if not isinstance(names, dict) or not all(number.isdecimal() for number in names):
        raise ValueError(
            f"id2label in {folder / 'config.json'} must be an object with numbers as names, got {names!r:.60}"
        )
    return fields


def check_files(folder: Path) -> None:
    """Raise a `ValueError` that names a file of weights in ``folder`` that cannot be opened."""
    if said := _broken_file(folder):
        raise ValueError(said)


def _broken_file(folder: Path) -> str | None:
    """Describes the first file of weights that cannot be opened; None if all can."""
    files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")))
    return next(filter(None, map(_fault, files)), None)


def _fault(file: Path) -> str | None:
    try:
        if file.suffix == ".json":
            read_json(file)
        else:
            with safe_open(file, "pt"):
                pass
    except Exception as error:
        said = str(error)
        return said if str(file) in said else f"{file} is not a whole safetensors file: {reason(error)}"
    return None
