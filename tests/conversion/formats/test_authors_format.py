"""Checkpoints of the paper's authors: every key is mapped, and the converted model is the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from authors_checkpoints import AUTHORS_SIZES, AUTHORS_VARIANTS, PRO, authors_checkpoint, authors_config, authors_layout
from checkpoints import converted, read, write
from foxlm import FoxConfig, FoxForCausalLM
from foxlm.conversion.convert import convert_to_folder
from foxlm.conversion.formats.authors import AUTHORS


@pytest.mark.parametrize("variant", AUTHORS_VARIANTS)
def test_folder_becomes_the_same_model(variant, tmp_path):
    fields, model, weights = authors_checkpoint(variant)
    if fields.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    write(tmp_path / "theirs", fields, weights)
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    tokens = torch.randint(61, (2, 19))
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
    assert authors_layout(ours, fields).keys() >= weights.keys()
    for name, weight in authors_layout(ours, fields).items():
        assert name not in weights or torch.equal(weight, weights[name])


@pytest.mark.parametrize("ratio", [{"hidden_ratio": None}, {}])
def test_width_is_theirs_where_no_ratio_is_given(ratio):
    fields = AUTHORS_SIZES | PRO | {"intermediate_size": None, "hidden_size": 512}
    del fields["hidden_ratio"]
    assert authors_config(fields | ratio).intermediate_size == 1536
    assert authors_config(fields | {"hidden_ratio": 3.5}).intermediate_size == 1280


def test_constants_of_their_code_are_kept():
    config = authors_config(AUTHORS_SIZES | PRO)
    assert config.qk_norm_eps == 1e-5 and config.rms_norm_eps == 1e-6
    assert authors_config({"model_type": AUTHORS.fields.model_type}).hidden_size == 2048


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"window_size": 128}, "window_size"),
        ({"elementwise_affine": False}, "elementwise_affine"),
        ({"fgate_typ": "full"}, "fgate_typ"),
        ({"fgate_type": "sometimes"}, "forget_gate"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_rope": "false"}, "use_rope"),
        (PRO | {"ogate_act": "silu"}, "ogate_act"),
    ],
)
def test_configuration_that_cannot_be_represented_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        authors_config(AUTHORS_SIZES | change)


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "unsplittable"])
def test_weights_that_do_not_fit_are_named(fault, tmp_path):
    fields, _, weights = authors_checkpoint("pro")
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
    write(tmp_path / "theirs", fields, weights)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_to_folder(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", AUTHORS_VARIANTS)
def test_round_trips_are_bitwise(variant, dtype, tmp_path):
    fields, _, weights = authors_checkpoint(variant)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if fields.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    write(tmp_path / "theirs", fields, weights)
    convert_to_folder(tmp_path / "theirs", tmp_path / "ours")
    convert_to_folder(tmp_path / "ours", tmp_path / "back", to="authors")
    convert_to_folder(tmp_path / "back", tmp_path / "ours again")
    back = read(tmp_path / "back")
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        # Gates are widened once, and stay so.
        assert back[name].dtype == (torch.float32 if "fgate" in name else dtype)
        assert torch.equal(back[name], weight.to(back[name].dtype))
    ours, again = read(tmp_path / "ours"), read(tmp_path / "ours again")
    assert ours.keys() == again.keys()
    assert all(ours[name].dtype == again[name].dtype and torch.equal(ours[name], again[name]) for name in ours)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "ours again" / file).read_text()


@pytest.mark.parametrize("variant", ["pro", "fixed", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_is_what_save_pretrained_would_write(variant, dtype, tmp_path):
    fields, _, weights = authors_checkpoint(variant)
    write(tmp_path / "theirs", fields, {name: weight.to(dtype) for name, weight in weights.items()})
    converted(tmp_path / "theirs", tmp_path / "ours").save_pretrained(tmp_path / "expected")
    written = {file.name for file in (tmp_path / "ours").iterdir()}
    assert written == {file.name for file in (tmp_path / "expected").iterdir()}
    assert written > {"config.json", "generation_config.json", "modeling_fox.py"}
    for file in written - {"model.safetensors"}:
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "expected" / file).read_text()
    ours, expected = read(tmp_path / "ours"), read(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 16}, "head_dim"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"qk_norm_eps": None}, "qk_norm_eps"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ({"output_gate_act": "silu"}, "ogate_act"),
        ({"norm_position": "post"}, "norm_position"),
        ({"qk_norm": "all_heads"}, "qk_norm"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "nope_layers": [0]},
            "nope_layers",
        ),
    ],
)
def test_model_that_their_layout_cannot_express_is_refused(change, named, tmp_path):
    fields = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    FoxForCausalLM(FoxConfig(**({"qk_norm_eps": 1e-5} | fields | change))).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=rf"^{named} must be "):
        convert_to_folder(tmp_path / "ours", tmp_path / "theirs", to="authors")
    assert not (tmp_path / "theirs").exists()


def test_what_nothing_computed_depends_on_is_left_behind(tmp_path):
    fields = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    idle = {"forget_aux_loss_coef": 0.1, "grafted_from": "llama", "acp_eps": None, "free_dead_cache": True}
    idle |= {"loss_chunk_size": 64}
    FoxForCausalLM(FoxConfig(**fields, qk_norm_eps=1e-5, **idle)).save_pretrained(tmp_path / "ours")
    convert_to_folder(tmp_path / "ours", tmp_path / "theirs", to="authors")
    assert not idle.keys() & json.loads((tmp_path / "theirs" / "config.json").read_text()).keys()


@pytest.mark.parametrize(
    ("preset", "to", "changes"),
    [
        ("pro-125m", "authors", {}),
        ("llama-125m", "authors", {}),
        ("llama-125m", "fla", {}),
        ("pro-125m", "fla", {"use_key_shift": False, "use_value_shift": False, "use_output_norm": False}),
    ],
)
def test_presets_are_written_and_read_back(preset: str, to: str, changes: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 61}
    model = FoxForCausalLM(FoxConfig.preset(preset, **sizes, **changes)).eval()
    model.save_pretrained(tmp_path / "ours")
    convert_to_folder(tmp_path / "ours", tmp_path / "theirs", to=to)
    convert_to_folder(tmp_path / "theirs", tmp_path / "back")
    tokens = torch.arange(20)[None]
    assert torch.equal(FoxForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits, model(tokens).logits)
