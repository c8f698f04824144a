"""The attention of a FoX block, with its projections, gates, norms and token shift.

The attention of one FoX (Pro) block (arXiv 2503.02130); every part but q, k, v and o is a switch of the configuration::

    x -> norm -+-> q ----------> q_norm -+
               +-> k -> shift -> k_norm -+-> forgetting attention -> output_norm -> * -> o
               +-> v -> shift -----------+                                          |
               +-> forget gate ----------+                                          |
               +-> output gate -----------------------------------------------------+
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...kernels.decay import Decay, accumulate, hide_keys, skip_keys
from ...kernels.elementwise.gated_norm import ACTIVATIONS
from ...kernels.pruning.rules import PruningRule
from ..arguments import DECODER_ARGUMENTS, refuse_unknown
from ..cache.layer_types import ForgettingLayer, check_cache, layer_of
from ..cache.paged import FoxPagedCache
from ..cache.static import StaticForgettingLayer
from ..cache.view import CacheView
from ..configuration_fox import DEFAULT_IMPLEMENTATION, FoxConfig
from ..parallel.tensor_parallel import local_part, sum_gradients
from ..token_layout import TokenLayout, token_layout
from ..versions import CACHE, one_cache
from .forget_gate import make_forget_gate
from .fused_projections import FusableProjections, has_hooks, is_called_plainly
from .logit_bounds import qk_norm_bounds
from .norm import FoxRMSNorm
from .rotary import FoxRotaryEmbedding, apply_rotary
from .token_shift import FoxTokenShift

if TYPE_CHECKING:
    from ...kernels.backends import Backend
    from ...kernels.elementwise.prologue import PrologueInputs

# By the class of the module that computes them.
_FUSED_ACTIVATIONS = {type(ACT2FN[name]): name for name in ACTIVATIONS}


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
        if not isinstance(layer_idx, int) or layer_idx < 0:
            raise ValueError(f"layer_idx must be an integer from 0, got {layer_idx!r}")
        self.config = config
        self.layer_idx = layer_idx
        self.use_rope = config.has_rope(layer_idx)
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

        Returns:
            ``[B, T, hidden]`` and the attention weights ``[B, H, T, Tk]`` (None unless `eager`).

        Raises:
            TypeError: an argument is not known here; the message names it.
            ValueError: an argument is not as above; the message names it.
        """
        refuse_unknown(FoxAttention.forward, kwargs, DECODER_ARGUMENTS)
        cache = one_cache(cache, past_key_values)
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
            position_embeddings = self.rotary_emb(
                hidden_states, layout.positions[None] if position_ids is None else position_ids
            )
        cache_layer = None if cache is None else layer_of(cache, self.layer_idx)
        # On the first call the cache is empty: nothing to search, and no page is allocated.
        has_past = cache_layer is not None and cache_layer.is_initialized
        fused = self.project(hidden_states)
        q, k, v = self._queries_keys_values(
            hidden_states, fused, layout, cache_layer, position_embeddings if self.use_rope else None
        )
        log_f = self.log_forget_gates(hidden_states)

        # Imported when they are used, since importing the kernels takes time.
        from ...kernels.backends import backend_of
        from ..attention_backends import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, prepare

        backend, view = backend_of(q), None
        few = has_past and self._can_use_decode_kernels(q, k, backend)
        dropout = self.attention_dropout if self.training else 0.0
        if not few and layout.shards is None and self.implementation == DEFAULT_IMPLEMENTATION:
            prepare(self, q, k, v, log_f, dropout, backend)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layout.shards is not None:
            c, kv_start = layout.shards.accumulate(layout.mask_gates(log_f), layout.starts, backend)
            decay = Decay(c, c, kv_start, layout.positions)
        elif cache is None or cache_layer is None:
            log_f = layout.mask_gates(log_f)
            c, kv_start = accumulate(log_f, starts=layout.starts, sum_gates=backend.sum_gates)
            decay = Decay(c, c, kv_start, layout.positions)
        else:
            cache_layer.append_gates(log_f, layout, backend, few)
            k, v = cache.update(k, v, self.layer_idx, few=few)
            decay, view = cache_layer.decay(few, own_block=self._bound_needs_keys())
        decay, real = _without_padding(decay, view, layout)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention_forward)
        options = {"real": real, "view": view, "shards": layout.shards, "backend": backend}
        out, weights = attend(self, q, k, v, None, decay=decay, scaling=self.scaling, dropout=dropout, **options)

        return self.o_proj(self._normalize_and_gate(out, hidden_states, fused)), weights

    def _normalize_and_gate(self, out: Tensor, hidden_states: Tensor, fused: dict[str, Tensor]) -> Tensor:
        """Output norm and output gate, where the configuration has them: ``[B, T, H, D] -> [B, T, H * D]``.

        Args:
            out: of attention.
            hidden_states: ``[B, T, hidden]``.
            fused: as for `_queries_keys_values`.
        """
        if not self.config.use_output_gate:
            return (self.output_norm(out) if self.config.use_output_norm else out).flatten(-2)
        gate = fused["output_gate"] if fused else self.output_gate(hidden_states)
        if self.config.use_output_norm:
            activation = _FUSED_ACTIVATIONS.get(type(self.output_gate_act))
            # A module that was put in place of one of the two, or a hook on it, is to see what is its own.
            own = isinstance(self.output_norm, FoxRMSNorm) and activation is not None
            if own and not (has_hooks(self.output_norm) or has_hooks(self.output_gate_act)):
                return self.output_norm(out, gate, activation).flatten(-2)
            out = self.output_norm(out)
        return out.flatten(-2) * self.output_gate_act(gate)

    def _queries_keys_values(
        self,
        hidden_states: Tensor,
        fused: dict[str, Tensor],
        layout: TokenLayout,
        cache_layer: ForgettingLayer | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``[B, T, heads, D]``: projected, shifted, normalized, rotated.

        Args:
            hidden_states: ``[B, T, hidden]``.
            fused: outputs of the projections by name, if they were computed as one matmul; else empty.
            layout: of the tokens.
            cache_layer: this layer's cache, or None.
            position_embeddings: with RoPE, else None.
        """
        q, k, v = (
            fused[name] if fused else getattr(self, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj")
        )
        # The number of heads is that of the projections: under tensor parallelism, of this rank.
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if isinstance(cache_layer, StaticForgettingLayer) and not cache_layer.is_initialized:
            cache_layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        key_logits, value_logits = fused.get("key_shift.proj"), fused.get("value_shift.proj")
        # Imported when it is used, since importing the kernels takes time.
        from ...kernels.backends import PYTORCH, backend_of

        backend = backend_of(q)
        if backend is not PYTORCH and self._can_use_prologue(layout):
            inputs = self._prologue_inputs((q, k, v), hidden_states, fused, layout, cache_layer, position_embeddings)
            prepared = backend.prologue(inputs, self.q_norm.eps if inputs.q_weight is not None else 0.0)
            if prepared is not None:
                for name, states in (("key", k), ("value", v)):
                    if cache_layer is not None and getattr(self.config, f"use_{name}_shift"):
                        cache_layer.append_unshifted(name, states, layout)
                return prepared
            key_logits, value_logits = inputs.key_logits, inputs.value_logits
        if self.config.use_key_shift:
            k = self.key_shift(hidden_states, k, layout, cache_layer, "key", key_logits)
        if self.config.use_value_shift:
            v = self.value_shift(hidden_states, v, layout, cache_layer, "value", value_logits)
        if self.config.qk_norm == "all_heads":
            q, k = (norm(x.flatten(-2)).view_as(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        elif self.config.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            # To the dtype of v: under autocast the angles are float32, and keys are cached beside values.
            q, k = (x.to(v.dtype) for x in apply_rotary(q, k, *position_embeddings))
        return q, k, v

    def _can_use_prologue(self, layout: TokenLayout) -> bool:
        """Whether one kernel may take the place of the modules between projections and attention."""
        if torch.compiler.is_compiling() or self.implementation != DEFAULT_IMPLEMENTATION or layout.shards is not None:
            return False
        classes = {"q_norm": FoxRMSNorm, "k_norm": FoxRMSNorm, "key_shift": FoxTokenShift, "value_shift": FoxTokenShift}
        used = [(getattr(self, name), made) for name, made in classes.items() if hasattr(self, name)]
        return self.config.qk_norm != "all_heads" and all(is_called_plainly(x, made) for x, made in used)

    def _prologue_inputs(
        self,
        states: tuple[Tensor, Tensor, Tensor],
        hidden_states: Tensor,
        fused: dict[str, Tensor],
        layout: TokenLayout,
        cache_layer: ForgettingLayer | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> "PrologueInputs":
        """What one kernel takes of projected queries, keys and values, and of the modules whose place it takes."""
        from ...kernels.elementwise.prologue import PrologueInputs

        inputs = PrologueInputs(*states, starts=layout.starts, last_real=layout.last_real)
        for name in ("key", "value"):
            if getattr(self.config, f"use_{name}_shift"):
                logits = fused.get(f"{name}_shift.proj")
                if logits is None:
                    logits = getattr(self, f"{name}_shift").proj(hidden_states)
                past = None if cache_layer is None else cache_layer.previous_unshifted(name, layout)
                if past is not None:
                    # What autograd keeps of a static cache must be a copy: the cache writes the next state over it.
                    past = past[:, -1].clone() if torch.is_grad_enabled() else past[:, -1]
                given: dict[str, Any] = {f"{name}_logits": logits, f"{name}_past": past}
                inputs = inputs._replace(**given)
        if self.config.qk_norm != "none":
            q_weight, k_weight = (sum_gradients(local_part(x.weight), x.ranks) for x in (self.q_norm, self.k_norm))
            inputs = inputs._replace(q_weight=q_weight, k_weight=k_weight)
        if position_embeddings is not None:
            inputs = inputs._replace(cos=position_embeddings[0], sin=position_embeddings[1])
        return inputs

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
    def implementation(self) -> str:
        """The attention implementation; the configuration of a standalone layer may name none."""
        return self.config._attn_implementation or DEFAULT_IMPLEMENTATION

    @property
    def outputs_stay_sharded(self) -> bool:
        """Whether under tensor parallelism each rank goes on with its own part of the projections."""
        return self.config.qk_norm != "all_heads"

    def log_forget_gates(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, hidden] -> [B, T, Hf]`` log forget gates, in float32 (float64 for a float64 model)."""
        if self.config.forget_gate == "none":
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            return hidden_states.new_zeros(*hidden_states.shape[:-1], 1, dtype=dtype)
        return nn.functional.logsigmoid(self.forget_gate(hidden_states))

    def _bound_needs_keys(self) -> bool:
        """Whether pruning needs a bound of the logits that the weights do not give."""
        return PruningRule(self.config.acp_rule).reads_bound and (self.config.qk_norm == "none" or self.rope_stretches)

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

    @property
    def rope_stretches(self) -> bool:
        """Whether RoPE changes the lengths of queries and keys in this layer."""
        rope_type = (self.config.rope_parameters or {}).get("rope_type")
        return self.use_rope and rope_type in ("yarn", "longrope")

    def _can_use_decode_kernels(self, q: Tensor, k: Tensor, backend: "Backend") -> bool:
        """Whether the decode kernels take these queries and new keys, ``[B, Tq, H, D]`` and ``[B, T, G, D]``."""
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        dropout = self.training and self.attention_dropout > 0.0
        if self.implementation != DEFAULT_IMPLEMENTATION or differentiable or dropout:
            return False
        return backend.can_decode(q, k.shape[2])


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
