"""Declarative maps between the weights of FoX models and those of others, read in both directions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM, FoxPreTrainedModel


@dataclass(frozen=True)
class Rename:
    """A weight of theirs, and what it is called in a FoX model.

    Attributes:
        theirs: their name; None where they have no such weight, which is then zero.
        ours: ours; several have equal numbers of columns and make up theirs, one above the other.
    """

    theirs: str | None
    ours: tuple[str, ...]


EMBEDDINGS = Rename("model.embeddings.weight", ("model.embed_tokens.weight",))


def all_renames(block: Mapping[str, str | tuple[str, ...]], config: FoxConfig) -> list[Rename]:
    """The renames of a whole model from those inside a block, their names to ours; around blocks all are alike."""
    renames = [EMBEDDINGS, Rename("model.norm.weight", ("model.norm.weight",))]
    if not config.tie_word_embeddings:
        renames.append(Rename("lm_head.weight", ("lm_head.weight",)))
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        for theirs, ours in block.items():
            names = (ours,) if isinstance(ours, str) else ours
            renames.append(Rename(start + theirs, tuple(start + name for name in names)))
    return renames


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a stored weight."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class NewWeight:
    """A weight to make: rows of stored ones, one above the other; zeros of ``shape`` where there are none."""

    shape: torch.Size
    rows: tuple[Rows, ...]
    least_dtype: torch.dtype | None = None

    def make(self, load: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, of the stored type or `least_dtype` if that is wider.

        Args:
            load: gives a stored weight by name.
            dtype: of zeros, again unless `least_dtype` is wider.
        """
        parts = [load(rows.name)[rows.start : rows.stop] for rows in self.rows]
        parts = parts or [torch.zeros(self.shape, dtype=dtype)]
        # Contiguous already, except in a pickle.
        whole = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
        return whole if self.least_dtype is None else whole.to(torch.promote_types(whole.dtype, self.least_dtype))


@dataclass
class Plan:
    """What a conversion reads and what it makes of that.

    Attributes:
        reads: weights that must be stored, with their shapes: these and no others.
        makes: the weights of the result.
        zeros: those of `reads` that must be zero, for the result has no place for them.
        copies: names under which one of `reads` may be stored once more, and which.
    """

    reads: dict[str, torch.Size] = field(default_factory=dict)
    makes: dict[str, NewWeight] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)

    def check(self, stored: Mapping[str, Tensor], load: Callable[[str], Tensor]) -> None:
        """Compare with the weights that are ``stored``, of which the shapes are read.

        Args:
            stored: all of them by name, with or without their values.
            load: gives one with its values.

        Raises:
            ValueError: one is missing, unknown, misshapen, or not what it must be; the message names it.
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
                raise ValueError(f"{name} must be zero, got other values: the other layout has no place for it")
        for name, copied in self.copies.items():
            if name in stored and not _same_values(load(name), load(copied)):
                raise ValueError(f"{name} must be {copied} with tie_word_embeddings, got other values")


def plan_to_ours(renames: Iterable[Rename], model: FoxForCausalLM) -> Plan:
    """How to make the weights of ``model``, of which the shapes are read, from those of theirs."""
    plan, ours = Plan(), distinct_weights(model)
    for rename in renames:
        stop = 0
        for name in rename.ours:
            start, stop = stop, stop + len(ours[name])
            rows = () if rename.theirs is None else (Rows(rename.theirs, start, stop),)
            # Gates stay in float32 when a model is loaded, so here too.
            is_gate = any(kept in name.split(".") for kept in model._keep_in_fp32_modules_strict)
            plan.makes[name] = NewWeight(ours[name].shape, rows, torch.float32 if is_gate else None)
        if rename.theirs is not None:
            plan.reads[rename.theirs] = torch.Size([stop, *ours[rename.ours[0]].shape[1:]])
    assert plan.makes.keys() == ours.keys(), "the renames cover a model"
    if model.config.tie_word_embeddings:
        (embeddings,) = plan.makes["model.embed_tokens.weight"].rows
        plan.copies["lm_head.weight"] = embeddings.name
    return plan


def plan_to_theirs(renames: Iterable[Rename], model: FoxForCausalLM) -> Plan:
    """How to make theirs from the weights of ``model``, of which the shapes are read."""
    plan, ours = Plan(), distinct_weights(model)
    for rename in renames:
        shapes = [ours[name].shape for name in rename.ours]
        plan.reads |= zip(rename.ours, shapes, strict=True)
        if rename.theirs is None:
            plan.zeros += rename.ours
        else:
            rows = tuple(Rows(name, 0, shape[0]) for name, shape in zip(rename.ours, shapes, strict=True))
            shape = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
            plan.makes[rename.theirs] = NewWeight(shape, rows)
    assert plan.reads.keys() == ours.keys(), "the renames cover a model"
    if model.config.tie_word_embeddings:
        plan.copies["lm_head.weight"] = "model.embed_tokens.weight"
    return plan


def distinct_weights(model: FoxPreTrainedModel) -> dict[str, Tensor]:
    """The weights of ``model`` by name; of tied embeddings, which are one weight, the input's."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def make_model(plan: Plan, config: FoxConfig, load: Callable[[str], Tensor], dtype: torch.dtype) -> FoxForCausalLM:
    """The model whose weights a plan makes, as if loaded from a folder: tied, gates in float32, fixed ones frozen.

    Args:
        plan: of a model with this configuration.
        config: of the model.
        load: gives a stored weight by name.
        dtype: of the model.
    """
    weights = {name: new.make(load, dtype) for name, new in plan.makes.items()}
    return FoxForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _same_values(weight: Tensor, other: Tensor) -> bool:
    # Their types may differ.
    return weight.shape == other.shape and bool((weight == other).all())


def few(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
