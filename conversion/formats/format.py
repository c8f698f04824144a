"""What is said of somebody's checkpoints: fields of the configuration and names of the weights, in both directions."""

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
        model_type: what ``config.json`` must say.
        defaults: every field that matters, with its value where a file leaves it out.
        ours: what we call those that carry over as they are.
        accepted: the values of those that can have only these.
        without_effect: fields that nothing which a model computes depends on.
        null_is_default: those for which null says the same as leaving them out.
    """

    model_type: str
    defaults: Mapping[str, Any]
    ours: Mapping[str, str]
    accepted: Mapping[str, tuple[Any, ...]]
    without_effect: frozenset[str]
    null_is_default: frozenset[str] = frozenset()

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

    def to_ours(self, complete: Mapping[str, Any]) -> dict[str, Any]:
        """Our names for those of the `complete` fields that carry over and are given."""
        ours = {new: complete[old] for old, new in self.ours.items() if complete[old] is not None}
        if "intermediate_size" in ours:
            ours.pop("mlp_ratio", None)
        return ours

    def to_theirs(self, config: FoxConfig) -> dict[str, Any]:
        """Their names for the fields of ours that carry over."""
        carried = {old: getattr(config, new) for old, new in self.ours.items() if new != "mlp_ratio"}
        return {"model_type": self.model_type, "architectures": ["ForgettingTransformerForCausalLM"]} | carried


@dataclass(frozen=True)
class Layout:
    """Somebody's checkpoints.

    Attributes:
        fields: those of their ``config.json``.
        to_config: the configuration of ours that computes what theirs does, from their ``config.json``; raises a
            `ValueError` that names a field which cannot be represented.
        to_fields: their ``config.json`` for a configuration of ours, as near as it comes.
        renames: what their weights are called in a model of ours with this configuration.
    """

    fields: Fields
    to_config: Callable[[Mapping[str, Any]], FoxConfig]
    to_fields: Callable[[FoxConfig], dict[str, Any]]
    renames: Callable[[FoxConfig], list[Rename]]

    def exact_fields(self, config: FoxConfig) -> dict[str, Any]:
        """`to_fields`, once it is sure that they say all that the model computes.

        Raises:
            ValueError: they cannot; the message names the field of ours.
        """
        fields = self.to_fields(config)
        theirs = _what_is_computed(self.to_config(fields))
        for name, value in _what_is_computed(config).items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{name} must be {theirs.get(name)!r}, got {value!r}: "
                    f"model_type {self.fields.model_type!r} has no other"
                )
        return fields


_ERRORS = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Whatever a ``config.json`` that holds anything leads to inside the block, as a `ValueError` of one line."""
    try:
        yield
    except (*_ERRORS, ValueError) as error:
        # Ours say what is wrong in one line, those of other libraries in several.
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ValueError(f"config.json does not describe a model: {' '.join(str(said).split())}") from error


# How fast something is computed, what training pays for, where a model came from, and what is kept under another name.
_NOT_COMPUTED = {"acp_eps", "acp_rule", "free_dead_cache", "forget_aux_loss_coef", "loss_chunk_size"}
_NOT_COMPUTED |= {"grafted_from", "mlp_ratio"}


def _what_is_computed(config: FoxConfig) -> dict[str, Any]:
    """The fields of ``config`` that its model depends on, without those that others of them make idle."""
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
