"""Compile a model's kernels before it runs, for example while a container image is built.

Which kernels a model launches is found by running one of its layers, with launches left out
(`foxlm.kernels.ahead_of_time`). Triton keeps compiled kernels by source, arguments and kind of GPU
(``TRITON_CACHE_DIR``, by default ``~/.triton/cache``), so that they need not be compiled where they run.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StaticCache

from foxlm.kernels.argument_types import typed
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.devices import GPU, assume_gpu
from foxlm.modeling.attention_settings import pruned_at_any_length
from foxlm.modeling.cache.paged import FoxPagedCache
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM
from foxlm.modeling.versions import cache_of

CACHES = ("dynamic", "static", "paged")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# More than a block of keys that pruning drops, and than PyTorch sums the gates of.
_PROMPT = 130
# Of an H100. How many there are decides no kernel.
_MULTIPROCESSORS = 132


class CompiledKernel(NamedTuple):
    """A kernel in Triton's cache.

    Attributes:
        name: of the kernel; there may be several, for different arguments.
        seconds: that it took, beside others.
        was_cached: whether it was there before.
    """

    name: str
    seconds: float
    was_cached: bool


@typed
def compile_kernels(
    config: FoxConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    arch: str | None = None,
    train: bool = False,
    batch_size: int = 1,
    caches: Sequence[str] = ("dynamic", "static"),
) -> list[CompiledKernel]:
    """Compile what a model of ``config`` launches into Triton's cache, in parallel. Nothing runs on a GPU.

    Prefill and decoding steps of one and of three tokens, with and without padding. Not: what ``torch.compile`` makes,
    context parallelism, kernels of other libraries.

    Args:
        config: of the model; layers are alike, and sizes of the vocabulary make no kernels.
        dtype: of its weights: bfloat16, float16 or float32.
        arch: of the GPU, such as ``sm_90``; by default that of this machine.
        train: training steps too, in ``dtype`` and under autocast to it over float32 weights.
        batch_size: sequences at a time.
        caches: to decode with: ``dynamic``, ``static``, ``paged``.

    Raises:
        ValueError: an argument is not as above, or there is neither ``arch`` nor a GPU, or no compiler for it.
    """
    if not HAS_TRITON:
        raise ValueError("kernels need Triton, which is not installed here")
    from foxlm.kernels.ahead_of_time import launches_left_out
    from foxlm.kernels.triton_common import INTERPRETED

    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, so there is nothing to compile")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    if unknown := [x for x in caches if x not in CACHES]:
        raise ValueError(f"caches must be of {', '.join(CACHES)}, got {unknown[0]!r}")
    gpu = _gpu(arch)
    found: list[CompiledKernel] = []
    with torch.random.fork_rng(devices=[]), assume_gpu(gpu), _compiling_for(gpu), _recorded(found):
        with launches_left_out() as futures:
            model = _stand_in(config, dtype)
            _generate(model, batch_size, caches)
            if train:
                _train(model, batch_size)
                if dtype != torch.float32:
                    with torch.autocast("cpu", dtype):
                        _train(_stand_in(config, torch.float32), batch_size)
        for future in futures:
            future.result()
    return found


def _gpu(arch: str | None) -> GPU:
    if arch is None:
        if not torch.cuda.is_available():
            raise ValueError("arch must name a GPU to compile for, such as sm_90: torch sees none here")
        return GPU(torch.cuda.get_device_capability(), _MULTIPROCESSORS)
    digits = re.fullmatch(r"sm_(\d+)(\d)", arch)
    capability = (int(digits[1]), int(digits[2])) if digits else (0, 0)
    if capability < (8, 0):
        raise ValueError(f"arch must be sm_80 or newer, such as sm_90, got {arch!r}")
    return GPU(capability, _MULTIPROCESSORS)


class _AbsentGPU:
    """As much of a driver as Triton's compiler asks for."""

    def __init__(self, gpu: GPU) -> None:
        self._arch = 10 * gpu.capability[0] + gpu.capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps kernels by device in memory: none that exists.
        return 1000 + self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(gpu: GPU) -> Iterator[None]:
    from triton.runtime import driver

    before: Any = driver.active if torch.cuda.is_available() else None
    absent: Any = _AbsentGPU(gpu)
    driver.set_active(absent)
    try:
        yield
    finally:
        # None has Triton look for a GPU when it needs one.
        driver.set_active(before)


@contextlib.contextmanager
def _recorded(found: list[CompiledKernel]) -> Iterator[None]:
    """Append to ``found`` what Triton compiles or finds in its cache."""
    from triton import knobs

    def note(*, metadata: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        found.append(CompiledKernel(metadata["name"], times.total / 1e6, cache_hit))

    before = knobs.compilation.listener
    knobs.compilation.listener = note
    try:
        yield
    finally:
        knobs.compilation.listener = before


def _stand_in(config: FoxConfig, dtype: torch.dtype) -> FoxForCausalLM:
    """A model with as few layers as show all kernels."""
    rotates = [config.has_rope(layer) for layer in range(config.num_hidden_layers)]
    layers = max(rotates.index(x) for x in set(rotates)) + 1
    fields = config.to_dict()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = None
    fields |= {"num_hidden_layers": layers, "vocab_size": 512}
    if config.nope_layers:
        fields["nope_layers"] = [layer for layer in config.nope_layers if layer < layers]
    return FoxForCausalLM(FoxConfig(**fields)).to(dtype)


def _tokens(model: FoxForCausalLM, batch: int) -> Tensor:
    return torch.arange(batch * _PROMPT).view(batch, _PROMPT) % model.config.vocab_size


@torch.no_grad()
def _generate(model: FoxForCausalLM, batch: int, caches: Sequence[str]) -> None:
    model.eval()
    tokens = _tokens(model, batch)
    masks: list[Any] = [None]
    if batch > 1:
        masks.append(torch.ones_like(tokens))
        masks[1][0, :9] = 0
    # Two tokens are one step: `generate` runs the first of its kind as always, and captures later ones.
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "disable_compile": True}
    for name in caches:
        for padding in masks:
            # As a short prompt, and as a long one.
            model(tokens, attention_mask=padding, cache=_cache(model, name), use_cache=True)
            with pruned_at_any_length():
                model.generate(tokens, attention_mask=padding, cache=_cache(model, name), **settings)
                for new in (1, 3):
                    # One step to a prompt: a kernel that is left out would have advanced the cache's length.
                    out = model(tokens, attention_mask=padding, cache=_cache(model, name), use_cache=True)
                    mask = None if padding is None else torch.cat([padding, padding[:, -1:].expand(-1, new)], dim=1)
                    model(tokens[:, :new], attention_mask=mask, cache=cache_of(out), use_cache=True)


def _cache(model: FoxForCausalLM, name: str) -> Any:
    if name == "static":
        return StaticCache(config=model.config, max_cache_len=2 * _PROMPT)
    return FoxPagedCache(model.config, max_cache_len=2 * _PROMPT) if name == "paged" else None


def _train(model: FoxForCausalLM, batch: int) -> None:
    tokens = _tokens(model, batch)
    model.train()
    with torch.enable_grad():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
