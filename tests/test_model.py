"""The model against independent computations: loops over the papers' formulas, transformers' Llama and Qwen3."""

import json
import math
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
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import foxlm
from foxlm import (
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
)
from foxlm.modeling import attention_fox
from models import (
    IMPLEMENTATIONS,
    LLAMA,
    ROPE,
    ROPE_TYPES,
    SIZES,
    VARIANTS,
    assert_close,
    rope,
    tiny_config,
    tiny_model,
    tokens,
)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rotate(x: Tensor, position: int, parameters: dict[str, Any]) -> Tensor:
    """Turn each pair ``(x_i, x_{i + n/2})`` of the first ``n`` dimensions by its angle."""
    n = int(len(x) * parameters.get("partial_rotary_factor", 1.0))
    out = x.clone()
    for i in range(n // 2):
        angle = position * parameters["rope_theta"] ** (-2 * i / n)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + n // 2] * sin
        out[i + n // 2] = x[i + n // 2] * cos + x[i] * sin
    return out


class LoopModel:
    """FoX as the papers write it: one token, one head, one weight at a time. It reads weights, runs no foxlm code."""

    def __init__(self, model: FoxForCausalLM) -> None:
        self.config: Any = model.config
        self.weights = dict(model.state_dict())

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = self.weights[name + ".weight"] @ x
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def head_weight(self, name: str, head: int) -> Tensor:
        size = self.config.head_dim
        weight = self.weights[name + ".weight"]
        return weight if len(weight) == size else weight[head * size : (head + 1) * size]

    def log_gate(self, name: str, x: Tensor, head: int) -> Tensor:
        config = self.config
        if config.forget_gate == "none":
            return torch.zeros((), dtype=x.dtype)
        gate = head
        if config.forget_gate_heads == "key_value":
            gate = head * config.num_key_value_heads // config.num_attention_heads
        logit = self.weights[name + ".bias"][gate]
        if config.forget_gate == "full":
            logit = logit + self.weights[name + ".weight"][gate] @ x
        return -torch.log1p(torch.exp(-logit))

    def shifted(self, projection: str, shift: str, xs: list[Tensor], head: int) -> list[Tensor]:
        """Keys or values of one head, each mixed with the one before it."""
        size = self.config.head_dim
        states = [self.linear(projection, x)[head * size : (head + 1) * size] for x in xs]
        if shift + ".proj.weight" not in self.weights:
            return states
        mixed = []
        for t, x in enumerate(xs):
            alpha = torch.sigmoid(self.weights[shift + ".proj.weight"][head] @ x)
            before = states[t - 1] if t else torch.zeros_like(states[0])
            mixed.append(alpha * before + (1 - alpha) * states[t])
        return mixed

    def attention(self, layer: str, xs: list[Tensor]) -> list[Tensor]:
        config = self.config
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        qk_eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
        outputs: list[list[Tensor]] = [[] for _ in xs]
        for head in range(heads):
            kv = head * kv_heads // heads
            queries = [self.linear(layer + "q_proj", x)[head * size : (head + 1) * size] for x in xs]
            keys = self.shifted(layer + "k_proj", layer + "key_shift", xs, kv)
            values = self.shifted(layer + "v_proj", layer + "value_shift", xs, kv)
            if config.qk_norm != "none":
                queries = [rms(q, self.head_weight(layer + "q_norm", head), qk_eps) for q in queries]
                keys = [rms(k, self.head_weight(layer + "k_norm", kv), qk_eps) for k in keys]
            if config.rope_parameters is not None:
                queries = [rotate(q, t, config.rope_parameters) for t, q in enumerate(queries)]
                keys = [rotate(k, t, config.rope_parameters) for t, k in enumerate(keys)]
            log_f = [self.log_gate(layer + "forget_gate", x, head) for x in xs]
            for i, q in enumerate(queries):
                logits = torch.stack([q @ keys[j] / math.sqrt(size) + sum(log_f[j + 1 : i + 1]) for j in range(i + 1)])
                weights = torch.exp(logits - logits.max())
                out = sum(w * v for w, v in zip(weights, values, strict=False)) / weights.sum()
                if config.use_output_norm:
                    out = rms(out, self.head_weight(layer + "output_norm", head), config.rms_norm_eps)
                if config.use_output_gate:
                    gate = self.linear(layer + "output_gate", xs[i])[head * size : (head + 1) * size]
                    sigmoid = torch.sigmoid(gate)
                    out = out * (sigmoid if config.output_gate_act == "sigmoid" else gate * sigmoid)
                outputs[i].append(out)
        return [self.linear(layer + "o_proj", torch.cat(parts)) for parts in outputs]

    def logits(self, ids: Tensor) -> Tensor:
        """``[T] -> [T, vocab]``."""
        eps = self.config.rms_norm_eps
        activation = getattr(torch.nn.functional, self.config.hidden_act)
        xs = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        for index in range(self.config.num_hidden_layers):
            layer = f"model.layers.{index}."
            normed = [rms(x, self.weights[layer + "input_layernorm.weight"], eps) for x in xs]
            attended = self.attention(layer + "self_attn.", normed)
            xs = [x + out for x, out in zip(xs, attended, strict=True)]
            for t, x in enumerate(xs):
                y = rms(x, self.weights[layer + "post_attention_layernorm.weight"], eps)
                up = activation(self.linear(layer + "mlp.gate_proj", y)) * self.linear(layer + "mlp.up_proj", y)
                xs[t] = x + self.linear(layer + "mlp.down_proj", up)
        final = [rms(x, self.weights["model.norm.weight"], eps) for x in xs]
        return torch.stack([self.linear("lm_head", x) for x in final])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_implementation_equals_the_formulas(variant: str) -> None:
    model = tiny_model(variant)
    ids = tokens(1, 7)
    expected = LoopModel(model).logits(ids[0])[None]
    # transformers computes the angles of RoPE in float32.
    tolerance = 1e-9 if model.config.rope_parameters is None else 1e-5
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        assert_close(model(ids).logits, expected, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("lost", ["forget_gate.weight", "forget_gate.bias", "key_shift.proj", "output_gate"])
def test_the_formulas_see_a_lost_part(lost: str) -> None:
    model = tiny_model()
    expected = LoopModel(model).logits(tokens(7))[None]
    for name, parameter in model.named_parameters():
        if lost in name:
            parameter.zero_()
    assert (model(tokens(1, 7)).logits - expected).abs().max() > 1e-2


def gradients(model: FoxForCausalLM, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_the_same_gradient_from_every_implementation(variant: str) -> None:
    model = tiny_model(variant).train()
    ids = tokens(2, 9)
    model.set_attn_implementation("eager")
    expected = gradients(model, ids)
    assert len(expected) == sum(parameter.requires_grad for parameter in model.parameters())
    for name, gradient in expected.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-9, f"{name} gets no gradient"
    for implementation in ("fox_reference", "sdpa"):
        model.set_attn_implementation(implementation)
        for name, gradient in gradients(model, ids).items():
            assert_close(gradient / expected[name].abs().max(), expected[name] / expected[name].abs().max(), 1e-8)


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


# Independent implementations of the block: transformers' own decoders


def foreign(model_class: Any, config_class: Any, rope_parameters: dict, **overrides: Any) -> tuple[Any, Any]:
    """A FoX model without gates, and transformers' model of the same weights."""
    model = tiny_model("transformer", rope_parameters=rope_parameters, **overrides)
    shared = {k: v for k, v in SIZES.items() if not k.startswith("decay")}
    for field in ("attention_bias", "mlp_bias", "tie_word_embeddings", "num_key_value_heads"):
        shared[field] = getattr(model.config, field)
    if config_class is Qwen3Config:
        del shared["mlp_bias"]
    other = model_class(config_class(**shared, rope_parameters=rope_parameters)).eval().double()
    other.load_state_dict(model.state_dict(), strict=True)
    return model, other


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("length", [17, 100])
def test_without_gates_it_is_llama(rope_type: str, length: int) -> None:
    model, llama = foreign(LlamaForCausalLM, LlamaConfig, rope(rope_type))
    ids = tokens(2, length)
    expected = llama(ids).logits
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        # Their norms and softmax compute in float32, whatever the model's type.
        assert_close(model(ids).logits, expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
    ],
)
def test_without_gates_it_is_llama_in_every_shape(overrides: dict) -> None:
    model, llama = foreign(LlamaForCausalLM, LlamaConfig, rope("default"), **overrides)
    assert_close(model(tokens(2, 17)).logits, llama(tokens(2, 17)).logits, 1e-5)


@torch.no_grad()
def test_without_gates_with_shared_qk_norm_it_is_qwen3() -> None:
    model, qwen = foreign(Qwen3ForCausalLM, Qwen3Config, rope("default"), qk_norm="shared")
    assert_close(model(tokens(2, 17)).logits, qwen(tokens(2, 17)).logits, 1e-5)


@torch.no_grad()
def test_gate_that_never_forgets_is_no_gate() -> None:
    gated = tiny_model(decay_time_min=1e9, decay_time_max=1e9, forget_gate="fixed")
    for layer in gated.model.layers:
        layer.self_attn.forget_gate.bias.fill_(800.0)
    plain = tiny_model("gateless")
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "forget_gate" not in k})
    assert_close(gated(tokens(2, 17)).logits, plain(tokens(2, 17)).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_changes_nothing_before_it(implementation: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = 2 + (ids[0, 7] - 1) % 90
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[:7].max() == 0.0
    assert difference[7:].min() > 1e-6


# Gates


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


# Attention implementations


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "nonsense"])
def test_unknown_attention_implementation_is_refused(name: str, tmp_path) -> None:
    accepted = rf"attn_implementation.*{name}.*fox_reference.*sdpa.*eager"
    with pytest.raises(ValueError, match=accepted):
        AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=name)
    with pytest.raises(ValueError, match=accepted):
        FoxForCausalLM(tiny_config(attn_implementation=name))
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=accepted):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match=accepted):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "fox_reference"


