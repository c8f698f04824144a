"""`FoxAttention` and `FoxDecoderLayer` outside of their model compute the same bits as inside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache

from foxlm import FoxAttention, FoxConfig, FoxDecoderLayer, FoxForCausalLM, FoxPagedCache
from models import assert_close, tiny_config, tiny_model, tokens

VARIANTS = ["pro", "llama", "rope", "nope-layers", "key-value-gates", "bias-only", "gateless", "olmo"]
# By name, what a model is called with beside its tokens, 2 rows of 12 or one.
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
CALLS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (2, {}),
    "padded": (2, {"attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)}),
    "packed": (1, {"cu_seq_lens_q": torch.tensor([0, 5, 11, 12], dtype=torch.int32), "position_ids": POSITIONS}),
    "packed by positions": (1, {"position_ids": POSITIONS}),
}


class Seen:
    """What attention and block of one layer of a model were given, and what they made of it, call by call."""

    def __init__(self, model: FoxForCausalLM, layer: int) -> None:
        block: Any = model.model.layers[layer]
        self.block = block
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.attention_calls: list[tuple[Tensor, Tensor]] = []
        block.register_forward_hook(lambda _, x, y: self.calls.append((x[0], y)))
        block.self_attn.register_forward_hook(lambda _, x, y: self.attention_calls.append((x[0], y[0])))


def alone(seen: Seen, layer: int) -> tuple[FoxDecoderLayer, FoxAttention]:
    """New modules with the weights of the model's."""
    # A configuration no model has seen: it names no implementation of attention.
    config = FoxConfig(**seen.block.self_attn.config.to_dict())
    block, attention = FoxDecoderLayer(config, layer).double().eval(), FoxAttention(config, layer).double().eval()
    block.load_state_dict(seen.block.state_dict())
    attention.load_state_dict(seen.block.self_attn.state_dict())
    return block, attention


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_whole_sequences(variant: str, call: str, layer: int) -> None:
    model = tiny_model(variant)
    seen = Seen(model, layer)
    batch, options = CALLS[call]
    model(tokens(batch, 12), use_cache=False, **options)
    block, attention = alone(seen, layer)
    ((x, y),), ((normed, attended),) = seen.calls, seen.attention_calls
    assert torch.equal(block(x, **options), y)
    assert torch.equal(attention(normed, **options)[0], attended)


def dynamic_cache(config: FoxConfig) -> Cache:
    return DynamicCache(config=config)


def static_cache(config: FoxConfig) -> Cache:
    return StaticCache(config=config, max_cache_len=20)


@pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoding_with_a_cache_of_its_own(variant: str, padded: bool, make_cache: Any) -> None:
    layer = 1
    model = tiny_model(variant)
    seen, cache = Seen(model, layer), make_cache(model.config)
    ids, mask = tokens(2, 12), MASK if padded else None
    # A prompt, single tokens, and several at once.
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12)):
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        model(ids[:, start:stop], cache=cache, **options)
    block, attention = alone(seen, layer)
    caches = make_cache(block.self_attn.config), make_cache(attention.config)
    stop = 0
    for (x, y), (normed, attended) in zip(seen.calls, seen.attention_calls, strict=True):
        stop += x.shape[1]
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        assert torch.equal(block(x, cache=caches[0], **options), y)
        assert torch.equal(attention(normed, cache=caches[1], **options)[0], attended)
    assert caches[0].get_seq_length(layer) == 12


