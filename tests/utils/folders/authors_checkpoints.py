"""Checkpoints in the layout of the paper's authors, made of models of ours without the code under test."""

from typing import Any

import torch

from foxlm import FoxForCausalLM
from foxlm.conversion.formats.authors import AUTHORS
from foxlm.conversion.formats.checkpoint_format import invalid_config_as_value_error

AUTHORS_SIZES: dict[str, Any] = {
    "model_type": AUTHORS.fields.model_type,
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.5,
}
PRO: dict[str, Any] = {
    "use_k_shift": True,
    "use_v_shift": True,
    "qk_norm": True,
    "use_output_gate": True,
    "use_output_norm": True,
    "hidden_ratio": 3.5,
}
FIXED = {"fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 64.0}
AUTHORS_VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "pro": PRO,
    "shared QK-norm": PRO | {"qk_norm_share_param_across_head": True},
    "rope": PRO | {"use_rope": True, "rope_base": 10000.0},
    "bias_only": PRO | {"fgate_type": "bias_only"} | FIXED,
    "fixed": {"fgate_type": "fixed"} | FIXED,
    "none": {"fgate_type": "none", "use_rope": True},
    "silu output gate": {"use_output_gate": True, "ogate_act": "silu"},
    "tied": {"tie_word_embeddings": True},
    "pruned": PRO | {"log_pruning_tolerance": -10.0},
}


def authors_config(fields):
    with invalid_config_as_value_error():
        return AUTHORS.to_config(fields)


def authors_layout(model, fields):
    """The weights of one of our models under the names that the authors' modules give them."""
    ours = model.state_dict()
    theirs = {
        "model.embeddings.weight": ours["model.embed_tokens.weight"],
        "model.norm.weight": ours["model.norm.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for i in range(fields["num_hidden_layers"]):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in ours.items() if f".layers.{i}." in k}
        attn = {k.removeprefix("self_attn."): v for k, v in layer.items() if k.startswith("self_attn.")}
        block = {
            "attn_norm.weight": layer["input_layernorm.weight"],
            "mlp_norm.weight": layer["post_attention_layernorm.weight"],
            "mlp.gate_proj.weight": torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]),
            "mlp.down_proj.weight": layer["mlp.down_proj.weight"],
            "attn.q_proj.weight": attn["q_proj.weight"],
            "attn.o_proj.weight": attn["o_proj.weight"],
        }
        for letter, name in (("k", "key"), ("v", "value")):
            if fields.get(f"use_{letter}_shift"):
                block[f"attn.{letter}_proj.linear.weight"] = attn[f"{letter}_proj.weight"]
                block[f"attn.{letter}_proj.shift_proj.weight"] = attn[f"{name}_shift.proj.weight"]
            else:
                block[f"attn.{letter}_proj.weight"] = attn[f"{letter}_proj.weight"]
        gate = fields.get("fgate_type", "full")
        if gate == "full":
            block["attn.fgate_proj.weight"] = attn["forget_gate.weight"]
            block["attn.fgate_proj.bias"] = attn["forget_gate.bias"]
        elif gate != "none":
            block["attn.fgate_bias"] = attn["forget_gate.bias"]
        if fields.get("use_output_gate"):
            block["attn.ogate_proj.weight"] = attn["output_gate.weight"]
        if fields.get("use_output_norm"):
            block["attn.output_norm.weight"] = attn["output_norm.weight"]
        if fields.get("qk_norm"):
            block["attn.q_norm.weight"] = attn["q_norm.weight"]
            block["attn.k_norm.weight"] = attn["k_norm.weight"]
        theirs |= {f"model.layers.{i}.{name}": weight for name, weight in block.items()}
    return theirs


def authors_checkpoint(variant):
    fields = AUTHORS_SIZES | AUTHORS_VARIANTS[variant]
    torch.manual_seed(0)
    model = FoxForCausalLM(authors_config(fields)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return fields, model, authors_layout(model, fields)
