"""Model folders, written and read without the code under test; and converted ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from foxlm import FoxForCausalLM
from foxlm.conversion.convert import convert_to_folder


def write(folder: Path, fields: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """A ``config.json`` and two files of weights, without an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(weights)
    for shard in (0, 1):
        part = {name: weights[name].contiguous() for name in names[shard::2]}
        save_file(part, folder / f"model-{shard}.safetensors")


def write_index(folder: Path) -> Path:
    """The index of a folder's ``*.safetensors``."""
    listed = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return index


def read(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder."""
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def converted(source: Path, out: Path) -> FoxForCausalLM:
    """The model that a checkpoint is converted to, in ``out``."""
    convert_to_folder(source, out)
    return FoxForCausalLM.from_pretrained(out, dtype="auto")
