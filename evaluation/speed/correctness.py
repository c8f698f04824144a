"""The gate before any timing: is what an implementation computes the attention it is taken for?

Some rows of queries are computed densely, in float64. With an output gradient that is zero in all other rows, they
determine every gradient: of all keys and values, and of all gates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Inputs

_LAST, _SCATTERED = 32, 32
# How much worse than torch's own rounding in the same type an implementation may be.
_FACTOR = 4.0
# Room for sums in float32 in another order, which matters only where inputs are float32.
_FLOAT32_SUMS = 1e-6

Gradients = dict[str, Tensor]
"""``out`` and the gradients ``q``, ``k``, ``v``, ``log_f`` of one query head and of the heads of keys, values and gates
that serve it; the first two for the sampled rows only."""


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
        batch, tokens = inputs.q.shape[:2]
        generator = torch.Generator().manual_seed(seed)
        earlier = torch.randperm(max(tokens - _LAST, 0), generator=generator)[:_SCATTERED]
        rows = torch.cat([earlier.sort().values, torch.arange(max(tokens - _LAST, 0), tokens)])
        pace = inputs.gates_of_queries()[-1].double().mean(0)
        heads = tuple(sorted({int(pace.argmin()), int(pace.argmax())}))
        return cls(batch - 1, heads, rows.to(inputs.q.device))

    def only(self, dout: Tensor) -> Tensor:
        """``dout``, ``[B, T, H, D]``, with zeros in all but the sampled rows."""
        return torch.zeros_like(dout).index_copy_(1, self.rows, dout.index_select(1, self.rows))


@dataclass(frozen=True)
class Reference:
    """What is right for a sample, and how near to it torch comes in the type of the inputs.

    Attributes:
        exact: for each head, from float64.
        error: for each head and tensor, relative distance of the same computation rounded as kernels round.
    """

    exact: list[Gradients]
    error: list[dict[str, float]]


def reference(inputs: Inputs, sample: Sample, gated: bool) -> Reference:
    """The sampled rows in float64, with the forget gates or as if there were none."""
    inputs = inputs if gated else inputs.open()
    exact, errors = [], []
    for head in sample.heads:
        right = attend_densely(inputs, sample, head, torch.float64)
        rounded = attend_densely(inputs, sample, head, inputs.q.dtype)
        exact.append(right)
        errors.append({name: relative_error(rounded[name], right[name]) for name in right})
    return Reference(exact, errors)


def attend_densely(inputs: Inputs, sample: Sample, head: int, dtype: torch.dtype) -> Gradients:
    """Attention of the sampled rows and its gradients; what kernels hold in ``dtype`` is rounded to it on the way.

    Args:
        inputs: of all heads.
        sample: which rows.
        head: of the queries. Where others share its keys or gates, their part of those gradients is added.
        dtype: to round to.
    """
    results = _one_head(inputs, sample, head, dtype)
    heads = inputs.q.shape[2]
    for names, count in ((("k", "v"), inputs.k.shape[2]), (("log_f",), inputs.log_f.shape[2])):
        size = heads // count
        for other in range(head // size * size, head // size * size + size):
            if other != head:
                part = _one_head(inputs, sample, other, dtype)
                results |= {name: results[name] + part[name] for name in names}
    return results


def _one_head(inputs: Inputs, sample: Sample, head: int, dtype: torch.dtype) -> Gradients:
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    def of_head(x: Tensor) -> Tensor:
        return x[sample.batch, :, head * x.shape[2] // inputs.q.shape[2]]

    q, k, v, dout = (of_head(x).to(wide) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    q, dout = q[sample.rows], dout[sample.rows]
    c = of_head(inputs.log_f).double().cumsum(0)
    bias = (c[sample.rows, None] - c).to(wide)
    bias.masked_fill_(torch.arange(len(c), device=c.device) > sample.rows[:, None], float("-inf"))
    weights = (inputs.scale * (q @ k.T)).add_(bias).softmax(-1)
    out = rounded(rounded(weights) @ v)
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = weights * ((dout @ v.T) - delta)
    dc = (-dscores.sum(0, dtype=torch.float64)).index_add_(0, sample.rows, dscores.sum(-1, dtype=torch.float64))
    return {
        "out": out,
        "q": rounded(inputs.scale * (rounded(dscores) @ k)),
        "k": rounded(inputs.scale * (rounded(dscores).T @ q)),
        "v": rounded(rounded(weights).T @ dout),
        "log_f": dc.flip(0).cumsum(0).flip(0),
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|`` in the Euclidean norm; NaN if ``found`` has one."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


@dataclass(frozen=True)
class Check:
    """How an implementation compares with the reference.

    Attributes:
        errors: for each tensor, the largest relative distance of any head.
        limits: what was allowed there.
        fault: the first that is beyond its limit, in words; None if all are within.
    """

    errors: dict[str, float]
    limits: dict[str, float]
    fault: str | None


def check(out: Tensor, grads: Gradients, sample: Sample, right: Reference, eps: float) -> Check:
    """Hold an implementation to the reference.

    Args:
        out: ``[B, T, H, D]``.
        grads: gradients of q, k, v, and of log_f unless it has none, each of the shape of what it is of.
        sample: rows to compare; the output gradient was zero in all others.
        right: their reference.
        eps: attention weight that pruning may take from a row.
    """
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}
    fault = None
    for head, exact, rounding in zip(sample.heads, right.exact, right.error, strict=True):
        for name, x in {"out": out, **grads}.items():
            found = x[sample.batch, :, head * x.shape[2] // out.shape[2]]
            error = relative_error(found[sample.rows] if name in ("out", "q") else found, exact[name])
            limit = _FACTOR * (rounding[name] + eps) + _FLOAT32_SUMS
            # Not the other way round: a NaN is within no limit.
            if not error <= limit and fault is None:
                what = "output" if name == "out" else f"gradient of {name}"
                fault = f"{what} of head {head} is off by {error:.1e}, {limit:.1e} allowed"
            if name not in errors or not error <= errors[name]:
                errors[name], limits[name] = error, limit
    return Check(errors, limits, fault)