@pytest.mark.parametrize("implementation", ["fox", "fox_reference", "sdpa", "eager"])
def test_training(implementation: str) -> None:
    model = tiny_model("rope", attn_implementation=implementation).train()
    seen = Seen(model, 1)
    model(tokens(2, 12), attention_mask=MASK, use_cache=False)
    ((x, y),) = seen.calls
    block, _ = alone(seen, 1)
    block.train().self_attn.config._attn_implementation = implementation
    leaf = x.detach().requires_grad_()
    actual = torch.autograd.grad(block(leaf, attention_mask=MASK).sum(), [leaf, *block.parameters()])
    expected = torch.autograd.grad(y.sum(), [x, *seen.block.parameters()])
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["pro", "rope"])
@torch.no_grad()
def test_compiled(variant: str) -> None:
    torch._dynamo.reset()
    block = FoxDecoderLayer(tiny_config(variant), 0).double()
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for options in ({}, {"attention_mask": MASK}):
        assert_close(compiled(x, **options), block(x, **options))
    caches = [static_cache(block.self_attn.config) for _ in range(2)]
    for part in (x[:, :6], x[:, 6:7], x[:, 7:8]):
        assert_close(compiled(part, cache=caches[0]), block(part, cache=caches[1]))


def test_gates_start_with_the_decay_times_of_the_configuration() -> None:
    gate = FoxAttention(tiny_config(), 0).forget_gate
    assert torch.equal(
        gate.bias,
        next(
            x
            for n, x in FoxForCausalLM(tiny_config()).named_parameters()
            if n.endswith("layers.0.self_attn.forget_gate.bias")
        ),
    )


@torch.no_grad()
def test_in_a_model_of_another_make() -> None:
    """Blocks one after the other on one cache, each on its own part of it."""

    class Mine(nn.Module):
        def __init__(self, config: FoxConfig) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(FoxDecoderLayer(config, i) for i in range(config.num_hidden_layers))

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            for block in self.blocks:
                x = block(x, **options)
            return x

    mine = Mine(tiny_config()).double().eval()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    cache = DynamicCache(config=tiny_config())
    steps = [mine(part, cache=cache) for part in x.split([4, 1, 1, 4], dim=1)]
    assert_close(torch.cat(steps, dim=1), mine(x))


@torch.no_grad()
def test_nan_in_padding_reaches_no_token() -> None:
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    poisoned = x.masked_fill(MASK[..., None] == 0, torch.nan)
    for variant in ("pro", "rope"):
        for implementation in ("fox", "fox_reference", "sdpa", "eager"):
            attention = FoxAttention(tiny_config(variant, attn_implementation=implementation), 0).double()
            actual, expected = (attention(y, attention_mask=MASK)[0][MASK == 1] for y in (poisoned, x))
            assert torch.equal(actual, expected), (variant, implementation)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"hidden_states.*\[B, T, 32\].*\[2, 3\]", {"hidden_states": torch.zeros(2, 3)}),
        (r"hidden_states.*\[2, 0, 32\]", {"hidden_states": torch.zeros(2, 0, 32)}),
        (r"hidden_states.*\[2, 3, 16\]", {"hidden_states": torch.zeros(2, 3, 16)}),
        (r"attention_mask.*\[2, 3\].*\[2, 4\]", {"attention_mask": torch.ones(2, 4)}),
        (r"position_ids.*\[1, 4\]", {"position_ids": torch.zeros(1, 4, dtype=torch.int64)}),
        (r"cu_seq_lens_q.*batch of 2", {"cu_seq_lens_q": torch.tensor([0, 3])}),
        (r"(cache|past_key_values).*FoxPagedCache.*all layers", {"cache": FoxPagedCache(tiny_config(), 64)}),
        (r"(cache|past_key_values).*2 layers, got 1", {"cache": StaticCache(tiny_config(num_hidden_layers=1), 8)}),
        (r"(cache|past_key_values).*got tuple", {"cache": ()}),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(message: str, arguments: dict[str, Any]) -> None:
    for layer in (FoxAttention(tiny_config(), 1), FoxDecoderLayer(tiny_config(), 1)):
        with pytest.raises(ValueError, match=message):
            layer(**({"hidden_states": torch.zeros(2, 3, 32)} | arguments))


@pytest.mark.parametrize("layer", [FoxAttention, FoxDecoderLayer])
def test_another_models_configuration_is_refused(layer: type) -> None:
    with pytest.raises(ValueError, match="config must be a FoxConfig, got LlamaConfig"):
        layer(LlamaConfig(hidden_size=32), 0)
