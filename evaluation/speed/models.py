"""The models that whole steps are measured on: a FoX whose gates forget as the benchmark's do, and a plain Llama."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.layers.forget_gate import FoxForgetGate

from .implementations import EPS
from .inputs import spread_decay_times

# Sizes for a CPU, where it only shows that all parts work.
CPU_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

Sizes = tuple[tuple[str, Any], ...]
"""Fields of a configuration and their values."""


def build_fox(preset: str, sizes: Sizes, device: str, dtype: torch.dtype = torch.float32) -> FoxForCausalLM:
    """A new FoX with its gates, always float32, around the benchmark's decay times.

    Args:
        preset: of `FoxConfig.preset`.
        sizes: what differs from the preset.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of all other weights.
    """
    # Billions of random numbers take a CPU a minute.
    with torch.device(device):
        model = FoxForCausalLM._from_config(FoxConfig.preset(preset, **dict(sizes)), dtype=dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FoxForgetGate):
                times = spread_decay_times(module.bias.numel())
                module.bias.copy_(-torch.log(torch.expm1(1.0 / times)))
    return model


def build_llama(config: FoxConfig, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A new Llama of transformers with the sizes of ``config``."""
    heads, kv_heads, head_dim = config.heads
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return LlamaForCausalLM._from_config(llama, dtype=dtype, attn_implementation="sdpa").to(device)


def set_pruning(model: FoxForCausalLM, rule: Rule | None) -> None:
    """Tell every layer of ``model`` to prune by ``rule``, or not to."""
    model.config.acp_eps = None if rule is None else EPS
    if rule is not None:
        model.config.acp_rule = rule
