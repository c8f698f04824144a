"""Find code in a model's folder that foxlm did not write: code files, and references to code in JSON files."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from foxlm.modeling.configuration_fox import IMPLEMENTATIONS
from foxlm.modeling.model_files import read_any_json
from foxlm.modeling.remote_code import AUTO_MAP, exported_files

_CODE = {".py", ".pyc", ".pyo", ".pyw", ".pyx", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1"}
_CODE |= {".js", ".mjs", ".wasm", ".ipynb", ".jar", ".whl", ".egg", ".cu"}
# Keys under which transformers and peft read what to import.
_NAMES_CODE = {"auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "kernel_config"}
# The value may name an attention kernel on the Hub.
_NAMES_KERNELS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
# ``owner/repository--module.Class`` is a reference under any key.
_ELSEWHERE = re.compile(r"[^\s/]+/[^\s/]+--[\w./-]+\.\w+")


def foreign_code(files: dict[str, Path], allowed: Collection[str]) -> list[str]:
    """The files of code, and the references to code in JSON files, that are neither foxlm's own nor allowed.

    Args:
        files: of the folder, by name.
        allowed: names of code files, and references as they stand in a JSON file.
    """
    found = [
        name
        for name, path in files.items()
        if path.suffix.lower() in _CODE and name not in {*exported_files(), *allowed}
    ]
    for name, path in files.items():
        if path.suffix.lower() == ".json" and path.is_file():
            own = AUTO_MAP.items() if name == "config.json" else ()
            for key, reference in _references(read_any_json(path)):
                module = f"{reference.rpartition('.')[0].replace('.', '/')}.py"
                if (key, reference) not in own and not {reference, module} & {*allowed}:
                    found.append(f"{key}: {reference} in {name}")
    return found


def _references(content: object) -> Iterator[tuple[str, str]]:
    """The references to code anywhere in a JSON file, each with its key."""
    left: list[tuple[str, object, bool]] = [("", content, False)]
    while left:
        key, value, is_code = left.pop()
        if isinstance(value, dict):
            # A configuration may name an implementation for each part of a model.
            names = {name: key if key in _NAMES_KERNELS else name for name in value}
            left += [(names[name], x, is_code or name in _NAMES_CODE) for name, x in value.items()]
        elif isinstance(value, list):
            left += [(key, x, is_code) for x in value]
        elif isinstance(value, str) and (
            is_code or _ELSEWHERE.fullmatch(value) or (key in _NAMES_KERNELS and value not in IMPLEMENTATIONS)
        ):
            yield key, value
