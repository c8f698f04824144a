"""What a cache holds, moved by any operation, continues as a run from scratch would.

`CachedRun` keeps the tokens beside the cache, applies the same operation to both, and compares after every step.
"""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, StaticLayer

from cached_run import CachedRun, restart_sum
from foxlm.kernels.backends import PYTORCH
from foxlm.modeling.cache.dynamic import DynamicForgettingLayer
from foxlm.modeling.cache.paged import FoxPagedCache
from foxlm.modeling.cache.static import StaticForgettingLayer, gates_for_kernel
from foxlm.modeling.token_layout import TokenLayout
from foxlm.modeling.versions import CACHE, cache_of
from models import DECODING_VARIANTS, SIZES, VARIANTS, assert_close, tiny_model, tokens

MODELS = {variant: tiny_model(variant) for variant in DECODING_VARIANTS}


def dynamic(variant: str = "pro", batch: int = 2) -> CachedRun:
    model = MODELS[variant]
    return CachedRun(model, DynamicCache(config=model.config), batch)


def static(variant: str = "pro", batch: int = 2, length: int = 40) -> CachedRun:
    model = MODELS[variant]
    return CachedRun(model, StaticCache(config=model.config, max_cache_len=length), batch)


def paged(variant: str = "pro", batch: int = 2, length: int = 40) -> CachedRun:
    model = MODELS[variant]
    return CachedRun(model, FoxPagedCache(model.config, length), batch)


HOLES = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 1]])


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
@pytest.mark.parametrize("make", [dynamic, static, paged])
class TestEveryCache:
    def test_chunks_and_single_tokens(self, make: Any, variant: str) -> None:
        run = make(variant).extend(5).extend(1).extend(1).extend(7).extend(1)
        assert run.cache.get_seq_length() == 15

    def test_one_token_at_a_time(self, make: Any, variant: str) -> None:
        run = make(variant)
        for _ in range(6):
            run.extend(1)

    def test_padding_in_every_part(self, make: Any, variant: str) -> None:
        run = make(variant).extend(5, HOLES).extend(1).extend(5, HOLES.flip(0)).extend(1, torch.tensor([[1], [0]]))
        run.extend(2).extend(5, HOLES)

    def test_reorder(self, make: Any, variant: str) -> None:
        run = make(variant, 3).extend(5).reorder([2, 0, 0]).extend(1).reorder([1, 2, 0]).extend(3)
        run.extend(3, torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 0]])).reorder([2, 2, 1]).extend(1)

    def test_offload_and_prefetch(self, make: Any, variant: str) -> None:
        make(variant).extend(5).offload().extend(1).offload().extend(3)

    def test_reset_and_reuse(self, make: Any, variant: str) -> None:
        make(variant).extend(5).extend(1).reset().extend(3).extend(1).reset().extend(1)


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
class TestDynamicCache:
    def test_repeat_and_select(self, variant: str) -> None:
        run = dynamic(variant).extend(5, HOLES).repeat(3).extend(1).select([4, 0, 5]).extend(3).repeat(2).extend(1)
        assert run.cache.layers[0].keys.shape[0] == 6

    def test_crop_and_continue(self, variant: str) -> None:
        run = dynamic(variant).extend(9).crop(1).extend(1).crop(4).extend(3).crop(0).extend(1)
        run.crop(run.ids.shape[1]).extend(4)

    def test_crop_with_padding(self, variant: str) -> None:
        dynamic(variant).extend(5).extend(5, HOLES).crop(2).extend(2).crop(3).extend(5, HOLES).crop(4).extend(1)

    def test_cache_made_without_a_configuration(self, variant: str) -> None:
        run = CachedRun(MODELS[variant], DynamicCache()).extend(5).reorder([1, 0]).extend(1).crop(3).extend(2)
        assert all(type(layer) is DynamicForgettingLayer for layer in run.cache.layers)

    def test_copy_is_independent(self, variant: str) -> None:
        run = dynamic(variant).extend(5)
        other = copy.copy(run)
        other.cache = copy.deepcopy(run.cache)
        other.extend(4)
        run.extend(1).extend(2)


