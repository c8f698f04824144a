"""Checkpoints of the authors' research code (`model_type` ``forgetting_transformer-project_fox``) as FoX models.

from foxlm.conversion.authors import convert_authors_checkpoint

model = convert_authors_checkpoint("path/to/their/folder")
model.save_pretrained("path/to/ours")
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from foxlm.conversion.weight_map import Rename, rename_weights
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM

AUTHORS_MODEL_TYPE = "forgetting_transformer-project_fox"

# Their configuration class's defaults, for the fields that a file leaves out.
_AUTHORS_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "num_hidden_layers": 24,
    "num_heads": 32,
    "num_kv_heads": None,
    "hidden_act": "swish",
    "window_size": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_base": 500000.0,
    "use_rope": False,
    "use_output_gate": False,
    "ogate_act": "sigmoid",
    "fgate_type": "full",
    "decay_time_min": None,
    "decay_time_max": None,
    "use_output_norm": False,
    "qk_norm": False,
    "qk_norm_share_param_across_head": False,
    "use_k_shift": False,
    "use_v_shift": False,
}
# Fused kernels, pruning, how gates were initialized, biases that their layers lack: nothing that a model computes.
_WITHOUT_EFFECT = {"fuse_norm", "fuse_cross_entropy", "log_pruning_tolerance", "fgate_bias_init", "attention_bias"}
# Accepted by their configuration, but their layers support one value only.
_REQUIRED_VALUES = {"num_kv_heads": None, "window_size": None, "elementwise_affine": True}
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_output_gate",
    "use_output_norm",
    "decay_time_min",
    "decay_time_max",
)
_RENAMED_FIELDS = {
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "hidden_ratio": "mlp_ratio",
    "ogate_act": "output_gate_act",
    "fgate_type": "forget_gate",
    "use_k_shift": "use_key_shift",
    "use_v_shift": "use_value_shift",
}

# Their QK-norm does not read `norm_eps`: it keeps the default of their RMSNorm.
_AUTHORS_QK_NORM_EPS = 1e-5


def authors_config(fields: Mapping) -> FoxConfig:
    """The configuration of ours that computes what theirs does.

    Args:
        fields: their ``config.json``.

    Raises:
        ValueError: a field is unknown, or has a value that their own layers do not support.
    """
    if fields.get("model_type") != AUTHORS_MODEL_TYPE:
        raise ValueError(f"model_type must be {AUTHORS_MODEL_TYPE!r}, got {fields.get('model_type')!r}")
    common = PreTrainedConfig().to_dict()
    known = {"model_type", "auto_map", "torch_dtype", *_AUTHORS_DEFAULTS, *_WITHOUT_EFFECT, *common}
    if unknown := sorted(name for name in fields.keys() - known if not name.startswith("_")):
        raise ValueError(f"the configuration has fields that are not known: {', '.join(unknown)}")
    fields = _AUTHORS_DEFAULTS | dict(fields)
    for name, value in _REQUIRED_VALUES.items():
        if fields[name] != value:
            raise ValueError(f"{name} must be {value}, got {fields[name]!r}: the authors' layers have no other")

    names = {name: name for name in _SAME_FIELDS} | _RENAMED_FIELDS
    ours: dict[str, Any] = {new: fields[old] for old, new in names.items() if fields[old] is not None}
    if fields["intermediate_size"] is not None:
        del ours["mlp_ratio"]
    ours["hidden_act"] = "silu" if fields["hidden_act"] == "swish" else fields["hidden_act"]
    ours["qk_norm_eps"] = _AUTHORS_QK_NORM_EPS
    ours["qk_norm"] = "none"
    if fields["qk_norm"]:
        ours["qk_norm"] = "shared" if fields["qk_norm_share_param_across_head"] else "per_head"
    if fields["use_rope"]:
        ours["rope_parameters"] = {"rope_type": "default", "rope_theta": float(fields["rope_base"])}
    return FoxConfig(**ours)


def authors_renames(config: FoxConfig) -> list[Rename]:
    """What each weight of theirs becomes in a model of ours with this configuration."""
    pairs = {
        "attn_norm.weight": ("input_layernorm.weight",),
        "mlp_norm.weight": ("post_attention_layernorm.weight",),
        "attn.q_proj.weight": ("self_attn.q_proj.weight",),
        "attn.o_proj.weight": ("self_attn.o_proj.weight",),
        "mlp.gate_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.down_proj.weight": ("mlp.down_proj.weight",),
    }
    for letter, name, shifted in (("k", "key", config.use_key_shift), ("v", "value", config.use_value_shift)):
        projection = f"self_attn.{letter}_proj.weight"
        if shifted:
            pairs[f"attn.{letter}_proj.linear.weight"] = (projection,)
            pairs[f"attn.{letter}_proj.shift_proj.weight"] = (f"self_attn.{name}_shift.proj.weight",)
        else:
            pairs[f"attn.{letter}_proj.weight"] = (projection,)
    if config.forget_gate == "full":
        pairs["attn.fgate_proj.weight"] = ("self_attn.forget_gate.weight",)
        pairs["attn.fgate_proj.bias"] = ("self_attn.forget_gate.bias",)
    elif config.forget_gate != "none":
        pairs["attn.fgate_bias"] = ("self_attn.forget_gate.bias",)
    if config.use_output_gate:
        pairs["attn.ogate_proj.weight"] = ("self_attn.output_gate.weight",)
    if config.use_output_norm:
        pairs["attn.output_norm.weight"] = ("self_attn.output_norm.weight",)
    if config.qk_norm != "none":
        pairs["attn.q_norm.weight"] = ("self_attn.q_norm.weight",)
        pairs["attn.k_norm.weight"] = ("self_attn.k_norm.weight",)
    renames = [
        Rename(f"model.layers.{{layer}}.{old}", tuple(f"model.layers.{{layer}}.{one}" for one in new))
        for old, new in pairs.items()
    ]
    renames += [
        Rename("model.embeddings.weight", ("model.embed_tokens.weight",)),
        Rename("model.norm.weight", ("model.norm.weight",)),
    ]
    if not config.tie_word_embeddings:
        renames.append(Rename("lm_head.weight", ("lm_head.weight",)))
    return renames


def convert_authors_weights(weights: Mapping[str, Tensor], config: FoxConfig) -> dict[str, Tensor]:
    """Their weights under our names; raises a `ValueError` that names any weight that does not fit."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in FoxForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        # One weight, which their checkpoints may hold under both names.
        shapes.pop("lm_head.weight")
        weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    return rename_weights(weights, authors_renames(config), config.num_hidden_layers, shapes)


def convert_authors_checkpoint(folder: str | Path) -> FoxForCausalLM:
    """Load a folder of theirs (``config.json`` and ``*.safetensors``) as a model of ours, in memory.

    Raises:
        ValueError: the folder is not such a checkpoint; the message names what stands in the way.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must hold a config.json, got {folder}")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"folder must hold safetensors files, got {folder} with none; pickled weights are not loaded")
    config = authors_config(json.loads((folder / "config.json").read_text()))
    weights = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    converted = convert_authors_weights(weights, config)
    # Loaded as from a folder of ours: tied, gates in float32, fixed ones frozen.
    dtype = converted["model.embed_tokens.weight"].dtype
    return FoxForCausalLM.from_pretrained(None, config=config, state_dict=converted, dtype=dtype)
