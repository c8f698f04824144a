"""accelerate's FSDP on CPU processes, in tests only.

accelerate shards on accelerators only: on CPU processes it leaves FSDP out without a word and replicates. What it does
from then on works on any device. So in tests it is told that these CPU processes are several GPUs.
"""

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def let_accelerate_shard() -> None:
    """From now on, in this process; before anything of accelerate's state is made."""

    def prepare_backend(self: PartialState, *_: object, **__: object) -> tuple[str, DistributedType]:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