def test_use_cache_returns_a_cache_of_the_right_layers() -> None:
    model = MODELS["pro"]
    cache = cache_of(model(tokens(1, 4), use_cache=True))
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in cache.layers] == [DynamicForgettingLayer] * 2
    assert [type(layer) for layer in StaticCache(config=model.config, max_cache_len=8).layers] == [
        StaticForgettingLayer
    ] * 2
    assert cache_of(model(tokens(1, 4), use_cache=False)) is None


@pytest.mark.parametrize("length", [9, 200])
def test_static_cache_of_any_length(length: int) -> None:
    static(length=length).extend(5).extend(1).extend(3)


def test_static_cache_made_early_with_another_type_of_gates() -> None:
    """`early_initialization` knows keys and values only."""
    model = MODELS["pro"]
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float64, device=torch.device("cpu"))
    CachedRun(model, cache).extend(5).extend(1).extend(4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [dynamic, static])
def test_other_implementations(make: Any, implementation: str) -> None:
    run = make()
    run.model = copy.deepcopy(run.model)
    run.model.set_attn_implementation(implementation)
    run.extend(5, HOLES).extend(1).extend(3).reorder([1, 0]).extend(1)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in DECODING_VARIANTS])
def test_every_other_variant(variant: str) -> None:
    model = tiny_model(variant)
    CachedRun(model, DynamicCache(config=model.config)).extend(5, HOLES).extend(1).reorder([1, 0]).extend(3)


# Rolling back


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(DynamicForgettingLayer, "rollback_window", 4)
    return 4


