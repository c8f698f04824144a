"""Inputs of forgetting attention for tests: gates of every speed, padding of every kind, and how results compare."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foxlm.kernels import attention as public

# The public function as tests use it: with bad arguments too, and with one type of result each.
forgetting_attention: Callable[..., Any] = public.forgetting_attention
attention: Callable[..., tuple[Tensor, Tensor]] = functools.partial(forgetting_attention, return_lse=True)

# Each with how often it is drawn. Mostly mild ones, so that most queries see far.
GATES = {0.0: 6, -1e-6: 4, -0.03: 12, -1.0: 3, -50.0: 1, -1e4: 1, -torch.inf: 1}


def draw_gates(*shape: int, generator: torch.Generator | None = None, dtype: torch.dtype) -> Tensor:
    """Log gates from exactly 0 to -inf, in random order."""
    weights = torch.tensor(list(GATES.values()), dtype=torch.float64)
    count = torch.Size(shape).numel()
    drawn = torch.multinomial(weights, max(count, 1), replacement=True, generator=generator)[:count]
    return torch.tensor(list(GATES), dtype=dtype)[drawn].reshape(shape)


def draw_inputs(
    keys: int,
    queries: int | None = None,
    *,
    batch: int = 2,
    heads: tuple[int, int, int] = (4, 2, 4),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Random ``[q, k, v, log_f]`` that require gradients; ``heads`` are those of queries, keys and gates."""
    generator = torch.Generator().manual_seed(seed)
    h, g, hf = heads
    shapes = [(keys if queries is None else queries, h), (keys, g), (keys, g)]
    qkv = [torch.randn(batch, t, n, head_dim, generator=generator, dtype=torch.float64) for t, n in shapes]
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    log_f = draw_gates(batch, keys, hf, generator=generator, dtype=gate_dtype)
    return [x.requires_grad_() for x in (*(x.to(dtype) for x in qkv), log_f)]


def padding_mask(kind: str, batch: int, keys: int) -> Tensor:
    """``[B, T]`` int64 mask with 1 for real tokens; every row of the batch differs.

    ``kind``: "left", "right", "holes" (padding anywhere) or "empty" (the first row has no real token).
    """
    index = torch.arange(keys)
    mask = torch.ones(batch, keys, dtype=torch.int64)
    for b in range(batch):
        padding = keys * (b + 1) // (batch + 2)
        if kind == "left":
            mask[b] = index >= padding
        elif kind == "right":
            mask[b] = index < keys - padding
        elif kind == "holes":
            mask[b] = (index * (b + 2) + b) % 3 != 0
        else:
            mask[b] = b > 0
    return mask


def poisoned(inputs: list[Tensor], tokens: Tensor, names: str) -> list[Tensor]:
    """``inputs`` with NaN at those tokens ``[B, T]`` of the tensors named in ``names`` ("qkv")."""
    result = []
    for name, x in zip("qkvf", inputs, strict=True):
        x = x.detach().clone()
        if name in names:
            x[tokens] = torch.nan
        result.append(x.requires_grad_())
    return result


def draw_cotangents(q: Tensor) -> list[Tensor]:
    """Random gradients of the output and log-sum-exp of queries ``q``, in its type and on its device."""
    generator = torch.Generator().manual_seed(1)
    batch, queries, heads, _ = q.shape
    shapes = (q.shape, (batch, heads, queries))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(q) for shape in shapes]


def output_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Run ``function`` and pull cotangents of output and log-sum-exp, by default random ones, back to every input."""
    out, lse = function(*inputs, **options)
    if cotangents is None:
        cotangents = draw_cotangents(inputs[0])
    # A fully masked row has log-sum-exp -inf, a constant: its cotangent must change nothing.
    cotangents = [d.to(x) for d, x in zip(cotangents, (out, lse), strict=True)]
    gradients = torch.autograd.grad([out, lse], inputs, cotangents, materialize_grads=True)
    names = ("dq", "dk", "dv", "dlog_f", "dsink_k", "dsink_v")
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, gradients, strict=False))}


def with_sink(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``function`` of six tensors: the key and value of a sink behind the others."""
    return lambda *inputs, **options: function(*inputs[:4], sink_k=inputs[4], sink_v=inputs[5], **options)


def draw_sink(inputs: list[Tensor]) -> list[Tensor]:
    """``inputs`` of `draw_inputs` and a key and value of a sink, ``[G, D]``, which many rows give much weight."""
    k = inputs[1]
    generator = torch.Generator().manual_seed(1)
    sink = 3.0 * torch.randn(2, *k.shape[2:], generator=generator, dtype=torch.float64)
    return [*inputs, *(x.to(k).requires_grad_() for x in sink)]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    """Compare by name, element by element: within ``atol`` where finite, equal where not."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0.0, atol=atol, msg=functools.partial("{}: {}".format, name)
        )
