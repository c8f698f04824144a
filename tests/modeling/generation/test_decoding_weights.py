"""Generation with projections fused computes what it does without, and leaves the model as it was."""

import copy
import functools
import pickle
from collections.abc import Callable
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

import foxlm.modeling.fused_projections as decoding_fox
from foxlm import FoxForCausalLM, decoding_weights
from foxlm.modeling.fused_projections import FEW_TOKENS, fused_products
from foxlm.modeling.layers.attention import FoxAttention
from foxlm.modeling.layers.block import FoxMLP
from models import VARIANTS, assert_close, tiny_model, tokens

NEW = 6
OWNERS = (FoxAttention, FoxMLP)


def fused_layers(model: nn.Module) -> list[bool]:
    """Whether each attention and each MLP has its projections fused."""
    return [x.fused_projections is not None for x in model.modules() if isinstance(x, OWNERS)]


def generate(model: Any, **how: Any) -> Any:
    fixed = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(tokens(2, 7), **(fixed | how))


def logits(model: Any, **how: Any) -> Tensor:
    return torch.stack(generate(model, **how).logits)


def plain_logits(model: Any, **how: Any) -> Tensor:
    """Those of transformers' own `generate`, with nothing fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoxForCausalLM, "generate", GenerationMixin.generate)
        assert not any(fused_layers(model))
        return logits(model, **how)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call in which projections were one product."""
    counted: list[int] = []

    def counting(owner: Any, x: Tensor) -> dict[str, Tensor]:
        products = fused_products(owner, x)
        counted.extend([x.shape[:-1].numel()] if products else [])
        return products

    for module in ("attention", "block"):
        monkeypatch.setattr(f"foxlm.modeling.layers.{module}.fused_products", counting)
    return counted


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
    model = tiny_model()
    with decoding_weights(model):
        model(tokens(1, 7)).logits.sum().backward()
        with torch.no_grad():
            model(tokens(1, FEW_TOKENS + 1))
            assert not calls
            model(tokens(2, FEW_TOKENS // 2))
    assert calls == [FEW_TOKENS] * 4


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
    with decoding_weights(model):
        fused = model.model.layers[0].self_attn.fused_projections
        q = model.model.layers[0].self_attn.q_proj.weight
        assert fused.weight.data_ptr() == q.data_ptr()
        with torch.no_grad():
            q[0, 0] = 7.0
        assert fused.weight[0, 0] == 7.0
    assert all(
        new.data_ptr() == again.untyped_storage().data_ptr()
        for new, again in zip(storages, model.parameters(), strict=True)
    )


def test_memory_is_given_back_where_a_model_is_moved() -> None:
    model = tiny_model()
    generate(model)
    (kept,) = decoding_fox._JOINED[model.model.layers[0].mlp].values()
    assert not kept.expired()
    model.float()
    assert kept.expired()


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


def test_not_fused_copies_of_a_model_within() -> None:
    model = tiny_model()
    with decoding_weights(model):
        assert all(fused_layers(model))
        assert not any(fused_layers(copy.deepcopy(model)))
    assert not any(fused_layers(model))


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
    with decoding_weights(model):
        assert fused_layers(model) == [False, True, True, True]
    assert attention.q_proj.weight.data_ptr() == address
    if reason not in ("type", "device", "subclass"):
        assert_close(logits(model), plain_logits(model))


def test_memory_that_others_see_stays_theirs() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    other.load_state_dict(model.state_dict(), assign=True)
    generate(model)
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.mul_(2.0)
            assert torch.equal(mine, its)
    del its, other
    with decoding_weights(model):
        assert all(fused_layers(model))
    # What is joined already is not moved again.
    kept = model.state_dict()
    with decoding_weights(model):
        assert all(fused_layers(model))
    assert all(x.data_ptr() == kept[name].data_ptr() for name, x in model.named_parameters())


def test_a_model_that_is_moved_when_it_is_called() -> None:
    """As `accelerate.cpu_offload_with_hook` does."""
    model = tiny_model()
    model.model.register_forward_pre_hook(lambda model, _: model.to("meta") and None)
    layer = model.model.layers[0].self_attn
    with torch.no_grad(), decoding_weights(model):
        assert fused_products(layer, torch.ones(1, 1, 32, dtype=model.dtype))
        model.model(tokens(1, 3).to("meta"))
        assert not fused_products(layer, torch.ones(1, 1, 32, dtype=model.dtype, device="meta"))


def test_hooks_see_every_call() -> None:
    model, seen = tiny_model(), []
    for layer in model.model.layers:
        layer.self_attn.value_shift.proj.register_forward_hook(lambda *_: seen.append(1))
        layer.mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    generate(model)
    assert len(seen) == 4 * NEW
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with decoding_weights(model):
        assert not any(fused_layers(model))
    handle.remove()


def test_weights_that_two_layers_share_are_fused_once() -> None:
    model = tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = first.v_proj.weight
    for _ in range(2):
        with decoding_weights(model):
            assert fused_layers(model) == [True, True, False, True]
        assert second.v_proj.weight is first.v_proj.weight
    assert_close(logits(model), plain_logits(model))


def test_autocast_and_fsdp_are_left_alone() -> None:
    model = tiny_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), decoding_weights(model):
        assert not any(fused_layers(model))
    layer = model.model.layers[0]
    layer.__class__ = type("Sharded", (type(layer),), {"unshard": lambda self: None, "reshard": lambda self: None})
    with decoding_weights(model):
        assert not any(fused_layers(model))


def test_exceptions_and_nested_entries() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens(1, 3), max_new_tokens=-1)
    assert not any(fused_layers(model))
    with decoding_weights(model):
        with pytest.raises(KeyError), decoding_weights(model.model):
            raise KeyError
        assert all(fused_layers(model))
        generate(model)
        assert all(fused_layers(model))
    assert not any(fused_layers(model))


def test_a_layer_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected, join = plain_logits(model), decoding_fox._join

    def full(weights: Any, *arguments: Any) -> Tensor | None:
        if weights[0] is model.model.layers[1].mlp.gate_proj.weight:
            raise torch.OutOfMemoryError
        return join(weights, *arguments)

    monkeypatch.setattr(decoding_fox, "_join", full)
    with decoding_weights(model):
        assert fused_layers(model) == [True, True, True, False]
    assert_close(logits(model), expected)


def test_within_inference_mode() -> None:
    model = tiny_model()
    expected = plain_logits(model)
    with torch.inference_mode():
        assert_close(logits(model), expected)
    ids = tokens(1, 5)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_other_models_are_left_alone() -> None:
    linear = nn.Linear(4, 4)
    with decoding_weights(linear):
        pass


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


def test_a_loop_of_ones_own() -> None:
    model = tiny_model()
    ids, out = tokens(2, 7), []
    with torch.no_grad(), decoding_weights(model):
        cache = DynamicCache(config=model.config)
        for _ in range(NEW):
            out.append(model(ids, cache=cache).logits[:, -1].float())
            ids = out[-1].argmax(-1, keepdim=True)
    assert_close(torch.stack(out), plain_logits(model))
