"""Checkpoints of flash-linear-attention: `model_type` ``forgetting_transformer``.

All its releases with this model, 0.2.0 to 0.6.0, compute the same under the same names.
"""

import math
from collections.abc import Mapping
from typing import Any

from foxlm.conversion.formats.format import Fields, Layout
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
    # No field of theirs, but files for several kinds of model may have it. Neither model reads it without RoPE.
    "max_position_embeddings",
)
_FIELDS = Fields(
    model_type="forgetting_transformer",
    # Their configuration class's defaults.
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
    ours={name: name for name in _SAME_NAMES}
    | {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "hidden_ratio": "mlp_ratio",
        "qkv_bias": "attention_bias",
    },
    accepted={
        # Only their cache reads it: with and without one, such a model computes different things.
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
    # In their MLPs.
    null_is_default=frozenset({"hidden_ratio"}),
)

# Their QK-norm does not read `norm_eps`: it keeps the default of their GroupNorm.
_FLA_QK_NORM_EPS = 1e-5


def _config(fields: Mapping[str, Any]) -> FoxConfig:
    theirs = _FIELDS.complete(fields)
    return FoxConfig(
        **_FIELDS.to_ours(theirs),
        qk_norm="per_head" if theirs["qk_norm"] else "none",
        qk_norm_eps=_FLA_QK_NORM_EPS,
        # New gates start from f = 0.5, as theirs.
        decay_time_min=1 / math.log(2),
        decay_time_max=1 / math.log(2),
        use_key_shift=False,
        use_value_shift=False,
        use_output_norm=False,
    )


def _fields(config: FoxConfig) -> dict[str, Any]:
    return _FIELDS.to_theirs(config) | {"qk_norm": config.qk_norm != "none"}


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
        # `qkv_bias` is of q, k and v only, our `attention_bias` of o too.
        biases = (f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(config.num_hidden_layers))
        renames += [Rename(None, (bias,)) for bias in biases]
    return renames


FLA = Layout(_FIELDS, _config, _fields, _renames)
