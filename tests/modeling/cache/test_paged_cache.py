"""The evicting cache: evicted pages are proven unneeded, held memory is bounded, and outputs do not change."""

import copy
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig

from foxlm import FoxForCausalLM
from foxlm.kernels.tiles import PRUNED_KEYS
from foxlm.modeling.cache.page_pool import move_pages
from foxlm.modeling.cache.paged import FoxPagedCache, PagedForgettingLayer
from foxlm.modeling.layers.block import FoxDecoderLayer
from foxlm.modeling.versions import CACHE, cache_of
from models import tiny_model, tokens

EPS = 1e-4
VARIANTS = ("pro", "multi-query", "key-value-gates", "bias-only", "rope", "shared-qk-norm", "olmo")


def forgetful_model(variant: str = "pro", rule: str = "tight", bias: float = -0.5, **overrides: Any) -> FoxForCausalLM:
    """Gates near ``sigmoid(bias)``: pages die within a few hundred tokens."""
    model = tiny_model(variant, acp_eps=EPS, acp_rule=rule, **overrides)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.forget_gate.bias.fill_(bias)
    return model


@torch.no_grad()
def feed(model: FoxForCausalLM, cache: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of ``ids`` fed in parts of these sizes."""
    parts = [model(part, cache=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


def layers_of(cache: FoxPagedCache) -> list[PagedForgettingLayer]:
    return list(cache.layers)


@pytest.mark.parametrize("rule", ["tight", "paper"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_evicted_pages_weigh_nothing_for_any_later_query(
    variant: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact weights, in float64: those of all evicted keys together are at most eps in every later row."""
    model = forgetful_model(variant, rule, bias=-2.0)
    cache = FoxPagedCache(model.config, 600)
    evictions: list[tuple[int, int, Tensor]] = []
    first_needed = PagedForgettingLayer.first_needed

    def recording(layer: PagedForgettingLayer, length: int, c: Tensor | None = None) -> Tensor | None:
        start = first_needed(layer, length, c)
        # Queries from here on must not miss what is evicted, those after a crop of as much as is allowed included.
        if start is not None:
            held = torch.maximum(start, layer.start)
            evictions.append((cache.layers.index(layer), length - layer.rollback_window, held))
        return start

    monkeypatch.setattr(PagedForgettingLayer, "first_needed", recording)
    ids = tokens(2, 420)
    feed(model, cache, ids, [200, 1, 99, *[1] * 20, 100])
    exact = copy.deepcopy(model)
    exact.set_attn_implementation("eager")
    with torch.no_grad():
        weights = exact(ids, output_attentions=True, use_cache=False).attentions
    evicted = 0
    for layer, since, start in evictions:
        group = weights[layer].shape[1] // start.shape[1]
        dead = (start * PRUNED_KEYS).repeat_interleave(group, dim=1)
        lost = weights[layer] * (torch.arange(420) < dead[..., None, None])
        assert lost[:, :, since:].sum(-1).max() <= EPS
        evicted += int((start > 0).sum())
    assert evicted > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay_within_what_eps_allows(variant: str) -> None:
    model = forgetful_model(variant)
    ids = tokens(2, 500)
    sizes = [190, 1, 1, 60, 70, *[1] * 70, 108]
    cache = FoxPagedCache(model.config, 500)
    found = feed(model, cache, ids, sizes)
    expected = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() <= 10 * EPS
    assert min(int(layer.start.min()) for layer in layers_of(cache)) >= 4
    held = sum(int((layer.pages >= 0).sum()) for layer in layers_of(cache))
    assert held <= 0.5 * sum(layer.pages.numel() for layer in layers_of(cache))


def test_without_eps_or_bounds_nothing_is_evicted() -> None:
    ids = tokens(1, 300)
    unknown = forgetful_model("rope", rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0})
    assert cast(FoxDecoderLayer, unknown.model.layers[0]).logit_bounds(torch.float64) is None
    exact = forgetful_model()
    exact.config.acp_eps = None
    for model in (unknown, exact):
        cache = FoxPagedCache(model.config, 300)
        feed(model, cache, ids, [250, 50])
        assert all(int(layer.start.max()) == 0 for layer in layers_of(cache))


