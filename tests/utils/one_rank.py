"""A sequence whose shards all lie on one rank that has no group."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from foxlm.kernels.context_parallel.group import Shards
from foxlm.kernels.context_parallel.partition import Segment, TokenSplit


class Alone(Shards):
    """All of a sequence, on one rank that has no group."""

    def __init__(self, length: int) -> None:
        context: Any = SimpleNamespace(rank=0)
        super().__init__(context, TokenSplit(length, 1, [Segment(0, 0, length)]))

    def gather(self, own: Tensor) -> Tensor:
        return own[None]
