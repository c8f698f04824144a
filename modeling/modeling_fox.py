"""The Forgetting Transformer (FoX): decoder, language model and task heads.

The attention of one FoX (Pro) block (arXiv 2503.02130); every part but q, k, v and o is a switch of the configuration::

    x -> norm -+-> q ----------> q_norm -+
               +-> k -> shift -> k_norm -+-> forgetting attention -> output_norm -> * -> o
               +-> v -> shift -----------+                                          |
               +-> forget gate ----------+                                          |
               +-> output gate -----------------------------------------------------+
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from ..kernels.attention import check_cu_seqlens, hide_padding
from ..kernels.decay import Decay, accumulate, sequence_starts
from .attention_fox import DEFAULT_IMPLEMENTATION, IMPLEMENTATIONS, eager_attention_forward, sdpa_forward
from .cache_fox import check_cache, layer_of
from .configuration_fox import FoxConfig

logger = logging.get_logger(__name__)

# An instance of our own: for FoX models alone, "sdpa" is called with the decay as its mask.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_forward


class TokenLayout(NamedTuple):
    """Where the tokens of one forward pass stand, found once and read by every layer.

    Attributes:
        positions: ``[T]`` int64 index of each token in the cache.
        real: ``[B, T]`` bool, False for padding; None without padding.
        real_keys: ``[B, Tk]`` the same over all keys, those in the cache included.
        starts: ``[B, T]`` bool, True where a packed sequence begins; None without packing.
    """

    positions: Tensor
    real: Tensor | None
    real_keys: Tensor | None
    starts: Tensor | None


class FoxRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32; ``weight`` covers it, or several heads of it (``[heads * D]``)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.view(-1, x.shape[-1]).squeeze(0) * wide).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class FoxRotaryEmbedding(LlamaRotaryEmbedding):
    """transformers' rotary embedding; also rotates part of a head (`partial_rotary_factor`) for the default type."""

    @staticmethod
    def compute_default_rope_parameters(config: FoxConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        parameters = config.rope_parameters or {}
        size = int(config.heads[2] * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float, device=device) / size
        return parameters["rope_theta"] ** -exponents, 1.0


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first ``cos.shape[-1]`` dimensions of ``[B, T, heads, D]`` queries and keys."""
    size = cos.shape[-1]
    if size == q.shape[-1]:
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotated_q, rotated_k = apply_rotary_pos_emb(q[..., :size], k[..., :size], cos, sin, unsqueeze_dim=2)
    return torch.cat([rotated_q, q[..., size:]], dim=-1), torch.cat([rotated_k, k[..., size:]], dim=-1)


def decay_time_bias(config: FoxConfig) -> Tensor:
    """``[Hf]`` float64 gate biases for decay times log-spaced over the heads: ``log sigmoid(b) = -1 / T``."""
    low, high = math.log(config.decay_time_min), math.log(config.decay_time_max)
    times = torch.linspace(low, high, config.num_forget_gates, dtype=torch.float64).exp()
    return -torch.log(torch.expm1(1.0 / times))


class FoxForgetGate(nn.Linear):
    """Data-dependent forget gate: ``[B, T, hidden] -> [B, T, Hf]`` logits in float32, whatever the model's type.

    In half precision a slow gate, ``log f = -1e-3``, could not be told from its neighbors.
    """

    def forward(self, x: Tensor) -> Tensor:
        with maybe_autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class FoxConstantGate(nn.Module):
    """Forget gate that does not depend on the data: logits ``b``, learned (`bias_only`) or not (`fixed`)."""

    def __init__(self, gates: int, learned: bool) -> None:
        super().__init__()
        bias = torch.zeros(gates)
        if learned:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(torch.promote_types(x.dtype, torch.float32))
        return bias.expand(*x.shape[:-1], -1)


def make_forget_gate(config: FoxConfig) -> FoxForgetGate | FoxConstantGate:
    """The gate that ``config.forget_gate`` names; any but ``none``."""
    if config.forget_gate == "full":
        return FoxForgetGate(config.hidden_size, config.num_forget_gates)
    return FoxConstantGate(config.num_forget_gates, learned=config.forget_gate == "bias_only")


class FoxTokenShift(nn.Module):
    """Data-dependent token shift: ``alpha_t x_{t-1} + (1 - alpha_t) x_t``, ``alpha_t = sigmoid(w . h_t)`` per head.

    What comes before the first token, and before the first of each packed sequence, is zero; padding is skipped.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, heads, bias=False)

    def forward(self, hidden_states: Tensor, states: Tensor, layout: TokenLayout, cache_layer, name: str) -> Tensor:
        """
        Args:
            hidden_states: ``[B, T, hidden]`` input of the layer.
            states: ``[B, T, G, D]`` keys or values.
            layout: where the tokens stand.
            cache_layer: the layer's cache, or None.
            name: what `cache_layer` keeps the unshifted states as.
        """
        before = None if cache_layer is None else cache_layer.before(name)
        if before is None:
            before = states.new_zeros(states.shape[0], 1, *states.shape[2:])
        extended = torch.cat([before, states], dim=1)
        if layout.real is not None:
            # Each padding token repeats the last real one, which is then what the next real token is mixed with.
            index = torch.arange(1, extended.shape[1], device=states.device)
            source = torch.where(layout.real, index, 0).cummax(-1).values
            source = nn.functional.pad(source, (1, 0))[..., None, None]
            extended = extended.gather(1, source.expand_as(extended))
        if cache_layer is not None:
            cache_layer.remember(name, extended[:, 1:])
        previous = extended[:, :-1]
        if layout.starts is not None:
            previous = previous.masked_fill(layout.starts[..., None, None], 0.0)
        dtype = torch.promote_types(states.dtype, torch.float32)
        alpha = self.proj(hidden_states).to(dtype).sigmoid()[..., None]
        return torch.lerp(states.to(dtype), previous.to(dtype), alpha).to(states.dtype)


