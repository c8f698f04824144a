"""Captured steps on kernels give the tokens and logits of steps that run as always, and their memory is given back."""

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache

from foxlm import FoxConfig, FoxForCausalLM, FoxPagedCache
from foxlm.modeling import decoding_graphs
from foxlm.modeling.versions import cache_of
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS, ONLY_COMPILED
from models import tiny_model, tokens
from recorded_graphs import capture_on_this_device

pytestmark = ON_KERNELS

# The interpreter is slow.
NEW = 5 if INTERPRETED else 80
VARIANTS = ["pro"] if INTERPRETED else ["pro", "llama", "key-value-gates", "multi-query", "rope", "rope-sink"]
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "paged": {},
}
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "beam": {"num_beams": 3}, "sampling": {"do_sample": True}}


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each capture."""
    made: list[int] = []
    if INTERPRETED:
        capture_on_this_device(monkeypatch)
    capture = decoding_graphs.StepGraph.capture

    def counted(self: Any, call: Any) -> Tensor:
        made.append(1)
        return capture(self, call)

    monkeypatch.setattr(decoding_graphs.StepGraph, "capture", counted)
    return made


def model_of(variant: str, **fields: Any) -> FoxForCausalLM:
    # A growing and a static cache bound what pruning drops a little differently: at a larger eps tokens may differ.
    model = tiny_model(variant, dtype=torch.float32, acp_eps=1e-9, **fields)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.forget_gate.bias.fill_(-0.5)
    return model.to(DEVICE)


def generate(model: Any, ids: Tensor, graphs: bool, **how: Any) -> Any:
    model.config.decoding_graphs = graphs
    torch.manual_seed(1)
    how = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids.to(DEVICE), **how)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("padded", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("search", ["greedy"] if INTERPRETED else SEARCHES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_as_without(variant: str, cache: str, search: str, padded: bool, captures: list[int]) -> None:
    model, ids = model_of(variant), tokens(2, 20 if INTERPRETED else 70)
    mask = torch.ones_like(ids)
    mask[0, : 9 if padded else 0] = 0
    how = CACHES[cache] | SEARCHES[search] | {"attention_mask": mask.to(DEVICE)}
    runs = []
    for graphs in (False, True):
        options = {"cache": FoxPagedCache(model.config, max_cache_len=200)} if cache == "paged" else {}
        runs.append(generate(model, ids, graphs, **how, **options))
        assert bool(captures) == graphs
    assert_same(runs[1], runs[0])


@ONLY_COMPILED
def test_assisted(captures: list[int]) -> None:
    model, ids = model_of("pro"), tokens(1, 5).repeat(1, 12)
    assistant = model_of("pro", num_hidden_layers=1)
    assistant.load_state_dict(model.state_dict(), strict=False)
    for how in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 4}):
        captures.clear()
        expected = generate(model, ids, False, output_logits=False, **how)
        assistant.config.decoding_graphs = True
        found = generate(model, ids, True, output_logits=False, **how)
        assert captures and torch.equal(found.sequences, expected.sequences)


@ONLY_COMPILED
@pytest.mark.parametrize("cache", CACHES)
def test_a_model_in_half_precision(cache: str, captures: list[int]) -> None:
    """Weights of one model move, change and come back between calls."""
    model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=3)).to(DEVICE, torch.bfloat16).eval()
    ids = torch.randint(50304, (4, 300))
    for change in ("nothing", "scaled", "moved"):
        with torch.no_grad():
            if change == "scaled":
                model.lm_head.weight.mul_(2.0)
            elif change == "moved":
                model.to("cpu").to(DEVICE)
        runs = []
        for graphs in (False, True):
            options = dict(CACHES[cache])
            if cache == "paged":
                options["cache"] = FoxPagedCache(model.config, max_cache_len=600)
            runs.append(generate(model, ids, graphs, **options))
        for a, b in zip(runs[1].logits, runs[0].logits, strict=True):
            same = (runs[0].sequences == runs[1].sequences).all()
            assert not same or (a - b).abs().max() <= 0.05 * b.abs().max()
    assert len(captures) >= 3


@ONLY_COMPILED
def test_a_compiled_step_where_it_is_asked_for(captures: list[int]) -> None:
    model, ids = model_of("pro"), tokens(2, 20)
    expected = generate(model, ids, False, compile_config=CompileConfig(), cache_implementation="static")
    found = generate(model, ids, True, compile_config=CompileConfig(), cache_implementation="static")
    assert not captures
    assert_same(found, expected)


@ONLY_COMPILED
def test_memory_is_given_back() -> None:
    model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=3)).to(DEVICE, torch.bfloat16).eval()
    ids = torch.randint(50304, (2, 200))
    generate(model, ids, True)

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    before = held()
    for batch in (1, 2, 4):
        generate(model, ids[:1].expand(batch, -1), True)
    # cuBLAS's workspace, of 32 MiB on Hopper, comes and goes.
    assert held() <= before + (33 << 20)
    cache = cache_of(generate(model, ids, True, cache=DynamicCache(config=model.config)))
    with_cache = held()
    del cache, model
    assert held() < with_cache and held() < before
