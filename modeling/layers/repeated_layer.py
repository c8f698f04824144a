"""Prompts of a layer repeated from memory: it launches what the one before it launched, with other addresses.

For a layer of a prompt the host takes up to a millisecond in eager mode, and the GPU below some thousand tokens half of
that. So the whole forward pass of a layer is recorded, with what it leaves in the cache, by `kernels.replay`, wherever
nothing but known modules and their weights has a part in it.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ...kernels.devices import capability_of
from ...kernels.operators import nothing_sees
from ..attention_settings import AttentionSettings
from ..cache.dynamic import DynamicForgettingLayer
from ..cache.static import StaticForgettingLayer
from ..configuration_fox import DEFAULT_IMPLEMENTATION
from ..token_layout import TokenLayout
from ..versions import CACHE
from .attention import FUSED_ACTIVATIONS, FoxAttention
from .attention_sink import FoxAttentionSink
from .forget_gate import FoxConstantGate, FoxForgetGate
from .known_modules import KnownModules, known_modules
from .norm import FoxRMSNorm
from .rotary import FoxRotaryEmbedding
from .token_shift import FoxTokenShift

# Modules whose forward passes depend on their attributes, weights and arguments alone.
_KNOWN: frozenset[type[nn.Module]] = frozenset(FUSED_ACTIVATIONS) | {
    *(nn.Linear, FoxAttention, FoxAttentionSink, FoxConstantGate),
    *(FoxForgetGate, FoxRMSNorm, FoxRotaryEmbedding, FoxTokenShift),
}
_ARGUMENTS = frozenset(("layout", "position_embeddings", "settings", CACHE))


@functools.cache
def _recordings() -> Any:
    """`replay.Recordings` of layers; None where launches cannot be repeated."""
    # Imported when they are used, since importing the kernels takes time.
    from ...kernels.backends import HAS_TRITON

    if not HAS_TRITON:
        return None
    from ...kernels.replay import IS_KNOWN, Recordings

    return Recordings() if IS_KNOWN else None


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
    held, cached = None, None
    if cache is not None:
        held = _layer_of(cache, layer.self_attn.layer_idx)
        cached = held and held.signature_for(hidden_states.shape[1])
        if cached is None:
            return None
    if not may_repeat():
        return None
    known = known_modules(layer)
    if known is None or not _are_of_known_classes(layer, known, classes):
        return None
    names = layer.self_attn.shifted
    if type(held) is StaticForgettingLayer and not held.is_initialized:
        attention = layer.self_attn
        heads = len(attention.k_proj.weight) // attention.head_dim
        like = hidden_states.new_empty(()).expand(len(hidden_states), heads, 1, attention.head_dim)
        held.lazy_initialization(like, like)
        held.was_reset = True
    before = () if held is None else held.state(names)
    angles = arguments["position_embeddings"] or (None, None)
    given = (hidden_states, *layout[: TokenLayout._fields.index("shards")], *angles, *before)
    tensors = tuple(x for x in given if x is not None)
    device = common_device((*tensors, *known.weights))
    if device is None:
        return None
    addresses = list(map(Tensor.data_ptr, tensors))
    which = tuple(x is None for x in given)
    fused = tuple(x.uses_fused == "never" for x in known.fused)
    signature = (known.kind, fused, settings, cached, which, device, *signature_of(tensors, addresses))
    addresses += known.addresses
    everything = (*tensors, *known.weights)
    out, *after = recordings.call(signature, everything, addresses, device, _run, layer, hidden_states, arguments, held)
    if held is not None:
        held.take_state(after, names)
    return out


def _are_of_known_classes(layer: nn.Module, known: KnownModules, classes: tuple[type[nn.Module], ...]) -> bool:
    if "classes" not in known.found:
        kinds = {type(x) for x in (layer, *known.modules)}
        known.found["classes"] = kinds <= _KNOWN.union(classes)
    return known.found["classes"]


def _run(layer: Any, hidden_states: Tensor, arguments: dict[str, Any], held: Any) -> Any:
    """The output, and what the cache's layer then holds."""
    out = layer.compute(hidden_states, **arguments)
    return (out,) if held is None else (out, *held.state(layer.self_attn.shifted))


def _layer_of(cache: Cache, index: int) -> DynamicForgettingLayer | StaticForgettingLayer | None:
    """The layer of a cache, if it is all of the cache that takes part."""
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if type(layer) in (DynamicForgettingLayer, StaticForgettingLayer) else None
