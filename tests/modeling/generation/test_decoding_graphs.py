"""Captured steps of `generate`: when they are captured, what they depend on, and what is left of them: nothing."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Cache, CompileConfig, DynamicCache, StaticCache

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.modeling import decoding_graphs
from foxlm.modeling.cache.dynamic import DynamicForgettingLayer
from foxlm.modeling.cache.reserved import ReservedForgettingLayer
from foxlm.modeling.versions import cache_of
from models import tiny_model, tokens
from recorded_graphs import RecordedGraph, capture_on_this_device

NEW = 10


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    return capture_on_this_device(monkeypatch)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings that steps run as always."""
    messages: list[str] = []
    monkeypatch.setattr(decoding_graphs.logger, "warning_once", messages.append)
    return messages


def generate(model: Any, ids: Tensor, **how: Any) -> Any:
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | how))


def plain(model: Any, ids: Tensor, **how: Any) -> Tensor:
    """Tokens of a run without a cache."""
    return generate(model, ids, use_cache=False, **how)


CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=60),
    # Without decode kernels its steps wait for the device, and run as always.
    "paged": lambda config: FoxPagedCache(config, max_cache_len=60),
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_first_step_runs_and_the_second_is_captured(cache: str, graphs: Any) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    found = generate(model, ids, cache=CACHES[cache](model.config))
    assert torch.equal(found, plain(model, ids))
    # The prompt gives the first token; of nine steps one runs, and all others are replays of one capture.
    assert (graphs.captures, graphs.replays) == (1, NEW - 2)
    # Its kernels are compiled now, so that a call on another cache captures at once.
    again = generate(model, tokens(2, 9), cache=CACHES[cache](model.config))
    assert torch.equal(again, plain(model, tokens(2, 9)))
    assert (graphs.captures, graphs.replays) == (2, NEW - 2 + NEW - 1)


def test_the_configuration_turns_them_off(graphs: Any) -> None:
    model, ids = tiny_model(decoding_graphs=False), tokens(2, 7)
    assert torch.equal(generate(model, ids), plain(model, ids))
    assert graphs.captures == 0


