"""A kernel launched before is launched past Triton's own code: the same compilation with the same arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from kernel_device import INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from ahead_of_time import idle_gpu
from foxlm.kernels import ahead_of_time
from foxlm.kernels.launches import launch
from foxlm.kernels.launches.launch import Launched
from foxlm.kernels.triton_common import HAS_GLUON

if not HAS_GLUON:
    pytest.skip("needs a release of Triton whose launchers are known", allow_module_level=True)

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

FACTOR = tl.constexpr(2)


@triton.jit(do_not_specialize=["LENGTH", "HEADS"], do_not_specialize_on_alignment=["PART"])
def _kernel(X, PART, stride, LENGTH, HEADS, scale, D: tl.constexpr, KIND: tl.constexpr = "a"):
    tl.store(X, FACTOR * D)


DATA = torch.zeros(64, dtype=torch.float64)
ARGUMENTS: dict[str, Any] = dict(X=DATA, PART=DATA, stride=48, LENGTH=5, HEADS=2, scale=0.5, D=64, num_warps=4)

floats = st.sampled_from([0.0, 0.5, 1.0])
whole = st.sampled_from([0, 1, 2, 16, 17, 48, 2**31 - 16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, -1, -16, -(2**31)])
whole |= st.integers(0, 40)


@st.composite
def tensors(draw: Any) -> Tensor:
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int8]))
    x = DATA.view(dtype)[draw(st.integers(0, 3)) :]
    return nn.Parameter(x, requires_grad=False) if draw(st.booleans()) else x


runtime = st.none() | st.booleans() | floats | whole | tensors()
launches = st.fixed_dictionaries(
    dict(X=tensors(), PART=tensors() | st.none(), stride=runtime, LENGTH=whole | st.booleans(), HEADS=runtime),
    optional=dict(KIND=st.sampled_from(["a", "b", "", None]), num_warps=st.sampled_from([4, 8])),
).flatmap(
    lambda drawn: st.fixed_dictionaries(
        dict(scale=runtime, D=st.none() | st.booleans() | floats | st.sampled_from([1, 64, "a", (1, 2), tl.float32]))
    ).map(lambda rest: drawn | rest)
)


def through_triton(kernel: Launched) -> list[str]:
    """Collects a name for each launch that Triton's own code makes from now on."""
    names: list[str] = []
    run = kernel.function.run

    def note(*args: Any, **options: Any) -> Any:
        names.append(kernel.__name__)
        return run(*args, **options)

    kernel.function.run = note
    return names


def check(made: list[dict[str, Any]], function: JITFunction = _kernel) -> None:
    """Launches, one after another and each twice, reach the driver as Triton's own do."""
    kernel = Launched(function)
    with idle_gpu() as found:
        for arguments in made:
            for _ in range(2):
                compiled = kernel[(3, 2)](**arguments)
                by_triton = function[(3, 2)](**arguments)
                assert compiled is by_triton
                assert found[-2] == found[-1]


@settings(deadline=None, max_examples=300)
@given(st.lists(launches, min_size=2, max_size=6))
def test_what_is_launched_is_what_triton_launches(made):
    check(made)


# What a key holds, and two launches that nothing else in it tells apart.
CONTROLS = [
    ("X.dtype", {}, {"X": DATA.view(torch.int64)}),
    ("PART.dtype", {}, {"PART": DATA.view(torch.int64)}),
    ("_p_X & 15 == 0", {}, {"X": DATA[1:]}),
    ("stride", {}, {"stride": 1}),
    ("stride", {}, {"stride": 47}),
    ("D", {}, {"D": 32}),
    ("KIND", {"KIND": "b"}, {}),
    ("*(_options and _options.items())", {}, {"num_warps": 8}),
    ("0 <= (LENGTH | HEADS) <= 0x7FFFFFFF", {}, {"LENGTH": 2**31}),
    ("type(LENGTH)", {}, {"LENGTH": True}),
]


