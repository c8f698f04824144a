"""What differs between versions of transformers: both names of the cache, with any version of the range."""

import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

from foxlm import FoxForCausalLM, FoxForSequenceClassification, FoxForTokenClassification, FoxModel, FoxPagedCache
from foxlm.modeling.versions_fox import CACHE, CACHE_NAMES, cache_of
from models import assert_close, tiny_model, tokens

# transformers warns of the older name from 5.24 on, as its own models do.
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("model_class", [FoxModel, FoxForCausalLM, FoxForTokenClassification])
def test_each_name_of_the_cache_is_taken(model_class: Any, name: str) -> None:
    model, ids = tiny_model(model_class=model_class), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    parts = [model(part, **{name: cache})[0] for part in ids.split([4, 1, 4], dim=1)]
    assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False)[0])
    assert cache.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_each_name_of_the_cache_is_taken_by_generate(name: str) -> None:
    model, ids = tiny_model(), tokens(1, 5)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    cache = FoxPagedCache(model.config, 32)
    out = model.generate(ids, return_dict_in_generate=True, **greedy, **{name: cache})
    assert torch.equal(out.sequences, model.generate(ids, use_cache=False, **greedy))
    assert cache_of(out) is cache and cache.get_seq_length() == 9


def test_the_cache_by_both_names_is_refused() -> None:
    model, ids = tiny_model(), tokens(1, 5)
    both = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names"):
            call(ids, **both)


def test_the_older_name_is_deprecated_where_transformers_deprecates_it() -> None:
    model = tiny_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(tokens(1, 5), past_key_values=DynamicCache(config=model.config))
    assert any("past_key_values is deprecated" in str(x.message) for x in caught) == (CACHE == "cache")


def test_outputs_hold_the_cache_under_the_name_that_transformers_reads() -> None:
    for model_class in (FoxModel, FoxForCausalLM, FoxForSequenceClassification):
        model = tiny_model(model_class=model_class)
        out = model(tokens(1, 4), use_cache=True)
        assert out[CACHE].get_seq_length() == cache_of(out).get_seq_length() == 4
        assert CACHE not in model(tokens(1, 4), use_cache=False)


def test_trainer_predicts_logits_alone(tmp_path) -> None:
    model = tiny_model(dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in tokens(3, 6)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    predicted = Trainer(model, arguments).predict(rows).predictions
    assert predicted.shape == (3, 6, model.config.vocab_size)
