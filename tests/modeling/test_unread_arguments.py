"""Unknown arguments of models, heads, layers, caches and attention are errors that name them."""

import re
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from foxlm import (
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
    FoxPagedCache,
)
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.modeling.arguments import DECODER_ARGUMENTS, LOSS_ARGUMENTS, MASK_ARGUMENTS
from foxlm.modeling.attention_implementations import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from foxlm.modeling.configuration_fox import IMPLEMENTATIONS
from models import assert_close, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.versions

CLASSES = (
    FoxModel,
    FoxForCausalLM,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxForQuestionAnswering,
)


@pytest.mark.parametrize("model_class", CLASSES)
def test_an_unknown_argument_is_refused_by_name(model_class: Any) -> None:
    model = tiny_model(model_class=model_class)
    for name, hint in {
        "attention_masks": "did you mean attention_mask?",
        "past_key_value": "did you mean past_key_values?",
        "is_causal": "it takes input_ids, ",
        "cache_position": "",
    }.items():
        with pytest.raises(TypeError, match=rf"forward got an argument that it does not know, '{name}': {hint}"):
            model(tokens(1, 4), **{name: torch.zeros(1)})
    with pytest.raises(TypeError):
        model(tokens(1, 4), sequence_ids=False)
    model(tokens(1, 4), cache_position=None)
    with pytest.raises(TypeError) as error:
        model(tokens(1, 4), is_causal=True)
    assert not re.search("debug_io|prune_layers|max_length_|seq_idx|num_items", str(error.value)), "internals"


@torch.no_grad()
def test_arguments_that_transformers_passes_change_nothing() -> None:
    values: dict[str, Any] = {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 6])}
    values |= {"max_length_q": 6, "max_length_k": 6, "num_items_in_batch": 5, "token_type_ids": torch.ones(1, 6).long()}
    values |= {"seq_idx": torch.zeros(1, 6, dtype=torch.int32)}
    values |= {name: True for name in DECODER_ARGUMENTS if name.startswith("output_")}
    left = DECODER_ARGUMENTS.keys() - values.keys()
    assert left == {"debug_io", "debug_io_dir", "prune_layers"}, "read by transformers before they come here"
    for model_class in CLASSES:
        model = tiny_model(model_class=model_class)
        assert_close(model(tokens(1, 6), **values)[0], model(tokens(1, 6))[0], 0)


def test_arguments_of_the_loss_are_for_models_with_one() -> None:
    model, ids = tiny_model(), tokens(1, 6)
    expected = model(ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    given = {"shift_labels": shifted, "num_items_in_batch": 5}
    assert given.keys() == LOSS_ARGUMENTS.keys()
    torch.testing.assert_close(model(ids, labels=ids, **given).loss, expected)
    with pytest.raises(TypeError, match="'shift_labels'"):
        model.model(ids, shift_labels=shifted)
    with pytest.raises(TypeError, match="'label': did you mean labels"):
        model(ids, label=ids)


def test_masks_for_generate_take_what_generate_passes() -> None:
    arguments = tiny_config(), torch.empty(1, 4, 0), torch.ones(1, 4), None
    passed: dict[str, Any] = dict.fromkeys(MASK_ARGUMENTS, True)
    FoxForCausalLM.create_masks_for_generate(*arguments, **passed, block_sequence_ids=None)
    with pytest.raises(TypeError, match="'block_sequence_ids'"):
        FoxForCausalLM.create_masks_for_generate(*arguments, block_sequence_ids=torch.ones(1, 4))


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_generate_takes_a_tokenizer(mode: dict[str, Any]) -> None:
    model, prompt, tokenizer = tiny_model(), tokens(1, 8), byte_tokenizer()
    settings = {"max_new_tokens": 4, "do_sample": False} | mode
    torch.manual_seed(0)
    expected = model.generate(prompt, **settings)
    torch.manual_seed(0)
    written = model.generate(prompt, tokenizer=tokenizer, stop_strings=["no such text"], **settings)
    assert written.equal(expected)


def test_layers_caches_and_attention_take_what_they_name() -> None:
    model, ids = tiny_model(), tokens(1, 4)
    seen: list[dict] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    model(ids, output_attentions=True, num_items_in_batch=3)
    hook.remove()
    layer, states = model.model.layers[0], torch.zeros(1, 4, 32, dtype=torch.float64)
    for module in (layer, layer.self_attn):
        with pytest.raises(TypeError, match="does not know, 'sliding_window'"):
            module(states, **seen[0], sliding_window=4)
    k = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
    caches = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=8)
    for cache in (*caches, FoxPagedCache(model.config, 8)):
        with pytest.raises(TypeError):
            cache.layers[0].update(k, k, cache_position=torch.arange(4))
        with pytest.raises(TypeError):
            cache.layers[0].update(k, k, False, {"cache_position": torch.arange(4)})
    for name in IMPLEMENTATIONS:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        with pytest.raises(TypeError, match="sliding_window"):
            attend(layer.self_attn, k, k, k, None, decay=None, scaling=1.0, sliding_window=4)
