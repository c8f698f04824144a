"""The pretrained decoders that forget gates can be grafted onto, each described in terms of `FoxConfig`.

To add a model type, add a `Base` to `BASES`: its configuration fields, each accounted for, and the parts of a FoX model
that it has. Weights must have the names of FoX (Llama's); `conversion.graft` maps them one to one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from foxlm.conversion.formats.checkpoint_format import Fields
from foxlm.kernels.validation import is_number
from foxlm.modeling.configuration_fox import FoxConfig


@dataclass(frozen=True)
class Base:
    """A model type of transformers whose weights have the same names as those of a FoX model.

    Attributes:
        fields: its configuration, each field accounted for.
        parts: fields of `FoxConfig` that hold for every such model.
        zeros: name suffixes of weights that a FoX model with these parts has and the base has not; they are set to
            zero, which changes nothing.
    """

    fields: Fields
    parts: Mapping[str, Any]
    zeros: tuple[str, ...] = ()


_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# In files of any of them. With another value a model would compute something else.
_ACCEPTED = {"rope_interleaved": (False,), "use_mrope": (False,)}
# Nothing that transformers computes reads them; all are in files that people publish.
_WITHOUT_EFFECT = frozenset(
    {
        "cls_token_id",
        "finetuning_task",
        "is_decoder",
        "is_llama_config",
        "mask_token_id",
        "max_sequence_length",
        "pretraining_tp",
        "sep_token_id",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    }
)
_NO_PARTS = {
    "qk_norm": "none",
    "use_key_shift": False,
    "use_value_shift": False,
    "use_output_gate": False,
    "use_output_norm": False,
}


def _fields(
    model_type: str,
    same_names: tuple[str, ...] = (),
    translated: tuple[str, ...] = (),
    without_effect: tuple[str, ...] = (),
) -> Fields:
    """
    Args:
        model_type: of the configuration.
        same_names: fields besides `_SAME_NAMES` that `FoxConfig` has too.
        translated: fields that `base_config` reads by itself.
        without_effect: fields that others are derived from.
    """
    names = _SAME_NAMES + same_names
    return Fields(
        model_type=model_type,
        # A configuration object of transformers has all fields of its class.
        defaults=dict.fromkeys(names + translated) | dict.fromkeys(_ACCEPTED, False),
        fox_names={name: name for name in names},
        accepted=_ACCEPTED,
        without_effect=_WITHOUT_EFFECT | set(without_effect),
    )


_WINDOWS = ("sliding_window", "layer_types")
_QWEN_WINDOWS = ("use_sliding_window", "max_window_layers")

BASES = {
    base.fields.model_type: base
    for base in (
        Base(_fields("llama", ("attention_bias", "mlp_bias")), {}),
        Base(_fields("mistral", translated=("sliding_window",)), {}),
        Base(
            _fields("qwen2", translated=_WINDOWS, without_effect=_QWEN_WINDOWS),
            # Qwen2 has biases for q, k and v only, `attention_bias` of FoxConfig also for o.
            {"attention_bias": True},
            zeros=("o_proj.bias",),
        ),
        Base(
            _fields("qwen3", ("attention_bias",), translated=_WINDOWS, without_effect=_QWEN_WINDOWS),
            {"qk_norm": "shared"},
        ),
        Base(
            _fields(
                "smollm3",
                ("attention_bias", "mlp_bias"),
                translated=(*_WINDOWS, "no_rope_layers"),
                without_effect=(*_QWEN_WINDOWS, "no_rope_layer_interval"),
            ),
            {},
        ),
        Base(_fields("olmo2", ("attention_bias",)), {"qk_norm": "all_heads", "norm_position": "post"}),
    )
}


def base_of(config: PreTrainedConfig) -> Base:
    """What describes the models of a configuration; raises a `ValueError` that names the model types there are."""
    check_model_type(config.model_type)
    return BASES[config.model_type]


def check_model_type(model_type: object) -> None:
    """Raise a `ValueError` that names the model types there are, if this is none of them."""
    if model_type not in list(BASES):
        raise ValueError(f"model_type must be one of {sorted(BASES)}, got {model_type!r}")


def base_config(
    config: PreTrainedConfig, *, keep_rope: bool = True, rope_factor: float | None = None, **chosen: Any
) -> FoxConfig:
    """The `FoxConfig` that computes what ``config`` does if its gates never forget.

    Args:
        config: of a model in `BASES`.
        keep_rope: whether to keep its rotary embeddings.
        rope_factor: if given, they are stretched for so many times its context.
        chosen: fields of `FoxConfig` that ``config`` does not determine.

    Raises:
        ValueError: a field is unknown, or has a value that a FoX model cannot represent; the message names it.
    """
    base = base_of(config)
    fields = config.to_dict()
    if fields.pop("quantization_config", None) is not None:
        raise ValueError("quantization_config must be absent: graft onto the model before quantization")
    source = base.fields.complete(fields)
    _refuse_windows(source)
    rope = _rope(source) if keep_rope else {"rope_parameters": None}
    if rope_factor is not None:
        rope |= _stretched(rope["rope_parameters"], source["max_position_embeddings"], rope_factor)
    return FoxConfig(**{**base.fields.to_fox(source), **_NO_PARTS, **base.parts, **rope, **chosen})


def _refuse_windows(source: Mapping[str, Any]) -> None:
    """Refuse sliding windows shorter than the context, which FoX does not have."""
    # Without `layer_types` a window holds for all layers.
    types = set(source.get("layer_types") or ["sliding_attention"])
    if unknown := sorted(types - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types must be of full_attention and sliding_attention, got {unknown}")
    window, longest = source.get("sliding_window"), source["max_position_embeddings"]
    if "sliding_attention" in types and window is not None and window < longest:
        raise ValueError(
            f"sliding_window must be at least max_position_embeddings ({longest}) or None in a layer of "
            f"sliding_attention, got {window}: FoX has no windows. The same model is a base for sequences as long as "
            f"its window, with max_position_embeddings set to {window}"
        )


def _rope(source: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `FoxConfig` for the rotary embeddings of the base."""
    rope = source["rope_parameters"]
    factor = rope.get("partial_rotary_factor", 1.0)
    # Layers of the bases rotate whole heads and ignore or reject another factor, which means something else for the
    # type `proportional`.
    if factor != 1.0 and rope["rope_type"] != "proportional":
        raise ValueError(f"partial_rotary_factor of rope_parameters must be 1, got {factor!r}")
    # In `no_rope_layers` 1 means a layer with RoPE and 0 one without.
    rotates = (source.get("no_rope_layers") or [])[: source["num_hidden_layers"]]
    return {"rope_parameters": rope, "nope_layers": [i for i, one in enumerate(rotates) if not one] or None}


def _stretched(rope: Mapping[str, Any] | None, context: int, factor: float) -> dict[str, Any]:
    """The fields of `FoxConfig` for rotary embeddings that reach ``factor`` times the context, by YaRN."""
    if not (is_number(factor) and 1.0 < factor < math.inf):
        raise ValueError(f"rope_factor must be a number above 1, got {factor!r}")
    kind = "none" if rope is None else rope["rope_type"]
    if rope is None or kind != "default":
        raise ValueError(f"rope_factor needs rotary embeddings of the type 'default', got {kind!r}")
    # A factor of attention other than 1 would change every logit, near keys too.
    yarn = {"factor": factor, "original_max_position_embeddings": context, "attention_factor": 1.0}
    return {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": rope["rope_theta"], **yarn},
        "max_position_embeddings": round(factor * context),
    }
