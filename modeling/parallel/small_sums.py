"""Sums of small tensors over GPUs that can map each other's memory: one kernel, no NCCL.

Imported when they are first wanted, since registering an operator takes time.
"""

import contextlib
import platform
import weakref
from typing import Any

import torch
from torch import Tensor

from ...kernels.operators import NAMESPACE

# Bytes. Above, a sum is bound by what it moves, and NCCL moves less.
_SMALL = 128 * 1024
# By a group's name: the group, and this rank's part of the memory that its GPUs share, None where they cannot.
_SHARED_MEMORY: dict[str, tuple[weakref.ref, Tensor | None]] = {}


def is_small(x: Tensor) -> bool:
    """Whether `sum_small` takes ``x``."""
    size = x.numel() * x.element_size()
    fits = 0 < size <= _SMALL and size % 16 == 0 and x.dtype in (torch.bfloat16, torch.float32)
    return fits and type(x) is Tensor and x.is_contiguous() and not x.requires_grad


@torch.library.custom_op(f"{NAMESPACE}::sum_small", mutates_args=())
def sum_small(x: Tensor, group: str) -> Tensor:
    """Sum of ``x``, for which `is_small`, over the ranks of a group that shares memory: one kernel, no NCCL.

    An operator of our own, so that a captured step finds the shared memory where it is: an argument would be copied.
    """
    memory = _SHARED_MEMORY[group][1]
    assert memory is not None, "share_memory has said so"
    part = memory.view(x.dtype)[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(part, x, "sum", group)


@sum_small.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _may_share(mesh: Any) -> bool:
    return mesh.ndim == 1 and mesh.device_type == "cuda"


def share_memory(mesh: Any, device: torch.device) -> str | None:
    """The name of the group of a sharded weight's device mesh, if its GPUs can map each other's memory for `sum_small`.

    The first call for a group asks all ranks, which must be here together, and they decide alike.
    """
    if not _may_share(mesh):
        return None
    group = mesh.get_group()
    name = group.group_name
    known, memory = _SHARED_MEMORY.get(name, (lambda: None, None))
    # Names are used again once a group is gone.
    if known() is not group:
        memory = _map_memory(group, device)
        _SHARED_MEMORY[name] = weakref.ref(group), memory
    return None if memory is None else name


def _map_memory(group: Any, device: torch.device) -> Tensor | None:
    """``[_SMALL]`` uint8 that all ranks of ``group`` have mapped, or None on all of them."""
    here: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(here, (platform.node(), device.index), group=group)
    hosts, devices = (set(x) for x in zip(*here, strict=True))
    if len(hosts) > 1 or len(devices) < len(here):
        return None
    # A failure of any kind, on any rank, leaves sums to NCCL. All take a step or none: they wait for each other.
    memory: Any = None
    for step in (_allocate, _meet):
        done = False
        with contextlib.suppress(Exception):
            memory = step(memory, group, device)
            done = True
        if not _all_agree(done, group, device):
            return None
    return memory


def _allocate(memory: None, group: Any, device: torch.device) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric

    return symmetric.empty(_SMALL, dtype=torch.uint8, device=device)


def _meet(memory: Tensor, group: Any, device: torch.device) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric

    symmetric.rendezvous(memory, group.group_name)
    return memory


def _all_agree(done: bool, group: Any, device: torch.device) -> bool:
    flag = torch.tensor(int(done), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag)
