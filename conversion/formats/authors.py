"""Checkpoint format of the authors' research code: `model_type` ``forgetting_transformer-project_fox``."""

from collections.abc import Mapping
from typing import Any

from foxlm.conversion.formats.checkpoint_format import CheckpointFormat, Fields
from foxlm.conversion.weight_map import Rename, all_renames
from foxlm.modeling.configuration_fox import FoxConfig

_SAME_NAMES = (
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
_FIELDS = Fields(
    model_type="forgetting_transformer-project_fox",
    # Defaults of the format's configuration class.
    defaults={
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
    },
    fox_names={name: name for name in _SAME_NAMES}
    | {
        "num_heads": "num_attention_heads",
        "norm_eps": "rms_norm_eps",
        "hidden_ratio": "mlp_ratio",
        "ogate_act": "output_gate_act",
        "fgate_type": "forget_gate",
        "use_k_shift": "use_key_shift",
        "use_v_shift": "use_value_shift",
    },
    accepted={
        # That configuration class takes other values, its layers do not.
        "num_kv_heads": (None,),
        "window_size": (None,),
        "elementwise_affine": (True,),
        "hidden_act": ("swish", "sigmoid"),
    },
    # Fused kernels, pruning, initialisation of gates, biases that those layers do not have.
    without_effect=frozenset(
        {"fuse_norm", "fuse_cross_entropy", "log_pruning_tolerance", "fgate_bias_init", "attention_bias"}
    ),
    # The MLP of that code takes None for the default.
    null_is_default=frozenset({"hidden_ratio"}),
)

# QK-norm in that code does not read `norm_eps`: it keeps the default of its RMSNorm.
_AUTHORS_QK_NORM_EPS = 1e-5


def _config(fields: Mapping[str, Any]) -> FoxConfig:
    source = _FIELDS.complete(fields)
    if source["use_output_norm"] and source["use_output_gate"] and source["ogate_act"] != "sigmoid":
        raise ValueError(f"ogate_act must be 'sigmoid' with use_output_norm, got {source['ogate_act']!r}")
    fox = _FIELDS.to_fox(source)
    fox["hidden_act"] = "silu" if source["hidden_act"] == "swish" else source["hidden_act"]
    fox["qk_norm_eps"] = _AUTHORS_QK_NORM_EPS
    fox["qk_norm"] = "none"
    if source["qk_norm"]:
        fox["qk_norm"] = "shared" if source["qk_norm_share_param_across_head"] else "per_head"
    if source["use_rope"]:
        fox["rope_parameters"] = {"rope_type": "default", "rope_theta": float(source["rope_base"])}
    return FoxConfig(**fox)


def _fields(config: FoxConfig) -> dict[str, Any]:
    fields = _FIELDS.to_external(config) | {
        "hidden_act": "swish" if config.hidden_act == "silu" else config.hidden_act,
        "qk_norm": config.qk_norm != "none",
        "qk_norm_share_param_across_head": config.qk_norm == "shared",
        "use_rope": config.rope_parameters is not None,
        "fgate_bias_init": config.forget_gate in ("bias_only", "fixed"),
    }
    if config.rope_parameters is not None:
        fields["rope_base"] = config.rope_parameters["rope_theta"]
    if not fields["fgate_bias_init"]:
        # Layers of that code refuse decay times with any other gate.
        fields["decay_time_min"] = fields["decay_time_max"] = None
    return fields


def _renames(config: FoxConfig) -> list[Rename]:
    block: dict[str, str | tuple[str, ...]] = {
        "attn_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "attn.q_proj.weight": "self_attn.q_proj.weight",
        "attn.o_proj.weight": "self_attn.o_proj.weight",
        "mlp.gate_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.down_proj.weight": "mlp.down_proj.weight",
    }
    for letter, name, shifted in (("k", "key", config.use_key_shift), ("v", "value", config.use_value_shift)):
        projection = f"self_attn.{letter}_proj.weight"
        if shifted:
            block[f"attn.{letter}_proj.linear.weight"] = projection
            block[f"attn.{letter}_proj.shift_proj.weight"] = f"self_attn.{name}_shift.proj.weight"
        else:
            block[f"attn.{letter}_proj.weight"] = projection
    if config.forget_gate == "full":
        block["attn.fgate_proj.weight"] = "self_attn.forget_gate.weight"
        block["attn.fgate_proj.bias"] = "self_attn.forget_gate.bias"
    elif config.forget_gate != "none":
        block["attn.fgate_bias"] = "self_attn.forget_gate.bias"
    if config.use_output_gate:
        block["attn.ogate_proj.weight"] = "self_attn.output_gate.weight"
    if config.use_output_norm:
        block["attn.output_norm.weight"] = "self_attn.output_norm.weight"
    if config.qk_norm != "none":
        block["attn.q_norm.weight"] = "self_attn.q_norm.weight"
        block["attn.k_norm.weight"] = "self_attn.k_norm.weight"
    return all_renames(block, config)


AUTHORS = CheckpointFormat(_FIELDS, _config, _fields, _renames)