class FoxAttention(nn.Module):
    """Forgetting attention with its projections, gates, norms and token shift."""

    def __init__(self, config: FoxConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden, (heads, kv_heads, self.head_dim) = config.hidden_size, config.heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.attention_bias)

        if config.forget_gate != "none":
            self.forget_gate = make_forget_gate(config)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "per_head"
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.q_norm = FoxRMSNorm(self.head_dim * (heads if per_head else 1), eps)
            self.k_norm = FoxRMSNorm(self.head_dim * (kv_heads if per_head else 1), eps)
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
        layout: TokenLayout,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: ``[B, T, hidden]``.
            layout: where the tokens stand.
            position_embeddings: cosines and sines ``[B or 1, T, rotated size]``, with RoPE.
            past_key_values: cache of earlier tokens; takes in these.

        Returns:
            ``[B, T, hidden]`` and the attention weights ``[B, H, T, Tk]`` (None unless `eager`).
        """
        cache_layer = None if past_key_values is None else layer_of(past_key_values, self.layer_idx)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads)
        k = self.k_proj(hidden_states).view(heads)
        v = self.v_proj(hidden_states).view(heads)
        if self.config.use_key_shift:
            k = self.key_shift(hidden_states, k, layout, cache_layer, "key")
        if self.config.use_value_shift:
            v = self.value_shift(hidden_states, v, layout, cache_layer, "value")
        if self.config.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            q, k = apply_rotary(q, k, *position_embeddings)

        decay = self._decay(hidden_states, layout, cache_layer)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, None, decay=decay, scaling=self.scaling, dropout=dropout, **kwargs)

        if self.config.use_output_norm:
            out = self.output_norm(out)
        out = out.flatten(-2)
        if self.config.use_output_gate:
            out = out * self.output_gate_act(self.output_gate(hidden_states))
        return self.o_proj(out), weights

    def log_forget_gates(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, hidden] -> [B, T, Hf]`` log forget gates, in float32 (float64 for a float64 model)."""
        if self.config.forget_gate == "none":
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            return hidden_states.new_zeros(*hidden_states.shape[:-1], 1, dtype=dtype)
        return nn.functional.logsigmoid(self.forget_gate(hidden_states))

    def _decay(self, hidden_states: Tensor, layout: TokenLayout, cache_layer) -> Decay:
        log_f = self.log_forget_gates(hidden_states)
        if layout.real is not None:
            log_f = log_f.masked_fill(~layout.real[..., None], 0.0)
        if cache_layer is None:
            c, first = accumulate(log_f, starts=layout.starts)
            decay = Decay(c, c, first, layout.positions)
        else:
            decay = cache_layer.append_gates(log_f, layout.starts)
        return decay if layout.real_keys is None else hide_padding(decay, layout.real_keys)