def test_attention_implementation_can_be_chosen_anywhere(tmp_path) -> None:
    model = tiny_model()
    assert model.config._attn_implementation == "fox_reference"
    model.save_pretrained(tmp_path)
    assert "fox_reference" not in (tmp_path / "config.json").read_text()
    for name in IMPLEMENTATIONS:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert model.model.layers[0].self_attn.config._attn_implementation == name


def test_llama_keeps_its_own_sdpa() -> None:
    """FoX brings an "sdpa" of its own, and must not hand it to other models."""
    _, llama = foreign(LlamaForCausalLM, LlamaConfig, rope("default"))
    llama.set_attn_implementation("eager")
    expected = llama(tokens(2, 9)).logits
    llama.set_attn_implementation("sdpa")
    # Their eager attention takes the softmax in float32.
    assert_close(llama(tokens(2, 9)).logits, expected, 1e-5)


@pytest.mark.parametrize("implementation", ["fox_reference", "sdpa"])
def test_attention_weights_that_are_not_computed_are_warned_of(implementation: str, monkeypatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(attention_fox.logger, "warning_once", warnings.append)
    model = tiny_model()
    model.set_attn_implementation(implementation)
    assert not model(tokens(1, 5), output_attentions=True).attentions
    assert warnings and all("eager" in warning for warning in warnings)
    warnings.clear()
    model(tokens(1, 5))
    assert not warnings


# Padding


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["pro", "llama", "rope", "key-value-gates", "bias-only", "gateless"])
def test_padding_anywhere_changes_nothing(variant: str, implementation: str) -> None:
    model = tiny_model(variant)
    model.set_attn_implementation(implementation)
    ids = tokens(5, 13)
    mask = torch.ones(5, 13, dtype=torch.long)
    mask[0, :5] = mask[1, 9:] = mask[2, 4:8] = 0
    mask[3, [0, 3, 4, 9, 12]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    other = ids.masked_fill(mask == 0, 96)
    assert_close(model(other, attention_mask=mask, position_ids=positions).logits[mask.bool()], logits[mask.bool()], 0)
    for row, keep in zip(range(5), mask.bool(), strict=True):
        assert_close(logits[row, keep], model(ids[row, keep][None]).logits[0], 1e-6 if variant == "rope" else 1e-9)
    assert logits.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_gradients_with_padding_are_those_without(variant: str, implementation: str) -> None:
    model = tiny_model(variant)
    ids = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, [0, 1, 4]] = 0
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model.set_attn_implementation(implementation)
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    for row in range(2):
        alone = ids[row, mask[row].bool()][None]
        # The label after the hole is predicted by the padding before it: it is left out here too.
        alone_labels = alone.clone()
        if row == 0:
            alone_labels[0, 2] = -100
        model(alone, labels=alone_labels, num_items_in_batch=10).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    # The padding before a real label is asked to predict it; take that one label out of the padded loss as well.
    model.zero_grad()
    labels[0, [2, 5]] = -100
    model.set_attn_implementation(implementation)
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss.backward()
    for name, parameter in model.named_parameters():
        assert actual[name].isfinite().all()
        assert_close(parameter.grad, expected[name], 1e-9)


