"""Kernels are compiled before they are launched: the right ones, in other threads, and nothing else happens."""

import threading
from typing import Any

import pytest
import torch

from attention_inputs import attention, draw_inputs, output_and_gradients
from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from kernel_device import INTERPRETED
from models import SIZES, VARIANTS

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
from triton.runtime.jit import JITFunction

from ahead_of_time import absent_gpu, specializations
from foxlm.kernels import ahead_of_time
from foxlm.kernels.ahead_of_time import launches_left_out, prepare_attention
from foxlm.kernels.portable.block_ranges import _head_order_kernel, heaviest_first

H100 = GPU((9, 0), 132)


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_prepared", set())


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"eps": 1e-3, "rule": "paper", "dropout": 0.1}], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_launched_is_prepared(gradients, head_dim, options):
    inputs = draw_inputs(300, batch=2, heads=(4, 2, 4), head_dim=head_dim, dtype=torch.bfloat16)
    with assume_gpu(H100), specializations(90) as found, torch.set_grad_enabled(gradients):
        state = torch.get_rng_state()
        prepare_attention(*inputs, **options)
        assert torch.equal(torch.get_rng_state(), state)
        prepared = set(found)
        found.clear()
        prepare_attention(*inputs, **options)
        assert not found
        if gradients:
            output_and_gradients(attention, inputs, **options)
        else:
            attention(*inputs, **options)
    assert len(found) >= (12 if gradients else 5)
    assert found == prepared


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("variant", ["pro", "llama", "gateless", "key-value-gates", "sink"])
@pytest.mark.parametrize("rule", ["measured", "paper"])
def test_a_model_launches_what_it_prepares(rule, variant, gradients, monkeypatch):
    config = FoxConfig(**SIZES | VARIANTS[variant] | {"hidden_size": 64, "head_dim": 16, "acp_rule": rule})
    model = FoxForCausalLM(config).bfloat16().train(gradients)
    tokens = torch.arange(140).view(2, 70) % 97

    def run() -> None:
        with torch.set_grad_enabled(gradients):
            out = model(tokens, labels=tokens, use_cache=not gradients)
            if gradients:
                out.loss.backward()

    with assume_gpu(H100), specializations(90) as found:
        with monkeypatch.context() as patch:
            patch.setattr(ahead_of_time, "_can_prepare", lambda inputs: False)
            run()
        launched = set(found)
        run()
    assert len(ahead_of_time._prepared) == 1
    assert "_forward_kernel" in {name for name, _ in launched}
    assert found == launched


def test_nothing_to_prepare():
    """On a CPU, and for fewer tokens than stand for all."""
    inputs = draw_inputs(300, batch=1, head_dim=64, dtype=torch.bfloat16)
    with specializations(90) as found:
        prepare_attention(*inputs, eps=1e-3)
        with assume_gpu(H100):
            prepare_attention(*(x[:, :30] for x in inputs), eps=1e-3)
    assert not found
    assert not ahead_of_time._prepared


def test_kernels_compile_in_other_threads():
    run, names = JITFunction.run, []

    def load(kernel):
        names.append(threading.current_thread().name)

    with absent_gpu(90, new=True) as device:
        with launches_left_out(load) as futures:
            for length in (64, 100):
                heaviest_first(torch.zeros(2, length, dtype=torch.int32))
        assert JITFunction.run is run
        assert [future.result().metadata.name for future in futures] == ["_head_order_kernel"]
        assert [name.rpartition("_")[0] for name in names] == ["compile-kernels"]
        # Triton finds the kernel itself, once it was asked for anything.
        (kernel,) = kernels_of(device)
        assert kernel.metadata.name == "_head_order_kernel"
        assert type(kernels_of(device)[0]) is triton.compiler.CompiledKernel


def kernels_of(device: int) -> list[Any]:
    return list(_head_order_kernel.device_caches[device][0].values())


def test_an_error_of_the_compiler_reaches_the_launch(monkeypatch):
    def fail(kernel):
        raise RuntimeError("cannot be loaded")

    with absent_gpu(89, new=True) as device:
        with launches_left_out(fail):
            heaviest_first(torch.zeros(2, 64, dtype=torch.int32))
        (kernel,) = kernels_of(device)
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            _ = kernel.run
