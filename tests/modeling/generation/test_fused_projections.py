"""Fused projections compute what those called one by one do, and leave everything but addresses as it was."""

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils.other import clean_state_dict_for_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import CompileConfig, DynamicCache, GenerationMixin

from foxlm import FoxForCausalLM
from foxlm.kernels.backends import HAS_TRITON, PYTORCH, backend_of
from foxlm.kernels.devices import GPU, assume_gpu
from foxlm.modeling.layers import fused_projections
from foxlm.modeling.layers.fused_projections import MAX_FUSED_TOKENS, FusableProjections
from foxlm.modeling.versions import cache_of
from kernel_device import DEVICES, INTERPRETED
from models import VARIANTS, assert_close, tiny_model, tokens

NEW = 6


def fused_layers(model: nn.Module) -> list[bool]:
    """Whether each attention and each MLP has its projections fused."""
    owners = [x for x in model.modules() if isinstance(x, FusableProjections)]
    return [x.fused_projections is not None and x.uses_fused != "never" for x in owners]


def generate(model: Any, **how: Any) -> Any:
    fixed = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(tokens(2, 7), **(fixed | how))


def logits(model: Any, **how: Any) -> Tensor:
    return torch.stack(generate(model, **how).logits)


def plain_logits(model: Any, **how: Any) -> Tensor:
    """Those of transformers' own `generate`, with nothing fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoxForCausalLM, "generate", GenerationMixin.generate)
        model.unfuse_projections()
        return logits(model, **how)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call in which projections were one matmul."""
    counted: list[int] = []
    project = FusableProjections.project

    def counting(owner: FusableProjections, x: Tensor) -> dict[str, Tensor]:
        outputs = project(owner, x)
        counted.extend([x.shape[:-1].numel()] if outputs else [])
        return outputs

    monkeypatch.setattr(FusableProjections, "project", counting)
    return counted


def addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_unfused(variant: str, calls: list[int]) -> None:
    model = tiny_model(variant)
    expected = plain_logits(model)
    assert not calls
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    assert_close(logits(model), expected)
    # Two layers of two owners each, in the prompt and in each step but the last.
    assert len(calls) == 4 * NEW
    assert not any(fused_layers(model))
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
def test_ways_to_generate(how: dict[str, Any], calls: list[int]) -> None:
    model = tiny_model("biases")
    assert_close(logits(model, **how), plain_logits(model, **how))
    assert calls


