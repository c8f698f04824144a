"""Tiny random Transformers of every kind that grafts take."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from models import ROPE_PARAMETERS, rope, tokens

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key/value head": ("Llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, gelu": ("Llama", {"hidden_act": "gelu", "rms_norm_eps": 0.1}),
    "llama, partly published": ("Llama", {"rope_interleaved": False, "unk_token_id": 3, "is_llama_config": True}),
    "llama, first release": ("Llama", {"max_sequence_length": 64, "tokenizer_class": "LlamaTokenizer"}),
    "llama, written in full by transformers 4": (
        "Llama",
        {"is_decoder": False, "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": False}
        | {"finetuning_task": None},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, wide window and heads": ("Mistral", {"sliding_window": 64, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, wide window": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, biases, multi-head": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 4, "attention_bias": True}),
    "smollm3": ("SmolLM3", {}),
    "smollm3, layers named": ("SmolLM3", {"no_rope_layers": [0, 1, 1, 0, 1], "tie_word_embeddings": False}),
    "smollm3, all with RoPE": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1], "mlp_bias": True, "attention_bias": True}),
    "olmo2": ("Olmo2", {}),
    "olmo2, biases, multi-head": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    **{f"llama, {kind}": ("Llama", {"rope_parameters": rope(kind)}) for kind in ROPE_PARAMETERS},
    "qwen3, yarn": ("Qwen3", {"head_dim": 8, "rope_parameters": rope("yarn")}),
    "smollm3, yarn": ("SmolLM3", {"rope_parameters": rope("yarn")}),
    "olmo2, linear": ("Olmo2", {"rope_parameters": rope("linear")}),
}
SIX = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2")


def base(name: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of transformers; biases and norms are random too."""
    kind, fields = BASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**copy.deepcopy(SIZES | fields | overrides))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


@torch.no_grad()
def logits(model: Any, length: int = 40, **kwargs: Any) -> Tensor:
    return model(tokens(2, length), **kwargs).logits
