"""Layers that are repeated from memory launch, return and keep what they would."""

import contextlib
import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from foxlm.modeling.layers.block import FoxDecoderLayer
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS
from models import tiny_model, tokens

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from ahead_of_time import idle_gpu
from foxlm.kernels import ahead_of_time
from foxlm.kernels.triton_common import HAS_GLUON
from foxlm.modeling.layers import repeated_layer

if not HAS_GLUON:
    pytest.skip("needs a release of Triton whose launchers are known", allow_module_level=True)

LENGTHS = 70, 90, 40
CASES: dict[str, dict[str, Any]] = {
    "pro": {},
    "without a cache": {"cached": False},
    "not pruned": {"acp_eps": None},
    "padded": {"how": "padded"},
    "packed": {"how": "packed"},
    "static": {"how": "static"},
    "a new static cache each time": {"how": "new static"},
    "long": {"lengths": (300, 200)},
    "heads of 64": {"head_dim": 64},
    "grouped": {"variant": "key-value-gates"},
    "llama": {"variant": "llama"},
    "RoPE and a sink": {"variant": "rope-sink"},
    "OLMo 2's": {"variant": "post-norm"},
    "all heads": {"qk_norm": "all_heads"},
    "fixed gates": {"variant": "fixed"},
    "float32": {"dtype": torch.float32},
}
# On a CPU the bound that this reads is checked, and what is checked is not repeated.
ON_A_GPU: dict[str, dict[str, Any]] = CASES | {"paper": {"acp_rule": "paper"}}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    monkeypatch.setattr(ahead_of_time, "_can_prepare", lambda inputs: False)
    with assume_gpu(GPU((9, 0), 132)), idle_gpu() as found:
        yield found


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[FoxDecoderLayer]:
    """The layers whose modules are called."""
    layers: list[FoxDecoderLayer] = []
    compute = FoxDecoderLayer._compute

    def noted(self: FoxDecoderLayer, *args: Any, **options: Any) -> Tensor:
        layers.append(self)
        return compute(self, *args, **options)

    monkeypatch.setattr(FoxDecoderLayer, "_compute", noted)
    return layers


