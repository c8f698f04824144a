"""What describes an external checkpoint format: configuration fields and weight names, in both directions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from foxlm.conversion.weight_map import Rename
from foxlm.modeling.configuration_fox import FoxConfig


@dataclass(frozen=True)
class Fields:
    """The configuration fields of a ``model_type``, each one accounted for.

    Attributes:
        model_type: the ``model_type`` of its ``config.json``.
        defaults: every field that matters, with its value where a file leaves it out.
        fox_names: the `FoxConfig` names of those that carry over unchanged.
        accepted: the accepted values of fields that cannot have others.
        without_effect: fields on which nothing that a model computes depends.
        null_is_default: fields for which null means the default.
    """

    model_type: str
    defaults: Mapping[str, Any]
    fox_names: Mapping[str, str]
    accepted: Mapping[str, tuple[Any, ...]]
    without_effect: frozenset[str]
    null_is_default: frozenset[str] = frozenset()

    def complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults updated by a ``config.json``; raises a `ValueError` that names a field which does not fit."""
        if fields.get("model_type") != self.model_type:
            raise ValueError(f"model_type must be {self.model_type!r}, got {fields.get('model_type')!r}")
        common = PreTrainedConfig().to_dict()
        known = {"model_type", "auto_map", "torch_dtype", *self.defaults, *self.without_effect, *common}
        if unknown := sorted(name for name in fields.keys() - known if not name.startswith("_")):
            raise ValueError(
                f"the configuration has fields that are not known: {', '.join(unknown)}; "
                "remove those that nothing depends on"
            )
        left_out = {name for name in self.null_is_default if fields.get(name) is None}
        complete = {**self.defaults, **{name: value for name, value in fields.items() if name not in left_out}}
        for name, default in self.defaults.items():
            if isinstance(default, bool) and not isinstance(complete[name], bool):
                raise ValueError(f"{name} must be true or false, got {complete[name]!r}")
        for name, values in self.accepted.items():
            if complete[name] not in values:
                accepted = " or ".join(repr(value) for value in values)
                raise ValueError(f"{name} must be {accepted}, got {complete[name]!r}: no other can be converted")
        return complete

    def to_fox(self, complete: Mapping[str, Any]) -> dict[str, Any]:
        """The `FoxConfig` arguments for those of the `complete` fields that carry over and are not null."""
        fox = {name: complete[external] for external, name in self.fox_names.items() if complete[external] is not None}
        if "intermediate_size" in fox:
            fox.pop("mlp_ratio", None)
        return fox

    def to_external(self, config: FoxConfig) -> dict[str, Any]:
        """The fields that carry over from ``config``, by their external names."""
        carried = {external: getattr(config, name) for external, name in self.fox_names.items() if name != "mlp_ratio"}
        return {"model_type": self.model_type, "architectures": ["ForgettingTransformerForCausalLM"]} | carried


@dataclass(frozen=True)
class CheckpointFormat:
    """An external checkpoint format.

    Attributes:
        fields: of its ``config.json``.
        to_config: from its ``config.json`` to the equivalent `FoxConfig`; raises a `ValueError` that names a field
            which cannot be represented.
        to_fields: from a `FoxConfig` to its ``config.json``, as close as the format allows.
        renames: its weight map for a FoX model with a given configuration.
    """

    fields: Fields
    to_config: Callable[[Mapping[str, Any]], FoxConfig]
    to_fields: Callable[[FoxConfig], dict[str, Any]]
    renames: Callable[[FoxConfig], list[Rename]]

    def exact_fields(self, config: FoxConfig) -> dict[str, Any]:
        """`to_fields`, checked by converting back.

        Raises:
            ValueError: the format cannot represent ``config``; the message names the field of `FoxConfig`.
        """
        fields = self.to_fields(config)
        converted_back = _computed_fields(self.to_config(fields))
        for name, value in _computed_fields(config).items():
            if converted_back.get(name) != value:
                raise ValueError(
                    f"{name} must be {converted_back.get(name)!r}, got {value!r}: "
                    f"model_type {self.fields.model_type!r} has no other (what it has: docs/guides/conversion.md)"
                )
        return fields


_ERRORS = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


@contextmanager
def invalid_config_as_value_error() -> Iterator[None]:
    """Turn any error that an invalid ``config.json`` causes inside the block into a `ValueError` of one line."""
    try:
        yield
    except (*_ERRORS, ValueError) as error:
        # Errors of this library are one line already, those of other libraries are not.
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ValueError(f"config.json does not describe a model: {' '.join(str(said).split())}") from error


# Fields that concern speed, the training loss, provenance, or that another field replaces.
_NOT_COMPUTED = {"acp_eps", "acp_rule", "free_dead_cache", "decoding_graphs", "forget_aux_loss_coef", "loss_chunk_size"}
_NOT_COMPUTED |= {"grafted_from", "mlp_ratio"}


def _computed_fields(config: FoxConfig) -> dict[str, Any]:
    """The fields of ``config`` on which the computed function depends, without those that other fields disable."""
    idle = set(_NOT_COMPUTED)
    if config.qk_norm == "none":
        idle.add("qk_norm_eps")
    if not config.use_output_gate:
        idle.add("output_gate_act")
    if config.num_attention_heads == config.num_key_value_heads or config.forget_gate == "none":
        idle.add("forget_gate_heads")
    if config.forget_gate in ("full", "none"):
        idle |= {"decay_time_min", "decay_time_max"}
    computed = {name: getattr(config, name) for name in FoxConfig.__annotations__ if name not in idle}
    if computed.get("qk_norm_eps", 0) is None:
        computed["qk_norm_eps"] = config.rms_norm_eps
    return computed
