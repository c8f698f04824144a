"""Prompts of a layer repeated from memory: it launches what the one before it launched, with other addresses.

For a layer of a prompt the host takes up to a millisecond in eager mode, and the GPU below some thousand tokens half of
that. So the whole forward pass of a layer is recorded, with what it leaves in the cache, by `kernels.replay`, wherever
nothing but known modules and their weights has a part in it.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
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
    tokens = hidden_states.shape[1]
    held = None if cache is None else _growing_layer(cache, layer.self_attn.layer_idx, tokens)
    if (cache is not None and held is None) or not may_repeat():
        return None
    known = known_modules(layer)
    if known is None or not _are_of_known_classes(layer, known, classes):
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


def _are_of_known_classes(layer: nn.Module, known: KnownModules, classes: tuple[type[nn.Module], ...]) -> bool:
    if "classes" not in known.found:
        kinds = {type(x) for x in (layer, *known.modules)}
        known.found["classes"] = kinds <= _KNOWN.union(classes)
    return known.found["classes"]


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
