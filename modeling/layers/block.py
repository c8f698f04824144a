"""The block of a FoX model: attention and MLP, each with its norm and a residual connection."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..configuration_fox import FoxConfig
from .attention import FoxAttention
from .fused_projections import FusableProjections, call_linear, has_hooks, have_plain_forwards, is_called_as_matmul
from .known_modules import KnownModules
from .logit_bounds import projection_bounds, qk_norm_bounds
from .norm import FoxRMSNorm
from .repeated_layer import repeat_prompt
from .saved_activations import computed_again

_SILU = type(ACT2FN["silu"])


class FoxMLP(FusableProjections, LlamaMLP):
    """Gated MLP, ``down(act(gate(x)) * up(x))``."""

    projections = ("gate_proj", "up_proj")
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        # By one kernel on a GPU, unless somebody replaced or watches the activation.
        own = type(self.act_fn) is not _SILU or torch.compiler.is_compiling() or has_hooks(self.act_fn)
        if not own and x.ndim == 3 and x.shape[0] == x.shape[1] == 1 and not torch.is_grad_enabled():
            return self._of_one_token(x)
        fused = self.project(x)
        gate, up = fused.values() if fused else (self.gate_proj(x), self.up_proj(x))
        if own:
            return self.down_proj(self.act_fn(gate) * up)
        # Imported when they are used, since importing the kernels takes time.
        from ...kernels.backends import PYTORCH, elementwise_backend_of

        backend = elementwise_backend_of(gate)
        activated = backend.silu_product(gate, up)
        if backend is PYTORCH or not torch.is_grad_enabled() or not is_called_as_matmul(self.down_proj):
            return self.down_proj(activated)
        # The kernel keeps gate and up; their product would be the largest part of what is kept beside them.
        with computed_again(activated, backend.silu_product, gate, up):
            return self.down_proj(activated)

    def _of_one_token(self, x: Tensor) -> Tensor:
        """`forward` of ``[1, 1, in]``, without gradients."""
        # Imported when they are used, since importing the kernels takes time.
        from ...kernels.backends import elementwise_backend_of

        fused = self.buffer_for(x)
        if fused is None or len(fused.weight) != sum(fused.sizes):
            gate, up = self.gate_proj(x), self.up_proj(x)
            activated = elementwise_backend_of(gate).silu_product(gate, up)
        else:
            activated = elementwise_backend_of(x).gated_linear(x, fused.weight, fused.bias)
        return call_linear(self.down_proj, activated)


class FoxDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with its norm and a residual connection; in a FoX model or in one of your own.

    Arguments as for `FoxAttention`, those of `forward` too; it returns ``[B, T, hidden]``.
    """

    attention_class: ClassVar[type[FoxAttention]] = FoxAttention
    mlp_class: ClassVar[type[FoxMLP]] = FoxMLP
    # What `repeat_prompt` knows of its modules.
    known: KnownModules | None = None

    def __init__(self, config: FoxConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.norms_first = config.norm_position == "pre"
        self.mlp = self.mlp_class(config)
        # Names of Llama, where `post_attention_layernorm` precedes the MLP, and of OLMo 2, where it follows attention.
        if self.norms_first:
            self.input_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        if not self.norms_first:
            self.post_feedforward_layernorm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        repeated = repeat_prompt(self, self._compute, (FoxDecoderLayer, FoxMLP), hidden_states, kwargs)
        return self._compute(hidden_states, **kwargs) if repeated is None else repeated

    def _compute(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """`forward`, by calling the modules."""
        if "layout" not in kwargs:
            # Before the norm, whose error would not name the argument.
            self.self_attn.check_hidden_states(hidden_states)
        if self.norms_first:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states, normalized = self._add_and_norm(hidden_states, attended)
            return hidden_states + self.mlp(normalized)
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))

    def _add_and_norm(self, hidden_states: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and its norm; for inference on a GPU by one kernel, unless the norm has hooks or was replaced."""
        norm = self.post_attention_layernorm
        if (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and have_plain_forwards([norm], FoxRMSNorm)
        ):
            # Imported when they are used, since importing the kernels takes time.
            from ...kernels.backends import PYTORCH, elementwise_backend_of

            backend = elementwise_backend_of(hidden_states)
            if backend is not PYTORCH:
                return backend.add_and_norm(hidden_states, attended, norm.local_weight(), norm.eps)
        hidden_states = hidden_states + attended
        return hidden_states, norm(hidden_states)

    @torch.no_grad()
    def logit_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Bounds of ``scale |q|`` and of ``|scale * q . k|`` by the weights, for any input: ``[H]`` or ``[1]`` float32.

        With QK-norm those of its weights, else of the singular values of the projections, if their input is normalized.
        None where the weights do not tell: RoPE that changes lengths, weights that are offloaded; and, without QK-norm,
        inputs that are not normalized and projections that are more than a matmul.

        Args:
            dtype: of queries and keys.
        """
        if not hasattr(self, "unshard"):
            return self._logit_bounds(dtype)
        # With FSDP a layer's weights are whole only while it runs, and this is called before.
        self.unshard()
        bounds = self._logit_bounds(dtype)
        self.reshard()
        return bounds

    def weights_of_bounds(self) -> list[Tensor]:
        """The weights that `logit_bounds` depends on."""
        attention = self.self_attn
        if attention.qk_norm != "none":
            return [attention.q_norm.weight, attention.k_norm.weight]
        modules = [attention.q_proj, attention.k_proj, *([self.input_layernorm] if self.norms_first else [])]
        return [weight for module in modules for weight in module.parameters()]

    def _logit_bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        attention = self.self_attn
        if attention.qk_norm != "none":
            bounds = qk_norm_bounds(attention, dtype)
        else:
            bounds = projection_bounds(attention, self.input_layernorm, dtype) if self.norms_first else None
        if bounds is None or any(x.is_meta for x in bounds):
            return None
        query, key = (x.float() for x in bounds)
        return query * abs(attention.scaling), query * key * abs(attention.scaling)