@pytest.mark.parametrize("variant", ["pro", "llama", "shared-qk-norm", "biases", "llama-rope", "olmo"])
def test_logit_bounds_hold(variant: str) -> None:
    model = tiny_model(variant)
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        bounds = cast(FoxDecoderLayer, layer).logit_bounds(torch.float64)
        assert bounds is not None
        query, any_logit = bounds
        states = torch.randn(1, 200, model.config.hidden_size, dtype=torch.float64) * 100.0
        attention = layer.self_attn
        hidden = layer.input_layernorm(states) if model.config.norm_position == "pre" else states
        heads = attention.q_proj.weight.shape[0] // attention.head_dim
        q, k = attention.q_proj(hidden), attention.k_proj(hidden)
        if model.config.qk_norm == "all_heads":
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (x.unflatten(-1, (-1, attention.head_dim)) for x in (q, k))
        if model.config.qk_norm in ("per_head", "shared"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        k = k.repeat_interleave(heads // k.shape[2], dim=2)
        assert (q.norm(dim=-1).amax((0, 1)) * attention.scaling <= query).all()
        assert (torch.einsum("bihd,bjhd->bhij", q, k).abs().amax((0, 2, 3)) * attention.scaling <= any_logit).all()


def test_memory_is_bounded_however_long_the_sequence() -> None:
    """All heads forget: 20,000 tokens are held in the pages of a few hundred."""
    model = forgetful_model(num_hidden_layers=1)
    cache = FoxPagedCache(model.config, 20_000)
    ids = tokens(1, 20_000)
    held = []
    with torch.no_grad():
        for part in ids.split(400, dim=1):
            model(part, cache=cache, logits_to_keep=1)
            held.append(cache.held_bytes())
    assert len(set(held[2:])) == 1
    in_use = int((layers_of(cache)[0].pages >= 0).sum())
    assert in_use <= 2 * (400 // PRUNED_KEYS + 4)


def test_prefill_frees_at_once() -> None:
    model = forgetful_model(num_hidden_layers=1)
    cache = FoxPagedCache(model.config, 4096)
    feed(model, cache, tokens(1, 4096), [4096])
    full = DynamicCache(config=model.config)
    feed(model, full, tokens(1, 4096), [4096])
    everything = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert cache.held_bytes() <= 0.2 * everything


class Both:
    """The same operations on a paged cache and on one that never frees."""

    def __init__(self, model: FoxForCausalLM, batch: int) -> None:
        self.model = model
        self.paged, self.full = FoxPagedCache(model.config, 1200), DynamicCache(config=model.config)
        self.batch, self.length, self.steps = batch, 0, 0

    def extend(self, count: int) -> None:
        self.steps += 1
        new = tokens(self.batch, count, seed=self.steps)
        found, expected = (feed(self.model, cache, new, [count]) for cache in (self.paged, self.full))
        assert (found - expected).abs().max() <= 10 * EPS
        self.length += count

    def both(self, operation: str, *arguments: Any) -> None:
        for cache in (self.paged, self.full):
            getattr(cache, operation)(*arguments)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(1, 150)),
        st.tuples(st.just("crop"), st.integers(1, 32)),
        st.tuples(st.just("reorder"), st.integers(0, 10**6)),
        st.tuples(st.just("select"), st.integers(0, 10**6)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("evict"), st.just(0)),
    ),
    min_size=3,
    max_size=9,
)
MODELS = {variant: forgetful_model(variant) for variant in ("pro", "key-value-gates", "multi-query")}


@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, variant=st.sampled_from(sorted(MODELS)))
def test_any_operations_leave_what_a_cache_that_never_frees_holds(operations: list, variant: str) -> None:
    run = Both(MODELS[variant], batch=2)
    run.extend(230)
    for name, number in operations:
        rows = torch.randint(run.batch, (run.batch,), generator=torch.Generator().manual_seed(number))
        if name == "extend" and run.length < 900:
            run.extend(number)
        elif name == "crop":
            before = run.length
            try:
                run.paged.crop(-number)
            except RuntimeError as error:
                # After a crop the next one may reach below what is evicted.
                assert "can be cropped" in str(error)
                assert int(run.paged.get_seq_length()) == before
                continue
            run.full.crop(-number)
            run.length -= number
        elif name == "reorder":
            run.both("reorder_cache", rows)
        elif name == "select":
            run.both("batch_select_indices", rows[: max(1, run.batch - 1)])
            run.batch = max(1, run.batch - 1)
        elif name == "repeat" and run.batch <= 2:
            run.both("batch_repeat_interleave", number)
            run.batch *= number
        elif name == "evict":
            layers = layers_of(run.paged)
            move_pages(layers, [layer.first_needed(run.length) for layer in layers], 0)
    run.extend(3)
    run.extend(1)


