"""The reference's error does not grow with length, and is at most twice torch's own in the same dtype.

``python tests/kernels/reference/test_precision.py`` prints the tables.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_inputs import forgetting_attention
from foxlm.kernels.decay import Decay
from foxlm.kernels.reference import reference_attention

NAMES = ("out", "dq", "dk", "dv", "dlog_f")
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Tokens after which each head has forgotten all but 1/e. The last head never forgets: plain softmax attention.
MEMORY = (1.0, 10.0, 100.0, 1e3, 1e6, math.inf)
FAST, SLOW, NEVER = slice(0, 3), slice(3, 5), -1
QUERIES = 64
# Tokens, and inputs drawn: the error of one short input varies more.
LENGTHS = {1024: 16, 16_384: 4, 262_144: 2}


def draw(tokens: int, queries: int, memory: tuple[float, ...], seed: int) -> tuple[list[Tensor], Tensor]:
    """``[q, k, v, log_f]`` and a cotangent. The last tokens are the same at every length."""
    generator = torch.Generator().manual_seed(seed)

    def backwards(count: int, *shape: int) -> Tensor:
        return torch.randn(1, count, len(memory), *shape, generator=generator).flip(1)

    q, dout = backwards(queries, 16), backwards(queries, 16)
    # One generator, read from the last token backwards, token by token.
    k, v, noise = backwards(tokens, 33).split([16, 16, 1], -1)
    log_f = -(0.5 * noise[..., 0]).exp() / torch.tensor(memory)
    return [q, k.contiguous(), v.contiguous(), log_f], dout


def results(attention: Attention, inputs: list[Tensor], dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients computed in ``dtype`` (the gates never below float32)."""
    gate_dtype = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(gate_dtype if i == 3 else dtype).requires_grad_() for i, x in enumerate(inputs)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def squares(x: Tensor) -> Tensor:
    """Sum of squares of each head of ``[1, T, H, ...]``."""
    return x.double().square().flatten(3).sum((0, 1, 3)) if x.ndim > 3 else x.double().square().sum((0, 1))


def errors_by_length(attention: Attention, lengths: dict[int, int]) -> dict[int, Tensor]:
    """Error in float32 against float64, relative in the norm of all draws: ``[quantity, head]`` at each length."""
    table = {}
    for tokens, draws in lengths.items():
        error, norm = torch.zeros(2, len(NAMES), len(MEMORY), dtype=torch.float64)
        for seed in range(draws):
            inputs, dout = draw(tokens, QUERIES, MEMORY, seed)
            actual = results(attention, inputs, dout, torch.float32)
            exact = results(forgetting_attention, inputs, dout, torch.float64)
            error += torch.stack([squares(a - e) for a, e in zip(actual, exact, strict=True)])
            norm += torch.stack([squares(e) for e in exact])
        table[tokens] = (error / norm).sqrt()
    return table


