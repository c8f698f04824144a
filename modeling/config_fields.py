"""Checks of configuration fields: names that FoX does not have, upper limits of sizes."""

import difflib
import functools
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args, get_origin

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

_Class = TypeVar("_Class", bound=type)
# Far beyond any model: a larger value is a typing error that would run out of memory.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
}
LARGEST_LABELS = 10**6
# Names of other libraries and models for fields of ours, or for what FoX has instead.
_FOREIGN = {
    "num_heads": "use num_attention_heads",
    "num_kv_heads": "use num_key_value_heads",
    "num_layers": "use num_hidden_layers",
    "norm_eps": "use rms_norm_eps",
    "hidden_ratio": "use mlp_ratio",
    "use_rope": "set rope_parameters",
    "rope_base": "set rope_parameters",
    "fgate_type": "use forget_gate",
    "use_k_shift": "use use_key_shift",
    "use_v_shift": "use use_value_shift",
    "layer_types": "it is derived, all layers are forgetting attention",
    "sliding_window": "the forget gates bound what a head sees",
    "no_rope_layers": "use nope_layers, the indices of the layers without RoPE",
}
# What transformers and the Hub keep in configurations beside the fields of a class.
_OF_TRANSFORMERS = {
    *GenerationConfig().to_dict(),
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "partial_rotary_factor",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "use_return_dict",
}


def raises_value_errors(strict_class: _Class) -> _Class:
    """Have a configuration raise a `ValueError` where huggingface_hub's `@strict` raises an error that is none."""
    config_class: Any = strict_class
    assign, validate = config_class.__setattr__, config_class.validate

    @functools.wraps(assign)
    def assign_field(self: Any, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except StrictDataclassError as error:
            kind = self.__dataclass_fields__[name].type
            accepted = kind.__name__ if isinstance(kind, type) else str(kind)
            accepted = f"one of {get_args(kind)}" if get_origin(kind) is Literal else accepted
            raise ValueError(f"{name} must be {accepted}, got {value!r}") from error

    # It carries the mark by which `@strict` knows its own `validate` in a subclass.
    @functools.wraps(validate)
    def validate_fields(self: Any) -> None:
        try:
            validate(self)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    config_class.__setattr__, config_class.validate = assign_field, validate_fields
    return strict_class


def near_miss(name: str, fields: Iterable[str]) -> str | None:
    """What was probably meant by the name of a field that a FoX configuration does not have; None for no idea."""
    if name in _FOREIGN:
        return _FOREIGN[name]
    close = difflib.get_close_matches(name, [*fields, *_FOREIGN], n=1, cutoff=0.85)
    return _FOREIGN.get(close[0], f"did you mean {close[0]}?") if close else None


def is_foreign(name: str) -> bool:
    """Whether another library's configuration has a field of that name, and ours has another instead."""
    return name in _FOREIGN


def unknown_fields(given: Iterable[str], config_class: type, fields: Iterable[str]) -> list[str]:
    """Names among ``given`` that neither the class nor transformers knows; those with an underscore are private."""
    known = {*fields, *_OF_TRANSFORMERS}
    return [
        name
        for name in given
        if name in _FOREIGN or not (name in known or name.startswith("_") or hasattr(config_class, name))
    ]


def drop_empty_foreign(given: dict[str, Any]) -> None:
    """Drop fields of other models that are None, as configurations converted from them have."""
    for name in [name for name, value in given.items() if name in _FOREIGN and value is None]:
        del given[name]


def warn_unknown(name: str, hint: str | None, config_class: type) -> None:
    """Warn once that a field has no effect."""
    more = f" ({hint})" if hint else "; is it of a newer version of foxlm?"
    logger.warning_once(f"{config_class.__name__} has no field {name!r}, which changes nothing{more}")


def is_labels(value: Any) -> bool:
    """Whether ``value`` maps class numbers, which are text in JSON, to something."""
    return isinstance(value, dict) and all(
        isinstance(key, int) or (isinstance(key, str) and key.isdecimal()) for key in value
    )


def is_dtype(value: Any) -> bool:
    """Whether ``value`` is a floating-point dtype of torch, or the name of one."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