def test_crop_below_what_is_evicted_is_refused_and_changes_nothing() -> None:
    model = forgetful_model()
    cache = FoxPagedCache(model.config, 600)
    ids = tokens(1, 500)
    feed(model, cache, ids[:, :400], [400])
    for count in (33, 100, 399):
        with pytest.raises(RuntimeError, match="32 tokens at most can be cropped"):
            cache.crop(-count)
    cache.crop(-32)
    with pytest.raises(RuntimeError, match="0 tokens at most"):
        cache.crop(-1)
    found = feed(model, cache, ids[:, 368:], [1, 131])
    expected = model(ids, use_cache=False).logits[:, 368:]
    assert (found - expected).abs().max() <= 10 * EPS
    cache.crop(-500)
    assert cache.get_seq_length() == 0
    for wrong in (1, -501):
        with pytest.raises(ValueError, match="tokens_to_remove must be in"):
            cache.crop(wrong)


def test_left_padding_and_a_longer_second_turn() -> None:
    """Prefix reuse: the cache of a batch of prompts goes on."""
    model = forgetful_model()
    ids, mask = tokens(2, 400), torch.ones(2, 400, dtype=torch.long)
    mask[0, :70] = 0
    cache = FoxPagedCache(model.config, 400)
    with torch.no_grad():
        for begin, end in ((0, 250), (250, 251), (251, 400)):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True).logits
    alone = model(ids[:1, 70:], use_cache=False).logits
    other = model(ids[1:], use_cache=False).logits
    assert (out[0] - alone[0, -149:]).abs().max() <= 10 * EPS
    assert (out[1] - other[0, -149:]).abs().max() <= 10 * EPS
    assert min(int(layer.start.min()) for layer in layers_of(cache)) > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_with_the_configuration_switch(options: dict[str, Any]) -> None:
    """Beam search, sampling and greedy search give the tokens of a cache that never frees."""
    model = forgetful_model()
    ids = tokens(2, 200)
    found = {}
    for free in (False, True):
        model.config.free_dead_cache = free
        torch.manual_seed(0)
        result = model.generate(ids, max_new_tokens=40, return_dict_in_generate=True, **options)
        assert isinstance(cache_of(result), FoxPagedCache) == free
        found[free] = result.sequences
    assert torch.equal(found[False], found[True])


