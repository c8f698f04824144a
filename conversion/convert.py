"""Checkpoints of FoX by others as folders that ``from_pretrained`` loads, and back."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from foxlm.conversion.checkpoint_io import WEIGHTS_INDEX, StoredWeights, check_sizes, read_fields
from foxlm.conversion.formats.authors import AUTHORS
from foxlm.conversion.formats.fla import FLA
from foxlm.conversion.formats.format import Layout, one_kind_of_error
from foxlm.conversion.hub.links import check_links
from foxlm.conversion.new_folder import check_new, copy_text_files, new_folder
from foxlm.conversion.weight_map import EMBEDDINGS, Plan, make_model, plan_to_ours, plan_to_theirs
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM

LAYOUTS = {"authors": AUTHORS, "fla": FLA}
_LAYOUTS_OF_KINDS = {layout.fields.model_type: layout for layout in LAYOUTS.values()}

# Shards are what memory holds at a time. One weight may be larger: the float32 embeddings of a 7B model are 0.8 GB.
_SHARD_BYTES = 10**9


def convert_checkpoint(folder: str | Path, *, allow_pickle: bool = False) -> FoxForCausalLM:
    """The model in ``folder``, a checkpoint of the authors or of flash-linear-attention, in memory.

    Args:
        folder: ``config.json`` and the weights, ``*.safetensors``.
        allow_pickle: whether ``pytorch_model*.bin`` will do, read as weights and nothing else.

    Raises:
        ValueError: it is no such checkpoint, or does not fit; the message names what stands in the way.
    """
    fields, stored = _read(Path(folder), allow_pickle, sorted(_LAYOUTS_OF_KINDS))
    model, plan = _read_theirs(fields)
    plan.check(stored.headers, stored.load)
    return make_model(plan, model.config, stored.load, _dtype(stored))


def convert_to_folder(source: str | Path, out: str | Path, *, to: str = "fox", allow_pickle: bool = False) -> None:
    """Write the checkpoint in ``source`` in another layout, with its tokenizer, to ``out``: whole or not at all.

    Weights are read and written a shard of 1 GB at a time, and keep their types, except that our forget gates are
    float32 at least.

    Args:
        source: ``config.json`` and the weights, ``*.safetensors``; of a FoX model unless ``to`` is ``"fox"``.
        out: folder to make.
        to: ``"fox"``; or ``"authors"`` or ``"fla"``, as their code loads it.
        allow_pickle: whether ``pytorch_model*.bin`` will do, read as weights and nothing else.

    Raises:
        ValueError: ``out`` is there already, or in ``source``; ``source`` is no such checkpoint, or does not fit, or
            computes what the other layout cannot express; the message names what stands in the way.
        OSError: ``out`` cannot be written.
    """
    source, out = Path(source), Path(out)
    if to not in ("fox", *LAYOUTS):
        raise ValueError(f"to must be one of {['fox', *LAYOUTS]}, got {to!r}")
    # Before anything is read, and again when the folder is made.
    check_new(out, source)
    kinds = sorted(_LAYOUTS_OF_KINDS) if to == "fox" else [FoxConfig.model_type]
    fields, stored = _read(source, allow_pickle, kinds)
    write_config: Callable[[Path, str], None]
    if to == "fox":
        model, plan = _read_theirs(fields)
        write_config = partial(_write_our_config, model)
    else:
        their_fields, plan = _read_ours(fields, LAYOUTS[to])
        write_config = partial(_write_their_config, their_fields)
    plan.check(stored.headers, stored.load)
    dtype = _dtype(stored)

    with new_folder(out) as folder:
        write_config(folder, str(dtype).removeprefix("torch."))
        _write_weights(folder, plan, stored, dtype)
        copy_text_files(source, folder)


def _read(folder: Path, allow_pickle: bool, kinds: list[str]) -> tuple[dict[str, Any], StoredWeights]:
    """Its ``config.json``, of a ``model_type`` among ``kinds``, and its weights."""
    fields = read_fields(folder)
    kind = fields.get("model_type")
    if kind not in kinds:
        wanted = f"one of {kinds}" if len(kinds) > 1 else repr(kinds[0])
        raise ValueError(f"model_type must be {wanted}, got {kind!r:.80}")
    check_links(folder)
    stored = StoredWeights(folder, allow_pickle)
    check_sizes(fields, stored.headers)
    return fields, stored


def _read_theirs(fields: dict[str, Any]) -> tuple[FoxForCausalLM, Plan]:
    """The model that their ``config.json`` makes, without weights, and how to make these of theirs."""
    layout = _LAYOUTS_OF_KINDS[fields["model_type"]]
    with one_kind_of_error(), torch.device("meta"):
        model = FoxForCausalLM(layout.to_config(fields))
    return model, plan_to_ours(layout.renames(model.config), model)


def _read_ours(fields: dict[str, Any], layout: Layout) -> tuple[dict[str, Any], Plan]:
    """Their ``config.json`` for one of ours, and how to make their weights of ours."""
    with one_kind_of_error(), torch.device("meta"):
        model = FoxForCausalLM(FoxConfig.from_dict(fields))
        their_fields = layout.exact_fields(model.config)
    return their_fields, plan_to_theirs(layout.renames(model.config), model)


def _dtype(stored: StoredWeights) -> torch.dtype:
    """What ``config.json`` is to say: the type of the embeddings, as transformers has it."""
    return next(stored.headers[name].dtype for name in (EMBEDDINGS.theirs, *EMBEDDINGS.ours) if name in stored.headers)


def _write_our_config(model: FoxForCausalLM, folder: Path, dtype: str) -> None:
    """What `save_pretrained` would write beside the weights."""
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _write_their_config(fields: dict[str, Any], folder: Path, dtype: str) -> None:
    # By the name that the versions of transformers they were made for read.
    _write_json(folder / "config.json", fields | {"torch_dtype": dtype})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(folder: Path, plan: Plan, stored: StoredWeights, dtype: torch.dtype) -> None:
    """Make the weights and write them, with an index if there are several files, as transformers names them."""
    # Copies, for the size of a view would be taken for that of what it looks at.
    headers = {name: new.make(stored.headers.__getitem__, dtype).clone() for name, new in plan.makes.items()}
    shards = split_torch_state_dict_into_shards(headers, max_shard_size=_SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        weights = {name: plan.makes[name].make(stored.load, dtype) for name in names}
        try:
            save_file(weights, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        # Before the next ones are made.
        del weights
    if shards.is_sharded:
        total = {"total_parameters": sum(weight.numel() for weight in headers.values()), **shards.metadata}
        index = {"metadata": total, "weight_map": shards.tensor_to_filename}
        _write_json(folder / WEIGHTS_INDEX, index)