@pytest.mark.parametrize("steps", [(12,), (3, 9), (1,) * 12, (9, 1, 1, 1), (1, 11)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_crop_within_the_window(steps: tuple[int, ...], count: int, short_window: int) -> None:
    run = dynamic()
    for step in steps:
        run.extend(step)
    run.crop(count).extend(2).extend(1)


def test_crop_beyond_the_window_is_refused_and_changes_nothing(short_window: int) -> None:
    run = dynamic().extend(12)
    for count in (4, 7, 11):
        with pytest.raises(RuntimeError, match=rf"tokens_to_remove is -{count}.*unshifted.*activate_past_recording"):
            run.cache.crop(-count)
        assert run.cache.get_seq_length() == 12
    run.crop(3).extend(2)
    run.crop(run.ids.shape[1]).extend(2)


def test_gradients_of_queries_alone_through_a_cache() -> None:
    """Autograd keeps the keys of each step: they must not be written to later."""
    model = copy.deepcopy(MODELS["pro"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    ids = tokens(1, 12)
    gradients = []
    for parts in (ids.split(3, 1), [ids]):
        cache = DynamicCache(config=model.config)
        losses = [model(part, cache=cache, use_cache=True).logits.square().sum() for part in parts]
        model.zero_grad()
        torch.stack(losses).sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert_close(gradients[0], gradients[1])


def test_shallow_copies_and_older_references_keep_what_they_had() -> None:
    run = dynamic().extend(5).extend(1).extend(1)
    other = copy.copy(run)
    other.cache = copy.copy(run.cache)
    other.cache.layers = [copy.copy(layer) for layer in run.cache.layers]
    keys = run.cache.layers[0].keys
    before = keys.clone()
    other.extend(2).extend(1)
    run.extend(1).extend(1)
    other.extend(1)
    run.crop(3).extend(1).extend(2)
    assert torch.equal(keys, before)


def test_tokens_are_written_in_place() -> None:
    run = dynamic(batch=1).extend(5).extend(1)
    places = set()
    for _ in range(20):
        run.extend(1)
        places.add(run.cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    run.offload()
    assert not {"keys", "values"} & set(run.cache.layers[0]._buffers)


def test_crop_beyond_the_window_without_token_shift(short_window: int) -> None:
    dynamic("llama").extend(12).crop(10).extend(3)


def test_announced_rollback_of_any_length(short_window: int) -> None:
    run = dynamic().extend(12)
    run.cache.activate_past_recording()
    run.extend(5).extend(9).extend(1).crop(15).extend(3)


def test_memory_of_unshifted_states_is_bounded(short_window: int) -> None:
    run = dynamic(batch=1)
    for _ in range(30):
        run.extend(1)
        held = {name: states.shape[1] for name, states in run.cache.layers[0].unshifted.items()}
        assert set(held) == {"key", "value"} and max(held.values()) <= 2 * short_window
    # A view would keep the whole prompt's memory alive.
    run = dynamic(batch=1).extend(30)
    states = run.cache.layers[0].unshifted["key"]
    assert states.untyped_storage().nbytes() <= 2 * short_window * 2 * 8 * states.element_size()


@pytest.mark.parametrize("count", [1, -13])
def test_crop_that_makes_no_sense_is_refused(count: int) -> None:
    run = dynamic().extend(12)
    with pytest.raises(ValueError, match=rf"tokens_to_remove must be in \[-12, 0\].*got {count}"):
        run.cache.crop(count)
    run.extend(1)


# Any sequence of operations

ROW = st.integers(0, 5)
OPERATION = st.one_of(
    st.tuples(st.just("extend"), st.integers(1, 6), st.integers(0, 2**32)),
    st.tuples(st.just("extend"), st.just(1), st.just(0)),
    st.tuples(st.just("reorder"), st.lists(ROW, min_size=6, max_size=6)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("select"), st.lists(ROW, min_size=1, max_size=4)),
    st.tuples(st.just("crop"), st.integers(0, 6)),
    st.tuples(st.just("offload")),
    st.tuples(st.just("reset")),
)
OPERATIONS = st.lists(OPERATION, min_size=3, max_size=9)


def apply(run: CachedRun, operation: tuple) -> None:
    """One random operation, fitted to the batch size and length that there are."""
    name, *arguments = operation
    batch, length = run.ids.shape
    if name == "extend":
        count, seed = arguments
        generator = torch.Generator().manual_seed(seed)
        padding = (torch.rand(batch, count, generator=generator) < 0.3).long() if seed else None
        if length + count <= 40:
            run.extend(count, padding)
    elif length == 0:
        return
    elif name == "reorder":
        run.reorder([row % batch for row in arguments[0][:batch]] + list(range(len(arguments[0]), batch)))
    elif name == "select":
        run.select([row % batch for row in arguments[0]])
    elif name == "repeat":
        if batch * arguments[0] <= 6:
            run.repeat(arguments[0])
    elif name == "crop":
        run.crop(min(arguments[0], length))
    else:
        getattr(run, name)()


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_any_operations_on_a_dynamic_cache(variant: str, operations: list[tuple]) -> None:
    run = dynamic(variant).extend(3)
    for operation in operations:
        apply(run, operation)
    run.extend(2)


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_any_operations_on_a_static_cache(variant: str, operations: list[tuple]) -> None:
    run = static(variant, length=42).extend(3)
    for operation in operations:
        if operation[0] not in ("repeat", "select", "crop"):  # a static cache has none of these
            apply(run, operation)
    run.extend(1)


# Refusals


def llama_cache() -> DynamicCache:
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SIZES.items() if not k.startswith("decay")}))
    return cache_of(llama(tokens(2, 3), use_cache=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        lambda: Cache(layers=[DynamicLayer(), DynamicLayer()]),
        lambda: Cache(layers=[StaticLayer(max_cache_len=9), StaticLayer(max_cache_len=9)]),
        lambda: StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=9),
        llama_cache,
        lambda: tuple((torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)) for _ in range(2)),
        lambda: [],
    ],
    ids=["encoder-decoder", "dynamic", "static", "llama-static", "llama", "tuples", "list"],
)
def test_cache_that_would_lose_the_gates_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=rf"{CACHE} must .*got"):
        MODELS["pro"](tokens(2, 4), cache=make(), use_cache=True)


def test_quantized_cache_of_fox_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forgetting_attention"):
        QuantizedCache(backend="quanto", config=MODELS["pro"].config)


def test_cache_of_fewer_layers_is_refused() -> None:
    short = DynamicCache(config=tiny_model(num_hidden_layers=1).config)
    with pytest.raises(ValueError, match=rf"{CACHE}.*layers"):
        MODELS["pro"](tokens(2, 4), cache=short, use_cache=True)


@pytest.mark.parametrize("make", [dynamic, static, paged])
def test_cache_of_another_batch_is_refused(make: Any) -> None:
    run = make().extend(5)
    with pytest.raises(ValueError, match=rf"{CACHE} holds a batch of 2 sequences, got one of 3"):
        run.model(tokens(3, 1), past_key_values=run.cache)


