"""Step-by-step decoding by kernels equals one pass over all tokens, with every cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.kernels import backends
from foxlm.kernels.backends import backend_of
from foxlm.modeling.cache import dynamic as cache_fox
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS, ONLY_COMPILED
from models import tiny_model, tokens

pytestmark = ON_KERNELS

EPS = 1e-4
LENGTH = 280
# A prompt, then tokens one by one and a few together.
STEPS = [230, 1, 3, 1]
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
    "paged": lambda config: FoxPagedCache(config, max_cache_len=LENGTH),
}
# The interpreter is slow.
COMPILED = ["pro", "llama", "key-value-gates", "multi-query", "rope", "rope-sink"]
VARIANTS = ["key-value-gates"] if INTERPRETED else COMPILED
RULES = ["tight"] if INTERPRETED else ["tight", "paper"]
TYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
OPERATIONS = ["crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"]


def forgetful_model(variant: str, dtype: torch.dtype = torch.float32, rule: str = "tight") -> FoxForCausalLM:
    model = tiny_model(variant, dtype=torch.float64, acp_eps=EPS, acp_rule=rule)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.forget_gate.bias.fill_(-0.5)
    return model.to(dtype)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that reached the kernels of decoding."""
    seen: list[tuple[int, ...]] = []

    def recording(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(tuple(q.shape))
        assert backends.TRITON.decode is not None
        return backends.TRITON.decode(q, *args, **options)

    recorded = backends.TRITON._replace(decode=recording)
    monkeypatch.setattr(
        backends, "backend_of", lambda q: recorded if backend_of(q) is backends.TRITON else backend_of(q)
    )
    return seen


@torch.no_grad()
def feed(model: FoxForCausalLM, cache: Cache, ids: Tensor, mask: Tensor | None, steps: list[int]) -> Tensor:
    parts, end = [], 0
    for part in ids[:, : sum(steps)].split(steps, dim=1):
        end += part.shape[1]
        seen = None if mask is None else mask[:, :end]
        parts.append(model(part, attention_mask=seen, cache=cache).logits)
    return torch.cat(parts, dim=1)


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_one_pass(variant: str, cache: str, dtype: torch.dtype, rule: str, decoded: list) -> None:
    ids = tokens(2, LENGTH)
    expected = forgetful_model(variant, torch.float64)(ids, use_cache=False).logits
    model = forgetful_model(variant, dtype, rule)
    # How far the type alone takes it: 4% of the largest logit in bfloat16, 18% in the model without QK-norm.
    model.set_attn_implementation("eager")
    rounded = model(ids, use_cache=False).logits
    model.set_attn_implementation("fox")
    found = feed(model.to(DEVICE), CACHES[cache](model.config), ids.to(DEVICE), None, STEPS).cpu()
    assert worst(found, expected[:, : sum(STEPS)]) < 10 * EPS + 2 * worst(rounded, expected)
    # Where the host does not know how many tokens are held, three may begin with what a sink stands for.
    asks = model.config.sink_token_id is not None and cache != "dynamic"
    assert [shape[1] for shape in decoded] == ([1, 1, 1, 1] if asks else [1, 1, 3, 3, 1, 1])


@pytest.mark.parametrize("cache", CACHES)
def test_left_padding(cache: str, decoded: list) -> None:
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :70] = 0
    model = forgetful_model("pro")
    exact = forgetful_model("pro", torch.float64)
    model.to(DEVICE)
    found = feed(model, CACHES[cache](model.config), ids.to(DEVICE), mask.to(DEVICE), STEPS).cpu()
    for row, start in ((0, 70), (1, 0)):
        expected = exact(ids[row : row + 1, start:], use_cache=False).logits[0, : sum(STEPS) - start]
        assert worst(found[row, start:], expected) < 10 * EPS
    assert len(decoded) == 6


@pytest.mark.parametrize("cache", CACHES)
def test_a_short_prompt(cache: str, decoded: list) -> None:
    ids = tokens(2, LENGTH)
    model = forgetful_model("pro")
    expected = forgetful_model("pro", torch.float64)(ids[:, :10], use_cache=False).logits
    model.to(DEVICE)
    found = feed(model, CACHES[cache](model.config), ids.to(DEVICE), None, [3, 1, 2, 1, 3]).cpu()
    assert worst(found, expected) < 10 * EPS
    assert [shape[1] for shape in decoded] == [1, 1, 2, 2, 1, 1, 3, 3]