def with_float32_sums(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
    """The negative control: the same attention over a running sum in float32."""
    c = log_f.cumsum(1).double().transpose(1, 2)
    queries, keys = q.shape[1], k.shape[1]
    last = torch.arange(keys - queries, keys)
    first = torch.zeros(1, 1, queries, dtype=torch.int64)
    return reference_attention(q, k, v, Decay(c[..., -queries:], c, first, last), scale=0.25)[0]


def format_by_length(table: dict[int, Tensor]) -> str:
    lines = ["tokens  quantity  " + "".join(f"{m:>10g}" for m in MEMORY)]
    for tokens, errors in table.items():
        for name, row in zip(NAMES, errors.tolist(), strict=True):
            lines.append(f"{tokens:<7} {name:<9} " + "".join(f"{x:>10.1e}" for x in row))
    return "\n".join(lines)


@pytest.mark.slow
def test_the_error_does_not_grow_with_length(record_property):
    table = errors_by_length(forgetting_attention, LENGTHS)
    print(format_by_length(table))
    record_property("errors", format_by_length(table))
    short = table[min(table)]
    for tokens, errors in table.items():
        assert errors.max() < 1e-5, tokens
        # What a head that forgets fast sees is the same at every length.
        assert (errors[:, FAST] < 2.0 * short[:, FAST]).all(), tokens
        # A slow head averages over more and more keys, and what is left of them gets small: softmax itself is
        # then worse conditioned. The decay must add nothing to the error of the head that never forgets.
        # The gradient of a gate is one sum over all pairs across it, of either sign: from one draw to another
        # its size, and so its relative error, varies by three.
        bound = torch.maximum(short, errors[:, NEVER, None]) * torch.tensor([2.0, 2.0, 2.0, 2.0, 4.0])[:, None]
        assert (errors[:, SLOW] < bound[:, SLOW]).all(), tokens


def test_float32_sums_are_seen_to_lose_precision():
    """Negative control: the errors above grow as soon as the running sum is not exact."""
    table = errors_by_length(with_float32_sums, {1024: 1, 16_384: 1})
    print(format_by_length(table))
    assert (table[16_384][:, FAST] > 4.0 * table[1024][:, FAST]).all()


# ---- Against torch in the same type


def dense(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
    """The same computation by torch, all of it in the type of ``q`` but the decay, rounded to it once."""
    queries, keys = q.shape[1], k.shape[1]
    c = log_f.double().cumsum(1).transpose(1, 2)
    decay = (c[..., keys - queries :, None] - c[..., None, :]).to(q.dtype)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + decay
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def errors_by_type(attention: Attention, dtype: torch.dtype, tokens: int, queries: int) -> tuple[Tensor, Tensor]:
    """Norm and largest element of the error of each quantity over 8 draws, each relative to the exact result's."""
    square, largest, norm, size = torch.zeros(4, len(NAMES), dtype=torch.float64)
    for seed in range(8):
        inputs, dout = draw(tokens, queries, MEMORY, seed)
        # The exact result is that of the rounded inputs.
        inputs[:3] = [x.to(dtype) for x in inputs[:3]]
        dout = dout.to(dtype)
        exact = results(forgetting_attention, inputs, dout, torch.float64)
        actual = results(attention, inputs, dout, dtype)
        for n, (a, e) in enumerate(zip(actual, exact, strict=True)):
            square[n] += (a - e).square().sum()
            norm[n] += e.square().sum()
            largest[n] = torch.maximum(largest[n], (a - e).abs().max())
            size[n] = torch.maximum(size[n], e.abs().max())
    return (square / norm).sqrt(), largest / size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "queries"), [(65, 65), (300, 300), (300, 40)])
def test_error_is_at_most_twice_that_of_torch(dtype, tokens, queries):
    ours = errors_by_type(forgetting_attention, dtype, tokens, queries)
    theirs = errors_by_type(dense, dtype, tokens, queries)
    for kind, error, allowed in zip(("norm", "largest"), ours, theirs, strict=True):
        for name, value, bound in zip(NAMES, error.tolist(), allowed.tolist(), strict=True):
            assert value <= 2.0 * bound, f"{name}, {kind}: {value:.1e} against {bound:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gate_gradients_are_exact_in_half_precision(dtype):
    """They are float32 and are computed in it: nothing on their way may be rounded to the type of ``q``."""
    errors, _ = errors_by_type(forgetting_attention, dtype, 300, 300)
    assert errors[NAMES.index("dlog_f")] < 1e-5


def test_the_comparison_sees_a_type_below():
    """Negative control: attention in bfloat16 passed off as float16 is more than twice as wrong."""

    def worse(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        return dense(q.bfloat16(), k.bfloat16(), v.bfloat16(), log_f).half()

    ours, theirs = (errors_by_type(f, torch.float16, 65, 65)[0] for f in (worse, dense))
    assert (ours > 2.0 * theirs).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_types_of_results(dtype):
    inputs, dout = draw(10, 10, MEMORY, 0)
    results_of_type = results(forgetting_attention, inputs, dout, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in results_of_type] == [dtype] * 4 + [wide]
    leaves = [x.to(dtype) for x in inputs[:3]]
    assert forgetting_attention(*leaves, inputs[3], return_lse=True)[1].dtype == wide


def main() -> None:
    print("Relative error of float32 against float64, by tokens a head remembers")
    print(format_by_length(errors_by_length(forgetting_attention, LENGTHS)))
    print("\nThe same over a running sum in float32")
    print(format_by_length(errors_by_length(with_float32_sums, LENGTHS)))
    print("\nRelative error (norm, largest element) at 300 tokens, with that of torch in the same type")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        columns = [x for f in (forgetting_attention, dense) for x in errors_by_type(f, dtype, 300, 300)]
        for name, *row in zip(NAMES, *(x.tolist() for x in columns), strict=True):
            print(f"{dtype!s:<15} {name:<7} " + "".join(f"{x:>10.1e}" for x in row))


if __name__ == "__main__":
    main()
