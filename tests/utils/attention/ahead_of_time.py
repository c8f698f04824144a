"""Compile the GPU kernels for an architecture that is not there, with the arguments of a real launch; or launch them on
a GPU that is not there."""

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from foxlm import warmup


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


# Of devices that nothing was compiled for, beyond those of `compile_kernels`.
_new_devices = itertools.count(10_000)


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
        device = triton.runtime.driver.active.get_current_device()
        # `compile_kernels` compiles for a device of its own, for which another test may have compiled.
        with mock.patch.object(warmup._AbsentGPU, "get_current_device", lambda self: device):
            yield found


class _IdleGPU(_AbsentGPU):
    """It also launches what is compiled, to no effect: ``launches`` is what the driver is called with."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        # That of tensors on the CPU.
        super().__init__(90, device=-1)
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(launch=self.launch, build_signature_metadata=tuple)
        # By the names of Triton 3.6 and 3.7.
        self.utils.fill_tma_descriptor = self.utils.fill_tma_descriptor_tiled = lambda *args: args

    def launch(self, *args: Any) -> None:
        if triton.__version__.startswith("3.6."):
            first, ours = args[:7] + args[9:10], args[13:]
        else:
            first, ours = args[:8] + args[13:15], args[15]
        # Either may be given: the driver asks a tensor for its address.
        self.launches.append((*first, *(x.data_ptr() if hasattr(x, "data_ptr") else x for x in ours)))


# Kernels remember it, and their own number.
_idle_gpu = _IdleGPU()
_functions = itertools.count()


@contextlib.contextmanager
def idle_gpu() -> Iterator[list[tuple[Any, ...]]]:
    """Within, kernels for an H100 are launched on the CPU's tensors, down to the driver, without being compiled or run.

    Yields:
        Of each launch the grid, stream, function and whatever else the driver is told, but hooks.
    """

    def compile_nothing(
        self: JITFunction, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
    ) -> CompiledKernel:
        # Triton collects the globals that a kernel reads when it is hashed.
        assert self.cache_key
        described = sum(isinstance(x, str) and x.startswith("tensordesc") for x in signature.values())
        descriptor = dict(swizzle=3, elem_size=2, elem_type=6, block_size=[64, 64], fp4_padded=False)
        sizes = {f"{kind}_scratch_{x}": 0 for kind in ("global", "profile") for x in ("size", "align")}
        metadata = SimpleNamespace(launch_cooperative_grid=False, launch_pdl=False, num_ctas=1, **sizes)
        metadata.tensordesc_meta = [descriptor] * described
        kernel = object.__new__(CompiledKernel)
        kernel.src, kernel.module, kernel.function = None, 0, next(_functions)
        kernel.name, kernel.packed_metadata = self.__name__, (4, 1, 0)
        kernel._run = nvidia.CudaLauncher(SimpleNamespace(constants={}, signature=signature), metadata)
        self.device_caches[device][0][key] = kernel
        return kernel

    patches = (
        mock.patch.object(triton.runtime.driver, "_active", _idle_gpu),
        mock.patch.object(JITFunction, "_do_compile", compile_nothing),
        mock.patch.object(nvidia, "PyKernelArg", lambda **parts: parts["type"], create=True),
        # Triton 3.6 has a launcher compiled for each kernel.
        mock.patch.object(nvidia, "compile_module_from_src", lambda **_: _idle_gpu.utils),
        mock.patch.object(nvidia, "library_dirs", list),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        _idle_gpu.launches.clear()
        yield _idle_gpu.launches