def test_compiled_once_over_several_entries() -> None:
    model = tiny_model()
    expected = plain_logits(model)
    config = CompileConfig(fullgraph=True, backend="inductor", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        found = logits(model, cache_implementation="static", compile_config=config)
        assert_close(found, expected)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_long_calls_and_calls_with_gradients_are_not_fused(calls: list[int]) -> None:
    model = tiny_model().eval()
    model.fuse_projections()
    model(tokens(1, 7)).logits.sum().backward()
    with torch.no_grad():
        model(tokens(1, MAX_FUSED_TOKENS + 1))
        assert not calls
        model(tokens(2, MAX_FUSED_TOKENS // 2))
    assert calls == [MAX_FUSED_TOKENS] * 4


def test_memory_is_not_held_twice() -> None:
    model = tiny_model("biases")
    size = sum(parameter.nbytes for parameter in model.parameters())
    kept = [parameter.untyped_storage() for parameter in model.parameters()]
    generate(model)
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    # To what saves and loads, each is the only one in its storage.
    assert sum(storage.nbytes() for storage in storages) == size
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    moved = sum(old.data_ptr() != new.data_ptr() for old, new in zip(kept, storages, strict=True))
    assert moved == 2 * (6 + 3 + 2 + 2)
    model.fuse_projections()
    fused = model.model.layers[0].self_attn.fused_projections
    q = model.model.layers[0].self_attn.q_proj.weight
    assert fused is not None and fused.weight.data_ptr() == q.data_ptr()
    with torch.no_grad():
        q[0, 0] = 7.0
    assert fused.weight[0, 0] == 7.0
    model.unfuse_projections()
    assert not any(fused_layers(model))
    assert sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()) == size
    assert q[0, 0] == 7.0 and fused.weight.data_ptr() != q.data_ptr()


def buffers(model: nn.Module) -> list[int]:
    """Address of each buffer that the model holds."""
    fused = [x.fused_projections for x in model.modules() if isinstance(x, FusableProjections)]
    return [x.weight.data_ptr() for x in fused if x is not None]


def test_addresses_stay_while_the_model_stays() -> None:
    model = tiny_model("biases")
    generate(model)
    first = addresses(model), buffers(model)
    assert len(first[1]) == 4
    for change in (
        generate,
        lambda model: model.to(model.dtype),
        lambda model: model.eval(),
        double_in_place,
        generate,
    ):
        change(model)
        assert (addresses(model), buffers(model)) == first


@pytest.mark.parametrize("moved", ["float", "cpu", "train", "unfuse_projections", "copy"])
def test_a_model_that_is_moved_or_trained_holds_no_buffer(moved: str) -> None:
    model = tiny_model().eval()
    model.fuse_projections()
    expected = {name: x.clone().float() for name, x in model.state_dict().items()}
    other = copy.deepcopy(model) if moved == "copy" else model
    if moved == "cpu":
        other.to("meta")
        assert not buffers(other)
        return
    if moved != "copy":
        getattr(other, moved)()
    assert not buffers(other) and not any(fused_layers(other))
    assert all(torch.equal(x.float(), expected[name]) for name, x in other.state_dict().items())
    storages = [x.untyped_storage() for x in other.parameters()]
    assert sum(x.nbytes() for x in storages) == sum(x.nbytes for x in other.parameters())


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("biases", dtype=torch.float32)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    generate(model)
    model.save_pretrained(tmp_path / "model")
    again = FoxForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    torch.save(model.state_dict(), tmp_path / "all.pt")
    torch.save(model.model.layers[0].self_attn.key_shift.state_dict(), tmp_path / "few.pt")
    assert (tmp_path / "few.pt").stat().st_size < 4000
    Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    cleaned = dict(model.state_dict())
    clean_state_dict_for_safetensors(cleaned)
    saved = [again, load_file(tmp_path / "all.safetensors"), torch.load(tmp_path / "all.pt"), cleaned]
    saved += [load_file(tmp_path / "accelerate" / "model.safetensors"), copy.deepcopy(model).state_dict()]
    saved += [pickle.loads(pickle.dumps(model.state_dict()))]
    for found in saved:
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], x) for name, x in expected.items())


