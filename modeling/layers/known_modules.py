"""What has been found of modules and their weights holds as long as nobody has changed them: a check that costs little.

Every `generate`, and every layer of a prompt, depends on which modules there are, on what watches them and on where
their weights are. To look at it anew takes the host as long as some layers do.
"""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..parallel.tensor_parallel import modules_of
from .fused_projections import FusableProjections

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HELD = ("_modules", "_parameters", "_buffers")
# Attributes of these types decide what a module does.
_PLAIN = (int, float, bool, str, tuple, type(None))
# But not these: which layer it is, what `KnownModules` has found, and what is known of fused projections.
_OTHERS = frozenset(("layer_idx", "known", "fused_projections", "uses_fused", "is_to_fuse", "fuses_itself"))
_shape_of = operator.attrgetter("dtype", "shape")
# A number for all modules that have the same in common.
_KINDS: dict[str, int] = {}


class KnownModules:
    """A module with all modules in it, as they were when this was made.

    It does not hold the module itself, which holds this.

    Args:
        root: the module; hooks on it are nobody's concern here, since they run before and after all that it does.

    Attributes:
        modules: those in ``root``, each once.
        weights: parameters and buffers, each once for each name, and the buffers of fused projections.
        addresses: of the weights.
        fused: modules whose projections are fused, whether or not calls read them so.
        found: by name, what else has been found of them.
    """

    def __init__(self, root: nn.Module) -> None:
        _, *self.modules = modules_of(root)
        self._types = list(map(type, self.modules))
        self._hooks = [vars(x)[name] for x in self.modules for name in _HOOKS]
        self._states = list(map(vars, self.modules))
        held = [x[name] for x in (vars(root), *self._states) for name in _HELD]
        self._places = [(x, name) for x in held for name in x]
        self._held = [x[name] for x, name in self._places]
        # By functions of C: there are hundreds.
        names = [_settings_of(x) for x in self._states]
        self._settings = [(operator.itemgetter(*y), x) for x, y in zip(self._states, names, strict=True)]
        self._values = [get(x) for get, x in self._settings]
        own = _settings_of(vars(root))
        self._type, self._get_own = type(root), operator.itemgetter(*own)
        self._own = self._get_own(vars(root))
        self._names = [name for _, name in self._places], names, own
        fusable = [x for x in (root, *self.modules) if isinstance(x, FusableProjections)]
        assert root not in fusable, "it would hold itself"
        self._fusable = fusable
        self._buffers = [x.fused_projections for x in fusable]
        self.fused = [x for x in fusable if x.fused_projections is not None]
        buffers = [y for x in self._buffers if x is not None for y in (x.weight, x.bias)]
        self.weights = tuple(x for x in (*self._held, *buffers) if isinstance(x, Tensor))
        self._shapes = list(map(_shape_of, self.weights))
        self.addresses = list(map(Tensor.data_ptr, self.weights))
        self.found: dict[str, Any] = {}

    def __reduce__(self) -> tuple:
        # A copy of the root has modules of its own: None in its place.
        return type(None), ()

    def are_unchanged(self, root: nn.Module) -> bool:
        """Whether no module was replaced, set otherwise or is watched, and no weight has moved; ``root`` as before."""
        if any(self._hooks) or _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return False
        try:
            held, values = [x[name] for x, name in self._places], [get(x) for get, x in self._settings]
            own = self._get_own(vars(root))
        except KeyError:
            return False
        if values != self._values or own != self._own or any(map(operator.is_not, held, self._held)):
            return False
        if True in ["forward" in x or "_hf_hook" in x for x in self._states] or type(root) is not self._type:
            return False
        if any(map(operator.is_not, [x.fused_projections for x in self._fusable], self._buffers)):
            return False
        if list(map(type, self.modules)) != self._types:
            return False
        if list(map(Tensor.data_ptr, self.weights)) != self.addresses:
            return False
        return list(map(_shape_of, self.weights)) == self._shapes

    @contextlib.contextmanager
    def uses_fused_always(self) -> Iterator[None]:
        """Within it, calls read fused projections without looking whether these are what was fused."""
        before = [x.uses_fused for x in self.fused]
        for x in self.fused:
            # For a twentieth of what it takes by `nn.Module.__setattr__`.
            vars(x)["uses_fused"] = "always"
        try:
            yield
        finally:
            for x, uses in zip(self.fused, before, strict=True):
                vars(x)["uses_fused"] = uses

    @property
    def kind(self) -> int:
        """A number that other modules have too if they differ from these in values of weights alone."""
        if "kind" not in self.found:
            sizes = [None if x is None else (x.names, x.sizes) for x in self._buffers]
            places = [(address % 16, self.addresses.index(address)) for address in self.addresses]
            missing = [x is None for x in self._held]
            weights = self._shapes, [x.stride() for x in self.weights], places
            values = self._own, self._values, missing, sizes
            key = repr((self._type, self._types, self._names, values, weights))
            self.found["kind"] = _KINDS.setdefault(key, len(_KINDS))
        return self.found["kind"]


def known_modules(root: Any) -> KnownModules | None:
    """``root.known``, brought up to date.

    None where something watches a module, or a weight is more than a tensor: sharded, quantized, not loaded.
    """
    known: KnownModules | None = root.known
    if known is not None and known.are_unchanged(root):
        return known
    found = KnownModules(root) if _can_be_known(root) else None
    if found is not known:
        root.known = found
    return found


def _can_be_known(root: nn.Module) -> bool:
    _, *modules = modules_of(root)
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return False
    for module in modules:
        state = vars(module)
        if any(state[name] for name in _HOOKS) or "forward" in state or "_hf_hook" in state:
            return False
    tensors = [x for module in (root, *modules) for name in _HELD[1:] for x in vars(module)[name].values()]
    return all(x is None or (type(x) in (Tensor, nn.Parameter) and not x.is_meta) for x in tensors)


def _settings_of(state: dict[str, Any]) -> list[str]:
    """Names of the attributes that decide what a module does, beside what it holds."""
    return [name for name, x in state.items() if type(x) in _PLAIN and name not in _OTHERS]


__all__ = ["KnownModules", "known_modules"]