def test_nothing_is_captured_where_steps_are_compiled(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in a frame that the compiler leaves to Python, as it may any."""
    model, ids = tiny_model(), tokens(2, 7)
    monkeypatch.setattr(model, "get_compiled_call", lambda _: model.__call__)
    compiles = CompileConfig()
    compiles._compile_all_devices = True
    how = {"cache_implementation": "static"}
    assert torch.equal(generate(model, ids, compile_config=compiles, **how), plain(model, ids))
    assert graphs.captures == 0
    generate(model, ids, **how)
    assert graphs.captures == 1


@pytest.mark.parametrize("padding", [False, True])
def test_room_that_is_used_up_is_made_anew(padding: bool, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_ROOM", 5), ("_LEAST_ROOM", 5), ("_ROOM_MULTIPLE", 1)):
        monkeypatch.setattr(decoding_graphs, name, value)
    model, ids = tiny_model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, : 3 if padding else 0] = 0
    how = {"max_new_tokens": 40, "attention_mask": mask}
    assert torch.equal(generate(model, ids, **how), plain(model, ids, **how))
    assert 7 <= graphs.captures <= 9


def test_a_growing_cache_gets_its_layers_back(graphs: Any) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    out = generate(model, ids, return_dict_in_generate=True)
    cache = cache_of(out)
    assert graphs.replays and all(type(x) is DynamicForgettingLayer for x in cache.layers)
    assert cache.get_seq_length() == 7 + NEW - 1
    fed = DynamicCache(config=model.config)
    with torch.no_grad():
        model(out.sequences[:, :-1], cache=fed)
        for a, b in zip(cache.layers, fed.layers, strict=True):
            for x, y in ((a.keys, b.keys), (a.values, b.values), (a.gates[0], b.gates[0])):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
            assert torch.equal(a.gates[1], b.gates[1])
        # Rolled back, copied and repeated, it goes on as one that has grown.
        cache.crop(-5)
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        more = tokens(2, 4, seed=3)
        text = torch.cat([out.sequences[:, : 7 + NEW - 6], more], dim=1)
        expected = model(text, use_cache=False).logits[:, -4:]
        torch.testing.assert_close(model(more, cache=cache).logits, expected)
        rows = [0, 0, 1, 1]
        torch.testing.assert_close(model(more[rows], cache=twin).logits, expected[rows])


def test_a_cache_given_again_keeps_its_graphs(graphs: Any) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    for make in (CACHES["dynamic"], CACHES["static"]):
        cache, text = make(model.config), ids
        graphs.captures = graphs.replays = 0
        for turn in range(3):
            expected = plain(model, text, max_new_tokens=5)
            text = generate(model, text, cache=cache, max_new_tokens=5)
            assert torch.equal(text, expected), turn
        # The cache lacks the last token of a turn, so that the next one has a step more.
        assert (graphs.captures, graphs.replays) == (1, 4 + 5 + 5 - 1)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
            model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(-model.model.layers[1].self_attn.o_proj.weight)
        cache.reset()
        assert torch.equal(generate(model, ids, cache=cache), plain(model, ids))


def test_graphs_die_with_their_cache_and_model(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []
    capture = RecordedGraph.capture

    def noted(self: RecordedGraph, call: Any) -> Tensor:
        made.append(weakref.ref(self))
        return capture(self, call)

    monkeypatch.setattr(RecordedGraph, "capture", noted)
    model, ids = tiny_model(), tokens(2, 7)
    generate(model, ids)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    cache = DynamicCache(config=model.config)
    generate(model, ids, cache=cache)
    assert made[1]() is not None
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None and made[1]() is None
    assert cache.get_seq_length() == 7 + NEW - 1


def test_hooks_of_submodules_are_called(graphs: Any, said: list[str]) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    calls: list[int] = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    generate(model, ids)
    assert len(calls) == NEW and graphs.captures == 0
    assert len(said) == 1 and "model.layers.1 has hooks" in said[0] and "decoding_graphs=False" in said[0]
    handle.remove()
    model.register_forward_hook(lambda *_: calls.append(2))
    generate(model, ids)
    assert calls.count(2) == NEW and graphs.replays == NEW - 2


def test_outputs_that_a_graph_does_not_give(graphs: Any) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    out = generate(model, ids, output_hidden_states=True, return_dict_in_generate=True)
    assert len(out.hidden_states) == NEW and graphs.captures == 0
    # The hooks that transformers has left behind do nothing now.
    generate(model, ids)
    assert graphs.captures == 1


def test_a_step_that_waits_for_the_device_runs_as_always(
    graphs: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    expected = plain(model, ids)
    forward = type(model.model.norm).forward

    def waiting(self: Any, x: Tensor, *rest: Any) -> Tensor:
        assert x.abs().max().item() >= 0.0
        return forward(self, x, *rest)

    monkeypatch.setattr(type(model.model.norm), "forward", waiting)
    assert torch.equal(generate(model, ids), expected)
    assert graphs.replays == 0 and len(said) == 1 and "capturing" in said[0]


def test_captures_that_do_not_pay_end(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam search gives the pages of an evicting cache other addresses at each step."""
    model, ids = tiny_model(), tokens(2, 7)
    how = {"num_beams": 3, "max_new_tokens": 20}
    cache = FoxPagedCache(model.config, max_cache_len=60)
    assert torch.equal(generate(model, ids, cache=cache, **how), plain(model, ids, **how))
    assert graphs.captures <= decoding_graphs._CAPTURES


def test_autocast_runs_as_always(graphs: Any, said: list[str]) -> None:
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, ids)
    assert graphs.captures == 0 and len(said) >= 1


def test_inference_mode_and_back(graphs: Any) -> None:
    model, ids = tiny_model(), tokens(2, 7)
    cache, expected = DynamicCache(config=model.config), plain(model, ids, max_new_tokens=2 * NEW)
    with torch.inference_mode():
        text = generate(model, ids, cache=cache)
    assert torch.equal(generate(model, text.clone(), cache=cache), expected)


def test_a_reserved_layer_refuses_to_forget_more_than_it_can_take_back() -> None:
    model, ids = tiny_model(), tokens(1, 100)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    layer = ReservedForgettingLayer(cache.layers[0], 128, (4, 2, ("key", "value")), torch.tensor(0))
    with pytest.raises(ValueError, match=r"must be in \(-100, 0\].*got 3"):
        layer.crop(3)
    with pytest.raises(RuntimeError, match=r"tokens_to_remove is -64, but token shift.*last 64"):
        layer.crop(-64)
    layer.crop(-60)
    assert layer.get_seq_length() == 40


