"""What has been found of modules holds as long as nobody has changed them: a check that costs little.

Every `generate`, and every layer of a prompt, depends on which modules there are, on what watches them and on where
their weights lie. To find all that anew takes the host as long as some layers do.
"""

import hashlib
import itertools
import operator
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from transformers import PreTrainedConfig

from .fused_projections import FusableProjections

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes of these types are compared by value.
_COMPARED = frozenset((int, float, bool, str, tuple, type(None)))
# What `nn.Module` keeps in attributes: hooks, and what is looked at by itself.
_CONTAINERS = (dict, set)
# Attributes that are no part of what a module does, or are asked for by whoever depends on them.
_LEFT_OUT = frozenset(("layer_idx", "known", "fused_projections", "uses_fused", "is_to_fuse", "fuses_itself"))
_shape_of = operator.attrgetter("dtype", "shape")
# A number for each kind of modules, by a digest of all that they have in common; numbers are not used again.
_KINDS: dict[bytes, int] = {}
_MOST_KINDS = 4096
_numbers = itertools.count()


class _Record(NamedTuple):
    """A module as it was.

    Attributes:
        module: weak, as modules are to die when their owner lets them go.
        kind: its class.
        forward: of the class.
        size: how many attributes it had; with whatever is put on a module, such as another forward, it has one more.
        get: reads the attributes that are compared by value.
        values, types: what these were.
        children: ids of its modules, which have records of their own.
        names: of these, of parameters and of buffers.
    """

    module: "weakref.ref[nn.Module]"
    kind: type[nn.Module]
    forward: Any
    size: int
    get: Any
    values: tuple[Any, ...]
    types: list[type]
    children: list[int]
    names: tuple[list[str], list[str], list[str]]


def _record(module: nn.Module) -> _Record:
    state = vars(module)
    # A module has several: what reads one alone would return no tuple.
    get: Any = operator.itemgetter(*(x for x in state if type(state[x]) in _COMPARED and x not in _LEFT_OUT))
    return _Record(
        weakref.ref(module),
        type(module),
        type(module).forward,
        len(state),
        get,
        get(state),
        list(map(type, get(state))),
        list(map(id, state["_modules"].values())),
        (list(state["_modules"]), list(state["_parameters"]), list(state["_buffers"])),
    )


def _is_odd(module: nn.Module) -> bool:
    """Whether it has attributes that are neither compared nor containers of `nn.Module` or a configuration."""
    others = [x for name, x in vars(module).items() if type(x) not in _COMPARED and name not in _LEFT_OUT]
    return not all(isinstance(x, (*_CONTAINERS, PreTrainedConfig)) for x in others)


def _is_watched(module: nn.Module) -> bool:
    state = vars(module)
    return any(state[name] for name in _HOOKS) or "forward" in state or "_hf_hook" in state


def _places_of(weights: list[Tensor]) -> list[Any] | None:
    """Address, dtype, shape and strides of each; None if one is more than a tensor in memory."""
    try:
        return [
            list(map(Tensor.data_ptr, weights)),
            list(map(_shape_of, weights)),
            list(map(Tensor.stride, weights)),
        ]
    except RuntimeError:
        # Sparse, or what a transform of torch.func makes of a tensor.
        return None


