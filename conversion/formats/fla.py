"""Checkpoint format of flash-linear-attention: `model_type` ``forgetting_transformer``.

Releases 0.2.0 to 0.6.0, all that have this model, compute the same function and use the same weight names.
"""

import math
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
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_output_gate",
    # Not a field of that class, but present in some files. Neither model reads it without RoPE.
    "max_position_embeddings",
)
_FIELDS = Fields(
    model_type="forgetting_transformer",
    # Defaults of the format's configuration class.
    defaults={
        "vocab_size": 32000,
        "hidden_size": 2048,
        "hidden_ratio": 4,
        "intermediate_size": None,
        "num_hidden_layers": 24,
        "num_heads": 32,
        "num_kv_heads": None,
        "qkv_bias": False,
        "qk_norm": False,
        "window_size": None,
        "use_output_gate": False,
        "hidden_act": "swish",
        "initializer_range": 0.02,
        "norm_eps": 1e-6,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attnres_block_size": None,
        "max_position_embeddings": None,
    },
    fox_names={name: name for name in _SAME_NAMES}
    | {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "hidden_ratio": "mlp_ratio",
        "qkv_bias": "attention_bias",
    },
    accepted={
        # Only the cache of that code reads it: results with and without a cache differ.
        "window_size": (None,),
        # Attention over the outputs of earlier layers in place of residuals (since 0.5.1).
        "attnres_block_size": (None,),
        # The other one is `powlu`, whose power is not in the configuration.
        "hidden_act": ("swish",),
    },
    without_effect=frozenset(
        {
            # No layer of this model reads it: norms have weights whatever it says.
            "elementwise_affine",
            # The same function fused or not, and losses.
            "fuse_norm",
            "fuse_swiglu",
            "fuse_cross_entropy",
            "fuse_linear_cross_entropy",
            "use_l2warp",
        }
    ),
    # The MLP of that code takes None for the default.
    null_is_default=frozenset({"hidden_ratio"}),
)

# QK-norm in that code does not read `norm_eps`: it keeps the default of its GroupNorm.
_FLA_QK_NORM_EPS = 1e-5


def _config(fields: Mapping[str, Any]) -> FoxConfig:
    source = _FIELDS.complete(fields)
    return FoxConfig(
        **_FIELDS.to_fox(source),
        qk_norm="per_head" if source["qk_norm"] else "none",
        qk_norm_eps=_FLA_QK_NORM_EPS,
        # That code starts new gates from f = 0.5.
        decay_time_min=1 / math.log(2),
        decay_time_max=1 / math.log(2),
        use_key_shift=False,
        use_value_shift=False,
        use_output_norm=False,
    )


def _fields(config: FoxConfig) -> dict[str, Any]:
    return _FIELDS.to_external(config) | {"qk_norm": config.qk_norm != "none"}


def _renames(config: FoxConfig) -> list[Rename]:
    block: dict[str, str | tuple[str, ...]] = {
        "attn_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "attn.q_proj.weight": "self_attn.q_proj.weight",
        "attn.k_proj.weight": "self_attn.k_proj.weight",
        "attn.v_proj.weight": "self_attn.v_proj.weight",
        "attn.o_proj.weight": "self_attn.o_proj.weight",
        "attn.f_proj.weight": "self_attn.forget_gate.weight",
        "attn.f_proj.bias": "self_attn.forget_gate.bias",
        "mlp.gate_proj.weight": "mlp.gate_proj.weight",
        "mlp.up_proj.weight": "mlp.up_proj.weight",
        "mlp.down_proj.weight": "mlp.down_proj.weight",
    }
    if config.attention_bias:
        block |= {f"attn.{letter}_proj.bias": f"self_attn.{letter}_proj.bias" for letter in "qkv"}
    if config.qk_norm != "none":
        block |= {f"attn.{letter}_norm.weight": f"self_attn.{letter}_norm.weight" for letter in "qk"}
    if config.use_output_gate:
        block["attn.g_proj.weight"] = "self_attn.output_gate.weight"
    renames = all_renames(block, config)
    if config.attention_bias:
        # `qkv_bias` covers q, k and v only, `attention_bias` of FoxConfig also o.
        biases = (f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(config.num_hidden_layers))
        renames += [Rename(None, (bias,)) for bias in biases]
    return renames


FLA = CheckpointFormat(_FIELDS, _config, _fields, _renames)