def test_a_warning_names_the_reason_once(graphs: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model(attn_implementation="sdpa"), tokens(1, 5)
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        generate(model, ids)
        generate(model, ids)
    finally:
        logger.propagate = False
    assert sum("attn_implementation is 'sdpa'" in record.message for record in caplog.records) <= 1
    assert graphs.captures == 0


class _Adapter(nn.Module):
    """A linear layer with a term that a number outside of its parameters scales, as adapters have."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, 1.0
        self.more = nn.Parameter(torch.randn_like(base.weight) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * nn.functional.linear(x, self.more)


CHANGES = ("nothing", "weights", "new weights", "dtype", "adapter", "scale", "eps", "training")
CALLS = st.tuples(
    st.sampled_from(CHANGES),
    st.sampled_from(["default", "dynamic", "static", "paged", "kept dynamic", "kept static"]),
    st.integers(1, 3),
    st.integers(1, 12),
    st.booleans(),
)


def _change(model: FoxForCausalLM, what: str) -> None:
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    if what == "weights":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.0)
    elif what == "new weights":
        attention.o_proj.weight = nn.Parameter(-2.0 * attention.o_proj.weight.detach())
    elif what == "dtype":
        model.to(torch.float32 if model.dtype == torch.float64 else torch.float64)
    elif what == "adapter" and isinstance(attention.v_proj, nn.Linear):
        attention.v_proj = _Adapter(attention.v_proj)
    elif what == "scale" and isinstance(attention.v_proj, _Adapter):
        attention.v_proj.scale *= -1.5
    elif what == "eps":
        model.config.acp_eps = None if model.config.acp_eps else 1e-5
    elif what == "training":
        model.train(not model.training)


@settings(max_examples=15)
@given(calls=st.lists(CALLS, min_size=2, max_size=5))
def test_whatever_changes_between_calls_is_seen(calls: list[tuple]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        capture_on_this_device(patch)
        model = tiny_model()
        kept: dict[tuple, Cache] = {}
        for change, kind, batch, length, padded in calls:
            _change(model, change)
            ids, mask = tokens(batch, length + 2, seed=length), torch.ones(batch, length + 2, dtype=torch.long)
            mask[0, : length // 3 if padded else 0] = 0
            how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5}
            expected = plain(model, ids, **how)
            if kind != "default":
                make = CACHES[kind.removeprefix("kept ")]
                key = (kind, batch, model.dtype)
                how["cache"] = kept.setdefault(key, make(model.config)) if "kept" in kind else make(model.config)
                how["cache"].reset()
            assert torch.equal(generate(model, ids, **how), expected), (change, kind)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_steps_read_no_mask_where_nothing_is_padding(cache: str, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(2, 9)
    read: list[bool] = []
    take_step = decoding_graphs.CacheGraphs.step

    def seen(self: Any, run: Any, cache: Cache, ids: Tensor, **options: Any) -> Tensor | None:
        if ids.shape[1] == 1:
            read.append(options["attention_mask"] is not None)
        return take_step(self, run, cache, ids, **options)

    monkeypatch.setattr(decoding_graphs.CacheGraphs, "step", seen)
    mask = torch.ones_like(ids)
    for hidden in (0, 3):
        mask[0, :hidden] = 0
        for chunk in (None, 4):
            read.clear()
            held = CACHES[cache](model.config)
            how: dict[str, Any] = {"attention_mask": mask, "prefill_chunk_size": chunk, "cache": held}
            assert torch.equal(generate(model, ids, **how), plain(model, ids, attention_mask=mask))
            assert len(read) >= NEW - 1 and set(read) == {hidden > 0}


def test_a_loop_of_the_caller_may_hide_any_token(graphs: Any) -> None:
    model, ids = tiny_model(), tokens(1, 9)
    held = DynamicCache(config=model.config)

    def loop(model: Any, input_ids: Tensor, **rest: Any) -> Tensor:
        """Tokens see every other one before."""
        for _ in range(NEW):
            mask = torch.ones_like(input_ids)
            mask[:, 1:-1:2] = 0
            new = input_ids if held.get_seq_length() == 0 else input_ids[:, -1:]
            logits = model(new, cache=held, attention_mask=mask).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
        return input_ids

    found = generate(model, ids, custom_generate=loop, cache=held)
    held = DynamicCache(config=model.config)
    with torch.no_grad():
        assert torch.equal(found, loop(model, ids))
    assert graphs.captures > 0
