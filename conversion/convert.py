"""Convert FoX checkpoints between this library's format and those of the authors and flash-linear-attention."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from foxlm.conversion.checkpoint_io import WEIGHTS_INDEX, StoredWeights, check_sizes
from foxlm.conversion.formats.authors import AUTHORS
from foxlm.conversion.formats.checkpoint_format import CheckpointFormat, invalid_config_as_value_error
from foxlm.conversion.formats.fla import FLA
from foxlm.conversion.links import check_links
from foxlm.conversion.new_folder import check_new, copy_text_files, new_folder
from foxlm.conversion.weight_map import EMBEDDINGS, Plan, plan_to_external, plan_to_fox
from foxlm.kernels.argument_types import typed
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.model_files import read_fields
from foxlm.modeling.modeling_fox import FoxForCausalLM

FORMATS = {"authors": AUTHORS, "fla": FLA}
_FORMAT_OF_MODEL_TYPE = {format.fields.model_type: format for format in FORMATS.values()}

# One shard is in memory at a time. A single weight may be larger: the float32 embeddings of a 7B model are 0.8 GB.
_SHARD_BYTES = 10**9


@typed
def convert_to_folder(source: str | Path, out: str | Path, *, to: str = "fox", allow_pickle: bool = False) -> None:
    """Write the checkpoint in ``source`` in another format, with its tokenizer, to ``out``, atomically.

    Weights are read and written one shard of 1 GB at a time and keep their dtypes, except that forget gates become
    float32 at least in the format ``"fox"``.

    Args:
        source: holds ``config.json`` and the weights, ``*.safetensors``; a FoX model unless ``to`` is ``"fox"``.
        out: the folder to create.
        to: the target format: ``"fox"``, ``"authors"`` or ``"fla"``.
        allow_pickle: also accept ``pytorch_model*.bin``, read with ``weights_only``.

    Raises:
        ValueError: ``out`` exists already or lies in ``source``; ``source`` holds no such checkpoint, or one that the
            target format cannot represent; the message names the field or weight.
        OSError: ``out`` cannot be written.
    """
    source, out = Path(source), Path(out)
    if to not in ("fox", *FORMATS):
        raise ValueError(f"to must be one of {['fox', *FORMATS]}, got {to!r}")
    # Before anything is read; `new_folder` checks again.
    check_new(out, source)
    model_types = sorted(_FORMAT_OF_MODEL_TYPE) if to == "fox" else [FoxConfig.model_type]
    fields, stored = _read(source, allow_pickle, model_types)
    write_config: Callable[[Path, str], None]
    if to == "fox":
        model, plan = _import_plan(fields)
        write_config = partial(_write_fox_config, model)
    else:
        target_fields, plan = _export_plan(fields, FORMATS[to])
        write_config = partial(_write_external_config, target_fields)
    plan.check(stored.headers, stored.load)
    dtype = _dtype(stored)

    with new_folder(out) as folder:
        write_config(folder, str(dtype).removeprefix("torch."))
        _write_weights(folder, plan, stored, dtype)
        copy_text_files(source, folder)


def _read(folder: Path, allow_pickle: bool, model_types: list[str]) -> tuple[dict[str, Any], StoredWeights]:
    """The ``config.json`` of a checkpoint with one of ``model_types``, and its weights."""
    fields = read_fields(folder)
    model_type = fields.get("model_type")
    if model_type not in model_types:
        accepted = f"one of {model_types}" if len(model_types) > 1 else repr(model_types[0])
        raise ValueError(f"model_type must be {accepted}, got {model_type!r:.80}")
    check_links(folder)
    stored = StoredWeights(folder, allow_pickle)
    check_sizes(fields, stored.headers)
    return fields, stored


def _import_plan(fields: dict[str, Any]) -> tuple[FoxForCausalLM, Plan]:
    """The FoX model (on the meta device) of an external ``config.json``, and how its weights are made."""
    format = _FORMAT_OF_MODEL_TYPE[fields["model_type"]]
    with invalid_config_as_value_error(), torch.device("meta"):
        model = FoxForCausalLM(format.to_config(fields))
    return model, plan_to_fox(format.renames(model.config), model)


def _export_plan(fields: dict[str, Any], target: CheckpointFormat) -> tuple[dict[str, Any], Plan]:
    """The target's ``config.json`` for that of a FoX model, and how the target's weights are made."""
    with invalid_config_as_value_error(), torch.device("meta"):
        model = FoxForCausalLM(FoxConfig.from_dict(fields))
        target_fields = target.exact_fields(model.config)
    return target_fields, plan_to_external(target.renames(model.config), model)


def _dtype(stored: StoredWeights) -> torch.dtype:
    """The dtype that ``config.json`` states: that of the embeddings, as transformers does."""
    return next(stored.headers[name].dtype for name in (EMBEDDINGS.external, *EMBEDDINGS.fox) if name in stored.headers)


def _write_fox_config(model: FoxForCausalLM, folder: Path, dtype: str) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _write_external_config(fields: dict[str, Any], folder: Path, dtype: str) -> None:
    # ``torch_dtype`` is what the versions of transformers read that these formats were made for.
    _write_json(folder / "config.json", fields | {"torch_dtype": dtype})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(folder: Path, plan: Plan, stored: StoredWeights, dtype: torch.dtype) -> None:
    """Make and write the weights, with an index if there are several files, by transformers' file names."""
    # Clones: huggingface_hub takes the size of a view's storage for that of the view.
    headers = {name: new.make(stored.headers.__getitem__, dtype).clone() for name, new in plan.makes.items()}
    shards = split_torch_state_dict_into_shards(headers, max_shard_size=_SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        weights = {name: plan.makes[name].make(stored.load, dtype) for name in names}
        try:
            save_file(weights, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        # Free this shard before the next one is made.
        del weights
    if shards.is_sharded:
        total = {"total_parameters": sum(weight.numel() for weight in headers.values()), **shards.metadata}
        index = {"metadata": total, "weight_map": shards.tensor_to_filename}
        _write_json(folder / WEIGHTS_INDEX, index)