class FoxMLP(LlamaMLP):
    """Gated MLP, ``down(act(gate(x)) * up(x))``."""


class FoxDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: FoxConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = FoxAttention(config, layer_idx)
        self.mlp = FoxMLP(config)
        self.input_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class FoxPreTrainedModel(PreTrainedModel):
    """Weights, initialization and transformers' switches common to all FoX models."""

    config: FoxConfig
    config_class = FoxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FoxDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FoxDecoderLayer, "attentions": FoxAttention}
    # A gate's bias sets its decay time, which bfloat16 would move by percents.
    _keep_in_fp32_modules_strict = ["forget_gate"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FoxForgetGate | FoxConstantGate):
            init.copy_(module.bias, decay_time_bias(self.config))

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # Called by transformers; its own default is sdpa, and it would let through functions that drop the decay.
        if requested_attention is None:
            return DEFAULT_IMPLEMENTATION
        if requested_attention not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation must be one of {list(IMPLEMENTATIONS)} or None, got {requested_attention!r}"
            )
        return requested_attention


class FoxModel(FoxPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FoxDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope_parameters is None else FoxRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: ``[B, T]`` int64 tokens; this or ``inputs_embeds``.
            attention_mask: ``[B, Tk]``, nonzero for real tokens and zero for padding anywhere, over all tokens so far.
                A 4-D mask is refused: a branch that a query may not see would still decay what it may see.
            position_ids: ``[B or 1, T]``; read by RoPE, and where they restart, with neither padding nor earlier tokens
                in a cache, a new packed sequence begins.
            past_key_values: cache of earlier tokens.
            inputs_embeds: ``[B, T, hidden]`` instead of tokens.
            use_cache: whether to return a cache.
            cu_seq_lens_q (in ``kwargs``): ``[N + 1]`` offsets of the sequences packed in a batch of one, as
                `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` gives them.

        Raises:
            ValueError: an argument is not as above; the message names it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[1] == 0:
            name, given = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
            raise ValueError(f"{name} must hold at least one token per sequence, got shape {list(given.shape)}")
        if past_key_values is not None:
            check_cache(past_key_values)
        elif use_cache:
            past_key_values = DynamicCache(config=self.config)

        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        layout = self._layout(inputs_embeds, attention_mask, position_ids, past_key_values, past, kwargs)
        position_embeddings = None
        if self.rotary_emb is not None:
            position_ids = layout.positions[None] if position_ids is None else position_ids
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                layout=layout,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _layout(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past: int | Tensor,
        kwargs: TransformersKwargs,
    ) -> TokenLayout:
        batch, length, _ = inputs_embeds.shape
        device = inputs_embeds.device
        positions = torch.arange(length, device=device) + past
        keys = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        real_keys = padding_mask(attention_mask, batch, past, length, keys, device)
        real = None if real_keys is None else real_keys.index_select(1, positions)
        # A static cache that holds tokens reports a tensor: packing cannot begin there.
        fresh = isinstance(past, int) and past == 0
        starts = self._packed_starts(batch, length, position_ids, kwargs.get("cu_seq_lens_q"), real, fresh)
        return TokenLayout(positions, real, real_keys, None if starts is None else starts.to(device))

    @staticmethod
    def _packed_starts(
        batch: int,
        length: int,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        real: Tensor | None,
        fresh: bool,
    ) -> Tensor | None:
        if cu_seqlens is not None:
            if batch != 1 or real is not None or not fresh:
                raise ValueError(
                    "cu_seq_lens_q packs sequences in a batch of one, without padding and without earlier tokens in "
                    f"past_key_values; got a batch of {batch}, padding: {real is not None}, earlier tokens: {not fresh}"
                )
            check_cu_seqlens("cu_seq_lens_q", cu_seqlens, length)
            return sequence_starts(cu_seqlens, length)
        if position_ids is None or real is not None or not fresh:
            return None
        starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
        # Reading the answer is not possible in a traced graph; there, sequences that do not restart cost a mask.
        if not is_torchdynamo_compiling() and not starts.any():
            return None
        return starts.expand(batch, length)


def padding_mask(
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    batch: int,
    past: int | Tensor,
    length: int,
    keys: int,
    device: torch.device,
) -> Tensor | None:
    """Bring an attention mask over all tokens so far to ``[B, keys]`` bool, False for padding; None without padding.

    Args:
        attention_mask: ``[B, past + length]``, or what `create_masks_for_generate` made of it.
        batch: number of sequences.
        past: tokens in the cache; a tensor for a static cache that holds some.
        length: tokens of this pass.
        keys: keys that attention will see, those still to come in a static cache included.
        device: where the mask is wanted.

    Raises:
        ValueError: ``attention_mask`` is not 2-D, or does not fit.
    """
    if isinstance(attention_mask, dict):
        return attention_mask["forgetting_attention"]
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be 2-D, [B, Tk], nonzero for real tokens; got shape {list(attention_mask.shape)}. "
            "FoX has no 4-D masks: tokens that a query may not see would still decay those that it may"
        )
    # Reading a length that lives on another device would wait for it, and cannot be traced.
    known = isinstance(past, int) or (past.device.type == "cpu" and not is_torchdynamo_compiling())
    expected = int(past) + length if known else attention_mask.shape[1]
    if attention_mask.shape != (batch, expected) or expected > keys:
        raise ValueError(
            f"attention_mask must cover the tokens in the cache and the new ones, [B, Tk] = {[batch, expected]}, "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask.to(device=device, dtype=torch.bool)
    if mask.shape[1] == keys and not is_torchdynamo_compiling() and mask.all():
        return None
    # A static cache is longer than its tokens; the keys to come are hidden by causality.
    return nn.functional.pad(mask, (0, keys - mask.shape[1]), value=True)


class FoxForCausalLM(FoxPreTrainedModel, GenerationMixin):
    """FoX with a language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FoxConfig) -> None:
        super().__init__(config)
        self.model = FoxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: FoxConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> dict[str, Tensor | None]:
        """The padding mask at the fixed length of a static cache, so that a compiled step sees one shape.

        Called by `generate` before each step where the cache can be compiled.
        """
        batch, length = inputs_embeds.shape[:2]
        keys = length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = padding_mask(attention_mask, batch, past, length, keys, inputs_embeds.device)
        return {"forgetting_attention": mask}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Arguments as for [`FoxModel.forward`], and

        Args:
            labels: ``[B, T]`` int64 targets, shifted inside; -100 is ignored.
            logits_to_keep: logits of the last so many tokens, or of the tokens at these indices; 0 is all.

        Example:
            >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2))
            >>> model(torch.tensor([[1, 2, 3]])).logits.shape
            torch.Size([1, 3, 50304])
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FoxForSequenceClassification(GenericForSequenceClassification, FoxPreTrainedModel):
    """FoX with a classifier of whole sequences."""


class FoxForTokenClassification(GenericForTokenClassification, FoxPreTrainedModel):
    """FoX with a classifier of tokens."""


class FoxForQuestionAnswering(GenericForQuestionAnswering, FoxPreTrainedModel):
    """FoX with an extractive question-answering head."""


__all__ = [
    "FoxForCausalLM",
    "FoxForQuestionAnswering",
    "FoxForSequenceClassification",
    "FoxForTokenClassification",
    "FoxModel",
    "FoxPreTrainedModel",
]
