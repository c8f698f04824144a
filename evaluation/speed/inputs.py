"""What the attention benchmark runs on: shapes, and synthetic queries, keys and forget gates.

`recorded` has those of a model on real text. Of the synthetic ones, queries and keys are normalized per head as QK-norm
leaves them, so that ``|scale * q . k| <= sqrt(D)``. Most heads of a trained model forget within a hundred tokens and
some hardly ever; so do these, each gate noisy around its head's decay time.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foxlm.kernels.pruning.rules import centered

# Tokens in which a head forgets, the range of the many and of the few.
_SHORT, _LONG = (1.0, 100.0), (1e3, 1e6)
_SHARE_LONG = 0.2
_GATE_NOISE = 0.5


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
        """Floating-point operations of the causal products of a forward pass, or of forward and backward.

        Two products forward, five backward, each ``2 B H T^2 D``, of which causality leaves half.
        """
        forward = 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim / 2.0
        return 3.5 * forward if backward else forward

    def traffic(self, itemsize: int, backward: bool) -> float:
        """Bytes that a forward pass, or forward and backward, must read and write, each tensor once.

        Pruning saves none: every key is read by its own query at least. Gates are float32, one for each query head.

        Args:
            itemsize: bytes of a number of queries, keys and values.
            backward: whether the backward pass counts, which reads the inputs, the output and its gradient, and writes
                the gradients of the inputs.
        """
        rows = self.batch * self.tokens
        queries = float(rows * self.heads * self.head_dim * itemsize)
        keys_values = 2.0 * rows * (self.kv_heads or self.heads) * self.head_dim * itemsize
        gates = 4.0 * rows * self.heads
        inputs = queries + keys_values + gates
        forward = inputs + queries
        return forward + (inputs + 2.0 * queries) + inputs if backward else forward


class Inputs(NamedTuple):
    """Inputs of one attention layer.

    Attributes:
        q, dout: ``[B, T, H, D]`` queries, and the gradient of the output.
        k, v: ``[B, T, G, D]`` keys and values.
        log_f: ``[B, T, Hf]`` float32 log forget gates, ``Hf`` one of ``H``, ``G`` and 1.
        scale: multiplies ``q . k``.
        logit_bound: ``U`` of the rule ``paper``: a number, or ``[B, H]``; None if only the keys themselves tell.
        centers: whether by the rule ``tight`` `centered` keys tell what may be left out.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_f: Tensor
    dout: Tensor
    scale: float
    logit_bound: float | Tensor | None
    centers: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(x.nbytes for x in self if isinstance(x, Tensor))

    def open(self) -> "Inputs":
        """The same with gates that never forget, where nothing can be pruned."""
        return self._replace(log_f=torch.zeros_like(self.log_f))

    def gates_of_queries(self) -> Tensor:
        """``[B, T, H]`` log forget gates, one for each query head."""
        return self.log_f.repeat_interleave(self.q.shape[2] // self.log_f.shape[2], dim=2)

    def searched_keys(self, rule: str) -> Tensor:
        """The keys by which ``rule`` finds what may be left out."""
        return centered(self.k) if self.centers and rule == "tight" else self.k


def spread_decay_times(heads: int) -> Tensor:
    """``[heads]`` float64 decay times in tokens, ascending.

    A fifth of the heads, at least one, forgets in 1e3 to 1e6 tokens and the others in 1 to 100, evenly spread in the
    logarithm: a random draw would move the share of tiles kept by percents from seed to seed.
    """
    long = max(1, int(_SHARE_LONG * heads))

    def spread(low: float, high: float, count: int) -> Tensor:
        return low * (high / low) ** ((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1))

    return torch.cat([spread(*_SHORT, heads - long), spread(*_LONG, long)])


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
    # As it follows from the norms, both sqrt(D).
    return Inputs(q, k, v, log_f, dout, scale=case.head_dim**-0.5, logit_bound=case.head_dim**0.5)