@pytest.mark.versions
def test_generate_is_told_in_the_call() -> None:
    """As a keyword or in a `GenerationConfig`, both before the model's own configuration."""
    model = forgetful_model(max_position_embeddings=512)
    ids, new = tokens(1, 200), {"max_new_tokens": 4, "return_dict_in_generate": True, "do_sample": False}
    for by_default in (False, True):
        model.config.free_dead_cache = by_default
        for asked in (False, True):
            in_config = GenerationConfig(free_dead_cache=asked, **new)
            for result in (
                model.generate(ids, free_dead_cache=asked, **new),
                model.generate(ids, generation_config=in_config),
                model.generate(ids, generation_config=in_config, free_dead_cache=None),
            ):
                assert isinstance(cache_of(result), FoxPagedCache) == asked
        assert isinstance(cache_of(model.generate(ids, free_dead_cache=None, **new)), FoxPagedCache) == by_default
    opposite = GenerationConfig(free_dead_cache=False, **new)
    result = model.generate(ids, generation_config=opposite, free_dead_cache=True)
    assert isinstance(cache_of(result), FoxPagedCache), "the keyword is the last word"
    with pytest.raises(ValueError, match=f"free_dead_cache must not be False with {CACHE} of type FoxPagedCache"):
        model.generate(result.sequences, cache=cache_of(result), free_dead_cache=False, **new)
    again = model.generate(result.sequences, cache=cache_of(result), free_dead_cache=True, **new)
    assert cache_of(again) is cache_of(result), "a paged cache is one that frees"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"cache": "own"}, "of type DynamicCache"),
        ({"free_dead_cache": "yes"}, "free_dead_cache must be True, False or None"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_generate_refuses_another_cache_beside_one_that_frees(options: dict[str, Any], message: str) -> None:
    model = forgetful_model()
    if options.get("cache") == "own":
        options = {"cache": DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match=f"free_dead_cache.*{message}|{message}"):
        model.generate(tokens(1, 8), max_new_tokens=4, **({"free_dead_cache": True} | options))


def test_generate_in_chunks_of_the_prompt() -> None:
    model = forgetful_model()
    ids = tokens(1, 300)
    expected = model.generate(ids, max_new_tokens=10)
    for cache in (FoxPagedCache(model.config, 310), DynamicCache(config=model.config)):
        assert torch.equal(model.generate(ids, max_new_tokens=10, cache=cache, prefill_chunk_size=64), expected)


def test_assisted_decoding_rolls_back() -> None:
    model, assistant = forgetful_model(), forgetful_model(seed=1)
    ids = tokens(1, 200)
    expected = model.generate(ids, max_new_tokens=30)
    model.config.free_dead_cache = True
    assert torch.equal(model.generate(ids, max_new_tokens=30, assistant_model=assistant), expected)


def test_generate_goes_on_with_the_returned_cache() -> None:
    model = forgetful_model(max_position_embeddings=512)
    ids = tokens(1, 200)
    sequences = {}
    for free in (False, True):
        model.config.free_dead_cache = free
        turn = model.generate(ids, max_new_tokens=10, return_dict_in_generate=True)
        longer = torch.cat([turn.sequences, tokens(1, 20, seed=1)], dim=1)
        sequences[free] = model.generate(longer, max_new_tokens=20, cache=cache_of(turn))
    assert torch.equal(sequences[False], sequences[True])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"prompt_lookup_num_tokens": 40}], ids=str)
def test_prompt_lookup_with_the_configuration_switch(options: dict[str, Any]) -> None:
    model = forgetful_model()
    ids = tokens(1, 100).repeat(1, 2)
    expected = model.generate(ids, max_new_tokens=40, **options)
    model.config.free_dead_cache = True
    assert torch.equal(model.generate(ids, max_new_tokens=40, **options), expected)


@pytest.mark.parametrize("count", [1, 16, 31, 32])
@pytest.mark.parametrize("length", [159, 320])
def test_after_a_crop_nothing_is_left_of_what_was_cropped(length: int, count: int) -> None:
    """The last token forgets everything, and is taken back: what it would have evicted must stay."""
    model = forgetful_model("bias-only", bias=9.0)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("forget_gate.bias")]
    ids = tokens(1, length + 60)
    cropped, fresh = (FoxPagedCache(model.config, 600) for _ in range(2))
    feed(model, cropped, ids[:, : length - 1], [length - 1])
    for bias, last in ((-1000.0, True), (9.0, False)):
        for parameter in biases:
            parameter.data.fill_(bias)
        if last:
            feed(model, cropped, ids[:, length - 1 : length], [1])
    cropped.crop(-count)
    held = length - count
    feed(model, fresh, ids[:, :held], [held])
    for one, other in zip(layers_of(cropped), layers_of(fresh), strict=True):
        for x, y in zip(one.running, other.running, strict=True):
            torch.testing.assert_close(x, y)
    found, expected = (feed(model, cache, ids[:, held : held + 40], [1, 1, 38]) for cache in (cropped, fresh))
    assert (found - expected).abs().max() <= 1e-9


def test_pruning_counts_what_is_evicted() -> None:
    """In a later part of a prompt: evicted keys and those that are left out may lose eps together, not each."""
    model = forgetful_model(num_hidden_layers=1)
    cache = FoxPagedCache(model.config, 600)
    feed(model, cache, tokens(1, 500), [500])
    (layer,) = layers_of(cache)
    assert int(layer.start.min()) >= 4
    keys, values, c = layer.read(500, layer.summary)
    log_decays = (-c.flatten(1, 2)).logcumsumexp(-1)[..., 63::64]
    torch.testing.assert_close(log_decays, layer.summary.log_decays[..., : log_decays.shape[-1]])
    assert (c.diff(dim=-1) <= 0).all()
    largest = keys.norm(dim=-1).cummax(-1).values[..., 63::64]
    assert (largest >= layer.summary.largest[..., : largest.shape[-1]]).all()
    evicted = int(layer.start.min()) * PRUNED_KEYS
    assert not values[:, :, :evicted].any()