# Arguments


def test_wrong_arguments_are_refused() -> None:
    model = tiny_model()
    ids = tokens(2, 5)
    embeds = torch.zeros(2, 5, 32, dtype=torch.float64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "input_ids and inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": embeds}, "input_ids and inputs_embeds"),
        ({"input_ids": ids[:, :0]}, r"input_ids.*\[2, 0\]"),
        ({"inputs_embeds": embeds[:, :0]}, r"inputs_embeds.*\[2, 0, 32\]"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask.*2-D.*\[2, 1, 5, 5\]"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 5)}, r"attention_mask.*\[2, 5\].*\[1, 5\]"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 6)}, r"attention_mask.*\[2, 5\].*\[2, 6\]"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 4)}, r"attention_mask.*\[2, 5\].*\[2, 4\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_embeddings_instead_of_tokens() -> None:
    model = tiny_model()
    ids = tokens(2, 5)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits, 0)


def test_logits_to_keep_and_hidden_states() -> None:
    model = tiny_model()
    out = model(tokens(2, 6), output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 6, 32)] * 3
    assert_close(model.lm_head(out.hidden_states[-1]), out.logits, 0)
    assert_close(model(tokens(2, 6), logits_to_keep=2).logits, out.logits[:, -2:], 0)
    assert_close(model(tokens(2, 6), logits_to_keep=torch.tensor([1, 4])).logits, out.logits[:, [1, 4]], 0)
    as_tuple = model(tokens(2, 6), return_dict=False, use_cache=False)
    assert_close(as_tuple[0], out.logits, 0)


def test_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model = tiny_model()
    ids = tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    total, count = 0.0, 0
    for row in range(2):
        for t in range(5):
            if labels[row, t + 1] != -100:
                total -= out.logits[row, t].float().log_softmax(-1)[labels[row, t + 1]].item()
                count += 1
    assert abs(out.loss.item() - total / count) < 1e-5


# Weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_bit_equal(variant: str, tmp_path) -> None:
    model = tiny_model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fox"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FoxForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
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


def test_mask_dictionary_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must .*full_attention"):
        tiny_model()(tokens(1, 5), attention_mask={"full_attention": None})
