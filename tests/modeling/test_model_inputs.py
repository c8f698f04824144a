"""What the model makes of its arguments: attention implementations, padding, masks, embeddings, labels."""

import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from foxlm import (
    FoxAttention,
    FoxDecoderLayer,
    FoxForCausalLM,
    FoxPagedCache,
    context_parallel_attention,
)
from foxlm.modeling import inputs
from models import (
    IMPLEMENTATIONS,
    assert_close,
    tiny_config,
    tiny_model,
    tokens,
)

# Attention implementations


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "flex_attention", "nonsense", "paged|sdpa", "paged|eager", "paged|fox"],
)
def test_unknown_attention_implementation_is_refused(name: str, tmp_path) -> None:
    accepted = rf"attn_implementation.*{re.escape(name)}.*fox_reference.*sdpa.*eager"
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
    assert model.config._attn_implementation == "fox"


def test_attention_implementation_can_be_chosen_anywhere(tmp_path) -> None:
    model = tiny_model()
    assert model.config._attn_implementation == "fox"
    model.save_pretrained(tmp_path)
    assert "fox_reference" not in (tmp_path / "config.json").read_text()
    for name in IMPLEMENTATIONS:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert model.model.layers[0].self_attn.config._attn_implementation == name


@pytest.mark.parametrize("implementation", ["fox_reference", "sdpa"])
def test_attention_weights_that_are_not_computed_are_warned_of(implementation: str, monkeypatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(inputs.logger, "warning_once", warnings.append)
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


@torch.no_grad()
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "fox_reference"])
@pytest.mark.parametrize("variant", ["pro", "llama", "gateless", "sink"])
def test_padding_sees_no_token(variant: str, implementation: str) -> None:
    """Not even those after it: the first token of a row padded on its left is a target of the padding before it."""
    model = tiny_model(variant, attn_implementation=implementation)
    ids = tokens(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 6:] = mask[2, [2, 5]] = 0
    logits = model(ids, attention_mask=mask).logits
    other = torch.where(mask.bool(), (ids + 1) % 97, ids)
    assert_close(model(other, attention_mask=mask).logits[mask == 0], logits[mask == 0], 0)
    labels = ids.masked_fill(mask == 0, -100)
    expected = tiny_model(variant, attn_implementation="fox_reference")
    # transformers takes the loss in float32.
    found, wanted = (x(ids, attention_mask=mask, labels=labels).loss for x in (model, expected))
    assert_close(found, wanted, 1e-6)


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
    with_ids: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids.float()}, r"input_ids.*float32"),
        ({"input_ids": ids[0]}, r"input_ids.*\[5\]"),
        ({"input_ids": ids.tolist()}, r"input_ids.*list"),
        ({"input_ids": ids + 95}, r"input_ids must be in \[0, 97\), got from 9\d to 1\d\d"),
        ({"input_ids": ids - 50}, r"input_ids must be in \[0, 97\), got from -\d"),
        ({"attention_mask": [[1] * 5] * 2}, "attention_mask.*list"),
        ({"attention_mask": "left"}, "attention_mask.*str"),
        ({"attention_mask": torch.zeros(2, 5) - 1e9}, "attention_mask.*additive"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.complex64)}, "attention_mask.*complex64"),
        ({"attention_mask": torch.ones(2, 5, device="meta")}, "attention_mask.*meta"),
        ({"position_ids": [[0, 1, 2, 3, 4]]}, "position_ids.*list"),
        ({"position_ids": torch.arange(5)}, r"position_ids.*\[5\]"),
        ({"position_ids": torch.arange(5.0)[None]}, "position_ids.*float32"),
        ({"position_ids": torch.ones(2, 5, dtype=torch.bool)}, "position_ids.*bool"),
        ({"cu_seq_lens_q": [0, 5]}, "cu_seq_lens_q.*"),
        ({"input_ids": ids[:1], "cu_seq_lens_q": [0, 5]}, "cu_seq_lens_q.*list"),
        ({"past_key_values": "cache"}, "(cache|past_key_values).*str"),
        ({"labels": ids[:, 1:]}, r"labels.*\[2, 5\].*\[2, 4\]"),
        ({"labels": ids[0]}, r"labels.*\[2, 5\].*\[5\]"),
        ({"labels": ids.float()}, "labels.*float32"),
        ({"labels": ids.tolist()}, "labels.*list"),
        ({"shift_labels": ids}, "shift_labels must be given with labels"),
        ({"labels": ids, "shift_labels": ids[:, 1:]}, r"shift_labels.*\[2, 5\].*\[2, 4\]"),
        ({"labels": ids, "shift_labels": ids.int()}, "shift_labels.*int32"),
        ({"labels": ids, "shift_labels": ids.tolist()}, "shift_labels.*list"),
        ({"labels": ids, "shift_labels": ids + 97}, r"shift_labels.*in \[0, 97\)"),
        ({"labels": ids, "logits_to_keep": 2}, r"labels.*\[2, 2\].*\[2, 5\].*logits_to_keep"),
        ({"logits_to_keep": -1}, "logits_to_keep.*-1"),
        ({"logits_to_keep": "all"}, "logits_to_keep.*str"),
        ({"logits_to_keep": None}, "logits_to_keep.*NoneType"),
        ({"logits_to_keep": torch.tensor([1.0])}, "logits_to_keep.*float32"),
    ]
    cases += [({"input_ids": ids} | arguments, message) for arguments, message in with_ids]
    cases += [
        ({"inputs_embeds": embeds[..., :16]}, r"inputs_embeds.*\[B, T, 32\].*\[2, 5, 16\]"),
        ({"inputs_embeds": ids}, r"inputs_embeds.*int64"),
        ({"inputs_embeds": embeds.tolist()}, r"inputs_embeds.*list"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_eager_models_have_every_derivative_and_transform() -> None:
    model = tiny_model(num_hidden_layers=1)
    model.set_attn_implementation("eager")
    embeds = model.get_input_embeddings()(tokens(2, 5)).detach()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False).logits.square().mean()

    by_hand = torch.autograd.functional.hessian(loss, embeds[:1])
    assert_close(torch.func.hessian(loss)(embeds[:1]), by_hand)
    assert_close(torch.func.vmap(loss)(embeds[:, None]), torch.stack([loss(x) for x in embeds[:, None]]))


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


def test_mask_dictionary_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must .*full_attention"):
        tiny_model()(tokens(1, 5), attention_mask={"full_attention": None})


def bad(x: Any) -> Any:
    """An argument whose type is wrong, hidden from mypy."""
    return x


def qkvf() -> list[torch.Tensor]:
    return [torch.zeros(1, 4, 1, 8)] * 3 + [torch.zeros(1, 4, 1)]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("max_cache_len.*'x'", lambda: FoxPagedCache(tiny_config(), bad("x"))),
        ("max_cache_len.*0.5", lambda: FoxPagedCache(tiny_config(), bad(0.5))),
        ("layer_idx.*'0'", lambda: FoxAttention(tiny_config(), bad("0"))),
        ("layer_idx.*-1", lambda: FoxDecoderLayer(tiny_config(), -1)),
        ("context.*str", lambda: tiny_model().set_context_parallel(bad("x"))),
        ("context.*NoneType", lambda: context_parallel_attention(*qkvf(), context=bad(None), length=4)),
    ],
)
def test_wrong_types_given_to_public_names_are_refused(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [-1, -99, 10**6])
@pytest.mark.parametrize("chunk", [None, 2])
def test_labels_out_of_range_are_named(value: int, chunk: int | None) -> None:
    model = tiny_model(loss_chunk_size=chunk).train()
    labels = tokens(1, 6)
    labels[0, 3] = value
    with pytest.raises(ValueError, match=rf"^labels must be -100 or in \[0, {model.config.vocab_size}\), .*{value}"):
        model(tokens(1, 6), labels=labels)
    labels[0, 3] = -100
    model(tokens(1, 6), labels=labels)


@pytest.mark.parametrize("value", [5.0, 0.0, float("nan")])
def test_acp_eps_that_is_set_later_is_checked_where_it_is_read(value: float) -> None:
    model = tiny_model().eval()
    model.config.acp_eps = value
    with pytest.raises(ValueError, match=r"^acp_eps must be "):
        model(tokens(1, 6))


@pytest.mark.parametrize("part", [FoxAttention, FoxDecoderLayer])
def test_a_layer_that_the_configuration_does_not_have_is_refused(part: Any) -> None:
    config = tiny_config()
    beyond = config.num_hidden_layers
    with pytest.raises(ValueError, match=rf"^layer_idx must be an integer from 0 to .*, got {beyond}"):
        part(config, beyond)
