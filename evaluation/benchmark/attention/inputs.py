"""What the attention benchmark runs on: synthetic inputs, or those of a model that reads text.

Synthetic queries and keys are normalized per head as QK-norm leaves them, so that ``|scale * q . k| <= sqrt(D)``. Most
heads of a trained model forget within a hundred tokens and some hardly ever; so do these, each gate noisy around its
head's decay time.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flops import ATTENTION_TRAINING
from ...recording import AttentionInputs, record_attention
from ..models import Workload, spread_decay_times

_GATE_NOISE = 0.5
# Of a recorded layer.
_TENSORS = ("q", "k", "v", "log_f")


@dataclass(frozen=True)
class Case:
    """A shape of one attention layer.

    Attributes:
        batch: sequences ``B``.
        heads: query heads ``H``.
        head_dim: size ``D`` of a head.
        tokens: tokens ``T`` of each sequence.
        kv_heads: heads ``G`` of keys and values; as many as of queries by default.
    """

    batch: int
    heads: int
    head_dim: int
    tokens: int
    kv_heads: int | None = None

    @classmethod
    def parse(cls, text: str, kv_heads: int | None = None) -> "Case":
        """``"2x24x64x16384"``, that is ``B x H x D x T``, with ``kv_heads`` heads of keys and values."""
        if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){3}", text):
            raise ValueError(
                f"--case must be four positive integers BxHxDxT such as 2x24x64x16384, each below 10**9, got {text!r}"
            )
        batch, heads, head_dim, tokens = map(int, text.split("x"))
        return cls(batch, heads, head_dim, tokens, kv_heads)

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.head_dim}x{self.tokens}"

    def flops(self, backward: bool) -> float:
        """FLOPs of the causal matmuls of a forward pass, or of forward and backward.

        Two matmuls forward, five backward, each ``2 B H T^2 D``, of which causality leaves half.
        """
        forward = 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim / 2.0
        return ATTENTION_TRAINING * forward if backward else forward


class Inputs(NamedTuple):
    """Inputs of one attention layer, and ``dout``, ``[B, T, H, D]``, the gradient of its output."""

    layer: AttentionInputs
    dout: Tensor

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(x.nbytes for x in (*self.layer[1:5], self.dout))

    def open(self) -> "Inputs":
        """The same with gates that never forget, where nothing can be pruned."""
        return self._replace(layer=self.layer._replace(log_f=torch.zeros_like(self.layer.log_f)))


def make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Draw the inputs of ``case``; each log gate is ``-exp(0.5 n) / tau`` with ``n`` normal and ``tau`` of its head."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.batch, case.tokens, case.heads, case.head_dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def normalized() -> Tensor:
        return torch.nn.functional.rms_norm(normal(*shape), shape[-1:]).to(dtype)

    times = spread_decay_times(case.heads).to(device=device, dtype=torch.float32)
    log_f = -normal(*shape[:-1]).mul_(_GATE_NOISE).exp_() / times
    q, k, v, dout = normalized(), normalized(), normal(*shape).to(dtype), normal(*shape).to(dtype)
    # The bound follows from the norms, both sqrt(D).
    bound = torch.full((case.batch, case.heads), case.head_dim**0.5, device=device)
    return Inputs(AttentionInputs(0, q, k, v, log_f, case.head_dim**-0.5, logit_bound=bound), dout)


def record_inputs(
    workload: Workload, rows: int, length: int, dtype: torch.dtype
) -> tuple[Case, Inputs, dict[str, Any]]:
    """What enters attention in every layer of a model that reads ``rows`` rows of ``length`` tokens, as one batch.

    Args:
        workload: with a model and its text.
        rows: of text.
        length: tokens of each.
        dtype: of the weights, and so of queries, keys and values.

    Returns:
        The case, the inputs (layer by layer, in each row by row), and as facts ``model``, ``text``, ``layers``,
        ``rows`` and ``length``.

    Raises:
        ValueError, OSError: model or text cannot be read, there is less text, or the model has no forget gates.
    """
    model = workload.build(dtype)
    if model.config.forget_gate == "none":
        raise ValueError(f"--model must have forget gates to be measured, got forget_gate 'none' in {workload.model}")
    ids = workload.ids(model.config.vocab_size, rows, length, repeat=False)
    # In the host's memory at first: the model and all layers beside their copy may not fit on the device.
    found: list[list[AttentionInputs]] = []
    for row in ids.split(1):
        with torch.no_grad(), record_attention(model) as layers:
            model.model(row, use_cache=False)
        found.append([one._replace(**{name: getattr(one, name).cpu() for name in _TENSORS}) for one in layers])
    del model, layers
    parts = [layer for of_layer in zip(*found, strict=True) for layer in of_layer]
    q, k, v, log_f = (torch.cat([getattr(one, x) for one in parts]).to(workload.device) for x in _TENSORS)
    # Without QK-norm no layer has a bound.
    bounds = [one.logit_bound.float().expand(q.shape[2]) for one in parts if one.logit_bound is not None]
    bound = torch.stack(bounds).to(q.device) if len(bounds) == len(parts) else None
    generator = torch.Generator(workload.device).manual_seed(workload.seed)
    dout = torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype)
    batch, tokens, heads, head_dim = q.shape
    facts = workload.facts() | {"layers": batch // rows, "rows": rows, "length": length}
    layer = AttentionInputs(0, q, k, v, log_f, parts[0].scale, parts[0].centers, bound)
    return Case(batch, heads, head_dim, tokens, k.shape[2]), Inputs(layer, dout), facts
