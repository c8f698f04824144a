"""Checkpoints of flash-linear-attention (`model_type` ``forgetting_transformer``) as FoX models.

from foxlm.conversion.fla import convert_fla_checkpoint

model = convert_fla_checkpoint("path/to/their/folder")
model.save_pretrained("path/to/ours")

All its releases with this model, 0.2.0 to 0.5.2, compute the same under the same names.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from foxlm.conversion.checkpoint import Fields, convert_folder, convert_weights
from foxlm.conversion.weight_map import Rename
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM

FLA_MODEL_TYPE = "forgetting_transformer"

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
    model_type=FLA_MODEL_TYPE,
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
    },
    required={
        # Only their cache reads it: with and without one, such a model computes different things.
        "window_size": None,
        # Attention over the outputs of earlier layers in place of residuals (since 0.5.1).
        "attnres_block_size": None,
        # The other one is `powlu`, whose power is not in the configuration.
        "hidden_act": "swish",
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
)

# Their QK-norm does not read `norm_eps`: it keeps the default of their GroupNorm.
_FLA_QK_NORM_EPS = 1e-5
# What their MLP takes for None.
_FLA_HIDDEN_RATIO = 4

_O_PROJ_BIAS = "model.layers.{layer}.self_attn.o_proj.bias"


def fla_config(fields: Mapping[str, Any]) -> FoxConfig:
    """The configuration of ours that computes what theirs does.

    Args:
        fields: their ``config.json``.

    Raises:
        ValueError: a field is unknown, or has a value that a FoX model cannot represent.
    """
    theirs = _FIELDS.complete(fields)
    if theirs["hidden_ratio"] is None:
        theirs["hidden_ratio"] = _FLA_HIDDEN_RATIO
    return FoxConfig(
        **_FIELDS.translate(theirs),
        attention_bias=theirs["qkv_bias"],
        qk_norm="per_head" if theirs["qk_norm"] else "none",
        qk_norm_eps=_FLA_QK_NORM_EPS,
        # New gates start from f = 0.5, as theirs.
        decay_time_min=1 / math.log(2),
        decay_time_max=1 / math.log(2),
        use_key_shift=False,
        use_value_shift=False,
        use_output_norm=False,
    )


def fla_renames(config: FoxConfig) -> list[Rename]:
    """What each weight of theirs becomes in a model of ours with this configuration."""
    names = {
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
        names |= {f"attn.{letter}_proj.bias": f"self_attn.{letter}_proj.bias" for letter in "qkv"}
    if config.qk_norm != "none":
        names |= {f"attn.{letter}_norm.weight": f"self_attn.{letter}_norm.weight" for letter in "qk"}
    if config.use_output_gate:
        names["attn.g_proj.weight"] = "self_attn.output_gate.weight"
    block = "model.layers.{layer}."
    renames = [Rename(block + old, (block + new,)) for old, new in names.items()]
    renames += [
        Rename("model.embeddings.weight", ("model.embed_tokens.weight",)),
        Rename("model.norm.weight", ("model.norm.weight",)),
    ]
    if not config.tie_word_embeddings:
        renames.append(Rename("lm_head.weight", ("lm_head.weight",)))
    return renames


def convert_fla_weights(weights: Mapping[str, Tensor], config: FoxConfig) -> dict[str, Tensor]:
    """Their weights under our names; raises a `ValueError` that names any weight that does not fit."""
    # `qkv_bias` is of q, k and v only, our `attention_bias` of o too.
    zeros = [_O_PROJ_BIAS] if config.attention_bias else []
    return convert_weights(weights, config, fla_renames(config), zeros)


def convert_fla_checkpoint(folder: str | Path) -> FoxForCausalLM:
    """Load a folder of theirs (``config.json`` and ``*.safetensors``) as a model of ours, in memory.

    Raises:
        ValueError: the folder is not such a checkpoint; the message names what stands in the way.
    """
    return convert_folder(folder, fla_config, convert_fla_weights)
