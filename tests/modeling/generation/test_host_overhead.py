"""What an eager forward pass asks of the host: few operators for each layer, and none that grow with what is cached.

On a GPU eager inference is launch-bound: the host needs tens of microseconds for each operator. They are counted here
as PyTorch dispatches them on a CPU, without those of attention itself, which is kernels there. Views are not counted.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, StaticCache

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.kernels import backends
from foxlm.kernels.pruning.key_stats import empty_summary
from foxlm.modeling import attention_implementations
from foxlm.modeling.cache import dynamic as cache_fox
from foxlm.modeling.cache.dynamic import DynamicForgettingLayer
from foxlm.modeling.token_layout import TokenLayout
from models import tiny_model, tokens

ROOM = 4096


class Counter(TorchDispatchMode):
    """Counts operators that compute or copy, the bytes that they write, and the answers that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.written = self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        masks = [
            x for x in (args[1] if name in ("index", "index_put_") else ()) if x is not None and x.dtype == torch.bool
        ]
        self.waits += bool(masks) or name in ("_local_scalar_dense", "equal", "nonzero")
        is_view = name == "_unsafe_view" or any(
            x.alias_info and not x.alias_info.is_write for x in function._schema.returns
        )
        if not is_view and "empty" not in name and name != "promote_types":
            self.operators += 1
            self.written += result.nbytes if isinstance(result, Tensor) else 0
        return result


@pytest.fixture(autouse=True)
def only_what_is_around_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = backends.PYTORCH._replace(attention=lambda q, k, v, decay, **_: (torch.empty_like(q), torch.empty(0)))
    monkeypatch.setattr(backends, "backend_of", lambda q: nothing)
    # What tells it from one that prunes.
    monkeypatch.setattr(attention_implementations, "PYTORCH", nothing)
    # torch has a kernel for it on GPUs only.
    monkeypatch.setattr(nn.functional, "rms_norm", lambda x, *_: x.clone())


def model_of(layers: int, **options: Any) -> FoxForCausalLM:
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": ROOM}
    return tiny_model("pro", dtype=torch.bfloat16, **(sizes | options))


@torch.no_grad()
def count(model: FoxForCausalLM, cache: Cache, parts: list[int]) -> Counter:
    """What the last of ``parts`` takes."""
    for part in parts:
        with Counter() as counter:
            model(tokens(1, part), cache=cache, use_cache=True)
    return counter


def new_cache(kind: str, model: FoxForCausalLM) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=ROOM)
    return FoxPagedCache(model.config, ROOM)


def for_each_layer(kind: str, parts: list[int]) -> tuple[int, int]:
    """Operators and waits that one layer more adds to the last part."""
    one, two = (count(model, new_cache(kind, model), parts) for model in (model_of(1), model_of(2)))
    return two.operators - one.operators, two.waits - one.waits


# Limits just above what was found: a new operator is to be seen.
@pytest.mark.parametrize(
    ("kind", "parts", "operators", "waits"),
    [
        ("dynamic", [300], 64, 0),
        ("dynamic", [300, 300, 300], 73, 0),
        ("dynamic", [300, 1, 1], 64, 0),
        ("static", [300, 300, 300], 74, 0),
        # Pages are moved by two dozen operators, on a GPU by one kernel.
        ("paged", [300], 180, 0),
        ("paged", [300, 300, 300], 169, 0),
    ],
)
def test_operators_of_a_layer(kind: str, parts: list[int], operators: int, waits: int) -> None:
    found = for_each_layer(kind, parts)
    assert found[0] <= operators and found[1] <= waits, found


