"""What spawned processes of the benchmark on several GPUs run in its tests: some of it goes wrong on purpose."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from foxlm import FoxForCausalLM
from foxlm.evaluation.benchmark.train_multi_gpu import fully_sharded
from foxlm.kernels.context_parallel.api import context_parallel_attention


def raise_on_one(rank: int, folder: str) -> None:
    """Rank 1 raises; the others wait for it far longer than a test may take."""
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    if rank == 1:
        raise ValueError("the second one will not\nand says why")
    time.sleep(600)


def losing_a_part(model: FoxForCausalLM, mesh: DeviceMesh) -> None:
    """Rank 1 loses its part of one weight."""
    fully_sharded(model, mesh)
    if mesh.get_local_rank() == 1:
        with torch.no_grad():
            weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
            assert isinstance(weight, DTensor)
            weight.to_local().zero_()


def failing_by_length(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, *, length: int, **options) -> Tensor:
    """Context parallelism that is right but at two lengths.

    At `LOST_AT`, the head that forgets slowest attends to no key before rank 1's tokens, there or later; at
    `KILLED_AT` rank 1 dies as if the system had killed it.
    """
    if options["context"].rank == 1:
        if length == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        lost = torch.zeros_like(log_f, dtype=torch.bool)
        lost[:, 0, -1] = length == LOST_AT
        log_f = log_f.masked_fill(lost, float("-inf"))
    return context_parallel_attention(q, k, v, log_f, length=length, **options)


LOST_AT, KILLED_AT = 256, 64
