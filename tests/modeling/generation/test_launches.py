"""How many launches a layer takes in eager mode: kernels, and operators of PyTorch that compute or copy; and how much
Python.

Counted on the CPU, with kernels chosen as on an H100 and left out.
"""

import cProfile
import pstats
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from foxlm import FoxConfig, FoxForCausalLM, FoxPagedCache
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from kernel_device import INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from triton.runtime.jit import JITFunction

from ahead_of_time import idle_gpu, specializations
from foxlm.kernels import ahead_of_time
from foxlm.modeling.cache.page_pool import PagePool

# Operators that launch nothing.
NOTHING = ("empty", "view", "detach", "alias", "promote_types", "lift_fresh", "local_scalar_dense", "as_strided")


class Launches(TorchDispatchMode):
    """Counts by name, of operators and of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        is_view = any(x.alias_info and not x.alias_info.is_write for x in function._schema.returns)
        # A kernel that counts as itself.
        is_ours = function.namespace not in ("aten", "prims")
        if not is_view and not is_ours and not any(x in name for x in NOTHING):
            self.names[name] += 1
        return result


def launches(layers: int, tokens: int, *, train: bool = False, cached: bool = False) -> Counter[str]:
    config = FoxConfig.preset("pro-125m", num_hidden_layers=layers, vocab_size=64, acp_eps=1e-3)
    # Forget gates stay in float32.
    model = FoxForCausalLM._from_config(config, dtype=torch.bfloat16).train(train)
    ids = torch.arange(tokens)[None] % 64
    counted = Launches()

    def left_out(self: JITFunction, *args: Any, **options: Any) -> Any:
        counted.names[self.__name__] += 1
        return run(self, *args, **options)

    # One kernel on a GPU.
    one = mock.patch.object(nn.functional, "rms_norm", lambda x, *_: x.clone())
    with assume_gpu(GPU((9, 0), 132)), specializations(90), one:
        run = JITFunction.run
        with mock.patch.object(JITFunction, "run", left_out), torch.set_grad_enabled(train):
            if not train:
                # Fuses projections.
                model(ids, use_cache=cached)
            counted.names.clear()
            with counted:
                out = model(ids, use_cache=cached)
                if train:
                    out.logits.sum().backward()
    return counted.names


def of_a_layer(**options: Any) -> Counter[str]:
    """What one layer more adds."""
    launches(1, 300, **options)
    one, two = (launches(layers, 300, **options) for layers in (1, 2))
    two.subtract(one)
    return +two


# Four of these are matmuls, and eight those of pruning and attention. A cache copies what it keeps.
@pytest.mark.parametrize(("cached", "most"), [(False, 20), (True, 23)])
def test_prefill_of_a_pro_layer(cached: bool, most: int) -> None:
    found = of_a_layer(cached=cached)
    assert found["prologue_forward_kernel"] == 1
    assert found.total() <= most, dict(found)


def test_training_of_a_pro_layer() -> None:
    found = of_a_layer(train=True)
    assert found["prologue_forward_kernel"] == found["prologue_backward_kernel"] == 1
    # Forward, and once more in backward.
    assert found["_silu_product_kernel"] == 2
    # Over thirty are matmuls. Within operators of ours kernels are counted, and operators of torch are not seen.
    assert found.total() <= 89, dict(found)


def test_a_chunk_of_an_evicting_cache() -> None:
    """Takes few launches more than one of a growing cache, at any length of what is held."""

    def launched(layers: int) -> Counter[str]:
        config = FoxConfig.preset("pro-125m", num_hidden_layers=layers, vocab_size=64, acp_eps=None)
        model = FoxForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        cache, ids, counted = FoxPagedCache(config, 4096), torch.arange(300)[None] % 64, Launches()

        def left_out(self: JITFunction, *args: Any, **options: Any) -> Any:
            counted.names[self.__name__] += 1
            return run(self, *args, **options)

        one = mock.patch.object(nn.functional, "rms_norm", lambda x, *_: x.clone())
        # No kernel counts pages here: the number would be what lay in memory.
        take = PagePool.take_counts
        some = mock.patch.object(PagePool, "take_counts", lambda self, *_: take(self, 0, self.pages[..., 0].numel()))
        with assume_gpu(GPU((9, 0), 132)), specializations(90), torch.no_grad(), one, some:
            run = JITFunction.run
            with mock.patch.object(JITFunction, "run", left_out):
                for _ in range(3):
                    counted.names.clear()
                    with counted:
                        model(ids, cache=cache)
        return counted.names

    one, two = launched(1), launched(2)
    two.subtract(one)
    found = +two
    assert found["_read_chunk_kernel"] == found["join_chunk_kernel"] == found["_write_chunk_kernel"] == 1
    assert found["_move_pages_kernel"] == 1
    assert found.total() <= 28, dict(found)


def python_calls(layers: int) -> int:
    """Calls of functions, Python's and others, for a prompt like those before it, down to the driver's launches."""
    config = FoxConfig.preset("pro-125m", num_hidden_layers=layers, vocab_size=64, acp_eps=1e-3)
    model = FoxForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids, profile = torch.arange(300)[None] % 64, cProfile.Profile()
    no_threads = mock.patch.object(ahead_of_time, "_can_prepare", lambda inputs: False)
    with assume_gpu(GPU((9, 0), 132)), idle_gpu(), no_threads, torch.no_grad():
        # The first calls import, compile and record.
        for _ in range(3):
            model(ids, use_cache=True, logits_to_keep=1)
        with profile:
            model(ids, use_cache=True, logits_to_keep=1)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ours = {function for function in stats if not function[0].endswith("ahead_of_time.py") or "kernels" in function[0]}
    return sum(calls for function in ours for caller, (calls, *_) in stats[function][4].items() if caller in ours)


def test_python_of_a_pro_layer() -> None:
    """Its prompts of less than some thousand tokens take what the host takes."""
    assert python_calls(5) - python_calls(4) <= 550
