"""accelerate's FSDP on CPU processes, in tests only.

accelerate shards on accelerators only: on CPU processes it leaves FSDP out without a word and replicates. What it does
from then on works on any device. So in tests it is told that these CPU processes are several GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _prepare_backend(self: PartialState, *_: object, **__: object) -> tuple[str, DistributedType]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def _set_device(self: PartialState) -> None:
    self.device = torch.device("cpu")


@contextmanager
def accelerate_shards() -> Iterator[None]:
    """To be entered before anything of accelerate's state is made."""
    with mock.patch.multiple(PartialState, _prepare_backend=_prepare_backend, set_device=_set_device):
        yield