def find_out(part: str, made: list[dict[str, Any]], function: JITFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``part`` the launches fail the check that they pass."""
    check(made, function)
    define = launch._define

    def leave_out(name: str, source: str, *args: Any, **names: Any) -> Any:
        lines = source.splitlines()
        for i, line in enumerate(lines):
            # Types, conditions, key: what else holds there.
            for start, nothing in (("_launch = ", "int"), ("if ", "True"), ("_key = (", "0")):
                if line.strip().startswith(start):
                    lines[i] = line.replace(f" {part}", f" {nothing}")
        return define(name, "\n".join(lines), *args, **names)

    monkeypatch.setattr(launch, "_define", leave_out)
    with pytest.raises(AssertionError):
        check(made, function)


@pytest.mark.parametrize(("part", "first", "second"), CONTROLS, ids=[x[0] for x in CONTROLS])
def test_a_key_without_a_part_is_found_out(part, first, second, monkeypatch):
    find_out(part, [ARGUMENTS | first, ARGUMENTS | second], _kernel, monkeypatch)


@triton.jit
def _described(x_descriptor, scale):
    pass


def describe(
    dtype: torch.dtype = torch.bfloat16, rows: int = 16, swizzled: int = 128, tokens: int = 64
) -> dict[str, Any]:
    layout = _LAYOUTS[swizzled]
    x = torch.zeros(2, tokens, 64, dtype=dtype)
    return dict(
        x_descriptor=TensorDescriptor(x, [2, tokens, 64], [tokens * 64, 64, 1], [1, rows, 64], layout), scale=0.5
    )


_LAYOUTS = {swizzled: gl.NVMMASharedLayout(swizzled, 16, rank=3) for swizzled in (64, 128)}


def test_tensor_descriptors():
    made = [describe(), describe(tokens=48), describe(rows=32), describe(swizzled=64), describe(torch.float16)]
    check([*made, describe()], _described)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("x_descriptor.base.dtype", describe(torch.float16)),
        ("*x_descriptor.block_shape", describe(rows=32)),
        ("id(x_descriptor.layout)", describe(swizzled=64)),
    ],
)
def test_a_key_without_a_part_of_a_descriptor_is_found_out(part, other, monkeypatch):
    find_out(part, [describe(), other], _described, monkeypatch)


def test_every_kernel_that_the_host_launches_remembers():
    source = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__).parents[3] / "kernels").rglob("*.py"))
    remembers = set(re.findall(r"(?:@launched\n@.*\n|@kernel\n|@decode_kernel\n)def (\w+)", source))
    launched = set(re.findall(r"(\w+_kernel)\[", source))
    assert len(launched) > 30
    assert launched <= remembers


def add_hook(knob: str) -> Any:
    return lambda patch: patch.setattr(triton.knobs.runtime, knob, lambda metadata: None)


def patch_run(patch: pytest.MonkeyPatch) -> None:
    run = JITFunction.run
    patch.setattr(JITFunction, "run", lambda self, *args, **options: run(self, *args, **options))


SETTINGS = {
    "enter": add_hook("launch_enter_hook"),
    "exit": add_hook("launch_exit_hook"),
    "chain": lambda patch: patch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None]),
    "stages": lambda patch: patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda: ("a", "b")),
    "debug": lambda patch: patch.setattr(triton.knobs.runtime, "debug", True),
    "instrumentation": lambda patch: patch.setattr(triton.knobs.compilation, "instrumentation_mode", "fpsan"),
    "before": lambda patch: patch.setattr(_kernel, "pre_run_hooks", [lambda *args, **options: None]),
    "patched": patch_run,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_triton_itself_launches_what_hooks_see_and_settings_change(setting, monkeypatch):
    kernel = Launched(_kernel)
    with idle_gpu(), monkeypatch.context() as patch:
        kernel[(3,)](**ARGUMENTS)
        patch.setattr(_kernel, "run", _kernel.run)
        names = through_triton(kernel)
        kernel[(3,)](**ARGUMENTS)
        assert not names
        if setting == "patched":
            del _kernel.__dict__["run"]
            SETTINGS[setting](patch)
            names = through_triton(kernel)
        else:
            SETTINGS[setting](patch)
        kernel[(3,)](**ARGUMENTS)
        assert names


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_everything_is_launched_by_triton_where_the_environment_says_so(value):
    program = """
from triton.runtime.jit import JITFunction
from foxlm.kernels.launches.replay import replayed
from foxlm.kernels.portable.scan import _gate_totals_kernel
print(isinstance(_gate_totals_kernel, JITFunction), replayed(print) is print)
"""
    environment = {
        name: x for name, x in os.environ.items() if name not in ("FOXLM_PLAIN_LAUNCHES", "TRITON_INTERPRET")
    }
    environment |= {} if value is None else {"FOXLM_PLAIN_LAUNCHES": value}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(value == "1")] * 2


def test_triton_itself_launches_on_a_grid_that_is_a_function(monkeypatch):
    kernel = Launched(_kernel)
    with idle_gpu() as found:
        for _ in range(2):
            kernel[lambda arguments: (arguments["D"],)](**ARGUMENTS)
    assert found[0] == found[1]
    assert found[0][:3] == (64, 1, 1)


def test_a_global_that_changes_is_an_error(monkeypatch):
    kernel = Launched(_kernel)
    with idle_gpu():
        for _ in range(2):
            kernel[(3,)](**ARGUMENTS)
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "FACTOR", tl.constexpr(3))
            with pytest.raises(RuntimeError, match="FACTOR has changed"):
                kernel[(3,)](**ARGUMENTS)
        kernel[(3,)](**ARGUMENTS)


def test_it_forgets_before_there_are_too_many(monkeypatch):
    monkeypatch.setattr(launch, "_MOST_KEYS", 2)
    check([ARGUMENTS | {"stride": stride} for stride in (1, 2, 3, 4, 2, 1)])


@pytest.mark.parametrize("head_dim", [64, 32])
def test_a_model_s_second_pass_is_launched_past_triton(head_dim, monkeypatch):
    sizes = dict(hidden_size=128, intermediate_size=64, head_dim=head_dim, num_attention_heads=128 // head_dim)
    config = FoxConfig.preset("pro-125m", num_hidden_layers=1, vocab_size=64, acp_eps=1e-3, **sizes)
    model = FoxForCausalLM._from_config(config, dtype=torch.bfloat16)
    ids = torch.arange(200).view(1, 200) % 64
    monkeypatch.setattr(ahead_of_time, "_can_prepare", lambda inputs: False)

    def run() -> None:
        model(ids, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            cache = model(ids).past_key_values
            model(ids[:, :1], past_key_values=cache)

    with assume_gpu(GPU((9, 0), 132)), idle_gpu() as found:
        run()
        count, names = len(found), []
        call = launch._through_triton

        def note(function: JITFunction, *args: Any) -> Any:
            names.append(function.__name__)
            return call(function, *args)

        monkeypatch.setattr(launch, "_through_triton", note)
        run()
    assert not names
    assert len(found) == 2 * count > 60
