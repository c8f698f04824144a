"""Declarative renaming of checkpoint weights, with every key accounted for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rename:
    """One source weight becomes one or several target weights.

    Attributes:
        source: key in the source checkpoint; ``{layer}`` stands for every layer.
        targets: keys in the converted one. Several share the source along its first dimension, in equal parts.
    """

    source: str
    targets: tuple[str, ...]

    def for_layers(self, layers: int) -> Iterable["Rename"]:
        """One renaming per layer; itself where no layer is named."""
        if "{layer}" not in self.source:
            return [self]
        return [
            Rename(self.source.format(layer=i), tuple(target.format(layer=i) for target in self.targets))
            for i in range(layers)
        ]


def rename_weights(
    weights: Mapping[str, Tensor],
    renames: Iterable[Rename],
    layers: int,
    shapes: Mapping[str, torch.Size],
    zeros: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Apply renamings to a checkpoint.

    Args:
        weights: the source checkpoint.
        renames: what each of its keys becomes.
        layers: number of layers that ``{layer}`` stands for.
        shapes: keys and shapes that the result must have.
        zeros: keys of the result that are zero, for want of a source; ``{layer}`` as above.

    Returns:
        The converted weights, views of the source where nothing is split.

    Raises:
        ValueError: a source key is missing or unknown, a weight has the wrong shape, or a target is left without one.
    """
    expanded = [one for rename in renames for one in rename.for_layers(layers)]
    sources = {rename.source for rename in expanded}
    if missing := sorted(sources - weights.keys()):
        raise ValueError(f"weights are missing from the checkpoint: {_few(missing)}")
    if unknown := sorted(weights.keys() - sources):
        raise ValueError(f"the checkpoint holds weights that its configuration has no place for: {_few(unknown)}")

    converted: dict[str, Tensor] = {}
    for rename in expanded:
        parts = weights[rename.source].chunk(len(rename.targets), dim=0)
        for target, part in zip(rename.targets, parts, strict=True):
            expected = shapes.get(target)
            if expected is None:
                raise ValueError(f"{rename.source} has no place in the model: it has no weight {target}")
            if part.shape != expected:
                raise ValueError(
                    f"{rename.source} has shape {list(weights[rename.source].shape)}, "
                    f"which gives {target} {list(part.shape)} where {list(expected)} is needed"
                )
            converted[target] = part
    dtype = next((weight.dtype for weight in weights.values()), None)
    for target in {zero.format(layer=i) for zero in zeros for i in range(layers)}:
        converted[target] = torch.zeros(shapes[target], dtype=dtype)
    if unfilled := sorted(shapes.keys() - converted.keys()):
        raise ValueError(f"the checkpoint has nothing for these weights of the model: {_few(unfilled)}")
    return converted


def _few(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