def model_of(variant: str = "pro", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    return tiny_model(variant, dtype=dtype, num_hidden_layers=4, **({"acp_eps": 1e-3} | fields)).eval()


@torch.no_grad()
def run(
    model: Any, how: str = "whole", cached: bool = True, lengths: tuple[int, ...] = LENGTHS, cache: Any = None
) -> tuple[list[Tensor], Any]:
    """Hidden states of a prompt in chunks, and the cache."""
    if how in ("static", "new static"):
        if cache is None or how == "new static":
            cache = StaticCache(config=model.config, max_cache_len=sum(lengths) + 1)
        cache.reset()
    elif cached:
        cache = DynamicCache(config=model.config)
    outs, done = [], 0
    for length in lengths:
        ids, options = tokens(2, length).to(model.device), {}
        if how == "padded":
            options["attention_mask"] = torch.ones(2, done + length, dtype=torch.int64, device=model.device)
            options["attention_mask"][0, :9] = 0
        elif how == "packed" and not done:
            ids = ids[:1]
            starts = torch.cat([torch.arange(30), torch.arange(length - 30)])
            options["position_ids"] = starts[None].to(model.device)
        elif how == "packed":
            ids = ids[:1]
        outs.append(model.model(ids, past_key_values=cache, use_cache=cached, **options).last_hidden_state)
        done += length if cached else 0
    return outs, cache


def held(cache: Any) -> list[list[tuple[str, Any]]]:
    """All that a cache's layers hold, tensors by dtype, shape and strides."""

    def described(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.shape, x.stride(), x.storage_offset()
        if isinstance(x, dict):
            return {name: described(y) for name, y in x.items()}
        return tuple(map(described, x)) if isinstance(x, tuple) else x

    names = ("keys", "values", "gates", "unshifted", "is_initialized", "dtype", "device", "_new", "summary")
    if isinstance(cache, StaticCache):
        slots: tuple[str, ...] = ("cumulative_length", "was_reset", "_states")
    else:
        slots = ("_buffers", "_reordered", "expected", "summarized")
    layers = [] if cache is None else cache.layers
    return [[(name, described(getattr(layer, name))) for name in (*names, *slots)] for layer in layers]


def kernels(launches: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Launches without addresses."""

    def named(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return tuple(map(named, x))
        return "address" if isinstance(x, int) and x >= 1 << 33 else x

    return list(map(named, launches))


@pytest.mark.parametrize("case", CASES)
def test_layers_launch_and_keep_what_they_would(
    case: str, launches: list[Any], computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CASES[case]
    how = {name: options[name] for name in ("how", "cached", "lengths") if name in options}
    model = model_of(**{name: x for name, x in options.items() if name not in how})
    with monkeypatch.context() as patch:
        patch.setattr(repeated_layer, "_recordings", lambda: None)
        cache = None
        for _ in range(3):
            launches.clear()
            outs, cache = run(model, **how, cache=cache)
    expected, wanted = kernels(launches), held(cache)
    for _ in range(3):
        launches.clear()
        computed.clear()
        found, cache = run(model, **how, cache=cache)
        assert kernels(launches) == expected
        assert held(cache) == wanted
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in outs]
    assert not computed


def same(module: Any, arguments: Any, out: Any) -> Any:
    return out


# After each the second layer is not what was recorded.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda layer: layer.self_attn.q_proj.register_forward_hook(same),
    "a hook on all modules": lambda layer: nn.modules.module.register_module_forward_hook(same),
    "another forward": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "another module": lambda layer: setattr(layer.mlp, "down_proj", nn.Sequential(layer.mlp.down_proj)),
    "another class": lambda layer: setattr(
        layer.self_attn.k_norm, "__class__", type("Norm", (type(layer.self_attn.k_norm),), {})
    ),
    "a parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer.mlp.down_proj),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_recorded_runs_by_its_modules(change: str, launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
    computed.clear()
    try:
        CHANGES[change](model.model.layers[1])
        for _ in range(3):
            run(model, lengths=(70,))
    finally:
        nn.modules.module._global_forward_hooks.clear()
    changed = model.model.layers if change == "a hook on all modules" else [model.model.layers[1]]
    assert computed == [layer for _ in range(3) for layer in changed]


@pytest.mark.parametrize("change", ["a weight", "its memory", "its dtype", "epsilon", "unfused"])
def test_what_is_set_otherwise_is_recorded_again(change: str, launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
    layer = model.model.layers[1]
    if change == "a weight":
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.detach().clone())
    elif change == "its memory":
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.detach().clone()
    elif change == "its dtype":
        layer.self_attn.output_norm.weight.data = layer.self_attn.output_norm.weight.float()
    elif change == "epsilon":
        layer.self_attn.q_norm.eps = 0.125
    else:
        layer.mlp.unfuse_projections()
    computed.clear()
    launches.clear()
    run(model, lengths=(70,))
    used = {x for one in launches for x in one if isinstance(x, float)}
    if change in ("a weight", "its memory"):
        # Another address makes no other launches: the recording of the others serves.
        assert not computed
    else:
        assert computed == [layer]
    if change == "epsilon":
        assert 0.125 in used


@pytest.mark.parametrize("how", ["autocast", "gradients", "recording the past", "a few more tokens"])
def test_other_calls_run_by_their_modules(how: str, launches: list[Any], computed: list[Any]) -> None:
    model = model_of(dtype=torch.float32 if how == "autocast" else torch.bfloat16)
    for _ in range(3):
        run(model, lengths=(70, 8))
    computed.clear()
    ids, cache = tokens(2, 70), DynamicCache(config=model.config)
    if how == "recording the past":
        cache.activate_past_recording()
    elif how == "a few more tokens":
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert not computed
        ids = ids[:, :8]
    with torch.set_grad_enabled(how == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(ids, past_key_values=None if how == "gradients" else cache)
    assert len(computed) == len(model.model.layers)


def test_copies_have_recordings_of_their_own(launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
    layer = model.model.layers[0]
    assert layer.known is not None
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    assert [x.known for x in copies] == [None, None]
    computed.clear()
    model.model.layers[0] = copies[0]
    model.fuse_projections()
    launches.clear()
    run(model)
    assert not computed
    used = {x for one in launches for x in one if isinstance(x, int)}
    assert copies[0].post_attention_layernorm.weight.data_ptr() in used
    assert layer.post_attention_layernorm.weight.data_ptr() not in used


def test_a_cache_goes_on_from_what_it_holds(launches: list[Any], computed: list[Any]) -> None:
    """Steps, crops and copies after a prompt that was repeated."""
    model = model_of()
    for _ in range(3):
        _, cache = run(model)
    total = sum(LENGTHS)
    with torch.no_grad():
        model(tokens(2, 1), past_key_values=cache)
        assert cache.get_seq_length() == total + 1
        cache.crop(-1)
        copied = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        for one in (cache, copied):
            model(tokens(2, 40), past_key_values=one)
            assert one.get_seq_length() == total + 40


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("how", ["memory", "parameter"])
def test_a_projection_that_left_its_buffer_is_read_where_it_is(
    name: str, how: str, launches: list[Any], computed: list[Any]
) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
    layer = model.model.layers[1]
    projection, owner = layer.get_submodule(name), layer.get_submodule(name.partition(".")[0])
    new = projection.weight.detach() * 2.0
    if how == "memory":
        projection.weight.data = new
    else:
        projection.weight = nn.Parameter(new)
    computed.clear()
    run(model, lengths=(70,))
    assert computed == [layer]
    assert owner.fused_projections is None


def test_what_is_known_keeps_no_weight_alive(launches: list[Any]) -> None:
    model = model_of()
    with torch.no_grad():
        model.generate(tokens(2, 20), max_new_tokens=1)
    run(model)
    layer = model.model.layers[1]
    buffers = [x.fused_projections.weight for x in (layer.self_attn, layer.mlp) if x.fused_projections]
    alive = [*map(weakref.ref, buffers), *map(weakref.ref, layer.parameters())]
    assert len(buffers) == 2
    del buffers
    model.train()
    assert [x() for x in alive[:2]] == [None, None]
    model.model.layers = model.model.layers[:1]
    del layer
    assert not [x for x in alive if x() is not None]


def test_attributes_of_other_types_are_not_taken_for_known(launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.scaling = np.float64(0.125 * (1 + index))
    for _ in range(3):
        launches.clear()
        run(model, lengths=(70,))
        found = {x for one in launches for x in one if isinstance(x, float)}
        assert {0.125, 0.25, 0.375, 0.5} <= found
    model.model.layers[1].self_attn.scaling = torch.tensor(0.25)
    assert len(computed) == 12


def test_a_launch_through_triton_is_not_repeated(launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    model.model.layers[0].input_layernorm.eps = np.float64(1e-6)
    counts = []
    for _ in range(4):
        launches.clear()
        run(model, lengths=(70,))
        counts.append(len(launches))
    assert len(set(counts[1:])) == 1


def test_a_cache_of_inference_mode_goes_on_without_it(launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        with torch.inference_mode():
            _, cache = run(model, lengths=(70, 90))
    computed.clear()
    with torch.inference_mode():
        _, cache = run(model, lengths=(70, 90))
    assert not computed
    with torch.no_grad():
        model(tokens(2, 40), past_key_values=cache)
    assert cache.get_seq_length() == 200


def test_another_module_in_the_place_of_attention(launches: list[Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.inside(*args, **options)

    model = model_of()
    run(model)
    model.model.layers[1].self_attn = Wrapped(model.model.layers[1].self_attn)
    run(model)


def test_a_copy_of_a_cache_layer_learns_that_room_is_taken(launches: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
        _, cache = run(model, lengths=(70, 90))
        fork = DynamicCache(config=model.config)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        with torch.no_grad():
            for one in (cache, fork):
                model(tokens(2, 40), past_key_values=one)
        assert cache.layers[0].keys.data_ptr() != fork.layers[0].keys.data_ptr()


def test_a_replica_is_known_by_its_own_modules(launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
    replica = model.model.layers[1]._replicate_for_data_parallel()
    other = copy.deepcopy(replica.mlp)
    replica._modules["mlp"] = other
    model.model.layers[1] = replica
    launches.clear()
    run(model, lengths=(70,))
    assert replica.known is not model.model.layers[0].known
    assert computed[-1] is replica


@pytest.mark.parametrize("what", ["a transposed weight", "a class", "a method", "a mode", "the cache", "attention"])
def test_who_looks_on_sees_each_call(what: str, launches: list[Any], computed: list[Any]) -> None:
    from torch.overrides import TorchFunctionMode

    from foxlm.evaluation.recording import replaced_attention
    from foxlm.modeling.attention_implementations import fox_attention_forward as attend
    from foxlm.modeling.layers.norm import FoxRMSNorm

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    model = model_of(hidden_size=64, num_attention_heads=4, head_dim=16)
    for _ in range(3):
        run(model, lengths=(70,))
    computed.clear()
    layer = model.model.layers[1]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if what == "a transposed weight":
            layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.detach().t()
        elif what == "a class":
            forward = FoxRMSNorm.forward
            patch.setattr(FoxRMSNorm, "forward", lambda self, *args: forward(self, *args))
        elif what == "a method":
            layer.self_attn.log_forget_gates = layer.self_attn.log_forget_gates
        elif what == "a mode":
            stack.enter_context(Mode())
        elif what == "attention":
            # As whoever counts what is skipped does.
            stack.enter_context(replaced_attention("fox", lambda *args, **options: attend(*args, **options)))
        cache = DynamicCache(config=model.config)
        if what == "the cache":
            patch.setattr(cache, "update", cache.update)
        with torch.no_grad():
            model(tokens(2, 70), past_key_values=cache)
    everyone = list(model.model.layers)
    assert computed == ([layer] if what in ("a transposed weight", "a method") else everyone)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fox_reference"])
def test_other_implementations_of_attention_are_called(
    implementation: str, launches: list[Any], computed: list[Any]
) -> None:
    model = model_of()
    for _ in range(3):
        run(model, lengths=(70,))
    model.set_attn_implementation(implementation)
    computed.clear()
    for _ in range(3):
        run(model, lengths=(70,))
    assert len(computed) == 3 * len(model.model.layers)


def test_a_default_device_changes_nothing(launches: list[Any], computed: list[Any]) -> None:
    model = model_of()
    for _ in range(3):
        run(model)
    computed.clear()
    with torch.device("cpu"):
        run(model)
    assert not computed


class TestOnAGPU:
    """Values, which a wrong address would change."""

    pytestmark = ON_KERNELS

    @pytest.mark.parametrize("case", ON_A_GPU)
    def test_results_are_those_of_the_modules(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        options = ON_A_GPU[case]
        how = {name: options[name] for name in ("how", "cached", "lengths") if name in options}
        model = model_of(**{name: x for name, x in options.items() if name not in how}).to(DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(repeated_layer, "_recordings", lambda: None)
            expected, cache = run(model, **how)
            run(model, **how, cache=cache)
            expected.append(self.step(model, cache))
        for _ in range(4):
            # What is not written is not as it was before.
            torch.full((1 << 24,), float("nan"), device=DEVICE)
            found, cache = run(model, **how, cache=cache)
            found.append(self.step(model, cache))
            for x, wanted in zip(found, expected, strict=True):
                assert torch.equal(x, wanted)

    @staticmethod
    @torch.no_grad()
    def step(model: Any, cache: Any) -> Tensor:
        ids = tokens(2, 1).to(DEVICE)
        return ids if cache is None else model(ids[: cache.layers[0].keys.shape[0]], past_key_values=cache).logits

    def test_a_prompt_holds_no_more_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of(head_dim=64, hidden_size=512, intermediate_size=2048).to(DEVICE)
        peaks = []
        for recordings in (lambda: None, repeated_layer._recordings):
            monkeypatch.setattr(repeated_layer, "_recordings", recordings)
            for _ in range(3):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run(model, lengths=(4096,))
                peak = torch.cuda.max_memory_allocated() - before
            peaks.append(peak)
        assert peaks[1] <= 1.02 * peaks[0]
