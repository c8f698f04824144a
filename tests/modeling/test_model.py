"""The model against independent computations: loops over the papers' formulas, transformers' Llama and Qwen3."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from foxlm import (
    FoxForCausalLM,
)
from models import (
    IMPLEMENTATIONS,
    ROPE_TYPES,
    SIZES,
    VARIANTS,
    assert_close,
    rope,
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

    def normed_together(
        self, layer: str, letter: str, xs: list[Tensor], states: list[Tensor], head: int, eps: float
    ) -> list[Tensor]:
        """One head of queries or keys over the root of the mean square of all heads."""
        heads = self.config.num_attention_heads if letter == "q" else self.config.num_key_value_heads
        shift = layer + "key_shift" if letter == "k" else "none"
        of_heads = [self.shifted(layer + letter + "_proj", shift, xs, other) for other in range(heads)]
        weight = self.head_weight(layer + letter + "_norm", head)
        return [
            weight * state / (torch.cat(token).square().mean() + eps).sqrt()
            for state, token in zip(states, zip(*of_heads, strict=True), strict=True)
        ]

    def attention(self, layer: str, xs: list[Tensor]) -> list[Tensor]:
        config = self.config
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        qk_eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
        index = int(layer.split(".")[2])
        outputs: list[list[Tensor]] = [[] for _ in xs]
        for head in range(heads):
            kv = head * kv_heads // heads
            queries = [self.linear(layer + "q_proj", x)[head * size : (head + 1) * size] for x in xs]
            keys = self.shifted(layer + "k_proj", layer + "key_shift", xs, kv)
            values = self.shifted(layer + "v_proj", layer + "value_shift", xs, kv)
            if config.qk_norm == "all_heads":
                queries = self.normed_together(layer, "q", xs, queries, head, qk_eps)
                keys = self.normed_together(layer, "k", xs, keys, kv, qk_eps)
            elif config.qk_norm != "none":
                queries = [rms(q, self.head_weight(layer + "q_norm", head), qk_eps) for q in queries]
                keys = [rms(k, self.head_weight(layer + "k_norm", kv), qk_eps) for k in keys]
            if config.rope_parameters is not None and index not in (config.nope_layers or []):
                queries = [rotate(q, t, config.rope_parameters) for t, q in enumerate(queries)]
                keys = [rotate(k, t, config.rope_parameters) for t, k in enumerate(keys)]
            log_f = [self.log_gate(layer + "forget_gate", x, head) for x in xs]
            for i, q in enumerate(queries):
                seen = [q @ keys[j] / math.sqrt(size) + sum(log_f[j + 1 : i + 1]) for j in range(i + 1)]
                of_seen = values[: i + 1]
                if config.attention_sink != "none":
                    seen.append(q @ self.weights[layer + "sink.key"][kv] / math.sqrt(size))
                    of_seen = [*of_seen, self.weights[layer + "sink.value"][kv]]
                logits = torch.stack(seen)
                weights = torch.exp(logits - logits.max())
                out = sum(w * v for w, v in zip(weights, of_seen, strict=True)) / weights.sum()
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
        post = self.config.norm_position == "post"
        xs = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        for index in range(self.config.num_hidden_layers):
            layer = f"model.layers.{index}."
            after_attention = self.weights[layer + "post_attention_layernorm.weight"]
            normed = xs if post else [rms(x, self.weights[layer + "input_layernorm.weight"], eps) for x in xs]
            attended = self.attention(layer + "self_attn.", normed)
            if post:
                attended = [rms(x, after_attention, eps) for x in attended]
            xs = [x + out for x, out in zip(xs, attended, strict=True)]
            for t, x in enumerate(xs):
                y = x if post else rms(x, after_attention, eps)
                up = activation(self.linear(layer + "mlp.gate_proj", y)) * self.linear(layer + "mlp.up_proj", y)
                down = self.linear(layer + "mlp.down_proj", up)
                xs[t] = x + (
                    rms(down, self.weights[layer + "post_feedforward_layernorm.weight"], eps) if post else down
                )
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


def test_llama_keeps_its_own_sdpa() -> None:
    """FoX brings an "sdpa" of its own, and must not hand it to other models."""
    _, llama = foreign(LlamaForCausalLM, LlamaConfig, rope("default"))
    llama.set_attn_implementation("eager")
    expected = llama(tokens(2, 9)).logits
    llama.set_attn_implementation("sdpa")
    # Their eager attention takes the softmax in float32.
    assert_close(llama(tokens(2, 9)).logits, expected, 1e-5)