@pytest.mark.parametrize(("kind", "operators"), [("static", 29), ("paged", 35)])
def test_a_decoding_step_is_taken_in_by_one_launch(kind: str, operators: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of so many operators."""
    launches = []

    def append(k: Tensor, v: Tensor, log_f: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        launches.append(k.shape)
        shape = log_f.mT.shape
        return torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.int64)

    def decode(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), torch.empty(0)

    now = backends.backend_of(torch.empty(0))._replace(can_decode=lambda q, heads: q.shape[1] == 1, decode=decode)
    found = []
    for backend in (now, now._replace(append=append)):
        monkeypatch.setattr(backends, "backend_of", lambda q, backend=backend: backend)
        found.append(for_each_layer(kind, [300, 1, 1])[0])
    assert found[0] - found[1] >= operators, found
    # Of one layer and of two, in two steps of a token.
    assert launches == [(1, 2, 1, 8)] * 6


def test_an_operator_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: norms of small operators, as they are where gradients are wanted."""
    expected, _ = for_each_layer("dynamic", [300, 1, 1])
    monkeypatch.setattr(nn.functional, "rms_norm", lambda x, *_: x * x.square().mean(-1, keepdim=True).rsqrt())
    found, _ = for_each_layer("dynamic", [300, 1, 1])
    assert found == expected + 5 * 3


def test_a_step_writes_as_much_at_any_length() -> None:
    model = model_of(2)
    short, long = (count(model, DynamicCache(config=model.config), [n, 1, 1]).written for n in (300, 3000))
    assert short == long


def test_what_parts_copy_does_not_grow_with_their_number() -> None:
    """The cache is copied to a larger place after each eighth that it grows: so each token nine times at most."""
    layer = DynamicForgettingLayer()
    part = torch.randn(1, 1, 512, 8)
    positions = torch.arange(512)
    layer.append_gates(torch.zeros(1, 512, 1), TokenLayout(positions, None, None, None, positions), backends.PYTORCH)
    with torch.no_grad(), Counter() as counter:
        for _ in range(200):
            layer.update(part, part)
    assert layer.keys.shape == (1, 1, 200 * 512, 8)
    assert counter.written < 2 * 11 * layer.keys.nbytes


class Summaries:
    """Feeds tokens to a layer of a dynamic cache as decoding on a GPU does, and checks its summary of keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layer, self.taken = DynamicForgettingLayer(), 0
        self._real = cache_fox.extend_summary
        monkeypatch.setattr(cache_fox, "extend_summary", self._counting)

    def _counting(self, *args: Any) -> Any:
        self.taken += 1
        return self._real(*args)

    @torch.no_grad()
    def feed(self, count: int, use_decode_kernel: bool, own_block: bool = False) -> None:
        past = self.layer.get_seq_length()
        positions = torch.arange(past, past + count)
        keys = torch.randn(2, 1, count, 8)
        self.layer.append_gates(
            -torch.rand(2, count, 3), TokenLayout(positions, None, None, None, positions), backends.PYTORCH
        )
        self.layer.update(keys, keys)
        decay, view = self.layer.decay(use_decode_kernel, own_block)
        assert (view is None) != use_decode_kernel
        if view is not None:
            # A query reads of the blocks before its own; with own_block of that too.
            length = past + count
            blocks = -(-length // 64) if own_block else (length - 1) // 64
            expected, running = empty_summary(decay.key, self.layer.keys, length)
            for token in range(length):
                now = decay.key[..., token : token + 1], self.layer.keys[..., token : token + 1, :]
                running = self._real(expected, running, *now, torch.tensor(token))
            for x, y in zip(view.summary, expected, strict=True):
                torch.testing.assert_close(x[..., :blocks], y[..., :blocks])


def test_keys_are_summarized_when_a_step_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Summaries(monkeypatch)
    for part in (100, 30, 200):
        run.feed(part, use_decode_kernel=False)
    assert run.taken == 0
    for _ in range(130):
        run.feed(1, use_decode_kernel=True)
    # At the first step, and where a block of 64 was full: at 384 and 448 tokens.
    assert run.taken == 3
    run.layer.crop(-100)
    for _ in range(30):
        run.feed(3, use_decode_kernel=True)
    run.feed(1, use_decode_kernel=True, own_block=True)
    run.feed(2, use_decode_kernel=True, own_block=True)
    run.feed(90, use_decode_kernel=False)
    run.feed(5, use_decode_kernel=True)
    run.layer.crop(-1)
    run.feed(5, use_decode_kernel=True)
