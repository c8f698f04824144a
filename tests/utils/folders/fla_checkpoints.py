"""Random checkpoints in the layout of flash-linear-attention, written without the code under test."""

from typing import Any

import torch

from foxlm.conversion.formats.fla import FLA

FLA_SIZES: dict[str, Any] = {
    "model_type": FLA.fields.model_type,
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
}
EVERYTHING: dict[str, Any] = {"num_kv_heads": 2, "qkv_bias": True, "qk_norm": True, "use_output_gate": True}


def fla_checkpoint(fields):
    """Random float64 weights with the names and shapes that their modules have."""
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    kv_dim = (fields.get("num_kv_heads") or heads) * (hidden // heads)
    width = fields["intermediate_size"]
    if width is None:
        ratio = 4 if fields["hidden_ratio"] is None else fields["hidden_ratio"]
        width = -(-int(ratio * hidden * 2 / 3) // 256) * 256
    shapes = {"model.embeddings.weight": (fields["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not fields.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (fields["vocab_size"], hidden)
    for i in range(fields["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "mlp_norm.weight": (hidden,),
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.up_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
            "attn.f_proj.weight": (heads, hidden),
            "attn.f_proj.bias": (heads,),
            "attn.o_proj.weight": (hidden, hidden),
        }
        for letter, size in (("q", hidden), ("k", kv_dim), ("v", kv_dim)):
            block[f"attn.{letter}_proj.weight"] = (size, hidden)
            if fields.get("qkv_bias"):
                block[f"attn.{letter}_proj.bias"] = (size,)
            if fields.get("qk_norm") and letter != "v":
                block[f"attn.{letter}_norm.weight"] = (size,)
        if fields.get("use_output_gate"):
            block["attn.g_proj.weight"] = (hidden, hidden)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    torch.manual_seed(0)
    weights = {name: 0.4 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: weight + ("norm" in name) for name, weight in weights.items()}
