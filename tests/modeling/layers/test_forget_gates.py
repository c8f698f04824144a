"""Forget gates: their initial values, their effect on attention weights, and which are trained."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from foxlm import (
    FoxForCausalLM,
)
from foxlm.modeling.layers.forget_gate import bias_for_times
from models import (
    assert_close,
    tiny_config,
    tiny_model,
    tokens,
)


@torch.no_grad()
@pytest.mark.parametrize("heads", ["query", "key_value"])
@pytest.mark.parametrize("gate", ["full", "bias_only", "fixed"])
def test_new_gates_start_from_log_spaced_decay_times(gate: str, heads: str) -> None:
    config = tiny_config(
        forget_gate=gate, forget_gate_heads=heads, decay_time_min=0.5, decay_time_max=4000.0, num_attention_heads=6
    )
    model: Any = FoxForCausalLM(config)
    count = 6 if heads == "query" else 2
    ratio = (4000.0 / 0.5) ** (1 / (count - 1))
    times = torch.tensor([0.5 * ratio**i for i in range(count)], dtype=torch.float64)
    for layer in model.model.layers:
        log_f = layer.self_attn.log_forget_gates(torch.zeros(1, 1, 32))[0, 0]
        assert log_f.dtype == torch.float32
        assert ((log_f * times + 1.0).abs() < 1e-5).all(), log_f


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gate_that_never_forgets_is_exactly_zero_and_has_no_gradient(dtype: torch.dtype) -> None:
    bias = bias_for_times(torch.tensor([math.inf, 1e300])).to(dtype).requires_grad_()
    log_f = torch.nn.functional.logsigmoid(bias.to(torch.promote_types(dtype, torch.float32)))
    log_f.sum().backward()
    smallest = 1e-50 if dtype == torch.float64 else 0.0
    assert bias.grad is not None
    assert log_f.abs().max() <= smallest and bias.grad.abs().max() <= smallest


def test_bias_gives_its_decay_time_however_short_or_long() -> None:
    times = torch.tensor([1e-3, 0.5, 1.0, 64.0, 1e9], dtype=torch.float64)
    assert_close(torch.nn.functional.logsigmoid(bias_for_times(times)) * times, torch.full((5,), -1.0).double())


def test_paper_start_of_full_gates() -> None:
    time = 1 / math.log(2)
    model: Any = FoxForCausalLM(tiny_config(decay_time_min=time, decay_time_max=time))
    assert model.model.layers[0].self_attn.forget_gate.bias.abs().max() < 1e-6


@torch.no_grad()
def test_decay_shows_in_the_attention_weights() -> None:
    """With queries of zero only the decay is left: weights fall by ``exp(-distance / T)``."""
    model = tiny_model("llama", forget_gate="fixed", seed=3)
    expected = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
        layer.self_attn.forget_gate.bias.copy_(-torch.log(torch.expm1(1 / torch.tensor([2.0, 5.0, 9.0, 20.0]))))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    for time in (2.0, 5.0, 9.0, 20.0):
        weights = torch.exp(-distance.double() / time).tril()
        expected.append(weights / weights.sum(-1, keepdim=True))
    model.set_attn_implementation("eager")
    attentions = model(tokens(2, 11), output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert_close(weights, torch.stack(expected).expand(2, -1, -1, -1), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates"])
def test_attention_weights_are_causal_and_sum_to_one(variant: str) -> None:
    model = tiny_model(variant)
    model.set_attn_implementation("eager")
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = mask[1, 8:] = mask[2, 3:6] = 0
    for weights in model(tokens(3, 11), attention_mask=mask, output_attentions=True).attentions:
        assert weights.shape == (3, 4, 11, 11)
        real = mask.bool()
        rows = weights.transpose(1, 2)[real]
        assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))
        assert rows.transpose(1, 2)[~real[:, None, :].expand(3, 11, 11)[real]].abs().max() == 0.0
        assert weights.transpose(1, 2)[real].min() >= 0.0
        future = torch.ones(11, 11, dtype=torch.bool).triu(1)
        assert (weights * (future & real[:, None, :, None])).abs().max() == 0.0


def test_fixed_gates_are_never_trained(tmp_path) -> None:
    model = tiny_model("fixed")
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    thawed = tiny_model("fixed").requires_grad_()
    for candidate, asks_for_gradient in ((model, False), (reloaded, False), (thawed, True)):
        candidate(tokens(2, 5), labels=tokens(2, 5)).loss.backward()
        bias = candidate.model.layers[0].self_attn.forget_gate.bias
        assert bias.requires_grad == asks_for_gradient
        assert bias.grad is None
    assert tiny_model("bias-only").model.layers[0].self_attn.forget_gate.bias.requires_grad
