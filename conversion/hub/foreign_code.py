"""What would be run in a model's folder that foxlm did not write: files of code, and what JSON files name as code."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from foxlm.conversion.checkpoint_io import read_any_json
from foxlm.modeling.attention_backends import IMPLEMENTATIONS
from foxlm.modeling.remote_code import AUTO_MAP, bundle

_CODE = {".py", ".pyc", ".pyo", ".pyw", ".pyx", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1"}
_CODE |= {".js", ".mjs", ".wasm", ".ipynb", ".jar", ".whl", ".egg", ".cu"}
# Under these names transformers and peft read what to import.
_NAMES_CODE = {"auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "kernel_config"}
# Attention may be a kernel of the Hub.
_NAMES_KERNELS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
# ``owner/repository--module.Class``, which is a reference under any name.
_ELSEWHERE = re.compile(r"[^\s/]+/[^\s/]+--[\w./-]+\.\w+")


def foreign_code(files: dict[str, Path], allowed: Collection[str]) -> list[str]:
    """The files of code, and the references to code in JSON files, that are neither foxlm's own nor allowed.

    Args:
        files: of the folder, by name.
        allowed: names of files of code, and references as a JSON file has them.
    """
    found = [name for name, path in files.items() if path.suffix.lower() in _CODE and name not in {*bundle(), *allowed}]
    for name, path in files.items():
        if path.suffix.lower() == ".json" and path.is_file():
            own = AUTO_MAP.items() if name == "config.json" else ()
            for key, reference in _references(read_any_json(path)):
                module = f"{reference.rpartition('.')[0].replace('.', '/')}.py"
                if (key, reference) not in own and not {reference, module} & {*allowed}:
                    found.append(f"{key}: {reference} in {name}")
    return found


def _references(content: object) -> Iterator[tuple[str, str]]:
    """What is named as code anywhere in a JSON file, each with the key next to it."""
    left: list[tuple[str, object, bool]] = [("", content, False)]
    while left:
        key, value, is_code = left.pop()
        if isinstance(value, dict):
            # Attention may be given for each part of a model.
            names = {name: key if key in _NAMES_KERNELS else name for name in value}
            left += [(names[name], x, is_code or name in _NAMES_CODE) for name, x in value.items()]
        elif isinstance(value, list):
            left += [(key, x, is_code) for x in value]
        elif isinstance(value, str) and (
            is_code or _ELSEWHERE.fullmatch(value) or (key in _NAMES_KERNELS and value not in IMPLEMENTATIONS)
        ):
            yield key, value
