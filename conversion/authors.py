"""Checkpoints of the authors' research code (`model_type` ``forgetting_transformer-project_fox``) as FoX models.

from foxlm.conversion.authors import convert_authors_checkpoint

model = convert_authors_checkpoint("path/to/their/folder")
model.save_pretrained("path/to/ours")
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from foxlm.conversion.checkpoint import Fields, convert_folder, convert_weights
from foxlm.conversion.weight_map import Rename
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM

AUTHORS_MODEL_TYPE = "forgetting_transformer-project_fox"

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
    model_type=AUTHORS_MODEL_TYPE,
    # Their configuration class's defaults.
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
    ours={name: name for name in _SAME_NAMES}
    | {
        "num_heads": "num_attention_heads",
        "norm_eps": "rms_norm_eps",
        "hidden_ratio": "mlp_ratio",
        "ogate_act": "output_gate_act",
        "fgate_type": "forget_gate",
        "use_k_shift": "use_key_shift",
        "use_v_shift": "use_value_shift",
    },
    # Accepted by their configuration, but their layers support one value only.
    required={"num_kv_heads": None, "window_size": None, "elementwise_affine": True},
    # Fused kernels, pruning, how gates were initialized, biases that their layers lack.
    without_effect=frozenset(
        {"fuse_norm", "fuse_cross_entropy", "log_pruning_tolerance", "fgate_bias_init", "attention_bias"}
    ),
)

# Their QK-norm does not read `norm_eps`: it keeps the default of their RMSNorm.
_AUTHORS_QK_NORM_EPS = 1e-5


def authors_config(fields: Mapping) -> FoxConfig:
    """The configuration of ours that computes what theirs does.

    Args:
        fields: their ``config.json``.

    Raises:
        ValueError: a field is unknown, or has a value that their own layers do not support.
    """
    fields = _FIELDS.complete(fields)
    ours = _FIELDS.translate(fields)
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
    return convert_weights(weights, config, authors_renames(config))


def convert_authors_checkpoint(folder: str | Path) -> FoxForCausalLM:
    """Load a folder of theirs (``config.json`` and ``*.safetensors``) as a model of ours, in memory.

    Raises:
        ValueError: the folder is not such a checkpoint; the message names what stands in the way.
    """
    return convert_folder(folder, authors_config, convert_authors_weights)
