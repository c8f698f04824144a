"""Prompts of a layer repeated from memory: it launches what the one before it launched, with other addresses.

For a layer of a prompt the host takes up to a millisecond in eager mode, and the GPU below some thousand tokens half of
that. So the whole forward pass of a layer is recorded, with what it leaves in the cache, by `kernels.launches.replay`,
wherever nothing but known modules and their weights has a part in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ...kernels.devices import capability_of
from ...kernels.operators import nothing_sees
from ..attention_settings import AttentionSettings
from ..cache.dynamic import DynamicForgettingLayer
from ..cache.static import StaticForgettingLayer
from ..token_layout import TokenLayout
from ..versions import CACHE
from .attention import FUSED_ACTIVATIONS, FoxAttention
from .attention_sink import FoxAttentionSink
from .forget_gate import FoxConstantGate, FoxForgetGate
from .known_modules import KnownModules, known_modules
from .norm import FoxRMSNorm
from .rotary import FoxRotaryEmbedding
from .token_shift import FoxTokenShift

# Modules whose forward passes depend on their attributes, weights and arguments alone; and these forward passes.
_CALLED: tuple[type[nn.Module], ...] = (
    *(nn.Linear, FoxAttention, FoxAttentionSink, FoxConstantGate, FoxForgetGate, FoxRMSNorm, FoxTokenShift),
    *FUSED_ACTIVATIONS,
)
_FORWARD = {kind: kind.forward for kind in _CALLED}
# A model computes the angles for all of its layers.
_NOT_CALLED: frozenset[type[nn.Module]] = frozenset((FoxRotaryEmbedding,))
_ARGUMENTS = frozenset(("layout", "position_embeddings", "settings", CACHE))


@functools.cache
def _recordings() -> Any:
    """`replay.Recordings` of layers; None where launches cannot be repeated."""
    # Imported when they are used, since importing the kernels takes time.
    from ...kernels.backends import HAS_TRITON

    if not HAS_TRITON:
        return None
    from ...kernels.launches.replay import IS_KNOWN, Recordings

    return Recordings() if IS_KNOWN else None


def repeat_prompt(
    layer: Any,
    compute: Callable[..., Tensor],
    classes: tuple[type[nn.Module], ...],
    hidden_states: Tensor,
    arguments: dict[str, Any],
) -> Tensor | None:
    """``compute(hidden_states, **arguments)``, from memory where that can be; None where it cannot.

    Args:
        layer: a `FoxDecoderLayer`; its ``known`` is kept up to date.
        compute: its forward pass, by its modules.
        classes: its own, and that of its MLP.
        hidden_states: ``[B, T, hidden]``.
        arguments: as a `FoxModel` passes them.
    """
    if capability_of(hidden_states) is None or torch.is_grad_enabled() or arguments.keys() != _ARGUMENTS:
        return None
    recordings = _recordings()
    if recordings is None or not _nothing_else_happens(hidden_states, arguments):
        return None
    from ...kernels.launches.replay import common_device, signature_of

    known, weights = known_modules(layer)
    if known is None or not _is_understood(layer, known, classes):
        return None
    attention: FoxAttention = layer.self_attn
    cache, state, cached = arguments[CACHE], None, None
    if cache is not None:
        state = _state_of(cache, attention.layer_idx)
        cached = state and state.signature_for(hidden_states.shape[1])
        if state is None or cached is None:
            return None
        if isinstance(state, StaticForgettingLayer) and not state.is_initialized:
            # More tokens than the kernels of decoding take: attention asks nothing else of an empty cache.
            heads = len(attention.k_proj.weight) // attention.head_dim
            state.make_buffers(hidden_states, heads, attention.head_dim)
    before = () if state is None else state.state(attention.shifted)
    angles = arguments["position_embeddings"] or (None, None)
    layout: TokenLayout = arguments["layout"]
    given = (hidden_states, *layout[: TokenLayout._fields.index("shards")], *angles, *before)
    tensors = tuple(x for x in given if x is not None)
    everything = (*tensors, *weights)
    device = common_device(everything)
    if device is None:
        return None
    addresses = list(map(Tensor.data_ptr, tensors))
    signature = (
        known.kind,
        tuple(x.uses_fused == "never" for x in known.fused),
        arguments["settings"],
        cached,
        tuple(x is None for x in given),
        # Outside of it nothing may be written to what was made in it.
        (torch.is_inference_mode_enabled(), *(x.is_inference() for x in tensors)),
        device,
        *signature_of(tensors, addresses),
    )
    addresses += known.addresses
    run = functools.partial(_run, compute, hidden_states, arguments, state, attention.shifted)
    out, *after = recordings.call(signature, everything, addresses, device, run)
    if state is not None:
        state.take_state(after, attention.shifted)
    return out


def _nothing_else_happens(hidden_states: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a call computes by its modules, kernels and operators as they are, with no hooks or modes active."""
    from ...kernels.launches.replay import may_repeat
    from ..attention_implementations import runs_own_attention

    settings: AttentionSettings = arguments["settings"]
    if arguments["layout"].shards is not None or not runs_own_attention(settings.implementation):
        return False
    if torch.is_autocast_enabled(hidden_states.device.type) or not nothing_sees(hidden_states) or not may_repeat():
        return False
    # `torch.set_default_device` is a mode too, which changes nothing here.
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return all(type(mode) is DeviceContext for mode in modes)


def _is_understood(layer: nn.Module, known: KnownModules, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether its modules are of known classes, whose methods are what they were, and have no other attributes."""
    if known.is_of_known_classes is None:
        kinds = set(map(type, layer.modules())).difference(classes, _NOT_CALLED)
        ours = all(kind in _FORWARD and kind.forward is _FORWARD[kind] for kind in kinds)
        known.is_of_known_classes = ours and known.odd <= _NOT_CALLED and known.lie_in_buffers
    return known.is_of_known_classes


def _run(
    compute: Callable[..., Tensor], hidden_states: Tensor, arguments: dict[str, Any], state: Any, names: Any
) -> tuple[Tensor | None, ...]:
    """The output, and what the cache's layer then holds."""
    out = compute(hidden_states, **arguments)
    return (out,) if state is None else (out, *state.state(names))


def _state_of(cache: Cache, index: int) -> DynamicForgettingLayer | StaticForgettingLayer | None:
    """The layer of a cache, if it is all of the cache that takes part, and its methods are its class's."""
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading or "update" in vars(cache):
        return None
    layer = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) not in (DynamicForgettingLayer, StaticForgettingLayer) or "update" in vars(layer):
        return None
    return layer
