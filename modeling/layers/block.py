"""The block of a FoX model: attention and MLP, each with its norm and a residual connection."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...kernels.pruning.rounding import logit_margin
from ..configuration_fox import FoxConfig
from ..parallel.tensor_parallel import local_part
from .attention import FoxAttention
from .fused_projections import FusableProjections, is_plain_linear
from .norm import FoxRMSNorm

# Of inputs, weights and partial sums of a projection, by TF32, autocast to bfloat16 or sums in it.
_PRODUCT_MARGIN = 2.0**-7


class FoxMLP(FusableProjections, LlamaMLP):
    """Gated MLP, ``down(act(gate(x)) * up(x))``."""

    projections = ("gate_proj", "up_proj")
    gate_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        fused = self.project(x)
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
        if attention.rope_stretches or not self.norms_first or not all(is_plain_linear(x) for x in projections):
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
