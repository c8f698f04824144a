"""Checkpoints in the authors' layout: every key accounted for, the same model out."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from foxlm import FoxForCausalLM
from foxlm.conversion.authors import (
    AUTHORS_MODEL_TYPE,
    authors_config,
    convert_authors_checkpoint,
    convert_authors_weights,
)

SIZES: dict[str, Any] = {
    "model_type": AUTHORS_MODEL_TYPE,
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
VARIANTS: dict[str, dict[str, Any]] = {
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


def checkpoint(variant):
    fields = SIZES | VARIANTS[variant]
    torch.manual_seed(0)
    model = FoxForCausalLM(authors_config(fields)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return fields, model, authors_layout(model, fields)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_becomes_the_same_model(variant, tmp_path):
    fields, model, weights = checkpoint(variant)
    if fields.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    names = sorted(weights)
    for shard in (0, 1):
        part = {name: weights[name].contiguous() for name in names[shard::2]}
        save_file(part, tmp_path / f"model-{shard}.safetensors")
    converted = convert_authors_checkpoint(tmp_path)
    tokens = torch.randint(61, (2, 19))
    assert torch.equal(converted(tokens).logits, model(tokens).logits)
    assert authors_layout(converted, fields).keys() >= weights.keys()
    for name, weight in authors_layout(converted, fields).items():
        assert name not in weights or torch.equal(weight, weights[name])


def test_constants_of_their_code_are_kept():
    config = authors_config(SIZES | PRO)
    assert config.qk_norm_eps == 1e-5 and config.rms_norm_eps == 1e-6
    assert authors_config({"model_type": AUTHORS_MODEL_TYPE}).hidden_size == 2048


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"window_size": 128}, "window_size"),
        ({"elementwise_affine": False}, "elementwise_affine"),
        ({"fgate_typ": "full"}, "fgate_typ"),
        ({"fgate_type": "sometimes"}, "forget_gate"),
    ],
)
def test_configuration_that_cannot_be_represented_is_refused(change, named):
    with pytest.raises(Exception, match=named):
        authors_config(SIZES | change)


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "unsplittable"])
def test_weights_that_do_not_fit_are_named(fault):
    fields, _, weights = checkpoint("pro")
    name = "model.layers.1.mlp.gate_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        name = "model.layers.1.attn.extra.weight"
        weights[name] = torch.zeros(3)
    elif fault == "misshapen":
        weights[name] = weights[name][:, :-1]
    else:
        weights[name] = weights[name][:1]
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_authors_weights(weights, authors_config(fields))


def test_pickled_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        convert_authors_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        convert_authors_checkpoint(tmp_path / "nowhere")
