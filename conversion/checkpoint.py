"""What conversions of checkpoints share: reading a folder, translating its configuration, loading its weights."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from foxlm.conversion.weight_map import Rename, rename_weights
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM


@dataclass(frozen=True)
class Fields:
    """The configuration fields of a ``model_type``, each one accounted for.

    Attributes:
        model_type: what ``config.json`` must say.
        defaults: every field that matters, with its value where a file leaves it out.
        ours: what we call those that carry over as they are.
        required: those that can have one value only.
        without_effect: fields that nothing which a model computes depends on.
    """

    model_type: str
    defaults: Mapping[str, Any]
    ours: Mapping[str, str]
    required: Mapping[str, Any]
    without_effect: frozenset[str]

    def complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a ``config.json`` over the defaults; raises a `ValueError` that names what does not fit."""
        if fields.get("model_type") != self.model_type:
            raise ValueError(f"model_type must be {self.model_type!r}, got {fields.get('model_type')!r}")
        common = PreTrainedConfig().to_dict()
        known = {"model_type", "auto_map", "torch_dtype", *self.defaults, *self.without_effect, *common}
        if unknown := sorted(name for name in fields.keys() - known if not name.startswith("_")):
            raise ValueError(
                f"the configuration has fields that are not known: {', '.join(unknown)}; "
                "remove those that nothing depends on"
            )
        complete = {**self.defaults, **fields}
        for name, value in self.required.items():
            if complete[name] != value:
                raise ValueError(f"{name} must be {value!r}, got {complete[name]!r}: no other can be converted")
        return complete

    def translate(self, complete: Mapping[str, Any]) -> dict[str, Any]:
        """Our names for those of the `complete` fields that carry over and are given."""
        ours = {new: complete[old] for old, new in self.ours.items() if complete[old] is not None}
        if "intermediate_size" in ours:
            ours.pop("mlp_ratio", None)
        return ours


def convert_weights(
    weights: Mapping[str, Tensor], config: FoxConfig, renames: Iterable[Rename], zeros: Iterable[str] = ()
) -> dict[str, Tensor]:
    """`rename_weights` for a FoX model: ``weights`` under our names.

    Raises:
        ValueError: a weight does not fit; the message names it.
    """
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in FoxForCausalLM(config).state_dict().items()}
    head = None
    if config.tie_word_embeddings:
        # One weight, which checkpoints may hold under both names.
        shapes.pop("lm_head.weight")
        weights = dict(weights)
        head = weights.pop("lm_head.weight", None)
    converted = rename_weights(weights, renames, config.num_hidden_layers, shapes, zeros)
    if head is not None and not torch.equal(head, converted["model.embed_tokens.weight"]):
        raise ValueError("tie_word_embeddings is true, but lm_head.weight is not the weight of the input embeddings")
    return converted


def convert_folder(
    folder: str | Path,
    to_config: Callable[[Mapping[str, Any]], FoxConfig],
    to_weights: Callable[[Mapping[str, Tensor], FoxConfig], dict[str, Tensor]],
) -> FoxForCausalLM:
    """Load a folder (``config.json`` and ``*.safetensors``) as a model of ours, in memory.

    Args:
        folder: the checkpoint.
        to_config: makes our configuration of its ``config.json``.
        to_weights: makes our weights of its weights and our configuration.

    Raises:
        ValueError: the folder is not such a checkpoint; the message names what stands in the way.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must hold a config.json, got {folder}")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"folder must hold safetensors files, got {folder} with none; pickled weights are not loaded")
    config = to_config(json.loads((folder / "config.json").read_text()))
    weights = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    return load_converted(to_weights(weights, config), config)


def load_converted(weights: dict[str, Tensor], config: FoxConfig) -> FoxForCausalLM:
    """A model of ours in the type of its weights, as if from a folder: tied, gates in float32, fixed ones frozen."""
    dtype = weights["model.embed_tokens.weight"].dtype
    return FoxForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
