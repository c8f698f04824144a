"""Time and memory of calls on a device."""

import gc
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_WARM_UP = 2
# Side of the square matmul whose rate is the measured ceiling. On a CPU it only shows that all parts work.
_MATMUL_SIDE = {"cuda": 8192, "cpu": 256}


def timing_of(passes: list[list[float]]) -> dict[str, float]:
    """The timing of a call from the milliseconds of each round of each pass.

    Returns:
        ``ms``, ``p20`` and ``p80``, median and percentiles over all rounds, and ``spread``, the relative difference of
        the medians of the passes. What is smaller is noise.
    """
    p20, median, p80 = np.percentile(np.concatenate(passes), [20, 50, 80]).tolist()
    medians = [float(np.median(one)) for one in passes]
    return {"ms": median, "p20": p20, "p80": p80, "spread": (max(medians) - min(medians)) / median}


def device_times(call: Callable[[], object], rounds: int, device: str, warm_up: int = _WARM_UP) -> list[float]:
    """Milliseconds of the device in each of ``rounds`` calls, which are queued without waiting in between.

    The inputs should not fit into the device's cache.
    """
    if device != "cuda":
        return wall_times(call, rounds, device, warm_up)
    for _ in range(warm_up):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def wall_times(call: Callable[[], object], rounds: int, device: str, warm_up: int = _WARM_UP) -> list[float]:
    """Milliseconds from each call until the device has finished it."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return times


def synchronize(device: str) -> None:
    """Wait for everything queued on ``device``."""
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory(device: str) -> None:
    """Free what earlier calls left behind, so that the next ones have the same memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def allocated_bytes(device: str) -> int:
    """Bytes of all tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_bytes(call: Callable[[], object], device: str, resident: int) -> int | None:
    """Peak memory of ``call``; None on a CPU.

    Args:
        call: what to run.
        device: ``"cuda"`` or ``"cpu"``.
        resident: bytes of its inputs. Other tensors on the device are not counted.
    """
    if device != "cuda":
        call()
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(device)
    return resident + torch.cuda.max_memory_allocated() - before


class Matmul:
    """A large square matmul, whose rate is the ceiling that others are compared with.

    Attributes:
        flops: of one call.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        side = _MATMUL_SIDE[device]
        self.flops = 2.0 * side**3
        # Random values: a GPU multiplies zeros faster.
        self._a, self._b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def __call__(self) -> Tensor:
        return self._a @ self._b

    def tflops(self, rounds: int) -> float:
        """The measured rate, in TFLOP/s."""
        return self.flops / float(np.median(device_times(self, rounds, self._a.device.type))) / 1e9
