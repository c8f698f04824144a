"""Models quantized by torchao, quanto and bitsandbytes: what is left out, generation, saving, LoRA on top."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from foxlm import FoxPagedCache
from models import tiny_model, tokens

# bitsandbytes' 4-bit kernel for CPUs takes multiples of 32 outputs.
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "initializer_range": 0.1}


def torchao(name: str) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)())


def quanto(weights: str) -> QuantoConfig:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights=weights)


def bitsandbytes(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


METHODS: dict[str, Callable[[], Any]] = {
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto-int8": lambda: quanto("int8"),
    "quanto-int4": lambda: quanto("int4"),
    "bitsandbytes-8bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes-4bit": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
# For int4 quanto compiles an extension, once on each machine.
ALL = [pytest.param(name, id=name, marks=pytest.mark.slow if name == "quanto-int4" else []) for name in METHODS]
# Of weights only: what rounds activations to int8 makes a difference in their last bit one of a percent, in any model.
EXACT = [method for method in ALL if method.id != "torchao-int8-dynamic"]
LEFT_OUT = ("forget_gate", "key_shift.proj", "value_shift.proj")


def load(folder: Path, method: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=METHODS[method](), dtype=dtype, **options)


def is_quantized(linear: Any) -> bool:
    """Whether the class of a projection or of its weight is not torch's own."""
    return type(linear) is not torch.nn.Linear or type(linear.weight) is not torch.nn.Parameter


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens(2, 9)).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ALL)
def test_gates_and_token_shift_stay_as_they_are(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32, **SIZES).save_pretrained(tmp_path)
    model, plain = load(tmp_path, method, dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    found = 0
    for name, expected in plain.named_parameters():
        module = name.rpartition(".")[0]
        if module.endswith(LEFT_OUT):
            actual = model.get_parameter(name)
            assert type(actual) is torch.nn.Parameter, name
            assert actual.dtype == expected.dtype == (torch.float32 if "forget_gate" in name else dtype), name
            assert torch.equal(actual, expected), name
            assert type(model.get_submodule(module)) is type(plain.get_submodule(module)), name
            found += 1
        elif module.endswith("_proj"):
            assert is_quantized(model.get_submodule(module)), name
    assert found == 2 * (2 + 1 + 1)
    assert logits(model).isfinite().all()


def test_a_list_of_what_else_not_to_quantize_does_not_replace_them(tmp_path: Path) -> None:
    """torchao compares whole names of parameters, the others names of modules."""
    tiny_model(dtype=torch.float32, **SIZES).save_pretrained(tmp_path)
    config = METHODS["torchao-int8"]()
    config.modules_to_not_convert = ["o_proj.weight"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    attention = model.model.layers[0].self_attn
    assert is_quantized(attention.q_proj)
    assert not is_quantized(attention.o_proj)
    assert not is_quantized(attention.key_shift.proj)
    assert type(attention.forget_gate.weight) is torch.nn.Parameter


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_generation_with_a_cache_gives_what_it_gives_without(variant: str, method: str, tmp_path: Path) -> None:
    """Projections stay unfused, and weights that are no matrices do not bound the logits of a paged cache."""
    tiny_model(variant, dtype=torch.float32, **SIZES).save_pretrained(tmp_path)
    model = load(tmp_path, method)
    ids = tokens(2, 7)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **how)
    for cache in ({}, {"cache_implementation": "static"}, {"past_key_values": FoxPagedCache(model.config, 32)}):
        assert torch.equal(model.generate(ids, **how, **cache), expected), cache


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("quanto")])
def test_saved_and_reloaded_it_is_the_same_model(method: str, tmp_path: Path) -> None:
    """Saved before it has run: on some CPUs bitsandbytes packs 4-bit weights at their first use, not without loss."""
    tiny_model(dtype=torch.float32, **SIZES).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", method, torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    attention = again.model.layers[0].self_attn
    assert is_quantized(attention.q_proj)
    assert not is_quantized(attention.key_shift.proj)
    assert attention.forget_gate.weight.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", EXACT)
def test_lora_on_quantized_weights_trains_and_reloads(method: str, tmp_path: Path) -> None:
    """With bitsandbytes, QLoRA. Gates are trained beside it, as they are on a model that is not quantized."""
    peft = pytest.importorskip("peft")
    tiny_model(dtype=torch.float32, **SIZES).save_pretrained(tmp_path / "plain")

    def base() -> Any:
        model = load(tmp_path / "plain", method, torch.bfloat16)
        if method.startswith("bitsandbytes"):
            options = {"use_reentrant": False}
            return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
        return model

    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["forget_gate"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = tokens(4, 4).repeat(1, 3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    gate = model.get_base_model().model.layers[0].self_attn.forget_gate
    assert all(
        (new - old).abs().max() > 0
        for new, old in zip(
            gate.modules_to_save["default"].parameters(), gate.original_module.parameters(), strict=True
        )
    )

    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
