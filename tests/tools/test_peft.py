"""LoRA on a FoX model: its gates, its default targets, and what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import foxlm
from foxlm import FoxForCausalLM
from foxlm.conversion.graft import graft
from models import assert_close, tiny_model, tokens
from without_foxlm import run_without

peft = pytest.importorskip("peft")


def base(**overrides: Any) -> FoxForCausalLM:
    return tiny_model(dtype=torch.float32, initializer_range=0.1, **overrides)


def train(model: Any, steps: int = 20) -> tuple[float, float]:
    """First and last loss on a few fixed sequences."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens(4, 4).repeat(1, 3)
    history = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    model.eval()
    return history[0], history[-1]


def log_gates(model: Any, ids: Tensor) -> list[Tensor]:
    """``log f`` of every layer in a forward pass, by whatever stands where the gate stood."""
    seen: list[Tensor] = []
    hooks = [
        module.forget_gate.register_forward_hook(lambda m, args, out: seen.append(out))
        for module in model.modules()
        if hasattr(module, "forget_gate") and hasattr(module, "q_proj")
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [torch.nn.functional.logsigmoid(logits) for logits in seen]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens(2, 9)).logits


def test_lora_with_trained_gates_trains_saves_reloads_and_merges(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["forget_gate"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("forget_gate.modules_to_save" in name for name in trained) == 4  # weight and bias of two layers
    assert sum("lora_" in name for name in trained) == 8
    assert len(trained) == 12
    gates = [g.clone() for g in log_gates(model, tokens(2, 9))]
    first, last = train(model)
    assert last < 0.9 * first
    moved = log_gates(model, tokens(2, 9))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(gates, moved, strict=True))

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(base())).abs().max() > 1e-3

    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is FoxForCausalLM
    assert_close(logits(merged), expected, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_all_linear_layers_keeps_valid_gates(dtype: torch.dtype, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "output_gate"} <= adapted
    assert "lm_head" not in adapted
    first, last = train(model)
    assert last < 0.9 * first
    for log_f in log_gates(model, tokens(2, 9)):
        assert log_f.dtype == torch.float32
        assert log_f.isfinite().all() and (log_f <= 0).all() and (log_f < 0).any()
    expected = logits(model)
    merged = model.merge_and_unload()
    # Merged in bfloat16, the weights are rounded once more.
    assert_close(logits(merged).float(), expected.float(), 1e-4 if dtype == torch.float32 else 0.05)


def test_adapted_gate_is_what_its_merged_weight_gives() -> None:
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["forget_gate"]))
    before = [g.clone() for g in log_gates(model, tokens(2, 9))]
    train(model)
    after = log_gates(model, tokens(2, 9))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after, strict=True))
    for a, b in zip(after, log_gates(model.merge_and_unload(), tokens(2, 9)), strict=True):
        assert_close(b, a, 1e-5)


@pytest.mark.parametrize("variant", ["pro", "llama", "bias-only"])
def test_lora_without_named_targets_adapts_queries_and_values(variant: str) -> None:
    model = peft.get_peft_model(tiny_model(variant, dtype=torch.float32), peft.LoraConfig(r=4))
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {"q_proj", "v_proj"}


ORDERS = {
    "peft first": "import peft; import foxlm",
    "foxlm first": "import foxlm; import peft",
    "model first": "import foxlm; build(foxlm); import peft",
    "foxlm from its command": "import sys; sys.orig_argv[-1] = 'foxlm'; import foxlm; build(foxlm); import peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_default_targets_are_known_in_every_order_of_imports(order: str, tmp_path: Path) -> None:
    code = f"""
def build(foxlm):
    global model
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = foxlm.FoxForCausalLM(foxlm.FoxConfig(**sizes))

{ORDERS[order]}
if "model" not in globals():
    build(foxlm)
for config in (peft.LoraConfig(r=2), peft.IA3Config(), peft.LNTuningConfig()):
    print(*sorted(peft.get_peft_model(model, config).peft_config["default"].target_modules))
"""
    assert run_without((), code, tmp_path).splitlines() == [
        "q_proj v_proj",
        "down_proj k_proj v_proj",
        "input_layernorm norm post_attention_layernorm",
    ]


def test_grafted_model_in_bfloat16_with_lora_and_trained_gates(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    graft(LlamaForCausalLM(config).bfloat16(), decay_times=(2, 20)).save_pretrained(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = [g.clone() for g in log_gates(model, tokens(2, 9))]
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["forget_gate"]))
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {"q_proj", "v_proj"}
    first, last = train(model)
    assert last < 0.9 * first
    after = log_gates(model, tokens(2, 9))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after, strict=True))
    # With a zero weight they did not depend on the token; now they do.
    assert all(b.std(1).max() == 0 < a.std(1).max() for a, b in zip(after, before, strict=True))

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(logits(again), logits(model))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "forget_gate" in name else torch.bfloat16), name
    for a, b in zip(log_gates(loaded, tokens(2, 9)), after, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, 1e-2)


def test_adapted_model_generates_as_without_a_cache() -> None:
    model = peft.get_peft_model(
        base(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "forget_gate"], init_lora_weights=False)
    ).eval()
    ids = tokens(2, 7)
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, use_cache=False, **how)
    assert torch.equal(model.generate(input_ids=ids, **how), expected)
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **how), expected)


def test_prefix_tuning_is_refused_by_name() -> None:
    model = peft.get_peft_model(tiny_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"must keep the forget gates.*prefix tuning.*LoRA or prompt tuning"):
        model(tokens(1, 5))


def test_an_adapter_holds_gates_and_sinks_without_a_list(tmp_path: Path) -> None:
    model = base(attention_sink="learned", use_output_gate=True)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **foxlm.peft_targets(model)))
    before = logits(adapted)
    first, last = train(adapted)
    assert last < 0.9 * first
    adapted.save_pretrained(tmp_path / "adapter")
    saved = peft.load_peft_weights(tmp_path / "adapter")
    for part in ("forget_gate.weight", "forget_gate.bias", "sink.key", "sink.value", "output_gate.lora_A.weight"):
        assert sum(name.endswith(part) for name in saved) == 2, part
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(logits(again), logits(adapted)) and not torch.equal(logits(again), before)
    merged = again.merge_and_unload()
    assert_close(logits(merged), logits(adapted), 1e-4)
    assert merged.model.layers[0].self_attn.sink.key.abs().max() > 0


def test_targets_of_other_models() -> None:
    assert foxlm.peft_targets(base(forget_gate="fixed").config)["modules_to_save"] == []
    assert "output_gate" not in foxlm.peft_targets(base(use_output_gate=False))["target_modules"]
    with pytest.raises(ValueError, match="model must be a FoX model or a FoxConfig, got LlamaConfig"):
        foxlm.peft_targets(LlamaConfig())