def train(model: Any, generates: bool) -> list[float]:
    """Losses of AdamW, with generation between steps and between forward and backward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        ids = tokens(2, 9, seed=step)
        loss = model(ids, labels=ids).loss
        if generates:
            generate(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_goes_on_as_without() -> None:
    model = tiny_model("biases")
    assert train(model, generates=True) == pytest.approx(train(tiny_model("biases"), generates=False), rel=1e-12)
    assert_close(logits(model), plain_logits(model))


def double_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)


def replace_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def replace_one(model: Any) -> None:
    projection = model.model.layers[1].self_attn.v_proj
    projection.weight = nn.Parameter(-projection.weight.detach())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": double_in_place,
    "data": replace_data,
    "one": replace_one,
    "loaded": lambda model: model.load_state_dict(tiny_model(seed=1).state_dict()),
    "assigned": lambda model: model.load_state_dict(tiny_model(seed=1).state_dict(), assign=True),
    "type": lambda model: model.float(),
    "there and back": lambda model: (
        model.to("meta") and model.to_empty(device="cpu") and model.load_state_dict(tiny_model(seed=1).state_dict())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_generations_are_seen(change: str, calls: list[int]) -> None:
    model = tiny_model()
    before = logits(model)
    CHANGES[change](model)
    expected = plain_logits(model)
    calls.clear()
    assert_close(logits(model), expected, 1e-9 if model.dtype == torch.float64 else 1e-5)
    assert calls
    assert change == "type" or (expected - before).abs().max() > 0.1, "nobody would notice"


def test_copies_are_not_fused() -> None:
    model = tiny_model().eval()
    model.fuse_projections()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(fused_layers(model)) and not any(fused_layers(again))
        with torch.no_grad():
            assert_close(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
        again.fuse_projections()
        assert all(fused_layers(again)) and not set(addresses(again)) & set(addresses(model))


def wrap_forward(linear: nn.Linear) -> None:
    linear.forward = functools.partial(lambda forward, x: forward(x), linear.forward)  # type: ignore[method-assign]


def offset(linear: nn.Linear) -> None:
    """Part of a larger storage, as engines keep weights that they sum or send as one."""
    flat = torch.zeros(linear.weight.numel() + 8, dtype=linear.weight.dtype)
    part = flat[8:].view_as(linear.weight)
    part.copy_(linear.weight.detach())
    linear.weight.data = part


class Weight(Tensor):
    """A subclass, as quantization has them."""


REFUSED: dict[str, Callable[[nn.Linear], Any]] = {
    "hook": lambda linear: linear.register_forward_hook(lambda *_: None),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda *_: None),
    "accelerate": lambda linear: add_hook_to_module(linear, ModelHook()),
    "parametrized": lambda linear: parametrizations.weight_norm(linear),
    "forward": wrap_forward,
    "type": lambda linear: linear.float(),
    "device": lambda linear: linear.to("meta"),
    "subclass": lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach().as_subclass(Weight))),
    "shared": lambda linear: linear.weight.share_memory_(),
    "part": offset,
    "strides": lambda linear: setattr(linear.weight, "data", linear.weight.detach().mT.contiguous().mT),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_fused(reason: str) -> None:
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    REFUSED[reason](attention.k_proj)
    address = attention.q_proj.weight.data_ptr()
    model.fuse_projections()
    assert fused_layers(model) == [False, True, True, True]
    assert attention.q_proj.weight.data_ptr() == address
    if reason not in ("type", "device", "subclass"):
        assert_close(logits(model), plain_logits(model))


def test_a_kept_state_dict_has_the_values_of_before() -> None:
    """As with ``model.to()``: what was taken before keeps its memory and no longer sees changes."""
    model = tiny_model("biases")
    kept = model.state_dict()
    values = {name: x.clone() for name, x in kept.items()}
    expected = logits(model)
    assert all(torch.equal(x, values[name]) for name, x in model.state_dict().items())
    double_in_place(model)
    moved = [name for name, x in model.state_dict().items() if x.data_ptr() != kept[name].data_ptr()]
    assert len(moved) == 2 * (6 + 3 + 2 + 2)
    assert all(torch.equal(kept[name], values[name]) for name in moved)
    model.load_state_dict(values)
    assert_close(logits(model), expected)
    # Of a fused model it is the memory of the parameters, as of any other.
    kept = model.state_dict()
    generate(model)
    double_in_place(model)
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


def test_a_model_that_is_moved_when_it_is_called() -> None:
    """As `accelerate.cpu_offload_with_hook` does."""
    model = tiny_model().eval()
    model.model.register_forward_pre_hook(lambda model, _: model.to("meta") and None)
    layer = model.model.layers[0].self_attn
    model.fuse_projections()
    with torch.no_grad():
        assert layer.project(torch.ones(1, 1, 32, dtype=model.dtype))
        model.model(tokens(1, 3).to("meta"))
        assert not layer.project(torch.ones(1, 1, 32, dtype=model.dtype, device="meta"))
        assert not buffers(model)


def test_hooks_see_every_call() -> None:
    model, seen = tiny_model(), []
    for layer in model.model.layers:
        layer.self_attn.value_shift.proj.register_forward_hook(lambda *_: seen.append(1))
        layer.mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    generate(model)
    assert len(seen) == 4 * NEW
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model.fuse_projections()
    assert not any(fused_layers(model))
    handle.remove()


def test_weights_that_two_layers_share_are_fused_once() -> None:
    model = tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = first.v_proj.weight
    for _ in range(2):
        model.fuse_projections()
        assert fused_layers(model) == [True, True, False, True]
        assert second.v_proj.weight is first.v_proj.weight
    assert_close(logits(model), plain_logits(model))


def test_autocast_and_fsdp_are_left_alone(calls: list[int]) -> None:
    model = tiny_model(dtype=torch.float32).eval()
    model.fuse_projections()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 3))
        assert not calls
    model.unfuse_projections()
    layer = model.model.layers[0]
    layer.__class__ = type("Sharded", (type(layer),), {"unshard": lambda self: None, "reshard": lambda self: None})
    model.fuse_projections()
    assert not any(fused_layers(model))


def test_generate_leaves_the_switch_as_it_was() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens(1, 3), max_new_tokens=-1)
    assert not any(fused_layers(model))

    def fail(*_: Any) -> Any:
        assert all(fused_layers(model))
        raise KeyError

    with pytest.raises(KeyError):
        generate(model, logits_processor=[fail])
    assert not any(fused_layers(model))
    model.fuse_projections()
    generate(model)
    assert all(fused_layers(model))
    model.unfuse_projections()
    assert not any(fused_layers(model))


CHANGES_OF_MODULES: dict[str, Callable[[Any], Any]] = {
    "hook": lambda attention: attention.v_proj.register_forward_hook(lambda linear, x, out: -out),
    "forward": lambda attention: setattr(attention.k_proj, "forward", lambda x: torch.zeros(*x.shape[:-1], 16).to(x)),
    "module": lambda attention: setattr(attention, "k_proj", nn.Linear(32, 16, bias=False, dtype=torch.float64)),
    "module without weights": lambda attention: setattr(attention, "k_proj", nn.AdaptiveAvgPool1d(16)),
    "weight": lambda attention: setattr(attention.k_proj, "weight", nn.Parameter(-attention.k_proj.weight.detach())),
    "data": lambda attention: setattr(attention.k_proj.weight, "data", -attention.k_proj.weight.detach()),
    "bias": lambda attention: setattr(attention.k_proj, "bias", None),
    "parametrized": lambda attention: parametrizations.orthogonal(attention.k_proj),
}


@pytest.mark.parametrize("change", CHANGES_OF_MODULES)
def test_calls_see_projections_that_are_no_longer_what_was_fused(change: str, calls: list[int]) -> None:
    model = tiny_model("biases").eval()
    model.fuse_projections()
    ids = tokens(2, 5)
    with torch.no_grad():
        before = model(ids).logits
        CHANGES_OF_MODULES[change](model.model.layers[0].self_attn)
        calls.clear()
        after = model(ids).logits
        assert len(calls) == 3
        assert (after - before).abs().max() > 1e-3, "nobody would notice"
        model.unfuse_projections()
        assert_close(after, model(ids).logits)


def test_a_layer_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected, move = plain_logits(model), fused_projections._move_to_buffer

    def full(names: Any, linears: Any) -> Any:
        if linears[0] is model.model.layers[1].mlp.gate_proj:
            raise torch.OutOfMemoryError
        return move(names, linears)

    monkeypatch.setattr(fused_projections, "_move_to_buffer", full)
    model.fuse_projections()
    assert fused_layers(model) == [True, True, True, False]
    model.unfuse_projections()
    assert_close(logits(model), expected)


def test_within_inference_mode() -> None:
    model = tiny_model()
    expected = plain_logits(model)
    with torch.inference_mode():
        assert_close(logits(model), expected)
    ids = tokens(1, 5)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_layer_without_its_model(calls: list[int]) -> None:
    attention = tiny_model().model.layers[0].self_attn.eval()
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = attention(x)[0]
        attention.fuse_projections()
        assert_close(attention(x)[0], expected)
    assert calls == [5]


def test_adapters_on_a_model_that_has_generated(calls: list[int]) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    generate(model)
    calls.clear()
    config = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    adapted: Any = get_peft_model(model, config).double()
    assert_close(logits(adapted), plain_logits(adapted.base_model.model))
    # The MLPs alone.
    assert len(calls) == 2 * NEW
    merged = adapted.merge_and_unload()
    calls.clear()
    assert_close(logits(merged), plain_logits(merged))
    assert len(calls) == 4 * NEW


def test_a_loop_of_ones_own(calls: list[int]) -> None:
    model = tiny_model()
    ids, out = tokens(2, 7), []
    model.fuse_projections()
    with torch.no_grad(), model.local_weights():
        cache = DynamicCache(config=model.config)
        for _ in range(NEW):
            out.append(model(ids, cache=cache).logits[:, -1].float())
            ids = out[-1].argmax(-1, keepdim=True)
    assert len(calls) == 4 * NEW
    model.unfuse_projections()
    assert_close(torch.stack(out), plain_logits(model))


@pytest.mark.parametrize("variant", ["pro", "llama"])
@pytest.mark.parametrize("device", DEVICES)
def test_prompts_are_fused_where_kernels_read_views(variant: str, device: str, calls: list[int]) -> None:
    model = tiny_model(variant, dtype=torch.float32).to(device).eval()
    plain = copy.deepcopy(model)
    plain.unfuse_projections()
    ids = tokens(1, 2 * MAX_FUSED_TOKENS + 2).to(device)
    with torch.no_grad():
        expected = plain(ids, use_cache=True)
        assert not calls
        # By itself, on kernels.
        found = model(ids, use_cache=True)
    on_kernels = backend_of(expected.logits[..., :1]) is not PYTORCH
    # Without token shift, attention caches values as they are projected, which must not hold the memory of all.
    assert len(calls) == (0 if not on_kernels else 4 if variant == "pro" else 2)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for layer in cache_of(found).layers:
        held = [layer.keys, layer.values, *layer.unshifted.values()]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in held)


@contextlib.contextmanager
def absent_h100() -> Iterator[None]:
    """Within, kernels are chosen as on an H100, and left out."""
    if not HAS_TRITON or INTERPRETED:
        pytest.skip("needs Triton's compiler")
    from triton.runtime.jit import JITFunction

    from ahead_of_time import specializations

    left_out = pytest.MonkeyPatch.context()
    with assume_gpu(GPU((9, 0), 132)), specializations(90), torch.no_grad(), left_out as patch:
        patch.setattr(JITFunction, "run", lambda *_, **__: None)
        yield


def adapt(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "up_proj"]), model)


def move_one(model: Any) -> None:
    """As accelerate's `dispatch_model` moves weights."""
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().clone())


