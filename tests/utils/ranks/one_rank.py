"""A sequence whose shards all lie on one rank that has no group."""

from torch import Tensor

from foxlm.kernels.context_parallel.partition import Segment, TokenSplit
from foxlm.kernels.context_parallel.sequence import ShardedSequence
from foxlm.kernels.context_parallel.shards import CommunicationVolume


class Alone(ShardedSequence):
    """All of a sequence, on one rank that has no group."""

    def __init__(self, length: int) -> None:
        split = TokenSplit(length, 1, [Segment(0, 0, length)])
        super().__init__(None, 0, split, CommunicationVolume())

    def gather(self, own: Tensor) -> Tensor:
        return own[None]