def stretched(model: FoxForCausalLM, by: float) -> FoxForCausalLM:
    """``model`` with its queries stretched."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention: Any = layer.self_attn
            (attention.q_norm if model.config.qk_norm != "none" else attention.q_proj).weight.mul_(by)
    return model


@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_weights_that_evicted_pages_do_not_hold_for_are_refused(variant: str) -> None:
    """Another model, and the same one with other weights; shorter queries miss nothing, nor those of a new text."""
    model = forgetful_model(variant)
    cache = FoxPagedCache(model.config, 600)
    feed(model, cache, tokens(1, 300), [300])
    feed(stretched(forgetful_model(variant), 0.5), cache, tokens(1, 2), [1, 1])
    feed(model, cache, tokens(1, 2), [1, 1])
    for other in (stretched(forgetful_model(variant), 2.0), stretched(model, 2.0)):
        with pytest.raises(ValueError, match=r"was filled by a model with other weights.*reset"):
            feed(other, cache, tokens(1, 1), [1])
    cache.reset()
    ids = tokens(1, 300, seed=1)
    found = feed(model, cache, ids, [260, 1, 39])
    assert (found - model(ids, use_cache=False).logits).abs().max() <= 10 * EPS


def test_other_weights_before_anything_is_evicted_are_taken() -> None:
    """The bounds are those of the weights in use, not of those that the first token met."""
    model = forgetful_model(num_hidden_layers=1)
    cache = FoxPagedCache(model.config, 600)
    feed(model, cache, tokens(1, 40), [40])
    (layer,) = layers_of(cache)
    assert layer.bounds is not None
    before = layer.bounds[0].clone()
    feed(stretched(model, 2.0), cache, tokens(1, 1), [1])
    torch.testing.assert_close(layer.bounds[0], 2.0 * before)


def test_bounds_are_not_computed_again_for_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where `fuse_projections` moves them, or a cache is used again."""
    model = forgetful_model("llama")
    calls: list[FoxDecoderLayer] = []
    bounds = FoxDecoderLayer.logit_bounds

    def counted(layer: FoxDecoderLayer, *args: Any) -> Any:
        calls.append(layer)
        return bounds(layer, *args)

    monkeypatch.setattr(FoxDecoderLayer, "logit_bounds", counted)
    cache = FoxPagedCache(model.config, 600)
    feed(model, cache, tokens(1, 100), [90, 1, 9])
    model.fuse_projections()
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
    feed(model, cache, tokens(1, 2), [1, 1])
    cache.reset()
    feed(model, cache, tokens(1, 9), [9])
    assert len(calls) == len(model.model.layers)


@pytest.mark.parametrize("how", ["model", "forward"])
def test_generate_with_a_compiled_model(how: str) -> None:
    """What waits for the device runs outside of the graph."""
    model = forgetful_model(num_hidden_layers=1)
    ids = tokens(1, 140)
    expected = model.generate(ids, max_new_tokens=4)
    model.config.free_dead_cache = True
    torch.compiler.reset()
    if how == "model":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    result = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected)
    assert int(layers_of(cache_of(result))[0].start.max()) > 0


def test_a_conversation_that_is_too_long_is_told_how_to_get_room() -> None:
    model = forgetful_model(max_position_embeddings=64, free_dead_cache=True)
    turn = model.generate(tokens(1, 50), max_new_tokens=10, return_dict_in_generate=True)
    longer = torch.cat([turn.sequences, tokens(1, 10, seed=1)], dim=1)
    with pytest.raises(ValueError, match=r"has room for 64.*pass max_cache_len to the first generate"):
        model.generate(longer, max_new_tokens=10, past_key_values=cache_of(turn))
    turn = model.generate(tokens(1, 50), max_new_tokens=10, max_cache_len=100, return_dict_in_generate=True)
    model.generate(longer, max_new_tokens=10, past_key_values=cache_of(turn))