# What was done to a model before and after its first call without gradients, and which layers are fused by then.
INFERENCE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], list[bool]]] = {
    "plain": (lambda model: None, lambda model: None, [True] * 4),
    "generated": (generate, lambda model: None, [True] * 4),
    "moved": (lambda model: None, lambda model: model.half(), [True] * 4),
    "one moved": (lambda model: None, move_one, [True, False, True, True]),
    "adapted": (adapt, lambda model: None, [False] * 4),
    "adapted later": (lambda model: None, adapt, [True] * 4),
    "unfused": (lambda model: None, lambda model: model.unfuse_projections(), [False] * 4),
    "trains": (lambda model: model.train().eval(), lambda model: None, [False] * 4),
    "to be trained": (lambda model: None, lambda model: model.train().eval(), [False] * 4),
    "in training": (lambda model: model.train(), lambda model: None, [False] * 4),
}


@pytest.mark.parametrize("case", INFERENCE)
def test_the_first_inference_fuses(case: str) -> None:
    before, after, expected = INFERENCE[case]
    model = tiny_model(dtype=torch.bfloat16).eval()
    model(tokens(1, 5))
    with torch.no_grad():
        model(tokens(1, 5))
    assert not any(fused_layers(model)), "neither for gradients nor without kernels"
    before(model)
    with absent_h100():
        model(tokens(1, 5))
        after(model)
        model(tokens(1, 5))
        assert fused_layers(model) == expected
        storages = [x.untyped_storage() for x in model.parameters()]
        assert sum(x.nbytes() for x in storages) == sum(x.nbytes for x in model.parameters())
    if case == "adapted later":
        # The adapters' layers are called one by one.
        assert not model.model.layers[0].self_attn.project(torch.ones(1, 1, 32, dtype=model.dtype))


def test_training_that_has_begun_is_left_alone() -> None:
    """Though nobody has called `train`."""
    model = FoxForCausalLM._from_config(tiny_model().config, dtype=torch.bfloat16)
    assert model.training
    model(tokens(1, 5))
    with absent_h100():
        model.eval()(tokens(1, 5))
        assert not any(fused_layers(model))
