"""Rotary position embedding of all or part of each head."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..configuration_fox import FoxConfig


class FoxRotaryEmbedding(LlamaRotaryEmbedding):
    """transformers' rotary embedding; its default type may rotate part of a head (`partial_rotary_factor`) too."""

    @staticmethod
    def compute_default_rope_parameters(config: FoxConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        parameters = config.rope_parameters or {}
        size = int(config.heads[2] * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float, device=device) / size
        # Bitwise what other decoders compute: at large positions a rounding of the frequency shows.
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first ``cos.shape[-1]`` dimensions of ``[B, T, heads, D]`` queries and keys."""
    size = cos.shape[-1]
    if size == q.shape[-1]:
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotated_q, rotated_k = apply_rotary_pos_emb(q[..., :size], k[..., :size], cos, sin, unsqueeze_dim=2)
    return torch.cat([rotated_q, q[..., size:]], dim=-1), torch.cat([rotated_k, k[..., size:]], dim=-1)
