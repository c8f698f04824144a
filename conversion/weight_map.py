"""Declarative weight maps between FoX models and external checkpoint formats, read in both directions.

A format lists its `Rename`s; `plan_to_fox` and `plan_to_external` turn them into a `Plan`: which weights must be
stored, and from which of their rows each new weight is made.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM, FoxPreTrainedModel


@dataclass(frozen=True)
class Rename:
    """A weight of an external format and its names in a FoX model.

    Attributes:
        external: its name in the external format; None where that has no such weight, which is then zero.
        fox: its name in a FoX model. Several names are weights with equal numbers of columns whose concatenation along
            the rows is the external weight (a fused projection).
    """

    external: str | None
    fox: tuple[str, ...]


EMBEDDINGS = Rename("model.embeddings.weight", ("model.embed_tokens.weight",))


def all_renames(block: Mapping[str, str | tuple[str, ...]], config: FoxConfig) -> list[Rename]:
    """The renames of a whole model.

    Args:
        block: external names of the weights of a decoder layer to their FoX names. Embeddings, the last norm and the
            head are named alike in all formats.
        config: of the FoX model.
    """
    renames = [EMBEDDINGS, Rename("model.norm.weight", ("model.norm.weight",))]
    if not config.tie_word_embeddings:
        renames.append(Rename("lm_head.weight", ("lm_head.weight",)))
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        for external, fox in block.items():
            names = (fox,) if isinstance(fox, str) else fox
            renames.append(Rename(start + external, tuple(start + name for name in names)))
    return renames


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a stored weight."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class NewWeight:
    """A weight to make: the concatenation of rows of stored weights, or zeros of ``shape`` where there are none."""

    shape: torch.Size
    rows: tuple[Rows, ...]
    least_dtype: torch.dtype | None = None

    def make(self, load: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, in the stored dtype or `least_dtype` if that is wider.

        Args:
            load: returns a stored weight by name.
            dtype: of zeros, unless `least_dtype` is wider.
        """
        parts = [load(rows.name)[rows.start : rows.stop] for rows in self.rows]
        parts = parts or [torch.zeros(self.shape, dtype=dtype)]
        # Only a pickle may hold a weight that is not contiguous.
        whole = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
        return whole if self.least_dtype is None else whole.to(torch.promote_types(whole.dtype, self.least_dtype))


@dataclass
class Plan:
    """The weights that a conversion reads from its source, and those of its target that it makes from them.

    Attributes:
        reads: weights that the source must hold, with their shapes: these and no others.
        makes: weights of the target.
        zeros: those of `reads` that must be zero, because the target has no place for them.
        copies: names under which the source may store one of `reads` a second time (tied weights), and which one.
    """

    reads: dict[str, torch.Size] = field(default_factory=dict)
    makes: dict[str, NewWeight] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)

    def check(self, stored: Mapping[str, Tensor], load: Callable[[str], Tensor]) -> None:
        """Check that the source holds what the plan reads.

        Args:
            stored: all weights of the source by name, of which the shapes are read (meta tensors will do).
            load: returns a weight with its values.

        Raises:
            ValueError: a weight is missing, unknown, of another shape, or has values that the target cannot hold; the
                message names it.
        """
        if missing := sorted(self.reads.keys() - stored.keys()):
            raise ValueError(f"weights are missing from the checkpoint: {few(missing)}")
        if unknown := sorted(stored.keys() - self.reads.keys() - self.copies.keys()):
            raise ValueError(f"the checkpoint holds weights that its configuration has no place for: {few(unknown)}")
        for name, shape in self.reads.items():
            if stored[name].shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(stored[name].shape)}")
        for name in self.zeros:
            if load(name).any():
                raise ValueError(f"{name} must be zero, got other values: the target format has no place for it")
        for name, copied in self.copies.items():
            if name in stored and not _same_values(load(name), load(copied)):
                raise ValueError(f"{name} must be {copied} with tie_word_embeddings, got other values")


def plan_to_fox(renames: Iterable[Rename], model: FoxForCausalLM) -> Plan:
    """The plan that makes the weights of ``model``, of which only shapes are read, from an external checkpoint."""
    plan, weights = Plan(), distinct_weights(model)
    for rename in renames:
        stop = 0
        for name in rename.fox:
            start, stop = stop, stop + len(weights[name])
            rows = () if rename.external is None else (Rows(rename.external, start, stop),)
            # `from_pretrained` keeps gates in float32, so conversion does too.
            is_gate = any(kept in name.split(".") for kept in model._keep_in_fp32_modules_strict)
            plan.makes[name] = NewWeight(weights[name].shape, rows, torch.float32 if is_gate else None)
        if rename.external is not None:
            plan.reads[rename.external] = torch.Size([stop, *weights[rename.fox[0]].shape[1:]])
    assert plan.makes.keys() == weights.keys(), "the renames cover a model"
    if model.config.tie_word_embeddings:
        (embeddings,) = plan.makes["model.embed_tokens.weight"].rows
        plan.copies["lm_head.weight"] = embeddings.name
    return plan


def plan_to_external(renames: Iterable[Rename], model: FoxForCausalLM) -> Plan:
    """The plan that makes an external checkpoint from the weights of ``model``, of which only shapes are read."""
    plan, weights = Plan(), distinct_weights(model)
    for rename in renames:
        shapes = [weights[name].shape for name in rename.fox]
        plan.reads |= zip(rename.fox, shapes, strict=True)
        if rename.external is None:
            plan.zeros += rename.fox
        else:
            rows = tuple(Rows(name, 0, shape[0]) for name, shape in zip(rename.fox, shapes, strict=True))
            shape = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
            plan.makes[rename.external] = NewWeight(shape, rows)
    assert plan.reads.keys() == weights.keys(), "the renames cover a model"
    if model.config.tie_word_embeddings:
        plan.copies["lm_head.weight"] = "model.embed_tokens.weight"
    return plan


def distinct_weights(model: FoxPreTrainedModel) -> dict[str, Tensor]:
    """The weights of ``model`` by name; tied embeddings appear once, as the input embeddings."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def make_model(plan: Plan, config: FoxConfig, load: Callable[[str], Tensor], dtype: torch.dtype) -> FoxForCausalLM:
    """The model whose weights a plan makes, as `from_pretrained` loads it: tied, gates in float32, fixed gates frozen.

    Args:
        plan: of a model with this configuration.
        config: of the model.
        load: returns a stored weight by name.
        dtype: of the model.
    """
    weights = {name: new.make(load, dtype) for name, new in plan.makes.items()}
    return FoxForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _same_values(weight: Tensor, other: Tensor) -> bool:
    # Dtypes may differ.
    return weight.shape == other.shape and bool((weight == other).all())


def few(names: Sequence[str], most: int = 5) -> str:
    """The first few names and the number of the others, for error messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
