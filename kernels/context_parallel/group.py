"""Context parallelism: one sequence on several ranks, each with the tokens of some segments of it.

What the layers need of other ranks' tokens, beside keys and values (`attention`), is little:

* Running sums of gates: the totals of each segment, so that each may begin with what was summed before it. They are
  exchanged in float64, so decay across ranks is as exact as within one.
* Hard resets and starts of packed sequences: the last one of each segment.
* Token shift: the last real state of each segment.

Each is one small exchange of all ranks with all, differentiable, without waiting for the device.

What a rank returns as its loss is the loss of the whole sequence, so gradients are those of a mean over ranks, as
data-parallel engines (DDP, FSDP) take it.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .partition import NAMED_SPLITS, Split, TokenSplit
from .sequence import ShardedSequence
from .shards import CommunicationVolume, all_gather


class ContextParallel:
    """A group of ranks that share the tokens of each sequence.

    Attributes:
        group: its process group.
        rank, ranks: of this process within the group, and how many there are.
        traffic: how much attention has fetched.

    Example:
        >>> mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("cp",))  # doctest: +SKIP
        >>> model.set_context_parallel(ContextParallel(mesh["cp"]))  # doctest: +SKIP
    """

    def __init__(self, group: "DeviceMesh | dist.ProcessGroup | None" = None, split: str | Split = "zigzag") -> None:
        """
        Args:
            group: a mesh of one dimension or a process group; all processes by default.
            split: who gets which tokens: ``"zigzag"``, ``"contiguous"``, or a function from the numbers of tokens and
                of ranks to `Segment`s, the same on all ranks.

        Raises:
            ValueError: processes were not started as a group, or an argument is not as above.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "context parallelism needs a process group, got a single process without one: start the program with "
                "torchrun or accelerate launch, and call torch.distributed.init_process_group"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be a mesh of one dimension, such as mesh['cp'], got {group.ndim} dimensions"
                )
            group = group.get_group()
        if isinstance(split, str) and split not in NAMED_SPLITS:
            raise ValueError(f"split must be one of {list(NAMED_SPLITS)} or a function, got {split!r}")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(f"group must hold this process, rank {dist.get_rank()}; it does not")
        self.traffic = CommunicationVolume()
        self._split = NAMED_SPLITS[split] if isinstance(split, str) else split
        self.shards = functools.lru_cache(maxsize=16)(self._shards)
        self._compared = False

    @torch.no_grad()
    def check_same(self, **inputs: Tensor | None) -> None:
        """Compare what the ranks were called with, the first time: later calls do not synchronise for it.

        Args:
            inputs: by name; of floating-point ones only shapes are compared, which may round differently.

        Raises:
            ValueError: ranks have different ones. All of them raise it, and none is left waiting.
        """
        if self._compared or torch.compiler.is_compiling():
            return
        device = next(x.device for x in inputs.values() if x is not None)
        own = torch.stack([_fingerprint(x, device) for x in inputs.values()])
        found = own.new_empty(self.ranks, *own.shape)
        all_gather(found.flatten(0, 1), own, group=self.group)
        differ = (found != found[0]).any(-1).any(0).tolist()
        if any(differ):
            names = [name for name, differs in zip(inputs, differ, strict=True) if differs]
            raise ValueError(
                f"with context parallelism all {self.ranks} ranks of a group must be given the same whole sequences, "
                f"got different {', '.join(names)}: does a sampler give each rank other rows?"
            )
        self._compared = True

    def _shards(self, length: int) -> ShardedSequence:
        split = TokenSplit(length, self.ranks, self._split(length, self.ranks))
        return ShardedSequence(self.group, self.rank, split, self.traffic)

    # A copy of a model on this rank is of the same group.
    def __deepcopy__(self, memo: dict) -> "ContextParallel":
        return self

    # What is stored or sent to another process is of none: the model comes without context parallelism.
    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.ranks})"


def _fingerprint(x: Tensor | None, device: torch.device) -> Tensor:
    """``[4]`` int64: the shape of an argument, and a number that its values have."""
    shape, values = [0, 0, 0], torch.zeros((), dtype=torch.int64, device=device)
    if x is not None:
        shape = [*x.shape, 0, 0, 0][:3]
        if not x.is_floating_point():
            flat = x.to(device, torch.int64).flatten()
            values = (flat * (torch.arange(len(flat), device=device) % 8191 + 1)).sum()
    return torch.cat([torch.tensor(shape, device=device), values[None]])
