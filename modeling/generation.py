"""FoX's part of `generate`: caches that keep forget gates, padding masks, fused projections, and what is refused."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from .arguments import MASK_ARGUMENTS, refuse_unknown
from .cache.dynamic import DynamicForgettingLayer
from .cache.paged import FoxPagedCache
from .configuration_fox import FoxConfig
from .decoding_graphs import decoding_graphs, holds_no_padding
from .decoding_graphs import running as running_graphs
from .layers.fused_projections import fuse_projections
from .layers.known_modules import KnownModules, can_be_known, known_modules
from .parallel.tensor_parallel import local_weights
from .token_layout import LAYER_TYPE, padding_mask, refuse_overflow
from .versions import CACHE, one_cache, with_one_cache


@contextlib.contextmanager
def decoding_mode(model: nn.Module, known: KnownModules | None = None) -> Iterator[None]:
    """Within it, projections are fused where they can be, and the weights of a tensor-parallel model are local.

    Calls do not look again whether projections are what was fused: within it weights are changed in place only. The
    buffers outlive it, so that the next entry finds them at the same addresses.

    Args:
        model: any module.
        known: its modules, if they are as this has left them before.
    """
    if known is None:
        changed = fuse_projections(model, uses="always")
    else:
        changed = [(x, x.uses_fused) for x in known.fused if x.uses_fused != "always"]
        for module, _ in changed:
            module.uses_fused = "always"
    try:
        with local_weights(model) if known is None else contextlib.nullcontext():
            yield
    finally:
        for module, before in changed:
            module.uses_fused = before


def _check_free_dead_cache(asked: Any, cache: Any, generation_config: Any, assisted: bool) -> None:
    """Raise a `ValueError` unless ``free_dead_cache``, as `generate` was given it, can be done."""
    if asked is not None and not isinstance(asked, bool):
        raise ValueError(f"free_dead_cache must be True, False or None, as the configuration says, got {asked!r}")
    if asked is False and isinstance(cache, FoxPagedCache):
        raise ValueError(f"free_dead_cache must not be False with {CACHE} of type FoxPagedCache, which frees")
    other = None
    if cache is not None and not isinstance(cache, FoxPagedCache):
        other = f"{CACHE} of type {type(cache).__name__}"
    elif generation_config.cache_implementation is not None:
        other = f"cache_implementation={generation_config.cache_implementation!r}"
    elif generation_config.use_cache is False:
        other = "use_cache=False"
    elif assisted and cache is None:
        other = "assistant_model or prompt_lookup_num_tokens, which take back more tokens than its cache allows"
    if asked and other is not None:
        raise ValueError(
            f"free_dead_cache=True is for a cache of its own, FoxPagedCache, got it with {other}: give one of the two"
        )


def _without_single_tokens(size: int, tokens: int) -> int:
    """The least size of chunks, from ``size`` on, that leaves no chunk of one token of so many.

    A single token is taken for a decoding step, in which no sequence begins; but in a padded batch one may begin there,
    with the token that its attention sink stands for.
    """
    return next((x for x in range(max(size, 2), tokens) if tokens % x != 1), max(size, tokens))


class FoxGenerationMixin(GenerationMixin):
    """transformers' generation, with caches that keep forget gates."""

    config: FoxConfig
    # What `generate` knows of its modules.
    known: KnownModules | None = None

    # Its signature is that of what it wraps.
    @cast(Any, functools.wraps(GenerationMixin.generate, assigned=()))
    def generate(self, *args, **kwargs):
        """As in [`~transformers.GenerationMixin.generate`], with fused projections and local weights.

        On a GPU its steps are captured in CUDA graphs, unless the configuration says ``decoding_graphs=False``.

        Args:
            free_dead_cache: use the evicting cache, [`FoxPagedCache`], or do not; by default as the `GenerationConfig`
                says, which takes it too, or else the model's configuration.

        Raises:
            ValueError: ``free_dead_cache=True`` with another cache, ``cache_implementation``, ``use_cache=False`` or
                assisted decoding; or ``cache_implementation="paged"``.
        """
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(
                "cache_implementation must not be 'paged', transformers' continuous batching, whose cache keeps no "
                "forget gates: free_dead_cache=True is for FoX's evicting cache"
            )
        known = self._known_modules()
        own_masks = kwargs.get("custom_generate") is not None
        with decoding_mode(cast(Any, self), known), decoding_graphs(self, known, own_masks):
            return super().generate(*args, **with_one_cache(kwargs))

    def _known_modules(self) -> KnownModules | None:
        """Those of the last call, if nothing has changed since; else of this one, once what can be fused is fused."""
        model = cast(Any, self)
        if self.known is not None and self.known.weights(model) is not None:
            return self.known
        if not can_be_known(model):
            self.known = None
            return None
        # What is fused moves, so before anything is known; `decoding_mode` has calls read it.
        for module, before in fuse_projections(model, uses="always"):
            module.uses_fused = before
        return known_modules(model)[0]

    def _prepare_generation_config(self, *args, **kwargs):
        """As in transformers, which would take a keyword that it does not know for one of the model's."""
        given = kwargs.pop("free_dead_cache", None)
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if given is not None:
            generation_config.free_dead_cache = given
        return generation_config, model_kwargs

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Captured steps need no compilation; who passes a `compile_config` gets it.
        graphs = running_graphs(self)
        if generation_config.compile_config is None and graphs is not None:
            return False
        compiles = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if compiles and graphs is not None:
            graphs.stand_aside()
        return compiles

    @cast(Any, functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=()))
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args, **kwargs):
        """As in transformers, after a check that the cache has room; the model cannot read a length on the device."""
        cache = kwargs.get(CACHE)
        room = -1 if cache is None else cache.get_max_length(0)
        if 0 <= room < input_ids.shape[1]:
            new = kwargs.get("next_sequence_length") or 1
            refuse_overflow(input_ids.shape[1] - new, room, new)
        # `generate` passes on arguments of its own, for `stop_strings`, which the model would refuse.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: FoxConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """The padding mask at the fixed length of a static cache, so that a compiled step sees one shape.

        Called by `generate` before each step where the cache can be compiled; so a paged cache makes room here, outside
        of what is compiled.
        """
        refuse_unknown(FoxGenerationMixin.create_masks_for_generate, kwargs, MASK_ARGUMENTS)
        cache = one_cache(cache, past_key_values)
        batch, length = inputs_embeds.shape[:2]
        if cache is not None and holds_no_padding(cache):
            attention_mask = None
        keys = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        past = 0 if cache is None else cache.get_seq_length()
        mask = padding_mask(attention_mask, batch, past, length, keys, inputs_embeds.device)
        # A prompt's: a step does not wait for the device.
        if mask is not None and isinstance(past, int) and mask.all():
            mask = None
        if isinstance(cache, FoxPagedCache):
            cache.reserve(length)
        return {LAYER_TYPE: mask}

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if (graphs := running_graphs(self)) is not None:
            graphs.longest = max_cache_length
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        cache = model_kwargs.get(CACHE)
        if assisted and isinstance(cache, Cache) and int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"{CACHE} must be empty with assistant_model or prompt_lookup_num_tokens, it holds "
                f"{int(cache.get_seq_length())} tokens, which transformers would feed to it again: leave {CACHE} out, "
                "or generate without assistance"
            )
        # Assisted decoding crops more tokens than the evicting cache allows.
        rolls_back = assisted or generation_config.is_assistant
        asked = getattr(generation_config, "free_dead_cache", None)
        if not generation_config.is_assistant:
            _check_free_dead_cache(asked, cache, generation_config, assisted)
        wanted = self.config.free_dead_cache if asked is None else asked
        wanted = wanted and generation_config.use_cache is not False and not rolls_back
        if wanted and cache is None and generation_config.cache_implementation is None:
            # Room for later turns with this cache costs little.
            room = max(max_cache_length, generation_config.max_cache_len or 0, self.config.max_position_embeddings)
            model_kwargs[CACHE] = FoxPagedCache(self.config, room)
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if graphs is not None:
            graphs.take_prompt(model_kwargs.get(CACHE), model_kwargs.get("attention_mask"))

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None:
            cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
            for layer in getattr(cache, "layers", ()):
                if isinstance(layer, DynamicForgettingLayer):
                    layer.expected = input_ids.shape[1]
            size = generation_config.prefill_chunk_size
            if self.config.sink_token_id is not None and mask is not None and cache is not None and size > 0:
                held = int(cache.get_seq_length()) if mask.shape[1] == input_ids.shape[1] else 0
                generation_config = copy.copy(generation_config)
                generation_config.prefill_chunk_size = _without_single_tokens(size, input_ids.shape[1] - held)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    # Each entry point to continuous batching, which would otherwise fail inside transformers.

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: raises NotImplementedError."""
        self._refuse_continuous_batching()

    def continuous_batching_context_manager(self, *args, **kwargs):
        """Not supported: raises NotImplementedError."""
        self._refuse_continuous_batching()

    def generate_batch(self, *args, **kwargs):
        """Not supported: raises NotImplementedError."""
        self._refuse_continuous_batching()

    def _refuse_continuous_batching(self) -> None:
        raise NotImplementedError(
            "FoX has no continuous batching, whose cache keeps no forget gates: call generate(input_ids, "
            "attention_mask=attention_mask) with prompts padded on their left"
        )


__all__ = ["FoxGenerationMixin"]
