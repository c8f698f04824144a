"""Attention sinks: every implementation is the same function, and a sink stands for the separator of a base model."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

import base_models
from foxlm import FoxForCausalLM, FoxPagedCache, forgetting_attention
from foxlm.conversion.graft import graft
from models import IMPLEMENTATIONS, assert_close, tiny_config, tiny_model, tokens

SEPARATOR = 1
# The base normalizes in float32, whatever its dtype.
TOLERANCE = 1e-5


def set_to(model: FoxForCausalLM, implementation: str) -> FoxForCausalLM:
    model.set_attn_implementation(implementation)
    return model


@functools.cache
def base() -> LlamaForCausalLM:
    return base_models.base(dtype=torch.float64, num_hidden_layers=2)


@functools.cache
def sinking() -> FoxForCausalLM:
    """The base with gates that never forget, and sinks in place of the separator at the first position."""
    grafted = graft(base(), decay_times=math.inf)
    config = grafted.config.to_dict() | {"attention_sink": "learned", "sink_token_id": SEPARATOR, "acp_eps": None}
    model = FoxForCausalLM(type(grafted.config).from_dict(config)).double().eval()
    model.load_state_dict(grafted.state_dict(), strict=False)
    cache = DynamicCache(config=base().config)
    with torch.no_grad():
        base()(torch.tensor([[SEPARATOR]]), past_key_values=cache)
        for layer, held in zip(model.model.layers, cache.layers, strict=True):
            layer.self_attn.sink.key.copy_(held.keys[0, :, 0])
            layer.self_attn.sink.value.copy_(held.values[0, :, 0])
    return model


def separated(batch: int, length: int) -> Tensor:
    return torch.cat([torch.full((batch, 1), SEPARATOR), tokens(batch, length - 1)], dim=1)


@pytest.mark.parametrize("implementation", ["fox", "fox_reference", "sdpa", "eager"])
def test_what_begins_with_the_separator_is_the_bases(implementation):
    ids = separated(2, 40)
    with torch.no_grad():
        assert_close(set_to(sinking(), implementation)(ids).logits, base()(ids).logits, TOLERANCE)


def test_what_begins_with_another_token_sees_the_sink_and_that_token():
    ids = tokens(2, 40)
    ids[1, 5] = SEPARATOR
    with torch.no_grad():
        found = set_to(sinking(), "fox")(ids, position_ids=torch.arange(1, 41)[None]).logits
        expected = base()(torch.cat([torch.full((2, 1), SEPARATOR), ids], dim=1)).logits[:, 1:]
    assert_close(found, expected, TOLERANCE)


def caches(config: Any) -> dict[str, Any]:
    return {
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=64),
        "paged": FoxPagedCache(config, max_cache_len=64),
    }


@pytest.mark.parametrize("kind", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("parts", [(1, 39), (2, 1, 37), (1, 1, 38), (3, 1, 36), (1, 1, 1, 1, 36), (20, 20)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_the_separator_stays_hidden_in_every_cache(kind, parts, padded):
    model, ids = set_to(sinking(), "fox"), separated(2, 40)
    mask = torch.ones_like(ids)
    if padded:
        # The second row begins three tokens later.
        ids[1, 3:] = ids[1, :-3].clone()
        mask[1, :3] = 0
    cache = caches(model.config)[kind]
    for _ in range(2):
        position, found = 0, []
        for part in parts:
            stop = position + part
            options = {"attention_mask": mask[:, :stop]} if padded else {}
            with torch.no_grad():
                step = model(ids[:, position:stop], cache=cache, **options)
            found.append(step.logits)
            position = stop
        with torch.no_grad():
            # A base rotates by differences alone. A sink's key is at the first real token.
            expected = base()(ids, attention_mask=mask).logits
        assert_close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], TOLERANCE)
        # Once more in the same cache.
        cache.reset()


@pytest.mark.parametrize("kind", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("size", [1, 4])
def test_prompts_in_chunks_may_begin_with_a_chunk_of_one_token(kind, size):
    """As the last of chunks of 1 or 4 tokens would be, and the second prompt is all in it."""
    model = set_to(sinking(), "fox")
    ids, mask = torch.full((3, 9), SEPARATOR), torch.ones(3, 9, dtype=torch.long)
    ids[0, 1:], ids[2, 5:] = tokens(1, 8)[0], tokens(1, 4)[0]
    mask[1, :8] = mask[2, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = base().generate(ids, **options)
    cache = caches(model.config)[kind]
    assert torch.equal(model.generate(ids, cache=cache, prefill_chunk_size=size, **options), expected)


def test_each_packed_sequence_has_its_own_beginning():
    model = set_to(sinking(), "fox")
    parts = [separated(1, 20), tokens(1, 15), separated(1, 25)]
    packed = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    with torch.no_grad():
        expected = [model(x).logits for x in parts]
        assert_close(model(packed, position_ids=positions).logits, torch.cat(expected, 1))


def test_generation_begins_with_the_separator_alone():
    model = set_to(sinking(), "fox")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = base().generate(torch.tensor([[SEPARATOR]]), **options)
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 1, "use_cache": False}):
        assert torch.equal(model.generate(torch.tensor([[SEPARATOR]]), **options, **more), expected)


def test_a_new_sink_is_empty_and_takes_the_share_of_a_logit_of_zero():
    model = FoxForCausalLM(tiny_config("sink"))
    assert all(not x.any() for name, x in model.named_parameters() if ".sink." in name)


def test_a_sink_of_weight_zero_is_none():
    q, k, v = (torch.randn(1, 30, 2, 8, dtype=torch.float64) for _ in range(3))
    q[..., 0] = 1.0
    far = torch.zeros(2, 8, dtype=torch.float64)
    far[:, 0] = -1e5
    log_f = torch.full((1, 30, 2), -0.1, dtype=torch.float64)
    expected = forgetting_attention(q, k, v, log_f)
    assert torch.equal(forgetting_attention(q, k, v, log_f, sink_k=far, sink_v=torch.ones_like(far)), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sink_k": torch.zeros(2, 8)}, "sink_v must be given with sink_k"),
        ({"sink_v": torch.zeros(2, 8)}, "sink_k must be given with sink_v"),
        ({"sink_k": torch.zeros(1, 8), "sink_v": torch.zeros(2, 8)}, r"sink_k must be \[G, D\] = \[2, 8\]"),
        ({"sink_k": torch.zeros(2, 8), "sink_v": torch.zeros(2, 8).half()}, "sink_v must be .* got torch.float16"),
    ],
)
def test_sinks_of_the_function_are_checked(given, message):
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        forgetting_attention(q, k, v, torch.zeros(1, 5, 2), **given)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_sinks(implementation):
    model = set_to(tiny_model("rope-sink"), implementation)
    ids = tokens(2, 12)
    sinks = [x for name, x in model.named_parameters() if ".sink." in name]
    assert len(sinks) == 4

    def loss() -> Tensor:
        return model(ids).logits.log_softmax(-1)[..., 5].sum()

    loss().backward()
    for parameter in sinks:
        step = torch.zeros_like(parameter)
        step.view(-1)[3] = 1e-6
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameter.add_(sign * step)
                losses.append(loss())
                parameter.sub_(sign * step)
        assert_close(parameter.grad.view(-1)[3], (losses[0] - losses[1]) / 2e-6, 1e-6)


@pytest.mark.parametrize("implementation", ["fox", "fox_reference", "sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["sink", "rope-sink"])
def test_padding_beside_a_sink_changes_no_logits(implementation, side, variant):
    model = set_to(tiny_model(variant), implementation)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    hidden = slice(0, 3) if side == "left" else slice(6, None)
    mask[1, hidden] = 0
    embeddings = model.get_input_embeddings()(ids).detach()
    # Whatever stands in padding must not spread, by a weight of zero times it.
    embeddings[1, hidden] = math.nan
    with torch.no_grad():
        found = model(inputs_embeds=embeddings, attention_mask=mask).logits
        assert_close(found[:1], model(ids[:1]).logits)
        real = mask[1].bool()
        assert_close(found[1:, real], model(ids[1:, real]).logits)


def test_attention_weights_leave_out_the_sinks():
    weights = set_to(tiny_model("sink"), "eager")(tokens(1, 9), output_attentions=True).attentions[0]
    assert weights.shape[-1] == 9
    assert (weights.sum(-1) < 1.0).all()


def test_dropout_beside_a_sink_is_refused_where_it_would_drop_it():
    model = set_to(tiny_model("sink", attention_dropout=0.5), "sdpa").train()
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 with an attention_sink .* 'sdpa'"):
        model(tokens(1, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_sink": "first"}, "attention_sink"),
        ({"sink_token_id": 1}, "sink_token_id must be None without an attention_sink"),
        ({"attention_sink": "learned", "sink_token_id": 97}, r"sink_token_id must be None or in \[0, vocab_size\)"),
    ],
)
def test_configurations_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("pro", **fields)