@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 4}, {"use_value_shift": False}], ids=str)
def test_static_cache_of_another_model_is_refused(overrides: dict[str, Any]) -> None:
    cache = StaticCache(config=tiny_model(**overrides).config, max_cache_len=9)
    with pytest.raises(ValueError, match=rf"{CACHE} must be made with the model's configuration"):
        MODELS["pro"](tokens(2, 4), past_key_values=cache)


def test_wrong_masks_beside_a_cache_are_refused() -> None:
    model = MODELS["pro"]
    for make in (dynamic, static):
        run = make().extend(5)
        for shape in [(2, 1, 3, 8), (2, 3), (3, 8), (2, 41)]:
            with pytest.raises(ValueError, match=r"attention_mask must"):
                model(tokens(2, 3), attention_mask=torch.ones(shape), cache=run.cache, use_cache=True)


def test_static_cache_that_is_full_is_refused() -> None:
    run = static(length=6).extend(5)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        run.extend(2)


@pytest.mark.parametrize("make", [dynamic, static])
def test_keys_without_gates_are_refused(make: Any) -> None:
    cache, states = make().cache, torch.zeros(2, 2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{CACHE} takes in keys.*call model\("):
        cache.update(states, states, 0)


def test_copies_are_compact_and_independent_of_the_room_behind() -> None:
    run = dynamic().extend(5).extend(1)
    layer = copy.deepcopy(run.cache).layers[0]
    for x in (layer.keys, layer.values, *layer.gates, *layer.unshifted.values()):
        assert x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    assert not {"_buffers", "summary"} & vars(layer).keys()


# Each of these breaks one thing; the comparison above must see it.


@pytest.mark.parametrize("variant", DECODING_VARIANTS)
def test_control_gate_sum_that_restarts_is_seen(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicForgettingLayer, "append_gates", restart_sum)
    run = dynamic(variant).extend(5)
    with pytest.raises(AssertionError, match="differs"):
        run.extend(1)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [("reorder", [[1, 0]]), ("select", [[1, 0]]), ("repeat", [2]), ("crop", [2])],
)
@pytest.mark.parametrize("kept", ["gates", "unshifted"])
def test_control_operation_that_leaves_state_behind_is_seen(
    operation: str, arguments: list, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates, or the unshifted states, are put back as they were before the operation."""
    run = dynamic().extend(5)
    before = [getattr(layer, kept) for layer in run.cache.layers]
    getattr(run, operation)(*arguments)
    with pytest.raises((AssertionError, RuntimeError)):
        for layer, state in zip(run.cache.layers, before, strict=True):
            setattr(layer, kept, state)
        run.extend(1)


def test_control_reorder_that_drops_the_gates_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicForgettingLayer, "reorder_cache", DynamicLayer.reorder_cache)
    run = dynamic("llama").extend(5).reorder([1, 0])
    with pytest.raises(AssertionError, match="differs"):
        run.extend(1)


@pytest.mark.parametrize("lost", ["sums", "last sum", "key", "value"])
def test_control_static_state_that_is_lost_is_seen(lost: str) -> None:
    run = static().extend(5)
    for layer in run.cache.layers:
        sums, last_sum, _ = layer.gates
        ({"sums": sums, "last sum": last_sum} | layer.unshifted)[lost].zero_()
    with pytest.raises(AssertionError, match="differs"):
        run.extend(1)


def test_a_kernel_takes_in_a_step_that_nothing_else_must_see() -> None:
    backend = PYTORCH._replace(append=lambda *_, **__: (torch.empty(0), torch.empty(0)))
    layout = TokenLayout(torch.arange(1), None, None, None, torch.arange(2))
    found: list[bool] = []

    def ask(log_f: torch.Tensor, few: bool = True) -> torch.Tensor:
        found.append(gates_for_kernel(log_f, layout, backend, few, {}) is not None)
        return log_f

    ask(torch.zeros(2, 1, 1))
    ask(torch.zeros(2, 1, 1), few=False)
    torch.func.vmap(ask)(torch.zeros(2, 1, 1, 1))
    assert found == [True, False, False]
