"""Time and memory of calls on a device."""

import gc
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

_WARM_UP_ROUNDS = 2
PASSES = 2
# Clock cycles for which the device waits, about 50 ms, so that it never waits later.
_HEAD_START = 100_000_000
# Side of the square product that stands for what the matrix units can do, and bytes of the copy that does so for the
# memory; small where it only shows that it runs.
_MATMUL_SIDE = {"cuda": 8192, "cpu": 256}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
_COPY_ROUNDS = 10

Name = TypeVar("Name", bound=Hashable)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Timing:
    """How long a call took, in milliseconds.

    Attributes:
        ms, p20, p80: median and percentiles over all rounds.
        spread: relative difference of the medians of two separate passes: anything smaller is noise.
    """

    ms: float
    p20: float
    p80: float
    spread: float


def interleaved(
    calls: Mapping[Name, Callable[[], object]], rounds: int, device: str, wall: bool = False
) -> dict[Name, Timing]:
    """Time each call once per round, all of them in turn, so that clocks and heat fall on all alike.

    Times are those of the device: calls are queued without waiting in between. The inputs of one call should not fit
    into the device's cache.

    Args:
        calls: what to time, by name.
        rounds: rounds in each of two passes.
        device: ``"cpu"`` or ``"cuda"``.
        wall: time each from calling it until the device has finished instead, as who calls it waits.
    """
    time_call = _waited if wall else timed
    for _ in range(_WARM_UP_ROUNDS):
        for call in calls.values():
            call()
    passes: list[dict[Name, list[float]]] = []
    for _ in range(PASSES):
        synchronize(device)
        marks: dict[Name, list[Callable[[], float]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                marks[name].append(time_call(call, device))
        synchronize(device)
        passes.append({name: [read() for read in reads] for name, reads in marks.items()})
    return {name: timing_of([one[name] for one in passes]) for name in calls}


def timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """Run ``call``; the result tells how many milliseconds it took, once the device has finished."""
    if device != "cuda":
        began = time.perf_counter()
        call()
        took = 1e3 * (time.perf_counter() - began)
        return lambda: took
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return lambda: start.elapsed_time(end)


def _waited(call: Callable[[], object], device: str) -> Callable[[], float]:
    took = wall_ms(call, device)
    return lambda: took


def wall_ms(call: Callable[[], object], device: str) -> float:
    """Milliseconds from calling ``call`` until the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def device_ms(call: Callable[[], object]) -> float:
    """Milliseconds that a CUDA device is busy with ``call``, however long the host needs to queue it.

    The device starts once all is queued. Its queue has room for about a thousand kernels: a call of more is measured
    too long if the host is slow.
    """
    synchronize("cuda")
    torch.cuda._sleep(_HEAD_START)
    read = timed(call, "cuda")
    synchronize("cuda")
    return read()


def timing_of(passes: list[list[float]]) -> Timing:
    """The timing of a call from the milliseconds of each round of each pass."""
    p20, median, p80 = np.percentile(np.concatenate(passes), [20, 50, 80]).tolist()
    medians = [float(np.median(one)) for one in passes]
    return Timing(median, p20, p80, (max(medians) - min(medians)) / median)


def progress(items: Iterable[Item], label: str) -> Iterable[Item]:
    """``items``, with a bar on a terminal's stderr."""
    return tqdm(items, desc=label, leave=False, disable=None)


def synchronize(device: str) -> None:
    """Wait for everything queued on ``device``."""
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory(device: str) -> None:
    """Give back what earlier calls left behind, so that they do not weigh on the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(call: Callable[[], object], device: str, resident: int) -> int | None:
    """Most memory that ``call`` needs at a time; None on a CPU.

    Args:
        call: what to run.
        device: ``"cuda"`` or ``"cpu"``.
        resident: bytes of what it works on. Whatever else lies on the device meanwhile does not count.
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
    """A square matrix product, whose rate is the ceiling that others are measured against."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        side = _MATMUL_SIDE[device]
        self.flops = 2.0 * side**3
        # Random: a GPU multiplies zeros faster.
        self._a, self._b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def __call__(self) -> None:
        self._a @ self._b


class Copy:
    """A copy of a large tensor, whose rate is the ceiling of what the memory delivers.

    Attributes:
        bytes: that are read and written.
    """

    def __init__(self, device: str) -> None:
        self._from, self._to = (torch.zeros(_COPIED_BYTES[device], dtype=torch.uint8, device=device) for _ in range(2))
        self.bytes = 2 * self._from.nbytes

    def __call__(self) -> None:
        self._to.copy_(self._from)


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a large copy."""
    copy = Copy(device)
    return 1e3 * copy.bytes / interleaved({"copy": copy}, _COPY_ROUNDS, device)["copy"].ms