class KnownModules:
    """A module with all modules in it, as they were when this was made; it keeps none of them alive, nor a weight.

    Args:
        root: the module. Hooks on it are of no concern: they run before and after all that it does.

    Attributes:
        kind: a number that other modules have too if they differ from these in values of weights alone.
        odd: classes of modules with attributes that are not compared here.
        lie_in_buffers: whether projections that are fused are what was fused.
        addresses: of the weights.
        is_of_known_classes, graphs: for `repeated_layer` and `decoding_graphs`, what they have found; None before.
    """

    def __init__(self, root: nn.Module) -> None:
        # So that the number of its attributes does not change when it is given this.
        vars(root).setdefault("known", None)
        modules = list(root.modules())
        self._records = list(map(_record, modules))
        fused = [x for x in modules if isinstance(x, FusableProjections)]
        self._fusable = list(map(weakref.ref, fused))
        self.odd = frozenset(type(x) for x in modules if _is_odd(x))
        self.lie_in_buffers = all(x.fused_projections is None or x._is_fused() for x in fused)
        self.is_of_known_classes: bool | None = None
        self.graphs: tuple[str | None, Any] | None = None
        places = _places_of(self._read(root) or [])
        assert places is not None, "asked in `known_modules`"
        self._places = places
        addresses: list[int] = places[0]
        self.addresses = addresses
        common = (
            [(x.kind, x.values, x.names) for x in self._records],
            [x.fused_projections and (x.fused_projections.names, x.fused_projections.sizes) for x in fused],
            places[1:],
            [(address % 16, addresses.index(address)) for address in addresses],
        )
        key = hashlib.sha256(repr(common).encode()).digest()
        if len(_KINDS) >= _MOST_KINDS:
            _KINDS.clear()
        self.kind = _KINDS.setdefault(key, next(_numbers))

    def __reduce__(self) -> tuple:
        # A copy of the root has modules of its own: None in its place.
        return type(None), ()

    @property
    def fused(self) -> list[FusableProjections]:
        """Modules whose projections are fused, whether or not calls read them so."""
        found = [ref() for ref in self._fusable]
        return [x for x in found if x is not None and x.fused_projections is not None]

    def weights(self, root: nn.Module) -> tuple[Tensor, ...] | None:
        """All of ``root``, at `addresses`; None if a module was replaced, set otherwise or is watched, or one moved."""
        if _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return None
        found = self._read(root)
        return None if found is None or _places_of(found) != self._places else tuple(found)

    def _read(self, root: nn.Module) -> list[Tensor] | None:
        if self._records[0].module() is not root:
            return None
        found: list[Tensor | None] = []
        for ref, kind, forward, size, get, values, types, children, names in self._records:
            module = ref()
            if type(module) is not kind or kind.forward is not forward:
                return None
            state = vars(module)
            if len(state) != size:
                return None
            if module is not root and (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
            ):
                return None
            inside, parameters, buffers = state["_modules"], state["_parameters"], state["_buffers"]
            if [*inside] != names[0] or [*parameters] != names[1] or [*buffers] != names[2]:
                return None
            if inside and list(map(id, inside.values())) != children:
                return None
            try:
                now = get(state)
            except KeyError:
                return None
            # By type first: to compare tensors is to wait for them.
            if list(map(type, now)) != types or now != values:
                return None
            found += parameters.values()
            found += buffers.values()
        for owner in self.fused:
            buffer = owner.fused_projections
            assert buffer is not None, "it is fused"
            found += (buffer.weight, buffer.bias)
        return [x for x in found if x is not None]


def known_modules(root: Any) -> tuple[KnownModules | None, tuple[Tensor, ...]]:
    """``root.known``, brought up to date, and its weights.

    None where something watches a module, or a weight is more than a tensor: sharded, quantized, not loaded.
    """
    known: KnownModules | None = root.known
    weights = None if known is None else known.weights(root)
    if weights is None:
        known = KnownModules(root) if can_be_known(root) else None
        if known is not root.known:
            root.known = known
        weights = None if known is None else known.weights(root)
    return (known, weights) if weights is not None else (None, ())


def can_be_known(root: nn.Module) -> bool:
    """Whether nothing watches a module of ``root``, and all weights are tensors in memory."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return False
    weights: list[Tensor] = []
    for module in root.modules():
        if module is not root and _is_watched(module):
            return False
        weights += [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_meta or x.layout != torch.strided for x in weights):
        return False
    return _places_of(weights) is not None


__all__ = ["KnownModules", "can_be_known", "known_modules"]
