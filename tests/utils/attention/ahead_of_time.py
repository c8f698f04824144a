"""Compile the GPU kernels for an architecture that is not there, with the arguments of a real launch."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _AbsentGPU:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int, device: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self._device = device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


# Of devices that nothing was compiled for.
_new_devices = itertools.count(1000)


@contextlib.contextmanager
def absent_gpu(capability: int, *, new: bool = False) -> Iterator[int]:
    """Within, Triton compiles for ``capability`` (e.g. 90). Yields the device that it keeps these kernels by.

    Args:
        capability: major and minor.
        new: whether none of them may have been compiled before in this process.
    """
    # Kernels are cached by device: one for each architecture.
    device = next(_new_devices) if new else capability
    # Not by set_active and reset_active: the latter looks for the machine's own GPU.
    with mock.patch.object(triton.runtime.driver, "_active", _AbsentGPU(capability, device)):
        yield device


@contextlib.contextmanager
def compiling_only(capability: int, *, new: bool = False) -> Iterator[list[Any]]:
    """Within, launching a kernel compiles it for ``capability`` (e.g. 90) and does nothing else. ``new`` as above.

    Yields:
        The compiled kernels, in the order of launching; each has ``metadata`` and ``asm``.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **(kwargs | {"warmup": True}))
        compiled.append(kernel)
        return kernel

    with absent_gpu(capability, new=new), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


@contextlib.contextmanager
def specializations(capability: int) -> Iterator[set[tuple[str, str]]]:
    """Within, launching a kernel neither compiles nor runs it.

    Yields:
        Name and specialization of each kernel that would be compiled, as Triton tells compilations apart.
    """
    found: set[tuple[str, str]] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.add((fn.name.rpartition(".")[2], str(compile["key"])))
        return True

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note), compiling_only(capability, new=True):
        yield found
