"""Functions run by several processes of one gloo group on the CPU, as torchrun would start them.

    def total(rank_argument):           # in a helper module, say `sums.py`
        ...                             # torch.distributed is initialized: gloo, `env://`
        return result                   # of each rank, anything that pickles

    results = run_ranks("sums:total", 2, rank_argument)

Ranks are forked from one process that has the modules below imported, which would cost each of them seconds.
"""

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

# How long ranks may go on when one has failed: a rank that waits for it then fails too, and says where.
_GRACE = 3.0
_POLL = 0.05

# Where functions of helper modules are found, as pytest finds them.
_UTILS = Path(__file__).parents[1]
_HELPERS = os.pathsep.join(str(folder) for folder in (_UTILS, *_UTILS.iterdir()) if folder.is_dir())

# Not from the process of the tests, whose threads and state no rank is to have.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["context_checks", "sharding_checks", "tensor_parallel_checks"])


class _Forked:
    """A process like `subprocess.Popen`'s that calls ``_main(folder)`` in a session of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], output: Path) -> None:
        self._process = _FORKS.Process(target=_forked, args=(folder, environment, output))
        # What the process that forks is started with, at the first start: it must not have threads.
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": _HELPERS}):
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


def _forked(folder: Path, environment: dict[str, str], output: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _main(folder)


class RankError(RuntimeError):
    """A rank raised, died, or was not done in time; the message has each failed rank's traceback or last output."""


def free_port() -> int:
    """A TCP port of this machine that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for this rank, with one thread for each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # accelerate and Trainer would else look for an accelerator.
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": _HELPERS,
    }


def kill_session(process: subprocess.Popen | _Forked) -> None:
    """End a process that has a session of its own, and all that it started."""
    # The process itself too: it may not have its session yet.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
    process.wait()


def run_ranks(
    function: str,
    world_size: int,
    *arguments: Any,
    timeout: float = 180.0,
    environment: dict[str, str] | None = None,
    group: bool = True,
    show: bool = False,
    fresh: bool = False,
) -> list[Any]:
    """Call ``function(*arguments)`` on each of ``world_size`` ranks.

    Args:
        function: ``module:name``, the module in `tests/utils/` or installed.
        world_size: number of processes.
        arguments: the same for each rank; must pickle.
        timeout: seconds after which all are killed; also the time-out of the group's collectives.
        environment: variables beside those of `rank_environment`.
        group: whether the process group is made before the call (and destroyed after it).
        show: let rank 0 print to the standard output of the caller, as it goes on.
        fresh: processes that import everything themselves, as kernels need that are interpreted or run on a GPU.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: a rank raised, died, or was not done in time.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        call = {"function": function, "arguments": arguments, "timeout": timeout, "group": group}
        (folder / "call").write_bytes(pickle.dumps(call))
        processes: list[subprocess.Popen | _Forked] = []
        try:
            for rank in range(world_size):
                own = os.environ | rank_environment(rank, world_size, port) | (environment or {})
                output = folder / f"output-{rank}"
                if fresh:
                    processes.append(_fresh(folder, own, None if show and rank == 0 else output))
                else:
                    processes.append(_Forked(folder, dict(own), output))
            in_time = _wait(processes, timeout)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                kill_session(process)
        if not in_time or any(codes):
            raise RankError(_failure(folder, function, codes, timeout if not in_time else None))
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _fresh(folder: Path, environment: dict[str, str], output: Path | None) -> subprocess.Popen:
    with contextlib.nullcontext() if output is None else output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: Sequence[subprocess.Popen | _Forked], timeout: float) -> bool:
    """Until all are done, or one has failed and the others had a moment to fail as well; False when time is up."""
    end, failed_at = time.monotonic() + timeout, None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + _GRACE:
            return True
        if now > end:
            return False
        time.sleep(_POLL)
    return True


def _failure(folder: Path, function: str, codes: list[int | None], timed_out_after: float | None) -> str:
    """What went wrong on each rank, the first to fail first."""
    said = []
    for rank, code in enumerate(codes):
        error = folder / f"error-{rank}"
        if error.exists():
            said.append((error.stat().st_mtime_ns, f"rank {rank} raised:\n{error.read_text()}"))
        elif code != 0:
            how = "was still running" if code is None else f"exited with {code}"
            output = (folder / f"output-{rank}").read_text(errors="replace")[-3000:]
            # After those that raised: a rank without an error of its own was waiting, or was killed.
            said.append((sys.maxsize, f"rank {rank} {how}; its output ends:\n{output}"))
    late = "" if timed_out_after is None else f", not done after {timed_out_after:g} s"
    return "\n".join([f"{function} on {len(codes)} ranks failed{late}", *(text for _, text in sorted(said))])


def _main(folder: Path) -> None:
    """What each process runs."""
    # Here, since tests that start no process import this file too.
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    call = pickle.loads((folder / "call").read_bytes())
    rank = os.environ["RANK"]
    try:
        if call["group"]:
            dist.init_process_group("gloo", timeout=timedelta(seconds=call["timeout"]))
        module, name = call["function"].split(":")
        result = getattr(importlib.import_module(module), name)(*call["arguments"])
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
