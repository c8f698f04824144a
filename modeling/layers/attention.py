"""The parts of a FoX block: norms, rotary embedding, token shift, attention, decoder layer.

The attention of one FoX (Pro) block (arXiv 2503.02130); every part but q, k, v and o is a switch of the configuration::

    x -> norm -+-> q ----------> q_norm -+
               +-> k -> shift -> k_norm -+-> forgetting attention -> output_norm -> * -> o
               +-> v -> shift -----------+                                          |
               +-> forget gate ----------+                                          |
               +-> output gate -----------------------------------------------------+
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...kernels.attention import hide_padding
from ...kernels.decay import Decay, accumulate, running_max
from ...kernels.pruning.rounding import logit_margin, stored_margin
from ..arguments import DECODER_ARGUMENTS, refuse_unknown
from ..attention_backends import ALL_ATTENTION_FUNCTIONS, DEFAULT_IMPLEMENTATION, decodes, eager_attention_forward
from ..cache.dynamic import ForgettingLayer, check_cache, layer_of
from ..cache.paged import FoxPagedCache
from ..cache.static import StaticForgettingLayer
from ..configuration_fox import FoxConfig
from ..fused_projections import FusedProjections, fused_products
from ..parallel.tensor_parallel import is_sharded, local_part, sum_gradients
from ..token_layout import TokenLayout, token_layout
from ..versions import CACHE, one_cache
from .forget_gate import make_forget_gate

# From this many elements on a tensor's float32 copies are worth computing twice.
_LARGE = 1 << 22
# How often RoPE rounds a pair of numbers: cosine and sine, which scales the pair; its products, which may lean together
# and count as the square root of 2; and their sum.
_ROPE_ROUNDINGS = 2.0 + 2.0**0.5
# Of inputs, weights and partial sums of a projection, by TF32, autocast to bfloat16 or sums in it.
_PRODUCT_MARGIN = 2.0**-7


def keeping_inputs_only(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; of large inputs backward computes the intermediate results again instead of keeping them.

    Norms and token shift compute in float32: in a model of 760M parameters what they would keep is 1.2 GB a layer at
    16,384 tokens, more than all matrix products. torch.compile decides for itself what to keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or inputs[0].numel() < _LARGE:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def activation_dtype(hidden_states: Tensor) -> torch.dtype:
    """Type of what a projection of ``hidden_states`` gives here and now."""
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


class FoxRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32; ``weight`` covers it, or several heads of it (``[heads * D]``)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        # Ranks that share the weight, each for heads of its own.
        self.ranks: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return keeping_inputs_only(self._normalize, x, sum_gradients(local_part(self.weight), self.ranks))

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        size = x.shape[-1:]
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # torch's kernel does the same in one launch instead of eight, and it is launches that eager inference waits
            # for. With a weight for each head it cannot round once at the end; autocast would have it return float32.
            if weight.shape == size and weight.dtype == x.dtype:
                return nn.functional.rms_norm(x, size, weight, self.eps).to(x.dtype)
            wide = nn.functional.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), size, None, self.eps)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # One weight for all heads, or one for each.
        weight = weight if weight.shape == size else weight.view(-1, x.shape[-1])
        return (weight * wide).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class FoxRotaryEmbedding(LlamaRotaryEmbedding):
    """transformers' rotary embedding; also rotates part of a head (`partial_rotary_factor`) for the default type."""

    @staticmethod
    def compute_default_rope_parameters(config: FoxConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        parameters = config.rope_parameters or {}
        size = int(config.heads[2] * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float, device=device) / size
        # To the bit what other decoders compute: far along a sequence a rounding shows.
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first ``cos.shape[-1]`` dimensions of ``[B, T, heads, D]`` queries and keys."""
    size = cos.shape[-1]
    if size == q.shape[-1]:
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotated_q, rotated_k = apply_rotary_pos_emb(q[..., :size], k[..., :size], cos, sin, unsqueeze_dim=2)
    return torch.cat([rotated_q, q[..., size:]], dim=-1), torch.cat([rotated_k, k[..., size:]], dim=-1)


class FoxTokenShift(nn.Module):
    """Data-dependent token shift: ``alpha_t x_{t-1} + (1 - alpha_t) x_t``, ``alpha_t = sigmoid(w . h_t)`` per head.

    What comes before the first token, and before the first of each packed sequence, is zero; padding is skipped.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, heads, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        states: Tensor,
        layout: TokenLayout,
        cache_layer: ForgettingLayer | None,
        name: str,
        logits: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: ``[B, T, hidden]`` input of the layer.
            states: ``[B, T, G, D]`` keys or values.
            layout: where the tokens stand.
            cache_layer: the layer's cache, or None.
            name: what `cache_layer` keeps the unshifted states as.
            logits: ``[B, T, G]``, those of alpha, where they are known.
        """
        if layout.shards is not None:
            before = layout.shards.states_before(states, layout.real_everywhere)
            parts = [
                _after(before[:, i : i + 1], states[:, rows], None if layout.real is None else layout.real[:, rows])
                for i, rows in enumerate(layout.shards.rows)
            ]
            previous = torch.cat([part[:, :-1] for part in parts], dim=1)
        else:
            past = None if cache_layer is None else cache_layer.before(name, layout)
            if past is None:
                past = states.new_zeros(states.shape[0], 1, *states.shape[2:])
            extended = _after(past, states, layout.real)
            if cache_layer is not None:
                cache_layer.remember(name, extended, layout)
            previous = extended[:, -states.shape[1] - 1 : -1]
        if layout.starts is not None:
            previous = previous.masked_fill(layout.starts[..., None, None], 0.0)
        logits = self.proj(hidden_states) if logits is None else logits
        return keeping_inputs_only(_mix, states, previous, logits)


def _after(past: Tensor, states: Tensor, real: Tensor | None) -> Tensor:
    """``past`` and ``states`` one after the other; padding repeats the last real one, which the next is mixed with."""
    extended = torch.cat([past, states], dim=1)
    if real is None:
        return extended
    index = torch.arange(extended.shape[1], device=states.device)
    before, new = index.split([past.shape[1], states.shape[1]])
    source = running_max(torch.where(real, new, before[-1]))
    source = torch.cat([before.expand(source.shape[0], -1), source], dim=1)[..., None, None]
    return extended.gather(1, source.expand_as(extended))


def _mix(states: Tensor, previous: Tensor, logits: Tensor) -> Tensor:
    """``alpha previous + (1 - alpha) states`` with ``alpha = sigmoid(logits)`` per head, in float32."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    alpha = logits.to(dtype).sigmoid()[..., None]
    return torch.lerp(states.to(dtype), previous.to(dtype), alpha).to(states.dtype)


class FoxAttention(nn.Module):
    """Forgetting attention with its projections, gates, norms and token shift; in a FoX model or in one of your own.

    Args:
        config: sizes and parts; beside them ``attn_implementation`` (by default ``fox``) and what pruning may drop.
        layer_idx: which layer of a cache is this one's, from 0; and with ``nope_layers`` whether it has RoPE.

    Example:
        >>> attention = FoxAttention(FoxConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1), layer_idx=0)
        >>> cache = DynamicCache(config=attention.config)
        >>> with torch.no_grad():
        ...     prompt, _ = attention(torch.randn(2, 10, 64), cache=cache)
        ...     step, _ = attention(torch.randn(2, 1, 64), cache=cache)
        >>> prompt.shape, step.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 1, 64]))
    """

    # Of the same input, which are one product in decoding.
    projections = ("q_proj", "k_proj", "v_proj", "output_gate", "key_shift.proj", "value_shift.proj")
    fused_projections: FusedProjections | None = None

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
        # For a layer without its model, which otherwise computes the angles once for all layers.
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
            layout: what the arguments before say, found once for all layers of a model.

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
            self._check_alone(hidden_states, cache)
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
        # In decoding all at once, else each where it is needed.
        fused = fused_products(self, hidden_states)
        q, k, v = (
            fused[name] if fused else getattr(self, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj")
        )
        # The number of heads is read from the projections: under tensor parallelism it is a share.
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        # The first tokens have nothing to search, and no pages yet.
        searches = cache_layer is not None and cache_layer.is_initialized
        if isinstance(cache_layer, StaticForgettingLayer) and not searches:
            cache_layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        if self.config.use_key_shift:
            k = self.key_shift(hidden_states, k, layout, cache_layer, "key", fused.get("key_shift.proj"))
        if self.config.use_value_shift:
            v = self.value_shift(hidden_states, v, layout, cache_layer, "value", fused.get("value_shift.proj"))
        if self.config.qk_norm == "all_heads":
            q, k = (norm(x.flatten(-2)).view_as(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        elif self.config.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            assert position_embeddings is not None, "given, or made above"
            # Back to the type of v: under autocast the angles are float32, and keys are cached beside values.
            q, k = (x.to(v.dtype) for x in apply_rotary(q, k, *position_embeddings))

        log_f = self.log_forget_gates(hidden_states)
        if layout.real is not None:
            log_f = log_f.masked_fill(~layout.real[..., None], 0.0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is None or cache_layer is None:
            sum_gates = accumulate if layout.shards is None else layout.shards.accumulate
            c, first = sum_gates(log_f, starts=layout.starts)
            decay = Decay(c, c, first, layout.positions, shards=layout.shards)
        else:
            few = searches and self._few_queries(q, k)
            cache_layer.append_gates(log_f, layout)
            k, v = cache.update(k, v, self.layer_idx, few=few)
            decay = cache_layer.decay(few, own_block=self._bound_needs_keys())
        if (real := layout.real_keys) is not None:
            # A mask may be as long as a cache of fixed size, where the keys are those so far.
            decay = hide_padding(decay, real if decay.cached is not None else real[:, : decay.key.shape[-1]])

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, None, decay=decay, scaling=self.scaling, dropout=dropout)

        if self.config.use_output_norm:
            out = self.output_norm(out)
        out = out.flatten(-2)
        if self.config.use_output_gate:
            gate = fused["output_gate"] if fused else self.output_gate(hidden_states)
            out = out * self.output_gate_act(gate)
        return self.o_proj(out), weights

    def check_hidden_states(self, hidden_states: Tensor) -> None:
        """Raise a `ValueError` unless they are ``[B, T, hidden]`` with at least one token."""
        size = self.config.hidden_size
        if hidden_states.ndim != 3 or hidden_states.shape[1] == 0 or hidden_states.shape[2] != size:
            raise ValueError(
                f"hidden_states must be [B, T, {size}] with at least one token, got shape {list(hidden_states.shape)}"
            )

    def _check_alone(self, hidden_states: Tensor, cache: Cache | None) -> None:
        """Raise a `ValueError` unless a layer without its model can take these."""
        if cache is not None:
            check_cache(cache, self.config, len(hidden_states), self.layer_idx + 1)
            if isinstance(cache, FoxPagedCache):
                raise ValueError(
                    f"{CACHE} must be a DynamicCache or a StaticCache for a layer without its model: "
                    "the pages of a FoxPagedCache are those of all layers"
                )

    @property
    def implementation(self) -> str:
        """The attention implementation; the configuration of a layer without its model may name none."""
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
        """Whether the rule of pruning needs a bound of the logits that the weights do not give."""
        return self.config.acp_rule == "paper" and (self.config.qk_norm == "none" or self.rope_stretches)

    def logit_bound(self, dtype: torch.dtype) -> Tensor | None:
        """Bound of ``|scale * q . k|`` by the weights of QK-norm: ``[H]``, or ``[1]``; None as `norm_bounds`.

        Args:
            dtype: of queries and keys; of their exact product, however it is computed, this is a bound.
        """
        bounds = self.norm_bounds(dtype)
        return None if bounds is None else bounds[0] * bounds[1] * abs(self.scaling)

    def norm_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Largest lengths of a query and of its keys after QK-norm, both ``[H]``, ``[1]`` if heads share the weights.

        What is normalized has length ``sqrt(size)`` at most, its weights stretch it, RoPE turns it, and each of them
        rounds it to ``dtype``. If all heads are normalized together, one of them may have all the length. None without
        QK-norm, and where RoPE stretches.
        """
        if self.config.qk_norm == "none" or self.rope_stretches:
            return None
        query, key = (self._norm_bound(norm, dtype) for norm in (self.q_norm, self.k_norm))
        if len(key) < len(query):
            key = key.repeat_interleave(len(query) // len(key))
        return query, key

    def _norm_bound(self, norm: FoxRMSNorm, dtype: torch.dtype) -> Tensor:
        weight = local_part(norm.weight).detach()
        size = len(weight) if self.config.qk_norm == "all_heads" else self.head_dim
        weight = weight.view(-1, self.head_dim)
        wide = torch.promote_types(weight.dtype, torch.float32)
        largest = torch.linalg.vector_norm(weight, ord=float("inf"), dim=-1, dtype=wide)
        return self.stored(largest, size, dtype, roundings=1)

    def stored(self, largest: Tensor, size: int, dtype: torch.dtype, roundings: int) -> Tensor:
        """Lengths of queries or keys as they are stored, at most.

        Args:
            largest: before any rounding, in units of ``sqrt(size)``.
            size: how many elements were normalized together, in float32.
            dtype: of queries and keys.
            roundings: to ``dtype``, before RoPE.
        """
        count = roundings + (_ROPE_ROUNDINGS if self.use_rope else 0.0)
        factor = size**0.5 * (1.0 + logit_margin(size, torch.float32)) * (1.0 + stored_margin(dtype, count))
        # What is subnormal, in float16 up to 6e-5, is rounded by a fixed amount.
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return largest * factor + count * least * self.head_dim**0.5

    @property
    def rope_stretches(self) -> bool:
        """Whether rotary embeddings change the lengths of queries and keys here."""
        rope_type = (self.config.rope_parameters or {}).get("rope_type")
        return self.use_rope and rope_type in ("yarn", "longrope")

    def _few_queries(self, q: Tensor, k: Tensor) -> bool:
        """Whether the kernels of decoding take these, ``[B, H, Tq, D]`` and ``[B, G, T, D]``."""
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        dropout = self.training and self.attention_dropout > 0.0
        return self.implementation == DEFAULT_IMPLEMENTATION and not differentiable and not dropout and decodes(q, k)


def _is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is a product with its weight and nothing else; torchao's weights say that they are float."""
    if type(module) is not nn.Linear or parametrize.is_parametrized(module):
        return False
    return is_sharded(module.weight) or type(module.weight) is nn.Parameter


class FoxMLP(LlamaMLP):
    """Gated MLP, ``down(act(gate(x)) * up(x))``."""

    projections = ("gate_proj", "up_proj")
    fused_projections: FusedProjections | None = None
    outputs_stay_sharded = True

    def forward(self, x: Tensor) -> Tensor:
        fused = fused_products(self, x)
        if not fused:
            return super().forward(x)
        return self.down_proj(self.act_fn(fused["gate_proj"]) * fused["up_proj"])


class FoxDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with its norm and a residual connection: the block of a FoX model, or of one of your own.

    Arguments as for `FoxAttention`, of its `forward` too, which returns ``[B, T, hidden]``.
    """

    def __init__(self, config: FoxConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = FoxAttention(config, layer_idx)
        self.norms_first = config.norm_position == "pre"
        self.mlp = FoxMLP(config)
        # The names of Llama and of OLMo 2: the same norm stands before the MLP in one and after attention in the other.
        if self.norms_first:
            self.input_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        if not self.norms_first:
            self.post_feedforward_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        if "layout" not in kwargs:
            # Before the norm, which would fail in words of its own.
            self.self_attn.check_hidden_states(hidden_states)
        if self.norms_first:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))

    @torch.no_grad()
    def logit_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Bounds of ``scale |q|`` and of ``|scale * q . k|`` by the weights, for any input: ``[H]`` or ``[1]`` float32.

        Those of QK-norm; without it, that a normalized input has length ``sqrt(hidden)`` and a projection stretches it
        by its largest singular value at most, which is sound but far more than what happens. None where the weights do
        not tell: RoPE that stretches, weights that are elsewhere, inputs that are not normalized or projections that
        are more than a matrix (LoRA), both without QK-norm.

        Args:
            dtype: of queries and keys.
        """
        if not hasattr(self, "unshard"):
            return self._logit_bounds(dtype)
        # With FSDP a layer's weights are whole only while it runs, and this is asked before.
        self.unshard()
        bounds = self._logit_bounds(dtype)
        self.reshard()
        return bounds

    def weights_of_bounds(self) -> list[Tensor]:
        """The weights that `logit_bounds` rests on."""
        attention = self.self_attn
        if attention.config.qk_norm != "none":
            return [attention.q_norm.weight, attention.k_norm.weight]
        modules = [attention.q_proj, attention.k_proj, *([self.input_layernorm] if self.norms_first else [])]
        return [weight for module in modules for weight in module.parameters()]

    def _logit_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        attention = self.self_attn
        normalized = attention.config.qk_norm != "none"
        bounds = attention.norm_bounds(dtype) if normalized else self._projection_bounds(dtype)
        if bounds is None or any(x.is_meta for x in bounds):
            return None
        query, key = (x.float() for x in bounds)
        return query * abs(attention.scaling), query * key * abs(attention.scaling)

    def _projection_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Largest lengths of a query and of its keys, ``[H]``, where nothing normalizes them."""
        attention = self.self_attn
        projections = (attention.q_proj, attention.k_proj)
        if attention.rope_stretches or not self.norms_first or not all(_is_plain(x) for x in projections):
            return None
        query, key = (self._largest_output(x, dtype) for x in projections)
        return query, key.repeat_interleave(attention.num_key_value_groups)

    def _largest_output(self, proj: nn.Linear, dtype: torch.dtype) -> Tensor:
        """Largest length of each head of ``proj`` of a normalized input, ``[heads]``."""
        size, norm, hidden = self.self_attn.head_dim, self.input_layernorm, proj.weight.shape[1]
        weight = local_part(proj.weight).float() * local_part(norm.weight).float()
        weight = weight.unflatten(0, (-1, size))
        # A rounding of an element is a share of all the products in it.
        margin = logit_margin(hidden, torch.float32) + (0.0 if dtype == torch.float64 else _PRODUCT_MARGIN)
        largest = torch.linalg.matrix_norm(weight, ord=2) + margin * torch.linalg.matrix_norm(weight)
        if self.self_attn.config.attention_bias:
            bias = local_part(proj.bias).float().unflatten(0, (-1, size))
            largest += torch.linalg.vector_norm(bias, dim=-1) / hidden**0.5
        # Of the normalized input, the product, the bias and token shift.
        return self.self_attn.stored(largest, hidden, dtype, roundings=4)
