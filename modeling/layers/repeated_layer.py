"""Prompts of a layer repeated from memory: it launches what the one before it launched, with other addresses.

For a layer of a prompt the host takes up to a millisecond in eager mode, and the GPU below some thousand tokens half of
that. So the whole forward pass of a layer is recorded, with what it leaves in the cache, by `kernels.replay`, wherever
nothing but known modules and their weights has a part in it.
"""

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from transformers.cache_utils import Cache, DynamicCache

from ...kernels.devices import capability_of
from ...kernels.operators import nothing_sees
from ...kernels.tiles import LARGEST_DECODED_QUERIES
from ..attention_settings import AttentionSettings
from ..cache.dynamic import DynamicForgettingLayer
from ..configuration_fox import DEFAULT_IMPLEMENTATION
from ..token_layout import TokenLayout
from ..versions import CACHE
from .attention import FUSED_ACTIVATIONS, FoxAttention
from .attention_sink import FoxAttentionSink
from .forget_gate import FoxConstantGate, FoxForgetGate
from .fused_projections import FusableProjections, FusedProjections
from .norm import FoxRMSNorm
from .rotary import FoxRotaryEmbedding
from .token_shift import FoxTokenShift

# Modules whose forward passes depend on their attributes, weights and arguments alone.
_KNOWN: frozenset[type[nn.Module]] = frozenset(FUSED_ACTIVATIONS) | {
    *(nn.Linear, FoxAttention, FoxAttentionSink, FoxConstantGate),
    *(FoxForgetGate, FoxRMSNorm, FoxRotaryEmbedding, FoxTokenShift),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_shape_of = operator.attrgetter("dtype", "shape")
_ARGUMENTS = frozenset(("layout", "position_embeddings", "settings", CACHE))
# Attributes of these types decide what a module launches.
_PLAIN = (int, float, bool, str, tuple, type(None))
# But not these: what identifies the layer, what is kept here, and what is asked of `_buffer_of`.
_OTHER_ATTRIBUTES = frozenset(("layer_idx", "known", "fused_projections", "uses_fused"))
# A number for each kind of layer, by all that layers of a kind have in common.
_KINDS: dict[str, int] = {}


class KnownLayer:
    """What a layer's forward pass depends on beside its arguments, as long as it `is_unchanged`.

    Args:
        layer: a `FoxDecoderLayer`.

    Attributes:
        weights: of all modules, and the buffers of fused projections.
        addresses: of the weights.
        kind: a number; layers of one kind launch the same.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._modules = list(layer.modules())
        self._types = list(map(type, self._modules))
        # Hooks on the layer itself run around its forward pass.
        self._hooks = [vars(x)[name] for x in self._modules[1:] for name in _HOOKS]
        self._states = list(map(vars, self._modules))
        held = [x[name] for x in self._states for name in ("_modules", "_parameters", "_buffers")]
        self._places = [(x, name) for x in held for name in x]
        self._found = [x[name] for x, name in self._places]
        settings = [(x, name) for x in self._states for name in x if type(x[name]) in _PLAIN]
        self._settings = [(x, name) for x, name in settings if name not in _OTHER_ATTRIBUTES]
        self._set = [x[name] for x, name in self._settings]
        self._fusable = [x for x in self._modules if isinstance(x, FusableProjections)]
        self._fused = [_buffer_of(x) for x in self._fusable]
        buffers = [y for x in self._fused if x is not None for y in (x.weight, x.bias)]
        self.weights = tuple(x for x in (*self._found, *buffers) if isinstance(x, Tensor))
        self._shapes = list(map(_shape_of, self.weights))
        strides = [x.stride() for x in self.weights]
        self.addresses = [x.data_ptr() for x in self.weights]
        names = [name for _, name in (*self._places, *self._settings)]
        sizes = [None if x is None else (x.names, x.sizes) for x in self._fused]
        places = [(address % 16, self.addresses.index(address)) for address in self.addresses]
        kind = repr(
            (self._types, names, self._set, sizes, self._shapes, strides, places, [x is None for x in self._found])
        )
        self.kind = _KINDS.setdefault(kind, len(_KINDS))

    def __reduce__(self) -> tuple:
        # A copy of the layer has modules of its own: None in its place.
        return type(None), ()

    def is_unchanged(self) -> bool:
        """Whether no module was replaced, set otherwise or is watched, and no weight has moved."""
        if any(self._hooks) or _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return False
        try:
            found, values = [x[name] for x, name in self._places], [x[name] for x, name in self._settings]
        except KeyError:
            return False
        if values != self._set or any(map(operator.is_not, found, self._found)):
            return False
        if True in ["forward" in x or "_hf_hook" in x for x in self._states]:
            return False
        if any(map(operator.is_not, map(_buffer_of, self._fusable), self._fused)):
            return False
        if list(map(type, self._modules)) != self._types:
            return False
        if list(map(Tensor.data_ptr, self.weights)) != self.addresses:
            return False
        return list(map(_shape_of, self.weights)) == self._shapes


def _buffer_of(module: FusableProjections) -> FusedProjections | None:
    """The buffer that calls without gradients may read; which of them check it first makes no difference here."""
    return None if module.uses_fused == "never" else module.fused_projections


@functools.cache
def _recordings() -> Any:
    """`replay.Recordings` of layers; None where launches cannot be repeated."""
    # Imported when they are used, since importing the kernels takes time.
    from ...kernels.backends import HAS_TRITON

    if not HAS_TRITON:
        return None
    from ...kernels.replay import IS_KNOWN, Recordings

    return Recordings() if IS_KNOWN else None


def _is_known(layer: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether it and its modules are of known classes, with plain weights of their own."""
    for module in layer.modules():
        if type(module) not in _KNOWN and type(module) not in classes:
            return False
        if any(x is not None and type(x) is not nn.Parameter for x in module._parameters.values()):
            return False
        if any(x is not None and type(x) is not Tensor for x in module._buffers.values()):
            return False
    return True


def repeat_prompt(
    layer: Any, classes: tuple[type[nn.Module], ...], hidden_states: Tensor, arguments: dict[str, Any]
) -> Tensor | None:
    """The output of ``layer.compute(hidden_states, **arguments)``, from memory where that can be; else None.

    Args:
        layer: a `FoxDecoderLayer`; its ``known`` is kept up to date.
        classes: its own, and that of its MLP.
        hidden_states: ``[B, T, hidden]``.
        arguments: as a `FoxModel` passes them.
    """
    if capability_of(hidden_states) is None or torch.is_grad_enabled() or arguments.keys() != _ARGUMENTS:
        return None
    layout: TokenLayout = arguments["layout"]
    settings: AttentionSettings = arguments["settings"]
    is_plain = layout.shards is None and settings.implementation == DEFAULT_IMPLEMENTATION
    if not is_plain or torch.is_autocast_enabled(hidden_states.device.type) or not nothing_sees(hidden_states):
        return None
    recordings = _recordings()
    if recordings is None:
        return None
    from ...kernels.replay import common_device, may_repeat, signature_of

    cache: Cache | None = arguments[CACHE]
    tokens = hidden_states.shape[1]
    held = None if cache is None else _growing_layer(cache, layer.self_attn.layer_idx, tokens)
    if (cache is not None and held is None) or not may_repeat():
        return None
    known: KnownLayer | None = layer.known
    if known is None or not known.is_unchanged():
        known = layer.known = KnownLayer(layer) if _is_known(layer, classes) else None
        if known is None or not known.is_unchanged():
            return None
    names = layer.self_attn.shifted
    before = () if held is None else held.state(names)
    angles = arguments["position_embeddings"] or (None, None)
    given = (hidden_states, *layout[: TokenLayout._fields.index("shards")], *angles, *before)
    tensors = tuple(x for x in given if x is not None)
    device = common_device((*tensors, *known.weights))
    if device is None:
        return None
    addresses = list(map(Tensor.data_ptr, tensors))
    cached = None if held is None else held.expected
    which = tuple(x is None for x in given)
    signature = (known.kind, settings, cached, which, device, *signature_of(tensors, addresses))
    addresses += known.addresses
    everything = (*tensors, *known.weights)
    out, *after = recordings.call(signature, everything, addresses, device, _run, layer, hidden_states, arguments, held)
    if held is not None:
        held.take_state(after, names)
    return out


def _run(layer: Any, hidden_states: Tensor, arguments: dict[str, Any], held: DynamicForgettingLayer | None) -> Any:
    """The output, and what the cache's layer then holds."""
    out = layer.compute(hidden_states, **arguments)
    return (out,) if held is None else (out, *held.state(layer.self_attn.shifted))


def _growing_layer(cache: Cache, index: int, tokens: int) -> DynamicForgettingLayer | None:
    """The layer of a growing cache that is to take a prompt or a chunk; None if it has more to do than that."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not DynamicForgettingLayer or not layer.is_growing:
        return None
    # The kernels of decoding read a summary of keys, which is no state of a prompt.
    return layer if tokens > LARGEST_DECODED_QUERIES or not layer.is_initialized else None
