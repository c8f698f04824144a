"""Tiny FoX models over bytes, float32, for tests of evaluation."""

from typing import Any

import torch

from foxlm import FoxConfig, FoxForCausalLM


def byte_model(**overrides: Any) -> FoxForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "decay_time_max": 64.0,
    }
    return FoxForCausalLM(FoxConfig(**(fields | overrides))).eval()
