"""What kernels ask of the GPU that they are to run on; and another answer, to compile for one that is not there."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class GPU(NamedTuple):
    """An NVIDIA GPU.

    Attributes:
        capability: compute capability, ``(9, 0)`` for an H100.
        multiprocessors: how many it has.
    """

    capability: tuple[int, int]
    multiprocessors: int


class _Assumed(threading.local):
    gpu: GPU | None = None


_assumed = _Assumed()
_NOTHING = contextlib.nullcontext()


def capability_of(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPU that ``x`` is on, or is assumed to be on; None elsewhere."""
    if x.is_cuda:
        if torch.version.cuda is None:
            return None
        if torch.compiler.is_compiling():
            # It knows the answer, and warns of caches.
            return torch.cuda.get_device_capability(x.device)
        return _capability(x.get_device())
    # torch.compile cannot trace what a thread assumes.
    return None if torch.compiler.is_compiling() or _assumed.gpu is None else _assumed.gpu.capability


def multiprocessors_of(x: Tensor) -> int | None:
    """Multiprocessors of that GPU; None elsewhere."""
    if x.is_cuda:
        return _multiprocessors(x.get_device())
    return None if _assumed.gpu is None else _assumed.gpu.multiprocessors


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """As `torch.cuda.device_of`, at a fraction of its cost where the device is the current one, as it mostly is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)


@contextlib.contextmanager
def assume_gpu(gpu: GPU) -> Iterator[None]:
    """Within, in this thread, tensors on the CPU count as on ``gpu``, where only the compiler for it is at hand."""
    before, _assumed.gpu = _assumed.gpu, gpu
    try:
        yield
    finally:
        _assumed.gpu = before
