"""The attention of a FoX block, with its projections, gates, norms and token shift.

The attention of one FoX (Pro) block (arXiv 2503.02130); every part but q, k, v and o is a switch of the configuration::

    x -> norm -+-> q ----------> q_norm -+
               +-> k -> shift -> k_norm -+-> forgetting attention -> output_norm -> * -> o
               +-> v -> shift -----------+                                          |
               +-> forget gate ----------+                                          |
               +-> output gate -----------------------------------------------------+
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...kernels.decay import Decay, hide_keys, skip_keys
from ...kernels.elementwise.gated_norm import ACTIVATIONS
from ...kernels.elementwise.prologue import PrologueInputs
from ..arguments import DECODER_ARGUMENTS, refuse_unknown
from ..attention_settings import AttentionSettings, attention_settings
from ..cache.layer_types import ForgettingLayer, check_cache, layer_of
from ..cache.paged import FoxPagedCache
from ..cache.static import StaticForgettingLayer, state_sizes
from ..cache.view import CacheView
from ..configuration_fox import DEFAULT_IMPLEMENTATION, FoxConfig
from ..token_layout import TokenLayout, token_layout
from ..versions import CACHE, one_cache
from .attention_sink import FoxAttentionSink
from .forget_gate import FoxForgetGate, make_forget_gate
from .fused_projections import FusableProjections, call_linear, has_hooks, have_plain_forwards
from .logit_bounds import qk_norm_bounds
from .norm import FoxRMSNorm
from .rotary import FoxRotaryEmbedding, apply_rotary
from .token_shift import FoxTokenShift

if TYPE_CHECKING:
    from ...kernels.backends import Backend

# By the class of the module that computes them.
FUSED_ACTIVATIONS = {type(ACT2FN[name]): name for name in ACTIVATIONS}
# Queries, keys and values of all heads, ``[B, T, H or G, D]``.
_States = tuple[Tensor, Tensor, Tensor]


class FoxAttention(FusableProjections):
    """Forgetting attention with its projections, gates, norms and token shift; in a FoX model or in one of your own.

    Args:
        config: sizes, switches, ``attn_implementation`` (by default ``fox``) and pruning.
        layer_idx: index from 0 of this layer in a cache, and in ``nope_layers``.

    Example:
        >>> attention = FoxAttention(FoxConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1), layer_idx=0)
        >>> cache = DynamicCache(config=attention.config)
        >>> with torch.no_grad():
        ...     prompt, _ = attention(torch.randn(2, 10, 64), cache=cache)
        ...     step, _ = attention(torch.randn(2, 1, 64), cache=cache)
        >>> prompt.shape, step.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 1, 64]))
    """

    projections = ("q_proj", "k_proj", "v_proj", "output_gate", "key_shift.proj", "value_shift.proj")

    def __init__(self, config: FoxConfig, layer_idx: int) -> None:
        super().__init__()
        if getattr(config, "model_type", None) != FoxConfig.model_type:
            raise ValueError(f"config must be a FoxConfig, got {type(config).__name__}")
        layers = config.num_hidden_layers
        if not isinstance(layer_idx, int) or not 0 <= layer_idx < layers:
            raise ValueError(
                f"layer_idx must be an integer from 0 to {layers - 1}, of {layers} layers, got {layer_idx!r}"
            )
        self.config = config
        self.layer_idx = layer_idx
        self.use_rope = config.has_rope(layer_idx)
        rope_type = (config.rope_parameters or {}).get("rope_type")
        # Whether RoPE changes the lengths of queries and keys in this layer.
        self.rope_stretches = self.use_rope and rope_type in ("yarn", "longrope")
        # What the modules below are made for; a configuration is slow to read.
        self.qk_norm = config.qk_norm
        self.has_forget_gate = config.forget_gate != "none"
        self.has_sink = config.attention_sink != "none"
        self.has_output_norm, self.has_output_gate = config.use_output_norm, config.use_output_gate
        self.shifted = state_sizes(config)[2]
        # Else keys or values are cached as they are projected.
        changes_keys = self.use_rope or self.qk_norm != "none" or "key" in self.shifted
        self.reads_views = changes_keys and "value" in self.shifted
        hidden, (heads, kv_heads, self.head_dim) = config.hidden_size, config.heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        # For a standalone layer; a model computes the angles once for all of its layers.
        if self.use_rope:
            self.rotary_emb = FoxRotaryEmbedding(config)

        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.attention_bias)

        if config.forget_gate != "none":
            self.forget_gate = make_forget_gate(config)
        if self.has_sink:
            self.sink = FoxAttentionSink(config)
        if config.qk_norm != "none":
            shared = config.qk_norm == "shared"
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.q_norm = FoxRMSNorm(self.head_dim * (1 if shared else heads), eps)
            self.k_norm = FoxRMSNorm(self.head_dim * (1 if shared else kv_heads), eps)
        if config.use_key_shift:
            self.key_shift = FoxTokenShift(hidden, kv_heads)
        if config.use_value_shift:
            self.value_shift = FoxTokenShift(hidden, kv_heads)
        if config.use_output_norm:
            self.output_norm = FoxRMSNorm(heads * self.head_dim, config.rms_norm_eps)
        if config.use_output_gate:
            self.output_gate = nn.Linear(hidden, heads * self.head_dim, bias=False)
            self.output_gate_act = ACT2FN[config.output_gate_act]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        past_key_values: Cache | None = None,
        layout: TokenLayout | None = None,
        settings: AttentionSettings | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: ``[B, T, hidden]``.
            attention_mask: ``[B, Tk]``, nonzero for real tokens and zero for padding anywhere, over all tokens so far.
            position_ids: ``[B or 1, T]``; read by RoPE, and where they restart, with an empty cache, a new packed
                sequence begins.
            cache: of earlier tokens; takes in these. ``DynamicCache(config=config)`` or ``StaticCache(config=config,
                max_cache_len=...)``, of which this layer uses the part of its ``layer_idx``.
            position_embeddings: cosines and sines ``[B or 1, T, rotated size]``, with RoPE; by default those of
                ``position_ids``.
            cu_seq_lens_q, cu_seq_lens_k: ``[N + 1]`` offsets of the sequences packed in a batch of one.
            past_key_values: the older name of ``cache``.
            layout: the above as a `TokenLayout`, computed once for all layers of a model.
            settings: of this call, by default as the configuration is now.

        Returns:
            ``[B, T, hidden]`` and the attention weights ``[B, H, T, Tk]`` (None unless `eager`).

        Raises:
            TypeError: an argument is not known here; the message names it.
            ValueError: an argument is not as above; the message names it.
        """
        if kwargs:
            refuse_unknown(FoxAttention.forward, kwargs, DECODER_ARGUMENTS)
        if past_key_values is not None:
            cache = one_cache(cache, past_key_values)
        if settings is None:
            settings = attention_settings(self.config, self.training or torch.is_grad_enabled())
        if layout is None:
            self.check_hidden_states(hidden_states)
            self._check_standalone(hidden_states, cache)
            layout = token_layout(
                (hidden_states.shape[0], hidden_states.shape[1]),
                hidden_states.device,
                attention_mask,
                position_ids,
                (cu_seq_lens_q, cu_seq_lens_k),
                cache,
                self.layer_idx,
            )
        if self.use_rope and position_embeddings is None:
            if position_ids is None:
                position_ids = layout.rope_positions(counts_padding=not self.has_sink)
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        cache_layer = None if cache is None else layer_of(cache, self.layer_idx)
        # On the first call the cache is empty: nothing to search, and no page is allocated.
        has_past = cache_layer is not None and cache_layer.is_initialized
        fused = self.project(hidden_states)
        states = self._heads(hidden_states, fused)
        if isinstance(cache_layer, StaticForgettingLayer) and not cache_layer.is_initialized:
            cache_layer.make_buffers(states[2], *states[2].shape[2:])

        # Imported when they are used, since importing the kernels takes time.
        from ...kernels.backends import PYTORCH, backend_of
        from ..attention_implementations import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, prepare

        backend, view = backend_of(states[0]), None
        is_fox = settings.implementation == DEFAULT_IMPLEMENTATION
        angles = position_embeddings if self.use_rope else None
        on_kernels = is_fox and layout.shards is None and backend is not PYTORCH
        q, k, v = self._queries_keys_values(
            states, hidden_states, fused, layout, cache_layer, angles, backend if on_kernels else None
        )
        log_f = self.log_forget_gates(hidden_states)

        use_decode_kernel = (
            has_past and is_fox and layout.after_sink is None and self._can_use_decode_kernels(q, k, backend)
        )
        dropout = self.attention_dropout if self.training else 0.0
        if is_fox and not use_decode_kernel and layout.shards is None:
            prepare(self, settings, q, k, v, log_f, dropout, backend)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is None or cache_layer is None:
            c, kv_start = layout.accumulate(log_f, backend)
            decay = Decay(c, c, kv_start, layout.positions)
        else:
            cache_layer.append_gates(log_f, layout, backend, use_decode_kernel)
            k, v = cache.update(k, v, self.layer_idx, use_decode_kernel=use_decode_kernel)
            # The bound of the logits that the rule reads, where the weights give none.
            needs_keys = settings.reads_bound and (self.qk_norm == "none" or self.rope_stretches)
            decay, view = cache_layer.decay(use_decode_kernel, own_block=needs_keys)
        decay, real = _without_padding(decay, view, layout)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(settings.implementation, eager_attention_forward)
        options = {"real": real, "view": view, "shards": layout.shards, "backend": backend, "settings": settings}
        options["sink"] = self.sink(q) if self.has_sink else None
        out, weights = attend(self, q, k, v, None, decay=decay, scaling=self.scaling, dropout=dropout, **options)

        out = self._normalize_and_gate(out, hidden_states, fused)
        return call_linear(self.o_proj, out) if use_decode_kernel else self.o_proj(out), weights

    def _normalize_and_gate(self, out: Tensor, hidden_states: Tensor, fused: dict[str, Tensor]) -> Tensor:
        """Output norm and output gate, where the configuration has them: ``[B, T, H, D] -> [B, T, H * D]``.

        Args:
            out: of attention.
            hidden_states: ``[B, T, hidden]``.
            fused: as for `_heads`.
        """
        if not self.has_output_gate:
            return (self.output_norm(out) if self.has_output_norm else out).flatten(-2)
        gate = fused["output_gate"] if fused else self.output_gate(hidden_states)
        activate = self.output_gate_act
        if self.has_output_norm:
            norm, activation = self.output_norm, FUSED_ACTIVATIONS.get(type(activate))
            # A module that was put in place of one of the two, or a hook on it, is to see what is its own.
            own = isinstance(norm, FoxRMSNorm) and activation is not None
            if own and not (has_hooks(norm) or has_hooks(activate)):
                return norm(out, gate, activation).flatten(-2)
            out = norm(out)
        return out.flatten(-2) * activate(gate)

    def _heads(self, hidden_states: Tensor, fused: dict[str, Tensor]) -> _States:
        """Projected queries, keys and values.

        Args:
            hidden_states: ``[B, T, hidden]``.
            fused: outputs of the projections by name, if they were computed as one matmul; else empty.
        """
        if fused:
            q, k, v = fused["q_proj"], fused["k_proj"], fused["v_proj"]
        else:
            q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        # The number of heads is that of the projections: under tensor parallelism, of this rank.
        size = (-1, self.head_dim)
        return q.view(*q.shape[:-1], *size), k.view(*k.shape[:-1], *size), v.view(*v.shape[:-1], *size)

    def _queries_keys_values(
        self,
        states: _States,
        hidden_states: Tensor,
        fused: dict[str, Tensor],
        layout: TokenLayout,
        cache_layer: ForgettingLayer | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        backend: "Backend | None",
    ) -> _States:
        """Queries, keys and values as attention takes them: shifted, normalized, rotated.

        Args:
            states: as `_heads` returns them.
            hidden_states: ``[B, T, hidden]``.
            fused: as for `_heads`.
            layout: of the tokens.
            cache_layer: this layer's cache, or None; takes in what is unshifted.
            position_embeddings: with RoPE, else None.
            backend: whose kernel may take the place of all this; None for none.
        """
        logits = fused.get("key_shift.proj"), fused.get("value_shift.proj")
        if backend is not None and self._can_use_prologue():
            inputs = self._prologue_inputs(states, hidden_states, logits, position_embeddings)
            inputs = self._with_past(inputs, layout, cache_layer)
            prepared = backend.prologue(inputs, self.qk_norm_eps)
            if prepared is not None:
                if cache_layer is not None:
                    for name in self.shifted:
                        cache_layer.append_unshifted(name, states[1 if name == "key" else 2], layout)
                return prepared
            logits = inputs.key_logits, inputs.value_logits
        q, k, v = states
        if "key" in self.shifted:
            k = self.key_shift(hidden_states, k, layout, cache_layer, "key", logits[0])
        if "value" in self.shifted:
            v = self.value_shift(hidden_states, v, layout, cache_layer, "value", logits[1])
        return self._normalize_and_rotate(q, k, v, position_embeddings)

    def _normalize_and_rotate(
        self, q: Tensor, k: Tensor, v: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> _States:
        """QK-norm and RoPE, where the layer has them; all ``[B, T, H or G, D]``, keys and values already shifted."""
        if self.qk_norm == "all_heads":
            q, k = (norm(x.flatten(-2)).view_as(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        elif self.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            # To the dtype of v: under autocast the angles are float32, and keys are cached beside values.
            q, k = (x.to(v.dtype) for x in apply_rotary(q, k, *position_embeddings))
        return q, k, v

    def _can_use_prologue(self) -> bool:
        """Whether one kernel may take the place of the modules between projections and attention."""
        if torch.compiler.is_compiling() or self.qk_norm == "all_heads":
            return False
        norms = [] if self.qk_norm == "none" else [self.q_norm, self.k_norm]
        shifts = [getattr(self, f"{name}_shift") for name in self.shifted]
        return have_plain_forwards(norms, FoxRMSNorm) and have_plain_forwards(shifts, FoxTokenShift)

    def _prologue_inputs(
        self,
        states: _States,
        hidden_states: Tensor,
        logits: tuple[Tensor | None, Tensor | None],
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> "PrologueInputs":
        """What one kernel takes of the modules whose place it takes, but for the states before; arguments as for
        `_queries_keys_values`."""
        key_logits, value_logits = logits
        if "key" in self.shifted and key_logits is None:
            key_logits = self.key_shift.proj(hidden_states)
        if "value" in self.shifted and value_logits is None:
            value_logits = self.value_shift.proj(hidden_states)
        weights: list[Tensor | None] = [None, None]
        if self.qk_norm != "none":
            weights = [self.q_norm.local_weight(), self.k_norm.local_weight()]
        cos, sin = (None, None) if position_embeddings is None else position_embeddings
        return PrologueInputs(*states, key_logits, value_logits, None, None, weights[0], weights[1], cos, sin)

    def _with_past(
        self, inputs: "PrologueInputs", layout: TokenLayout, cache_layer: ForgettingLayer | None
    ) -> "PrologueInputs":
        """``inputs`` with the states before them, and where those lie."""
        held = None if cache_layer is None else cache_layer.unshifted_buffer
        # Autograd would keep what the cache overwrites.
        if held and not torch.is_grad_enabled():
            key_past, value_past, past_slot = held.get("key"), held.get("value"), layout.slots
        else:
            key_past = _last_unshifted("key", layout, cache_layer) if "key" in self.shifted else None
            value_past = _last_unshifted("value", layout, cache_layer) if "value" in self.shifted else None
            past_slot = None
        return inputs._replace(
            key_past=key_past,
            value_past=value_past,
            starts=layout.starts,
            last_real=layout.last_real,
            past_slot=past_slot,
        )

    def check_hidden_states(self, hidden_states: Tensor) -> None:
        """Raise a `ValueError` unless they are ``[B, T, hidden]`` with at least one token."""
        size = self.config.hidden_size
        if hidden_states.ndim != 3 or hidden_states.shape[1] == 0 or hidden_states.shape[2] != size:
            raise ValueError(
                f"hidden_states must be [B, T, {size}] with at least one token, got shape {list(hidden_states.shape)}"
            )

    def _check_standalone(self, hidden_states: Tensor, cache: Cache | None) -> None:
        """Raise a `ValueError` unless a standalone layer can take these."""
        if cache is not None:
            check_cache(cache, self.config, len(hidden_states), self.layer_idx + 1)
            if isinstance(cache, FoxPagedCache):
                raise ValueError(
                    f"{CACHE} must be a DynamicCache or a StaticCache for a standalone layer: "
                    "the pages of a FoxPagedCache are those of all layers"
                )

    @property
    def qk_norm_eps(self) -> float:
        """Of QK-norm as its modules have it now; 0 without one."""
        return 0.0 if self.qk_norm == "none" else self.q_norm.eps

    @property
    def outputs_stay_sharded(self) -> bool:
        """Whether under tensor parallelism each rank goes on with its own part of the projections."""
        return self.qk_norm != "all_heads"

    def log_forget_gates(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, hidden] -> [B, T, Hf]`` log forget gates, in float32 (float64 for a float64 model)."""
        if not self.has_forget_gate:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            return hidden_states.new_zeros(*hidden_states.shape[:-1], 1, dtype=dtype)
        gate = self.forget_gate
        plain = not torch.compiler.is_compiling() and have_plain_forwards([gate], FoxForgetGate)
        if plain and isinstance(gate, FoxForgetGate):
            return gate.forward(hidden_states, log_sigmoid=True)
        return nn.functional.logsigmoid(gate(hidden_states))

    def logit_bound(self, dtype: torch.dtype) -> Tensor | None:
        """Bound of ``|scale * q . k|`` by the weights of QK-norm, ``[H]`` or ``[1]``; None as for `norm_bounds`.

        Args:
            dtype: of queries and keys; the bound is of their exact product, however it is computed.
        """
        bounds = self.norm_bounds(dtype)
        return None if bounds is None else bounds[0] * bounds[1] * abs(self.scaling)

    def norm_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Largest lengths of a query and of its keys after QK-norm, both ``[H]``, ``[1]`` if heads share the weights.

        None without QK-norm, and where RoPE changes lengths.
        """
        return qk_norm_bounds(self, dtype)

    def _can_use_decode_kernels(self, q: Tensor, k: Tensor, backend: "Backend") -> bool:
        """Whether the decode kernels take these queries and new keys, ``[B, Tq, H, D]`` and ``[B, T, G, D]``."""
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        dropout = self.training and self.attention_dropout > 0.0
        return not (differentiable or dropout) and backend.can_decode(q, k.shape[2])


def _last_unshifted(name: str, layout: TokenLayout, cache_layer: ForgettingLayer | None) -> Tensor | None:
    """``[B, G, D]`` unshifted ``name`` before the first token; None for zero."""
    past = None if cache_layer is None else cache_layer.previous_unshifted(name, layout)
    if past is None:
        return None
    # What autograd keeps of a static cache must be a copy: the cache writes the next state over it.
    return past[:, -1].clone() if torch.is_grad_enabled() else past[:, -1]


def _without_padding(decay: Decay, view: CacheView | None, layout: TokenLayout) -> tuple[Decay, Tensor | None]:
    """``decay`` with the keys of padding hidden and its queries fully masked; and the mask of the keys, or None."""
    real = layout.real_keys
    if real is None:
        return decay, None
    if layout.shards is not None:
        return layout.shards.hide_padding(decay, real), real
    assert layout.first_visible is not None, "there is padding"
    decay = skip_keys(decay, layout.first_visible)
    if view is not None:
        # Decode kernels hide padding among the keys themselves.
        return decay, real
    # The mask may be as long as a static cache: cut it to the keys so far.
    real = real[:, : decay.key.shape[-1]]
    return hide_keys(decay, real), real
