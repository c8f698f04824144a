"""Checkpoints of flash-linear-attention: every key is mapped, and the logits are those of the source."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from checkpoints import converted, read, write
from fla_checkpoints import EVERYTHING, FLA_SIZES, fla_checkpoint
from foxlm import FoxForCausalLM
from foxlm.conversion.convert import convert_to_folder
from foxlm.conversion.formats.checkpoint_format import invalid_config_as_value_error
from foxlm.conversion.formats.fla import FLA
from naive import naive_attention

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "GQA": {"num_kv_heads": 2},
    "one key/value head": {"num_kv_heads": 1, "qk_norm": True},
    "biases": {"qkv_bias": True},
    "QK-norm": {"qk_norm": True},
    "output gate": {"use_output_gate": True},
    "tied": {"tie_word_embeddings": True},
    "large eps": {"norm_eps": 0.3, "qk_norm": True},
    "width by ratio": {"intermediate_size": None, "hidden_ratio": 13, "use_output_gate": True},
    "width by their default": {"intermediate_size": None, "hidden_ratio": None, "use_output_gate": True},
    "everything": EVERYTHING,
    "without effect": {
        "elementwise_affine": False,
        "fuse_norm": False,
        "fuse_swiglu": False,
        "fuse_cross_entropy": False,
        "fuse_linear_cross_entropy": True,
        "use_l2warp": True,
        "attnres_block_size": None,
        "architectures": ["ForgettingTransformerForCausalLM"],
        "torch_dtype": "float64",
        "transformers_version": "4.51.3",
    },
    # Every field that 0.6.0 writes with transformers 5.24, in the values of a model as it comes.
    "a file of 0.6.0": {
        "architectures": ["ForgettingTransformerForCausalLM"],
        "attnres_block_size": None,
        "bos_token_id": 1,
        "dtype": "float64",
        "elementwise_affine": True,
        "eos_token_id": 2,
        "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False,
        "fuse_norm": True,
        "fuse_swiglu": True,
        "hidden_act": "swish",
        "hidden_ratio": 4,
        "initializer_range": 0.02,
        "norm_eps": 1e-6,
        "num_kv_heads": None,
        "pad_token_id": None,
        "qk_norm": False,
        "qkv_bias": False,
        "tie_word_embeddings": False,
        "transformers_version": "5.24.0",
        "use_cache": True,
        "use_l2warp": False,
        "use_output_gate": False,
        "window_size": None,
    },
}


def fla_config(fields):
    with invalid_config_as_value_error():
        return FLA.to_config(fields)


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def fla_logits(tokens, weights, fields):
    """Their forward pass in float64, from what their modules compute."""
    eps, head_dim = fields.get("norm_eps", 1e-6), fields["hidden_size"] // fields["num_heads"]
    x = weights["model.embeddings.weight"][tokens]
    for i in range(fields["num_hidden_layers"]):
        start = f"model.layers.{i}."
        layer = {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}

        def project(name, x, layer=layer):
            return functional.linear(x, layer[f"{name}_proj.weight"], layer.get(f"{name}_proj.bias"))

        def heads(letter, x, layer=layer, project=project):
            states = project(f"attn.{letter}", x).unflatten(-1, (-1, head_dim))
            if f"attn.{letter}_norm.weight" in layer:
                # GroupNorm of one group per head, whose eps does not come from the configuration.
                states = rms_norm(states, layer[f"attn.{letter}_norm.weight"].unflatten(0, (-1, head_dim)), 1e-5)
            return states

        h = rms_norm(x, layer["attn_norm.weight"], eps)
        q, k, v = (heads(letter, h) for letter in "qkv")
        out, _ = naive_attention(q, k, v, functional.logsigmoid(project("attn.f", h)))
        out = out.flatten(-2)
        if fields.get("use_output_gate"):
            out = project("attn.g", h).sigmoid() * out
        x = x + project("attn.o", out)
        h = rms_norm(x, layer["mlp_norm.weight"], eps)
        x = x + project("mlp.down", functional.silu(project("mlp.gate", h)) * project("mlp.up", h))
    head = weights["model.embeddings.weight" if fields.get("tie_word_embeddings") else "lm_head.weight"]
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_theirs(variant, tmp_path):
    fields = FLA_SIZES | VARIANTS[variant]
    weights = fla_checkpoint(fields)
    write(tmp_path / "theirs", fields, weights)
    model = converted(tmp_path / "theirs", tmp_path / "ours")
    assert model.dtype == torch.float64 and not model.training
    tokens = torch.randint(61, (2, 19))
    expected = fla_logits(tokens, weights, fields)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bitwise(variant, tmp_path):
    fields = FLA_SIZES | VARIANTS[variant]
    weights = fla_checkpoint(fields)
    write(tmp_path / "theirs", fields, weights)
    convert_to_folder(tmp_path / "theirs", tmp_path / "ours")
    convert_to_folder(tmp_path / "ours", tmp_path / "back", to="fla")
    back = read(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    assert back["model.norm.weight"].dtype == torch.float64
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert FLA.to_config(fields).to_diff_dict() == fla_config(FLA_SIZES | VARIANTS[variant]).to_diff_dict()


def test_bias_that_theirs_lacks_must_be_zero(tmp_path):
    model = FoxForCausalLM(fla_config(FLA_SIZES | EVERYTHING))
    model.save_pretrained(tmp_path / "zero")
    convert_to_folder(tmp_path / "zero", tmp_path / "theirs", to="fla")
    model.get_parameter("model.layers.1.self_attn.o_proj.bias").data[3] = 0.5
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj\.bias must be zero"):
        convert_to_folder(tmp_path / "ours", tmp_path / "back", to="fla")
    assert not (tmp_path / "back").exists()


def test_tied_embeddings_may_stand_twice(tmp_path):
    fields = FLA_SIZES | VARIANTS["tied"]
    weights = fla_checkpoint(fields)
    write(tmp_path / "theirs", fields, weights | {"lm_head.weight": weights["model.embeddings.weight"].clone()})
    model = converted(tmp_path / "theirs", tmp_path / "ours")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("spoil", [lambda head: head + 1e-9, lambda head: head[:-1]])
def test_tied_embeddings_that_differ_are_refused_both_ways(spoil, tmp_path):
    fields = FLA_SIZES | VARIANTS["tied"]
    weights = fla_checkpoint(fields)
    write(tmp_path / "theirs", fields, weights)
    convert_to_folder(tmp_path / "theirs", tmp_path / "ours")
    save_file({"lm_head.weight": spoil(weights["model.embeddings.weight"])}, tmp_path / "theirs" / "head.safetensors")
    shutil.copy(tmp_path / "theirs" / "head.safetensors", tmp_path / "ours")
    for convert, name in (
        (lambda: convert_to_folder(tmp_path / "theirs", tmp_path / "out"), "embeddings"),
        (lambda: convert_to_folder(tmp_path / "ours", tmp_path / "out", to="fla"), "embed_tokens"),
    ):
        with pytest.raises(ValueError, match=rf"lm_head\.weight must be model\.{name}\.weight with tie_word"):
            convert()
    assert not (tmp_path / "out").exists()


def test_fields_that_a_file_leaves_out():
    config = fla_config({"model_type": FLA.fields.model_type})
    assert (config.hidden_size, config.num_hidden_layers, config.heads) == (2048, 24, (32, 32, 64))
    assert (config.intermediate_size, config.vocab_size, config.eos_token_id) == (5632, 32000, 2)
    assert config.rope_parameters is None and config.forget_gate_heads == "query"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "forgetting_transformer-project_fox"}, "model_type"),
        ({"window_size": 128}, "window_size"),
        ({"attnres_block_size": 4}, "attnres_block_size"),
        ({"hidden_act": "powlu"}, "hidden_act"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"attn": {"layers": [0]}}, "attn"),
        ({"num_heads": 5}, "num_attention_heads"),
        ({"num_kv_heads": 3}, "num_key_value_heads"),
        ({"qkv_bias": "yes"}, "qkv_bias"),
    ],
)
def test_configuration_that_cannot_be_represented_is_refused(change, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        fla_config(FLA_SIZES | change)


def missing(weights):
    name = "model.layers.1.attn.f_proj.bias"
    del weights[name]
    return name


def unknown(weights):
    # Residuals of another kind, which a configuration without them does not announce.
    name = "model.layers.1.attn_res_norm.weight"
    weights[name] = torch.ones(32)
    return name


def misshapen(weights):
    # One weight for all heads, as in the days before flash-linear-attention's first release of this model.
    name = "model.layers.1.attn.q_norm.weight"
    weights[name] = weights[name][:8]
    return name


def unasked(weights):
    name = "model.layers.0.attn.o_proj.bias"
    weights[name] = torch.ones(32)
    return name


@pytest.mark.parametrize("spoil", [missing, unknown, misshapen, unasked])
def test_weights_that_do_not_fit_are_named(spoil, tmp_path):
    fields = FLA_SIZES | EVERYTHING
    weights = fla_checkpoint(fields)
    name = spoil(weights)
    write(tmp_path / "theirs", fields, weights)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_to_folder(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("switch", ["qkv_bias", "qk_norm", "use_output_gate"])
def test_weights_and_switches_must_agree(switch, tmp_path):
    write(tmp_path / "theirs", FLA_SIZES | EVERYTHING | {switch: False}, fla_checkpoint(FLA_SIZES | EVERYTHING))
    with pytest.raises(ValueError, match="no place"):
        convert_to_folder(tmp_path / "theirs", tmp_path / "ours")
