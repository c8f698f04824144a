"""Read the weights of a model's folder, one at a time, and check them against its configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foxlm.modeling.model_files import read_json

# File names that transformers gives to weights, shards and their index.
_SAFETENSORS, WEIGHTS_INDEX = "*.safetensors", "model.safetensors.index.json"
_PICKLES, _PICKLES_INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
# Configuration fields that are sizes of weights, in any model type read here.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *("num_heads", "num_kv_heads", "num_attention_heads", "num_key_value_heads"),
)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_sizes(fields: dict[str, Any], headers: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` if a ``config.json`` states sizes larger than its weights, before a model is built from it.

    Args:
        fields: of the ``config.json``.
        headers: the weights by name; meta tensors will do.
    """
    weights, parameters = len(headers), sum(weight.numel() for weight in headers.values())
    for most, held, names in ((weights, "weights", ("num_hidden_layers",)), (parameters, "parameters", _SIZES)):
        for name in names:
            size = fields.get(name)
            if isinstance(size, int | float) and not size <= most:
                raise ValueError(f"{name} in config.json is {size}, but its files hold {most:,} {held}")


def headers_to_load(folder: Path) -> dict[str, Tensor] | None:
    """The weights, on the meta device, of the safetensors files that transformers would load; None if there are none.

    Raises:
        ValueError: a file is missing, outside the folder or broken; the message names it.
    """
    whole, index = folder / "model.safetensors", folder / WEIGHTS_INDEX
    if whole.exists():
        files = [whole]
    elif index.exists():
        files = _named_files(index, _SAFETENSORS)
    else:
        return None
    weights = {name: weight for file in files for name, weight in _mapped(file).items()}
    return {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights.items()}


class StoredWeights:
    """The weights in a folder, loaded one at a time: only names, dtypes and shapes are read at first.

    Attributes:
        headers: the weights by name, on the meta device.
        files: the file of each weight.

    Args:
        folder: holds ``*.safetensors``, all of it or what ``model.safetensors.index.json`` lists.
        allow_pickle: also accept ``pytorch_model*.bin`` if there is no safetensors file, read with ``weights_only``.

    Raises:
        ValueError: there are no such files; a file is missing, broken or contradicts the index; or a weight is not of
            a floating-point dtype. The message names it.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        files, index = _weight_files(folder, allow_pickle)
        self.headers: dict[str, Tensor] = {}
        self.files: dict[str, Path] = {}
        for file in files:
            for name, weight in _mapped(file).items():
                if name in self.files:
                    raise ValueError(f"{name} is in two files, {self.files[name]} and {file}")
                if weight.dtype not in _DTYPES:
                    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                    raise ValueError(f"{name} must be one of {accepted}, got {weight.dtype} in {file}")
                self.files[name] = file
                self.headers[name] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        if index is not None:
            _check_index(index, {name: file.name for name, file in self.files.items()})

    def load(self, name: str) -> Tensor:
        """Load one weight. Its file is mapped anew each time, so that its memory is freed with the weight."""
        return _mapped(self.files[name])[name]


def _weight_files(folder: Path, allow_pickle: bool) -> tuple[list[Path], Path | None]:
    """The files with a folder's weights, and their index if there is one."""
    for pattern, index in ((_SAFETENSORS, folder / WEIGHTS_INDEX), (_PICKLES, folder / _PICKLES_INDEX)):
        found = sorted(folder.glob(pattern))
        if not found and not index.exists():
            continue
        if pattern == _PICKLES and not allow_pickle:
            raise ValueError(
                f"{folder} has pickled weights only, which can be made to run code: make safetensors of them; foxlm "
                "convert --allow-pickle (in Python allow_pickle=True) reads them as weights and nothing else"
            )
        if not index.exists():
            return found, None
        single = folder / pattern.replace("*", "" if pattern == _PICKLES else "model")
        if single in found and single.name not in _listed(index).values():
            raise ValueError(f"{folder} holds both {single.name} and {index.name}, which does not list it: remove one")
        return _named_files(index, pattern), index
    raise ValueError(f"{folder} must hold safetensors files, got none")


def _named_files(index: Path, pattern: str) -> list[Path]:
    """The files that an index names; all must match ``pattern`` and lie in its folder."""
    names = sorted(set(_listed(index).values()))
    found = set(index.parent.glob(pattern))
    for name in names:
        # The pattern includes the suffix: an index of safetensors must not make us read a pickle.
        if index.parent / name not in found or not (index.parent / name).is_file():
            raise ValueError(f"{index} lists {name!r}, which is not a file {pattern} of the folder")
    return [index.parent / name for name in names]


def _listed(index: Path) -> dict[str, str]:
    """The file of each weight, by an index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} must have a weight_map from weights to files")
    return listed


def _check_index(index: Path, files: dict[str, str]) -> None:
    listed = _listed(index)
    for name in sorted(listed.keys() | files.keys()):
        if listed.get(name) != files.get(name):
            there, said = files.get(name, "none of its files"), listed.get(name, "nothing")
            raise ValueError(f"{name} is in {there}, but {index} says {said}")


def _mapped(file: Path) -> dict[str, Tensor]:
    """All weights of a file, memory-mapped."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    except Exception as error:
        # Unpickling invalid data can raise anything; after its first line torch advises to load without weights_only.
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not a whole file of pickled weights and nothing else: {reason}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{file} must hold a dictionary of weights, got a {type(weights).__name__}")
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor) or weight.layout != torch.strided:
            raise ValueError(f"{file} must hold a dictionary of weights, got a {type(weight).__name__} as {name!r}")
    return weights