@pytest.mark.parametrize("operation", OPERATIONS[:1] if INTERPRETED else OPERATIONS)
@pytest.mark.parametrize("cache", ["dynamic", "paged"])
def test_what_pruning_knows_of_keys_moves_with_them(cache: str, operation: str) -> None:
    ids = tokens(3, LENGTH)
    rows = {"crop": [0, 1, 2], "batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}.get(operation, [2, 0])
    argument = {"crop": -20, "batch_repeat_interleave": 2}.get(operation, torch.tensor(rows).to(DEVICE))
    model = forgetful_model("pro")
    exact = forgetful_model("pro", torch.float64)
    model.to(DEVICE)
    held = CACHES[cache](model.config)
    feed(model, held, ids.to(DEVICE), None, [230, 1])
    getattr(held, operation)(argument)
    if operation == "crop":
        ids = torch.cat([ids[:, :211], ids[:, 231:]], dim=1)
    found = feed(model, held, ids[rows].to(DEVICE)[:, 211 if operation == "crop" else 231 :], None, [1, 1]).cpu()
    begin = 211 if operation == "crop" else 231
    expected = exact(ids[rows, : begin + 2], use_cache=False).logits[:, -2:]
    assert worst(found, expected) < 10 * EPS


def test_steps_under_tracing_leave_no_half_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dynamic cache that some compiled steps have extended: what is known of keys would be of some of them."""
    model = forgetful_model("pro")
    ids = tokens(2, LENGTH)
    expected = forgetful_model("pro", torch.float64)(ids[:, :100], use_cache=False).logits
    model.to(DEVICE)
    cache = CACHES["dynamic"](model.config)
    parts = [feed(model, cache, ids[:, :20].to(DEVICE), None, [20])]
    monkeypatch.setattr(cache_fox, "is_torchdynamo_compiling", lambda: True)
    parts.append(feed(model, cache, ids[:, 20:96].to(DEVICE), None, [70, 5, 1]))
    monkeypatch.undo()
    parts.append(feed(model, cache, ids[:, 96:100].to(DEVICE), None, [1, 1, 2]))
    assert worst(torch.cat(parts, dim=1).cpu(), expected) < 10 * EPS


def test_gradients_take_the_other_kernels(decoded: list) -> None:
    model = forgetful_model("pro").to(DEVICE)
    cache = DynamicCache(config=model.config)
    ids = tokens(1, 70).to(DEVICE)
    model(ids, cache=cache)
    model(ids[:, :1], cache=cache).logits.sum().backward()
    assert not decoded
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


def test_a_cache_that_forgets_what_it_knew_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with bounds of no keys, everything far is dropped."""
    real = cache_fox.extend_summary

    def forgetful(summary: Any, running: Any, *args: Any) -> Any:
        found = real(summary, running, *args)
        summary.log_decays.fill_(-1e9)
        return found

    ids = tokens(1, LENGTH)
    model = tiny_model("pro", dtype=torch.float32, acp_eps=EPS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.forget_gate.weight.zero_()
            layer.self_attn.forget_gate.bias.fill_(8.0)
    expected = model(ids[:, :231], use_cache=False).logits.double()
    model.to(DEVICE)
    assert worst(feed(model, CACHES["dynamic"](model.config), ids.to(DEVICE), None, [230, 1]).cpu(), expected) < 1e-4
    monkeypatch.setattr(cache_fox, "extend_summary", forgetful)
    assert worst(feed(model, CACHES["dynamic"](model.config), ids.to(DEVICE), None, [230, 1]).cpu(), expected) > 1e-3


# ---- On a GPU


@ONLY_COMPILED
@pytest.mark.parametrize("cache", ["static", "paged"])
def test_one_graph_for_all_steps(cache: str) -> None:
    """Captured once, replayed while the context grows, also past the borders of pages."""
    model = forgetful_model("pro", torch.float32).to(DEVICE)
    ids = tokens(2, LENGTH)
    expected = model.cpu().double()(ids, use_cache=False).logits
    model.float().to(DEVICE)
    held = CACHES[cache](model.config)
    torch.compiler.reset()
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    with torch.no_grad():
        model(ids[:, :100].to(DEVICE), cache=held)
        for i in range(100, LENGTH):
            if isinstance(held, FoxPagedCache):
                held.reserve(1)
            found = step(ids[:, i : i + 1].to(DEVICE), cache=held).logits[:, 0].cpu()
            assert worst(found, expected[:, i]) < 10 * EPS
            torch._dynamo.config.error_on_recompile = i > 100
    torch._dynamo.config.error_on_recompile = False


@ONLY_COMPILED
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {}], ids=["static", "paged"])
def test_generate_compiles_the_step(options: dict[str, Any]) -> None:
    model = forgetful_model("pro").to(DEVICE)
    ids = tokens(2, 200).to(DEVICE)
    greedy: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **greedy)
    model.config.free_dead_cache = not options
    assert torch.equal(model.generate(ids, **greedy, **options), expected)


@ONLY_COMPILED
def test_memory_of_freed_pages_is_returned() -> None:
    """100,000 tokens of a model whose heads all forget, by the allocator's own count."""
    model = forgetful_model("pro", torch.bfloat16).to(DEVICE)
    held = FoxPagedCache(model.config, max_cache_len=100_000)
    counts = []
    with torch.no_grad():
        for start in range(0, 96_000, 4_000):
            model(tokens(1, 4_000, seed=start).to(DEVICE), cache=held, logits_to_keep=1)
            torch.cuda.synchronize()
            counts.append(torch.cuda.memory_allocated())
        for token in tokens(1, 300).to(DEVICE).split(1, dim=1):
            model(token, cache=held)
        counts.append(torch.cuda.memory_allocated())
    assert max(counts[2:]) - min(counts[2:]) < 1 << 20
