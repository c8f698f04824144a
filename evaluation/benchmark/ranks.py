"""Processes that measure together: one for each GPU of this host, none of which outlives the others."""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank that waits for another in a collective gives up then; the first steps compile for minutes.
_TIMEOUT = timedelta(minutes=10)
# Seconds that ranks get to end when another has failed.
_GRACE = 5.0

Found = TypeVar("Found")


class RankError(RuntimeError):
    """A process raised or died; its cause has the traceback."""


def run_ranks(function: Callable[..., None], ranks: int, device: str, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``ranks`` processes that make up torch's default process group.

    When one fails, the others are ended.

    Args:
        function: importable by name.
        ranks: processes.
        device: ``"cuda"``, a GPU for each, or ``"cpu"``.
        arguments: the same for each; must pickle.

    Raises:
        RankError: a process raised or died.
    """
    with tempfile.TemporaryDirectory(prefix="foxlm-") as folder:
        context = mp.start_processes(
            _run, args=(ranks, device, folder, function, arguments), nprocs=ranks, join=False, start_method="spawn"
        )
        assert context is not None
        try:
            while not context.join(grace_period=_GRACE):
                pass
        except mp.ProcessRaisedException as error:
            raise RankError(f"rank {error.error_index} of {ranks}: {_last_line(error.msg)}") from error
        except mp.ProcessExitedException as error:
            how = f"was ended by {error.signal_name}" if error.signal_name else f"exited with {error.exit_code}"
            raise RankError(f"rank {error.error_index} of {ranks} {how}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def gathered(of_rank: Found) -> list[Found]:
    """What each rank gives, on all of them."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, of_rank)
    return everyone


def slowest(of_ranks: list[list[float]]) -> list[float]:
    """Of calls that all ranks make together: of each call, the rank that is done last."""
    return [max(of_call) for of_call in zip(*of_ranks, strict=True)]


def _last_line(traceback: str) -> str:
    """What was raised, of a traceback: the first line of its message."""
    raised = [line for line in traceback.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return raised[-1] if raised else traceback.strip()


def _run(rank: int, ranks: int, device: str, folder: str, function: Callable[..., None], arguments: tuple) -> None:
    if sys.platform == "linux":
        # All are on this host: no name of a network card or of the host needs to be found.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(f"{folder}/store", ranks),
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
