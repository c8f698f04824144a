"""The check of an attention before it is timed: a sample of its rows against dense attention in float64.

With an output gradient that is zero in all other rows, the sampled rows determine every gradient: of all keys and
values, and of all gates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import FACTOR, fault_of
from ..results import Row
from .inputs import Inputs

_LAST, _SCATTERED = 32, 32
# Sums in float32 in another order, which matters only where inputs are float32.
_FLOAT32_SUMS = 1e-6

Gradients = dict[str, Tensor]
"""``out`` and the gradients of ``q``, ``k``, ``v`` and ``log_f`` of one query head and of the heads of keys, values and
gates that serve it; the first two for the sampled rows only."""


@dataclass(frozen=True)
class Sample:
    """Which rows are computed densely.

    Attributes:
        batch: index of the sequence.
        heads: indices of query heads.
        rows: ``[R]`` int64 indices of queries, ascending.
    """

    batch: int
    heads: tuple[int, ...]
    rows: Tensor

    @classmethod
    def of(cls, inputs: Inputs, seed: int) -> "Sample":
        """The last queries and some others, in the last sequence, of the heads that forget fastest and slowest."""
        batch, tokens, heads, _ = inputs.layer.q.shape
        generator = torch.Generator().manual_seed(seed)
        earlier = torch.randperm(max(tokens - _LAST, 0), generator=generator)[:_SCATTERED]
        rows = torch.cat([earlier.sort().values, torch.arange(max(tokens - _LAST, 0), tokens)])
        log_f = inputs.layer.log_f
        pace = log_f[-1].double().mean(0).repeat_interleave(heads // log_f.shape[2])
        return cls(batch - 1, tuple(sorted({int(pace.argmin()), int(pace.argmax())})), rows.to(log_f.device))

    def only(self, dout: Tensor) -> Tensor:
        """``dout``, ``[B, T, H, D]``, with zeros in all but the sampled rows."""
        return torch.zeros_like(dout).index_copy_(1, self.rows, dout.index_select(1, self.rows))


class Reference:
    """Compares attention with the rows of ``sample`` in float64; attention without gates on `Inputs.open`."""

    def __init__(self, inputs: Inputs, sample: Sample) -> None:
        self.sample = sample
        self._exact = [attend_densely(inputs, sample, head, torch.float64) for head in sample.heads]
        # How near torch comes in the dtype of the inputs.
        rounded = [attend_densely(inputs, sample, head, inputs.layer.q.dtype) for head in sample.heads]
        self._rounding = [
            {name: relative_error(of_head[name], right[name]) for name in right}
            for of_head, right in zip(rounded, self._exact, strict=True)
        ]

    def fault(self, found: Gradients, eps: float, row: Row) -> str | None:
        """What is wrong, in words; None if nothing is. Adds ``errors`` and ``limits`` by tensor to ``row``.

        Args:
            found: ``out``, ``[B, T, H, D]``, and gradients of the shapes of the inputs, for `Sample.only`; ``log_f``
                may be missing.
            eps: attention weight that pruning may take from a row.
            row: of what is checked.
        """
        errors: dict[str, float] = {}
        limits: dict[str, float] = {}
        fault = None
        for head, exact, rounding in zip(self.sample.heads, self._exact, self._rounding, strict=True):
            for name, x in found.items():
                of_head = x[self.sample.batch, :, head * x.shape[2] // found["out"].shape[2]]
                error = relative_error(of_head[self.sample.rows] if name in ("out", "q") else of_head, exact[name])
                limit = FACTOR * (rounding[name] + eps) + _FLOAT32_SUMS
                what = "output" if name == "out" else f"gradient of {name}"
                fault = fault or fault_of(f"{what} of head {head} is", error, limit)
                # Also if it is NaN.
                if not error <= errors.get(name, -1.0):
                    errors[name], limits[name] = error, limit
        row |= {"errors": errors, "limits": limits}
        return fault


def attend_densely(inputs: Inputs, sample: Sample, head: int, dtype: torch.dtype) -> Gradients:
    """Attention of the sampled rows and its gradients, rounded to ``dtype`` where kernels round.

    Where other query heads share the keys or gates of ``head``, their part of those gradients is added.
    """
    results = _one_head(inputs, sample, head, dtype)
    layer = inputs.layer
    heads = layer.q.shape[2]
    for names, count in ((("k", "v"), layer.k.shape[2]), (("log_f",), layer.log_f.shape[2])):
        size = heads // count
        for other in range(head // size * size, head // size * size + size):
            if other != head:
                part = _one_head(inputs, sample, other, dtype)
                results |= {name: results[name] + part[name] for name in names}
    return results


def _one_head(inputs: Inputs, sample: Sample, head: int, dtype: torch.dtype) -> Gradients:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = inputs.layer

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    def of_head(x: Tensor) -> Tensor:
        return x[sample.batch, :, head * x.shape[2] // layer.q.shape[2]]

    q, k, v, dout = (of_head(x).to(wide) for x in (layer.q, layer.k, layer.v, inputs.dout))
    q, dout = q[sample.rows], dout[sample.rows]
    c = of_head(layer.log_f).double().cumsum(0)
    bias = (c[sample.rows, None] - c).to(wide)
    bias.masked_fill_(torch.arange(len(c), device=c.device) > sample.rows[:, None], float("-inf"))
    weights = (layer.scale * (q @ k.T)).add_(bias).softmax(-1)
    out = rounded(rounded(weights) @ v)
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = weights * ((dout @ v.T) - delta)
    dc = (-dscores.sum(0, dtype=torch.float64)).index_add_(0, sample.rows, dscores.sum(-1, dtype=torch.float64))
    return {
        "out": out,
        "q": rounded(layer.scale * (rounded(dscores) @ k)),
        "k": rounded(layer.scale * (rounded(dscores).T @ q)),
        "v": rounded(rounded(weights).T @ dout),
        "log_f": dc.flip(0).cumsum(0).flip(0),
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|`` in the Euclidean norm; NaN if ``found`` has one."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()
