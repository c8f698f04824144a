"""What is repeated from memory are the launches that the function would make."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foxlm import FoxPagedCache
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS
from models import tiny_model, tokens

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
import triton.language as tl

from ahead_of_time import idle_gpu
from foxlm.kernels import ahead_of_time
from foxlm.kernels.launches import launch, replay
from foxlm.kernels.launches.launch import launched
from foxlm.kernels.launches.replay import Replayed
from foxlm.kernels.launches.tape import INCOMPLETE, Recorder, Tape
from foxlm.kernels.triton_common import HAS_GLUON
from foxlm.modeling.cache.page_pool import PagePool

if not HAS_GLUON:
    pytest.skip("needs a release of Triton whose launchers are known", allow_module_level=True)

FACTOR = tl.constexpr(2)
Call = tuple[Any, tuple[Any, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    # No kernel counts pages here: the number would be what lay in memory.
    take = PagePool.take_counts
    monkeypatch.setattr(PagePool, "take_counts", lambda self, *_: take(self, 0, self.pages[..., 0].numel()))
    with assume_gpu(GPU((9, 0), 132)), idle_gpu() as found:
        yield found


def flat(arguments: Any) -> list[Any]:
    return [y for x in arguments for y in (x if isinstance(x, tuple) else (x,))]


def tapes(replayed: Replayed) -> list[Any]:
    return list(replayed.recordings.tapes.values())


def elsewhere(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with tensors at other addresses, but for those that were at one address, which still are."""
    memories: dict[int, Tensor] = {}

    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            made = getattr(type(x), "_make", tuple)
            return made(map(moved, x))
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        memory = x.untyped_storage()
        if memory.data_ptr() not in memories:
            memories[memory.data_ptr()] = torch.empty(memory.nbytes(), dtype=torch.uint8)
        new = torch.empty(0, dtype=x.dtype).set_(
            memories[memory.data_ptr()].untyped_storage(), x.storage_offset(), x.shape, x.stride()
        )
        return torch.nn.Parameter(new, requires_grad=False) if type(x) is torch.nn.Parameter else new

    return tuple(map(moved, arguments))


def described(found: list[tuple[Any, ...]], arguments: tuple[Any, ...], result: Any) -> list[Any]:
    """Launches and results, with addresses by argument, or else numbered in the order in which they appear."""
    begins = {x.data_ptr(): i for i, x in reversed(list(enumerate(flat(arguments)))) if isinstance(x, Tensor)}
    numbers: dict[int, int] = {}

    def name(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(name, x))
        if not isinstance(x, int) or x < 1 << 33:
            return x
        return ("argument", begins[x]) if x in begins else ("new", numbers.setdefault(x, len(numbers)))

    launched = [name(x) for x in found]
    results = result if isinstance(result, tuple) else (result,)
    return launched + [None if x is None else (name(x.data_ptr()), x.shape, x.stride(), x.dtype) for x in results]


def run(model: Any, how: str, train: bool) -> list[Tensor]:
    """Logits of forward passes, and the gradients of the first."""
    ids, options = tokens(2, 150).to(model.device), {}
    if how == "padded":
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :9] = 0
    elif how == "packed":
        ids = ids[:1]
        options["position_ids"] = torch.cat([torch.arange(70), torch.arange(80)])[None].to(model.device)
    with torch.set_grad_enabled(train):
        if how == "evicting":
            cache = FoxPagedCache(model.config, max_cache_len=1024)
            return [model(ids, past_key_values=cache).logits for _ in range(3)]
        out = model(ids, **options)
        if how == "chunked":
            return [out.logits, model(ids, past_key_values=out.past_key_values).logits]
        if not train:
            return [out.logits]
        model.zero_grad()
        out.logits.float().square().mean().backward()
    return [out.logits, *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


def calls_of_a_model(monkeypatch: pytest.MonkeyPatch, variant: str, train: bool, how: str, **fields: Any) -> list[Call]:
    """Functions that a model has replayed, and their arguments."""
    model = tiny_model(variant, dtype=torch.bfloat16, acp_eps=1e-3, **fields).train(train)
    calls: list[Call] = []

    def noted(self: Replayed, *arguments: Any) -> Any:
        calls.append((self._function, arguments))
        return self._function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Replayed, "__call__", noted)
        patch.setattr(ahead_of_time, "_can_prepare", lambda inputs: False)
        run(model, how, train)
    return calls


