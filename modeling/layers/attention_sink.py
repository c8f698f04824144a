"""An attention sink: a key and a value of each key/value head that every query sees and no gate decays."""

import torch
from torch import Tensor, nn

from ..configuration_fox import FoxConfig
from ..parallel.tensor_parallel import local_part


class FoxAttentionSink(nn.Module):
    """Key and value of an attention sink (`FoxConfig.attention_sink`).

    Pretrained Transformers give much of their attention to the first key, which a forget gate would take away; a sink
    stays (Xiao et al., arXiv 2309.17453, who keep the first keys). A new one starts from zeros: of each row it then
    takes the weight of a key with logit 0, for a value of 0.

    Attributes:
        key, value: ``[G, D]``, as attention takes them: the key normalized and, at position 0, rotated.
    """

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        _, kv_heads, head_dim = config.heads
        self.key = nn.Parameter(torch.zeros(kv_heads, head_dim))
        self.value = nn.Parameter(torch.zeros(kv_heads, head_dim))

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value for queries ``q``, in their dtype; under tensor parallelism of this rank's heads."""
        return local_part(self.key).to(q.dtype), local_part(self.value).to(q.dtype)
