"""The kinds of cache layers: how transformers' caches build them, and which caches a model accepts.

Beside keys and values, a layer keeps the running sum of log gates of every key, the first key that is still visible,
with token shift the last unshifted key and value, and, where kernels run, the key statistics by which they find what to
read. transformers' caches hold one layer object per model layer and build it by layer type. `DynamicForgettingLayer`
and `StaticForgettingLayer` are what they build for a `FoxConfig`, so that ``DynamicCache(config=...)``,
``StaticCache(config=...)`` and ``generate`` work as for any model. `FoxPagedCache` builds its own layers, which evict.

Every operation of a cache moves the extra state too, except offloading: it is read before the layer is fetched back,
and is a twentieth of the keys and values. Static layers have the operations of transformers' `StaticLayer`: no
cropping, repeating or selecting.
"""

import functools
from typing import TYPE_CHECKING

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    DynamicLayer,
)

from ..token_layout import LAYER_TYPE
from ..versions import CACHE
from .dynamic import DynamicForgettingLayer
from .paged import FoxPagedCache, PagedForgettingLayer
from .static import StaticForgettingLayer, state_sizes

if TYPE_CHECKING:
    from ..configuration_fox import FoxConfig

ForgettingLayer = DynamicForgettingLayer | StaticForgettingLayer | PagedForgettingLayer
_LAYERS = (DynamicForgettingLayer, StaticForgettingLayer, PagedForgettingLayer)
_ACCEPTED = (
    "DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=...) "
    "or FoxPagedCache(model.config, max_cache_len=...)"
)


def register_layer_type(config: "FoxConfig") -> str:
    """Have transformers' caches build layers for ``config``; returns the layer type by which they know them.

    The type names the sizes of the state: it is all that a layer is built from, and a static one must know them.
    """
    sizes = state_sizes(config)
    gates, heads, shifted = sizes
    layer_type = "-".join(map(str, (LAYER_TYPE, gates, heads, *shifted)))
    if layer_type not in STATIC_LAYER_TYPE_MAPPING:
        DYNAMIC_LAYER_TYPE_MAPPING[layer_type] = DynamicForgettingLayer
        STATIC_LAYER_TYPE_MAPPING[layer_type] = functools.partial(StaticForgettingLayer, made_for=sizes)
    return layer_type


def check_cache(cache: Cache, config: "FoxConfig", batch: int, least: int | None = None) -> None:
    """Refuse a cache that does not fit; give an empty `DynamicCache()` the right layers.

    Args:
        cache: what the caller gave.
        config: of the model.
        batch: number of sequences.
        least: layers that the cache must have, for a layer without its model; by default those of the model.

    Raises:
        ValueError: the cache would drop the gates, is for other layers or heads, or holds another number of sequences.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ValueError(f"{CACHE} must be {_ACCEPTED}, got {type(cache).__name__}")
    if isinstance(cache, DynamicCache) and not layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = DynamicForgettingLayer
    grows = cache.layer_class_to_replicate is DynamicForgettingLayer
    foreign = {type(x).__name__ for x in layers if not isinstance(x, _LAYERS)}
    if foreign or not (layers or grows):
        raise ValueError(
            f"{CACHE} must keep the forget gates: pass {_ACCEPTED}, got {type(cache).__name__} "
            f"of {sorted(foreign) or 'no layers'} (such as prefix tuning makes: FoX trains with LoRA or prompt tuning)"
        )
    number = least or config.num_hidden_layers
    too_many = least is None and isinstance(cache, FoxPagedCache) and len(layers) > number
    if too_many or (len(layers) < number and not grows):
        raise ValueError(f"{CACHE} must have the model's {number} layers, got {len(layers)}")
    for layer in layers[:number]:
        if not isinstance(layer, DynamicForgettingLayer) and layer.made_for != (expected := state_sizes(config)):
            raise ValueError(
                f"{CACHE} must be made with the model's configuration: it is for (gates, key/value heads, shifted "
                f"states) of {layer.made_for}, and the model has {expected}"
            )
    held = layers[0].batch_size if layers and layers[0].is_initialized else None
    if held not in (None, batch):
        raise ValueError(f"{CACHE} holds a batch of {held} sequences, got one of {batch}: each cache is for one batch")


def layer_of(cache: Cache, layer_idx: int) -> ForgettingLayer:
    """The cache's layer for ``layer_idx``, made now if the cache makes its layers as they are needed."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]
