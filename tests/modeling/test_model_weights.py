"""Saving, loading and dtypes of weights, and the heads of other tasks."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import foxlm
from foxlm import (
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
)
from models import (
    IMPLEMENTATIONS,
    LLAMA,
    ROPE,
    VARIANTS,
    assert_close,
    tiny_config,
    tiny_model,
    tokens,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_bit_equal(variant: str, tmp_path) -> None:
    model = tiny_model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fox"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FoxForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # Weights mapped from a file may lie at odd addresses, by which a CPU's matrix products choose the order of sums.
    loaded = copy.deepcopy(loaded)
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["pro", "bias-only", "fixed", "key-value-gates"])
def test_gates_stay_in_float32(variant: str, dtype: torch.dtype, tmp_path) -> None:
    model = tiny_model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if "forget_gate" in name else dtype), name
        if "forget_gate" in name:
            assert torch.equal(tensor, model.state_dict()[name])
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(tokens(2, 9)).logits, loaded(tokens(2, 9)).logits)


@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_lists_of_what_stays_in_float32_name_that_and_nothing_else(variant: str) -> None:
    model = tiny_model(variant)
    assert not model._keep_in_fp32_modules
    assert model._keep_in_fp32_modules_strict == {"forget_gate"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_made_in_half_precision_keeps_its_decay_times(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("fixed", decay_time_max=4000.0), dtype=dtype)
    log_f = model.model.layers[0].self_attn.log_forget_gates(torch.zeros(1, 1, 32, dtype=dtype))[0, 0]
    assert abs(log_f[0].item() * 2.0 + 1) < 1e-5 and abs(log_f[-1].item() * 4000.0 + 1) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["pro", "llama", "rope"])
def test_half_precision_is_finite_and_near(variant: str, dtype: torch.dtype, implementation: str, tmp_path) -> None:
    """Compared with float32 at an ordinary scale of weights, where rounding is all that differs."""
    model = tiny_model(variant, dtype=torch.float32, initializer_range=0.1)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation=implementation)
    logits = half(tokens(2, 30)).logits
    assert logits.dtype == dtype
    # A few roundings on the way: 2 layers, each a handful of products.
    assert_close(logits.float(), model(tokens(2, 30)).logits, 16 * torch.finfo(dtype).eps)


def edit_weights(folder: Any, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.self_attn.forget_gate"


def test_missing_gate_is_reported_and_starts_anew(tmp_path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: (weights.pop(GATE + ".weight"), weights.pop(GATE + ".bias")))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {GATE + ".weight", GATE + ".bias"}
    log_f = loaded.model.layers[1].self_attn.log_forget_gates(torch.zeros(1, 1, 32))[0, 0]
    assert abs(log_f[0].item() * 2.0 + 1) < 1e-5 and abs(log_f[-1].item() * 20.0 + 1) < 1e-5
    assert 0.2 < loaded.model.layers[1].self_attn.forget_gate.weight.std() < 0.8


def test_unknown_key_is_reported(tmp_path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.g.weight": torch.ones(1)}))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.layers.0.self_attn.g.weight"}


def test_wrong_shape_is_an_error(tmp_path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({GATE + ".weight": torch.zeros(2, 32)}))
    with pytest.raises(RuntimeError, match=r"(?s)mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_embeddings_are_saved_once(tmp_path) -> None:
    model = tiny_model("tied", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# Heads of other tasks


@pytest.mark.parametrize(
    ("model_class", "auto_class", "labels"),
    [
        (FoxForSequenceClassification, AutoModelForSequenceClassification, {"labels": torch.tensor([1, 2, 0])}),
        (FoxForTokenClassification, AutoModelForTokenClassification, {"labels": tokens(3, 9) % 3}),
        (
            FoxForQuestionAnswering,
            AutoModelForQuestionAnswering,
            {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])},
        ),
    ],
)
def test_task_heads(model_class: Any, auto_class: Any, labels: dict[str, Tensor], tmp_path) -> None:
    # A question-answering head has two outputs whatever num_labels says.
    model = tiny_model(model_class=model_class, num_labels=3, dtype=torch.float32)
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    ids[0, 6:] = mask[0, 6:] = 0
    out = model(ids, attention_mask=mask, **labels)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    again = loaded(ids, attention_mask=mask, **labels)
    field = "start_logits" if model_class is FoxForQuestionAnswering else "logits"
    assert torch.equal(again[field], out[field])
    alone = model(ids[:1, :6])[field]
    expected = out[field][:1] if model_class is FoxForSequenceClassification else out[field][:1, :6]
    assert_close(alone, expected, 1e-4)


def test_every_auto_class_knows_fox(tmp_path) -> None:
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is FoxModel
    expected = model.model(tokens(1, 5)).last_hidden_state
    assert torch.equal(base(tokens(1, 5)).last_hidden_state, expected)
    assert type(AutoModelForSequenceClassification.from_config(tiny_config())) is FoxForSequenceClassification
    assert set(foxlm.__all__) <= set(dir(foxlm))


def test_llama_block_is_what_the_preset_says() -> None:
    fields = foxlm.FoxConfig.preset("llama-125m")
    assert {name: getattr(fields, name) for name in LLAMA} == LLAMA
    assert set(ROPE) == {"rope_parameters"}
