"""Every method of `generate` gives the tokens of a run without a cache, in models that a lost gate changes."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from cached_run import restart_sum
from foxlm import FoxPagedCache
from foxlm.modeling import token_layout as layout_fox
from foxlm.modeling.cache.dynamic import DynamicForgettingLayer
from foxlm.modeling.cache.reserved import ReservedForgettingLayer
from foxlm.modeling.versions import CACHE, cache_of
from models import DECODING_VARIANTS, tiny_model, tokens
from recorded_graphs import RecordedGraph, capture_on_this_device

pytestmark = pytest.mark.versions

MODELS = {variant: tiny_model(variant) for variant in DECODING_VARIANTS}
NEW = 12


@pytest.fixture(autouse=True, params=["eager", "captured"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph] | None:
    """How decoding steps run: every test runs both ways."""
    return capture_on_this_device(monkeypatch) if request.param == "captured" else None


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    torch.manual_seed(7)
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids, **kwargs)


def assert_same_tokens(model: Any, ids: Tensor, how: dict[str, Any], cache: dict[str, Any] | None = None) -> None:
    """Compare generation by ``how`` with and without a cache; ``cache`` are arguments for the cached run alone."""
    expected = generate(model, ids, use_cache=False, **how)
    actual = generate(model, ids, **how, **(cache or {}))
    assert torch.equal(actual, expected), f"generated {actual.tolist()} instead of {expected.tolist()}"


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 20},
    "several": {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam-sampling": {"num_beams": 3, "do_sample": True, "temperature": 3.0},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_search(variant: str, search: str, cache: str) -> None:
    assert_same_tokens(MODELS[variant], tokens(2, 7), SEARCHES[search], CACHES[cache])


@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize("size", [1, 3, 5, 16])
@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_prefill_in_chunks(variant: str, size: int, search: str) -> None:
    assert_same_tokens(MODELS[variant], tokens(2, 11), SEARCHES[search], {"prefill_chunk_size": size})


@pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_cache_of_the_caller(variant: str, search: str, make: Any) -> None:
    model = MODELS[variant]
    cache = make(model.config)
    assert_same_tokens(model, tokens(2, 7), SEARCHES[search], {"cache": cache})
    assert cache.get_seq_length() == 7 + NEW - 1


def test_chunks_of_a_prompt_are_written_to_memory_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("pro", decoding_graphs=False)
    cache = DynamicCache(config=model.config)
    monkeypatch.setattr(DynamicForgettingLayer, "least_growth", 1)
    generate(model, tokens(2, 40), cache=cache, prefill_chunk_size=8, max_new_tokens=1)
    buffers = cache.layers[0]._buffers
    assert buffers.keys() == {"c", "keys", "kv_start", "values"}
    assert {held.shape[-2 if name in ("keys", "values") else -1] for name, (held, _) in buffers.items()} == {40}


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_static_cache_longer_than_the_text_used_twice(variant: str) -> None:
    model = MODELS[variant]
    cache = StaticCache(config=model.config, max_cache_len=50)
    for seed in (0, 1):
        assert_same_tokens(model, tokens(2, 7, seed=seed), {}, {"cache": cache})
        cache.reset()


def test_static_cache_compiled() -> None:
    """The step as `generate` compiles it on a GPU: one graph, of one shape."""
    model = tiny_model()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    expected = generate(model, tokens(2, 7), attention_mask=mask, use_cache=False)
    actual = generate(model, tokens(2, 7), attention_mask=mask, cache_implementation="static", compile_config=config)
    assert torch.equal(actual, expected)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


# Speculative decoding: tokens that turn out wrong are rolled back.


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 0.3}])
@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_assisted(variant: str, how: dict[str, Any]) -> None:
    model = MODELS[variant]
    assistant = tiny_model(variant, num_hidden_layers=1)
    # Half of the assistant's weights are the model's: some of its tokens are accepted and some are not.
    assistant.load_state_dict(model.state_dict(), strict=False)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    if how:
        out = generate(model, tokens(1, 7), assistant_model=assistant, **how)
        assert out.shape == (1, 7 + NEW)
        return
    assert_same_tokens(model, tokens(1, 7), {}, {"assistant_model": assistant})
    # An assistant that is the model itself: every token is accepted.
    assert_same_tokens(model, tokens(1, 7), {}, {"assistant_model": tiny_model(variant)})


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_prompt_lookup(variant: str) -> None:
    ids = tokens(1, 5).repeat(1, 3)
    how = {"max_new_tokens": 20}
    assert_same_tokens(MODELS[variant], ids, how, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2})


@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": MODELS["pro"]}], ids=["lookup", "model"]
)
@pytest.mark.parametrize("make", [DynamicCache, FoxPagedCache])
def test_assistance_with_a_cache_that_holds_tokens_is_refused(make: Any, how: dict[str, Any]) -> None:
    """transformers would feed it the prompt once more."""
    model = MODELS["pro"]
    options = {"max_cache_len": 60} if make is FoxPagedCache else {}
    cache = make(config=model.config, **options)
    with torch.no_grad():
        model(tokens(1, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be empty with assistant_model or prompt_lookup_num_tokens.*7 tokens"):
        generate(model, torch.cat([tokens(1, 7), tokens(1, 3)], dim=1), past_key_values=cache, **how)


def test_more_rejected_drafts_than_pages_take_back_are_refused() -> None:
    model = MODELS["pro"]
    how = {"prompt_lookup_num_tokens": 50, "max_matching_ngram_size": 1}
    ids = tokens(1, 60).repeat(1, 2)
    # One more, so that the draft is what the prompt went on with.
    ids = torch.cat([ids, ids[:, :1]], dim=1)
    assert_same_tokens(model, ids, {}, how)
    with pytest.raises(RuntimeError, match=r"can be cropped now.*DynamicCache\(config=model.config\)"):
        generate(model, ids, past_key_values=FoxPagedCache(model.config, 300), max_new_tokens=60, **how)


def test_static_cache_that_is_too_small_is_refused_without_reading_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_fox, "is_readable", lambda x: False)
    model = MODELS["pro"]
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match=r"holds 8 tokens and has room for 8: 1 more do not fit; .*max_cache_len"):
        generate(model, tokens(1, 6), past_key_values=cache)


@pytest.mark.parametrize("door", ["init_continuous_batching", "continuous_batching_context_manager", "generate_batch"])
def test_continuous_batching_is_refused_at_every_door(door: str) -> None:
    with pytest.raises(NotImplementedError, match=r"FoX has no continuous batching.*padded on their left"):
        getattr(MODELS["pro"], door)([[2, 3]])


def test_continuous_batching_within_generate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_implementation must not be 'paged'.*free_dead_cache=True"):
        generate(MODELS["pro"], tokens(1, 5), cache_implementation="paged")


# Padding


def padded(row: int, length: int, holes: list[int]) -> tuple[Tensor, Tensor]:
    ids, mask = tokens(1, length, seed=row), torch.ones(1, length, dtype=torch.long)
    mask[0, holes] = 0
    return ids, mask


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_padded_batch_generates_what_its_rows_do(variant: str, search: str, cache: str) -> None:
    """Left padding, and holes as a conversation of several turns leaves them."""
    model = MODELS[variant]
    rows = [padded(0, 9, [0, 1, 2]), padded(1, 9, []), padded(2, 9, [0, 3, 4]), padded(3, 9, [2, 6, 7])]
    ids, mask = torch.cat([ids for ids, _ in rows]), torch.cat([mask for _, mask in rows])
    out = generate(model, ids, attention_mask=mask, **SEARCHES[search], **CACHES[cache])
    for row in range(4):
        alone = generate(model, ids[row, mask[row].bool()][None], use_cache=False, **SEARCHES[search])
        assert out[row, 9:].tolist() == alone[0, -NEW:].tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_conversation_of_two_turns(variant: str, kind: str) -> None:
    """The cache goes on from turn to turn; the second turns are of two lengths, padded on their left."""
    model = MODELS[variant]
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=60)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    for turn in range(3):
        out = generate(model, ids, attention_mask=mask, cache=cache, max_new_tokens=5)
        mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
        for row in range(2):
            alone = generate(model, ids[row, mask[row, : ids.shape[1]].bool()][None], use_cache=False, max_new_tokens=5)
            assert out[row, -5:].tolist() == alone[0, -5:].tolist(), f"turn {turn}, row {row}"
        new_mask = torch.ones(2, 4, dtype=torch.long)
        new_mask[turn % 2, : 1 + turn] = 0
        ids = torch.cat([out, tokens(2, 4, seed=turn + 1)], dim=1)
        mask = torch.cat([mask, new_mask], dim=1)


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_prefix_shared_by_several_questions(variant: str) -> None:
    model = MODELS[variant]
    prefix = tokens(1, 8)
    cache = cache_of(model(prefix, cache=DynamicCache(config=model.config), use_cache=True))
    cache.batch_repeat_interleave(3)
    ids = torch.cat([prefix.expand(3, -1), tokens(3, 4, seed=5)], dim=1)
    assert torch.equal(generate(model, ids, cache=cache), generate(model, ids, use_cache=False))
    # The cache rolled back to the prefix serves the next question.
    cache.crop(8 - cache.get_seq_length())
    ids = torch.cat([prefix.expand(3, -1), tokens(3, 2, seed=6)], dim=1)
    assert torch.equal(generate(model, ids, cache=cache), generate(model, ids, use_cache=False))


# In chunks, transformers cuts the positions by the tokens, of which there are none: no model can.
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_embeddings_as_the_prompt(cache: str) -> None:
    model = MODELS["pro"]
    ids = tokens(2, 7)
    embeds = model.get_input_embeddings()(ids)
    torch.manual_seed(7)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, **CACHES[cache])
    assert torch.equal(out, generate(model, ids, use_cache=False)[:, 7:])


def test_end_of_sequence_within_a_batch() -> None:
    """A row that is done goes on as padding while the other goes on."""
    model = MODELS["pro"]
    ids = tokens(2, 7)
    end = int(generate(model, ids, use_cache=False)[0, 10])
    assert_same_tokens(model, ids, {"eos_token_id": end, "num_beams": 2})
    expected = generate(model, ids, use_cache=False, eos_token_id=end)
    assert (expected[:, 11:] == 0).any(), "no row ended early"
    assert torch.equal(generate(model, ids, eos_token_id=end), expected)


def test_scores_are_those_without_a_cache() -> None:
    model = MODELS["pro"]
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    with_cache: Any = generate(model, tokens(2, 7), **how)
    without: Any = generate(model, tokens(2, 7), use_cache=False, **how)
    for a, b in zip(with_cache.logits, without.logits, strict=True):
        assert (a - b).abs().max() < 1e-5  # generate converts them to float32


def test_cache_that_generate_cannot_use_is_refused() -> None:
    model = MODELS["pro"]
    with pytest.raises(ValueError, match="forgetting_attention"):
        generate(model, tokens(1, 5), cache_implementation="quantized", cache_config={"backend": "quanto"})
    with pytest.raises(ValueError, match=CACHE):
        generate(model, tokens(1, 5), cache=((torch.zeros(1), torch.zeros(1)),))


# Each of these breaks one thing; the comparisons above must see it.


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_control_gate_sum_that_restarts_changes_the_tokens(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicForgettingLayer, "append_gates", restart_sum)
    append_gates = ReservedForgettingLayer.append_gates

    def restart_in_graph(layer: Any, *args: Any) -> None:
        layer.gates[1].zero_()
        append_gates(layer, *args)

    monkeypatch.setattr(ReservedForgettingLayer, "append_gates", restart_in_graph)
    with pytest.raises(AssertionError, match="generated"):
        assert_same_tokens(MODELS[variant], tokens(2, 7), {})


@pytest.mark.parametrize("variant", ["pro", "llama", "rope", "key-value-gates"])
def test_control_reorder_that_drops_the_gates_changes_the_tokens(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicForgettingLayer, "reorder_cache", DynamicLayer.reorder_cache)

    def reorder_keys_alone(layer: Any, beam_idx: Tensor) -> None:
        for held in (layer.keys, layer.values):
            held.copy_(held.index_select(0, beam_idx))

    monkeypatch.setattr(ReservedForgettingLayer, "reorder_cache", reorder_keys_alone)
    with pytest.raises(AssertionError, match="generated"):
        assert_same_tokens(MODELS[variant], tokens(4, 7), SEARCHES["beams"])


def test_control_padding_that_is_ignored_changes_the_tokens() -> None:
    model = MODELS["pro"]
    ids, mask = padded(0, 9, [0, 1, 2])
    alone = generate(model, ids[:, 3:], use_cache=False)
    assert generate(model, ids, attention_mask=mask)[0, 9:].tolist() == alone[0, 6:].tolist()
    assert generate(model, ids)[0, 9:].tolist() != alone[0, 6:].tolist()