def test_cache_of_another_model_is_refused() -> None:
    model = forgetful_model()
    for overrides, message in (
        ({"num_hidden_layers": 3}, "must have the model's 2 layers, got 3"),
        ({"num_hidden_layers": 1}, "must have the model's 2 layers, got 1"),
        ({"num_key_value_heads": 4}, "must be made with the model's configuration"),
        ({"use_key_shift": False}, "must be made with the model's configuration"),
    ):
        cache = FoxPagedCache(forgetful_model(**overrides).config, 100)
        with pytest.raises(ValueError, match=message):
            feed(model, cache, tokens(1, 5), [5])
    cache = FoxPagedCache(model.config, 100)
    feed(model, cache, tokens(2, 5), [5])
    with pytest.raises(ValueError, match="holds a batch of 2 sequences, got one of 3"):
        feed(model, cache, tokens(3, 5), [5])


def test_projections_of_what_is_not_normalized_have_no_bound() -> None:
    assert cast(FoxDecoderLayer, tiny_model("llama-post-norm").model.layers[0]).logit_bounds(torch.float64) is None


def test_projections_with_adapters_have_no_bound() -> None:
    peft = pytest.importorskip("peft")
    model = forgetful_model("llama", num_hidden_layers=1)
    layer = cast(FoxDecoderLayer, model.model.layers[0])
    assert layer.logit_bounds(torch.float64) is not None
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["k_proj"]))
    assert layer.logit_bounds(torch.float64) is None


def test_offloaded_weights_free_nothing() -> None:
    from accelerate import cpu_offload

    model = forgetful_model()
    ids = tokens(1, 300)
    expected = model(ids, use_cache=False).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    cache = FoxPagedCache(model.config, 300)
    assert (feed(model, cache, ids, [250, 50]) - expected).abs().max() <= 1e-9
    assert all(int(layer.start.max()) == 0 for layer in layers_of(cache))


def test_bad_arguments() -> None:
    model = forgetful_model()
    with pytest.raises(ValueError, match="max_cache_len must be a positive integer, got 0"):
        FoxPagedCache(model.config, 0)
    cache = FoxPagedCache(model.config, 100)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(tokens(1, 5), cache=cache)
    cache = FoxPagedCache(model.config, 100)
    feed(model, cache, tokens(1, 98), [98])
    for count in (3, 70):
        with pytest.raises(ValueError, match=r"has room for 100.*max_cache_len"), torch.no_grad():
            model(tokens(1, count), cache=cache)
    feed(model, cache, tokens(1, 2), [1, 1])


def test_a_bound_that_is_too_small_is_seen() -> None:
    """Negative control: were queries shorter than they are, pages would be evicted that count."""
    model = forgetful_model(bias=3.0)
    with torch.no_grad():
        for layer in model.model.layers:
            cast(FoxDecoderLayer, layer).self_attn.q_norm.weight.mul_(20.0)
    ids = tokens(1, 400)
    cache = FoxPagedCache(model.config, 400)
    feed(model, cache, ids[:, :10], [10])
    for layer in layers_of(cache):
        assert layer.bounds is not None
        layer.bounds = (layer.bounds[0] * 0.0, layer.bounds[1] * 0.0)
    found = feed(model, cache, ids[:, 10:], [290, 100])
    assert not (found[:, -100:] - model(ids, use_cache=False).logits[:, -100:]).abs().max() <= 10 * EPS


class _Synchronisations(TorchDispatchMode):
    """Counts operators that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def test_pages_of_all_layers_move_with_one_synchronisation() -> None:
    ids = tokens(1, 400)
    counts = []
    for layers in (2, 5):
        model = tiny_model("pro", num_hidden_layers=layers, acp_eps=EPS, decay_time_max=3.0)
        cache = FoxPagedCache(model.config, 600)
        with torch.no_grad():
            model(ids[:, :200], cache=cache)
            with _Synchronisations() as seen:
                model(ids[:, 200:400], cache=cache)
                cache.reserve(1)
        counts.append(seen.count)
        assert any(layer.start.any() for layer in cache.layers), "nothing was evicted"
    assert counts[0] == counts[1], counts