CASES: dict[str, dict[str, Any]] = {
    "inference": {},
    "chunked": {"how": "chunked"},
    "evicting": {"how": "evicting"},
    "padded": {"how": "padded"},
    "packed": {"how": "packed"},
    "training": {"train": True},
    "heads of 64": {"train": True, "head_dim": 64},
    "heads of 128": {"train": True, "head_dim": 128},
    "grouped": {"variant": "key-value-gates"},
    "RoPE and sinks": {"variant": "rope-sink", "train": True},
    "paper": {"acp_rule": "paper"},
    "measured": {"acp_rule": "measured"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_repeated_is_what_the_function_launches(
    case: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"variant": "pro", "train": False, "how": "whole"} | CASES[case]
    repeated = set()
    for function, arguments in calls_of_a_model(monkeypatch, **options):
        one = Replayed(function)
        for _ in range(3):
            one(*arguments)
        if not isinstance(tapes(one)[0], Tape):
            continue
        repeated.add(function.__name__)
        others = elsewhere(arguments)
        launches.clear()
        with Recorder(()):
            expected = function(*others)
            wanted = described(launches, others, expected)
        launches.clear()
        result = one(*others)
        assert described(launches, others, result) == wanted
        assert tapes(one)[1:] == []
    assert {"_launch_sums", "_norm_forward", "_silu_forward", "_prologue_forward"} <= repeated
    assert "_launch_forward" in repeated
    assert case != "evicting" or {"_launch_take", "_launch_write"} <= repeated


def test_a_recording_keeps_no_tensor(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_a_model(monkeypatch, "pro", False, "whole", head_dim=64)
    functions = [Replayed(function) for function, _ in calls]
    made: list[Any] = []
    for one, (_, arguments) in zip(functions, calls, strict=True):
        moved = elsewhere(arguments)
        for _ in range(3):
            result = one(*moved)
        kept = [x for x in flat((moved, result)) if isinstance(x, Tensor)]
        made += map(weakref.ref, kept)
    assert sum(isinstance(tapes(one)[0], Tape) for one in functions) == len(functions)
    del moved, result, kept, arguments, calls
    gc.collect()
    assert not [x().shape for x in made if x() is not None]


@launched
@triton.jit
def _kernel(X, OUT, scale, D: tl.constexpr):
    tl.store(OUT, tl.load(X) * FACTOR * D)


def launch_one(x: Tensor, out: Tensor, scale: float = 1.0) -> None:
    _kernel[(3,)](X=x, OUT=out, scale=scale, D=4)


def in_place(x: Tensor) -> Tensor:
    launch_one(x, x)
    return x


def test_arguments_at_one_address_are_told_apart(launches: list[Any]) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        launch_one(x, y)
        return y

    one, (a, b, c) = Replayed(function), torch.zeros(3, 16).unbind()
    for _ in range(3):
        assert one(a, a) is a
    for x, y in ((a, b), (b, c), (c, a), (a, a)):
        launches.clear()
        assert one(x, y) is y
        assert launches[0][-4:-2] == (x.data_ptr(), y.data_ptr())


def unchanged(function: Any, *arguments: Any) -> None:
    """Calls with the ``arguments`` always run plainly."""
    one = Replayed(function)
    made = [one(*arguments) for _ in range(4)]
    assert not any(isinstance(x, Tape) for x in tapes(one))
    for x in made:
        torch.testing.assert_close(x, function(*arguments))


def test_what_pytorch_computes_is_computed_again(launches: list[Any]) -> None:
    """With the arguments in their places, parts of them, and what operators before it have computed or changed."""

    def function(x: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = x.split([2, 3], dim=1)
        product = left.mT @ right
        held[1:].copy_(torch.cat([product, product + 1.0]).float()[:, 0])
        launch_one(product, held)
        # Parts without elements among them.
        both = torch.cat([right[2:2, 1], product.sum()[None], product[0, 3:]])
        return product.t()[1:], held, both

    one = Replayed(function)
    for seed in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        held, expected_held = torch.zeros(5), torch.zeros(5)
        expected = function(x, expected_held)
        found = one(x, held)
        assert found[1] is held
        for y, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(y, wanted, rtol=0, atol=0)
            assert y.stride() == wanted.stride()
    assert isinstance(tapes(one)[0], Tape)


def test_what_no_later_step_reads_is_let_go(launches: list[Any]) -> None:
    made: list[weakref.ref[Any]] = []

    def function(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 1.0
        return x

    one, x = Replayed(function), torch.zeros(16)
    for _ in range(2):
        one(x)
    tape = tapes(one)[0]

    def watched(repeat: Any) -> Any:
        def step(held: list[Any], *rest: Any) -> None:
            assert sum(y() is not None for y in made) <= 1
            repeat(held, *rest)
            made.append(weakref.ref(held[-1]))

        return step

    one.recordings.tapes = {
        key: tape._replace(steps=[(watched(repeat), unread) for repeat, unread in tape.steps])
        for key in one.recordings.tapes
    }
    assert torch.equal(one(x), torch.full((16,), 3.0))
    assert len(made) == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.rand_like(x) * 0.0,
        lambda x: x * 2.0 if x.sum() > 0.0 else x + 3.0,
        lambda x: x * torch.tensor([2.0] * 16),
        lambda x: x[x > 0.0] * 2.0,
        lambda x: torch.nn.functional.dropout(x, 0.5) * 0.0,
    ],
    ids=["random", "by value", "a constant", "as many as there are", "dropout"],
)
def test_what_may_differ_is_not_repeated(function: Any, launches: list[Any]) -> None:
    unchanged(function, torch.ones(16))


def test_a_part_of_two_arguments_is_not_repeated(launches: list[Any]) -> None:
    x = torch.ones(4, 16)

    def function(left: Tensor, right: Tensor) -> Tensor:
        launch_one(right[1], right)
        return right

    unchanged(function, x[:, :8], x[:, 8:])


def test_a_part_may_be_returned(launches: list[Any]) -> None:
    one = Replayed(lambda x: x[1:])
    for x in torch.zeros(4, 16).unbind():
        assert one(x).data_ptr() == x[1:].data_ptr()
    assert isinstance(tapes(one)[0], Tape)


def test_other_classes_of_tensors_run_plainly(launches: list[Any]) -> None:
    class Marked(Tensor):
        pass

    unchanged(lambda x: x * 2, torch.ones(16).as_subclass(Marked))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x, 2.0),
        lambda x: (x, 1),
        lambda x: (x.double(), 1.0),
        lambda x: (x[:8], 1.0),
        lambda x: (torch.zeros(33)[1:17], 1.0),
        lambda x: (torch.zeros(16, 2)[:, 0], 1.0),
        lambda x: (torch.nn.Parameter(x), 1.0),
    ],
)
def test_another_signature_is_another_recording(other: Any, launches: list[Any]) -> None:
    def function(x: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(x)
        launch_one(x, out, scale)
        return out

    one, x = Replayed(function), torch.zeros(16)
    for _ in range(3):
        one(x, 1.0)
    one(*other(x))
    assert len(tapes(one)) == 2


def test_tf32_is_part_of_a_signature(launches: list[Any]) -> None:
    one, x = Replayed(in_place), torch.zeros(16)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            one(x)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert len(tapes(one)) == 2


def test_a_compilation_is_recorded_again_without_it(launches: list[Any]) -> None:
    def function(x: Tensor) -> Tensor:
        _fresh[(3,)](X=x, OUT=x, scale=1.0, D=4)
        return x

    _fresh, one, x = launched(triton.jit(_kernel.function.fn)), Replayed(function), torch.zeros(16)
    one(x)
    # As if another thread had made room.
    _fresh._launches.clear()
    one(x)
    assert tapes(one) == [INCOMPLETE]
    one(x)
    assert isinstance(tapes(one)[0], Tape)


def test_a_global_that_changes_is_an_error(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = Replayed(in_place), torch.zeros(16)
    for _ in range(3):
        one(x)
    monkeypatch.setitem(globals(), "FACTOR", tl.constexpr(3))
    with pytest.raises(RuntimeError, match="FACTOR has changed"):
        one(x)


@pytest.mark.parametrize("hook", ["on all launches", "on the kernel"])
def test_hooks_see_every_launch(hook: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = Replayed(in_place), torch.zeros(16)
    for _ in range(3):
        one(x)
    monkeypatch.setattr(Tape, "play", lambda *_: pytest.fail("it was repeated"))
    if hook == "on the kernel":
        monkeypatch.setattr(_kernel.function, "pre_run_hooks", [lambda *args, **options: None])
        one.recordings.forget()
        for _ in range(3):
            one(x)
    else:
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    one(x)


def test_tensors_on_another_device_than_the_current_one_are_launched_there(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(x: Tensor) -> Tensor:
        return x

    one, x = Replayed(function), torch.zeros(16)
    monkeypatch.setattr(triton.runtime.driver.active, "get_current_device", lambda: 1)
    for _ in range(3):
        one(x)
    assert not tapes(one)


def test_it_forgets_before_there_are_too_many(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_SIGNATURES", 2)
    one = Replayed(lambda x: x)
    for size in (1, 2, 3):
        one(torch.zeros(size))
    assert len(tapes(one)) == 1


def test_other_releases_of_triton_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "IS_KNOWN", False)
    assert replay.replayed(launch_one) is launch_one
    assert launch.IS_KNOWN


class TestOnAGPU:
    """Whole models, where a wrong address would be seen."""

    pytestmark = ON_KERNELS

    @pytest.mark.parametrize("case", CASES)
    def test_results_are_those_of_the_function(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        options: dict[str, Any] = {"variant": "pro", "train": False, "how": "whole"} | CASES[case]
        variant, train, how = (options.pop(name) for name in ("variant", "train", "how"))
        model = tiny_model(variant, dtype=torch.bfloat16, acp_eps=1e-3, **options).to(DEVICE).train(train)
        with monkeypatch.context() as patch:
            patch.setattr(Replayed, "__call__", lambda self, *arguments: self._function(*arguments))
            expected = run(model, how, train)
        for _ in range(4):
            # What is not written is not as it was before.
            torch.full((1 << 24,), float("nan"), device=DEVICE)
            for found, wanted in zip(run(model, how, train), expected, strict=True):
                assert torch.equal(found, wanted)
