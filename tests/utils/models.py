"""Tiny FoX models, one for every switch of the configuration, in which a lost gate shows.

Weights are drawn with a standard deviation of 0.5: at the usual 0.02 a decode whose gate sum restarts at every
step still picks the same tokens. Models are float64, so that what should be equal is equal to 1e-9.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from foxlm import FoxConfig, FoxForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "initializer_range": 0.5,
    "max_position_embeddings": 128,
    "decay_time_max": 20.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
LLAMA: dict[str, Any] = {
    "qk_norm": "none",
    "use_key_shift": False,
    "use_value_shift": False,
    "use_output_gate": False,
    "use_output_norm": False,
}
ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}

VARIANTS: dict[str, dict[str, Any]] = {
    "pro": {},
    "llama": LLAMA,
    # Each Pro part taken from Pro, and each put alone on a Llama block.
    "pro-no-qk-norm": {"qk_norm": "none"},
    "pro-no-key-shift": {"use_key_shift": False},
    "pro-no-value-shift": {"use_value_shift": False},
    "pro-no-output-gate": {"use_output_gate": False},
    "pro-no-output-norm": {"use_output_norm": False},
    "llama-qk-norm": LLAMA | {"qk_norm": "per_head"},
    "llama-key-shift": LLAMA | {"use_key_shift": True},
    "llama-value-shift": LLAMA | {"use_value_shift": True},
    "llama-output-gate": LLAMA | {"use_output_gate": True},
    "llama-output-norm": LLAMA | {"use_output_norm": True},
    "shared-qk-norm": {"qk_norm": "shared"},
    "llama-shared-qk-norm": LLAMA | {"qk_norm": "shared"},
    "all-heads-qk-norm": {"qk_norm": "all_heads"},
    "llama-all-heads-qk-norm": LLAMA | {"qk_norm": "all_heads"},
    "silu-gate": {"output_gate_act": "silu"},
    "bias-only": {"forget_gate": "bias_only"},
    "fixed": {"forget_gate": "fixed"},
    "gateless": {"forget_gate": "none"},
    "key-value-gates": {"forget_gate_heads": "key_value"},
    "llama-key-value-gates": LLAMA | {"forget_gate_heads": "key_value"},
    "bias-only-key-value": {"forget_gate": "bias_only", "forget_gate_heads": "key_value"},
    "fixed-key-value": {"forget_gate": "fixed", "forget_gate_heads": "key_value"},
    "rope": ROPE,
    "llama-rope": LLAMA | ROPE,
    "transformer": LLAMA | ROPE | {"forget_gate": "none"},
    "partial-rope": {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    "sink": {"attention_sink": "learned"},
    "rope-sink": LLAMA | ROPE | {"attention_sink": "learned", "sink_token_id": 1},
    "nope-layers": ROPE | {"nope_layers": [1]},
    "post-norm": {"norm_position": "post"},
    "llama-post-norm": LLAMA | {"norm_position": "post"},
    # As OLMo 2 has it.
    "olmo": LLAMA | ROPE | {"qk_norm": "all_heads", "norm_position": "post"},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "wide-head": {"head_dim": 12},
    "odd-head": {"head_dim": 5},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu", "qk_norm_eps": 1e-3, "rms_norm_eps": 1e-2},
}

# What decides how a model is decoded; the rest of the switches act within one token.
DECODING_VARIANTS = ("pro", "llama", "rope", "key-value-gates", "bias-only", "olmo", "rope-sink")
IMPLEMENTATIONS = ("fox", "sdpa", "eager")


def tiny_config(variant: str = "pro", **overrides: Any) -> FoxConfig:
    """Configuration of a variant, with any other field set by ``overrides``."""
    return FoxConfig(**(SIZES | VARIANTS[variant] | overrides))


def tiny_model(
    variant: str = "pro",
    *,
    model_class: Any = FoxForCausalLM,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> Any:
    """A random model in evaluation mode. Norm weights, biases and sinks are random too: a mixed-up head shows."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(variant, **overrides)).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("forget_gate.weight"):
                # Log gates of about -1/20 to -1/2: what is lost 10 tokens back must show as well.
                parameter.mul_(0.25)
            if parameter.ndim == 1 or ".sink." in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    if model.can_generate():
        model.generation_config.pad_token_id = 0
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding or the beginning of a sequence."""
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    assert actual.isfinite().all() and expected.isfinite().all(), "not finite"
    worst = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert worst <= tolerance, f"differs by {worst:.2e}, more than {tolerance:.0e}"


ROPE_PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 6.0, 9.0],
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
ROPE_TYPES = ["default", *ROPE_INIT_FUNCTIONS]


def rope(rope_type: str) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 100.0} | ROPE_PARAMETERS[rope_type]
