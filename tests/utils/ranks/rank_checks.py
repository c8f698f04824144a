"""What the tests of `ranks` run on each rank."""

import os
import time

import torch
import torch.distributed as dist


def add_up(value: float) -> tuple[int, float, int]:
    """This rank, the sum over ranks of ``value * (rank + 1)``, and torch's threads."""
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.get_num_threads()


def fail_on_one() -> None:
    """Rank 1 raises while the others wait for it."""
    if dist.get_rank() == 1:
        raise ValueError("no such luck")
    dist.barrier()


def hang(path: str) -> None:
    """Starts a process of its own that writes on and on, and waits for it."""
    if os.fork() == 0:
        while True:
            with open(path, "a") as file:
                file.write("still here\n")
            time.sleep(0.05)
    time.sleep(1000)
