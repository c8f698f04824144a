"""Forgetting attention equals its definition for random hostile inputs, in PyTorch and by kernels."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_inputs import attention, output_and_gradients
from fuzz import fuzz
from hostile_attention import Case, draw_case, expected_results
from kernel_device import DEVICE, DTYPES, INTERPRETED, ON_KERNELS

PYTORCH = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(
    case: Case, u: float, u_products: float, floor: float, function: Callable[..., tuple[Tensor, Tensor]] = attention
) -> None:
    """Fail unless results are within rounding of the definition; arguments as for `expected_results`."""
    print(case.describe())
    copies = [x.detach().clone() for x in case.inputs]
    exact, bounds = expected_results(case, u, u_products, floor)
    results = {
        name: x.cpu()
        for name, x in output_and_gradients(function, case.inputs, case.cotangents, **case.options).items()
    }
    for x, copy in zip(case.inputs, copies, strict=True):
        assert torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0)), "an input was written to"
    eps = case.options.get("eps", 0.0)
    for name, x in results.items():
        assert x.shape == exact[name].shape, name
        assert not x.isnan().any(), f"{name} has NaN"
        pruned = name in ("out", "lse") and eps < 0.2
        if eps and not pruned:
            continue
        bound = bounds[name]
        if eps:
            # A row that loses a share of its weight goes to the mean of the rest.
            bound = bound + (2.0 * eps * largest_value(case) if name == "out" else 2.0 * eps)
        error = (x.double() - exact[name]).masked_fill(x == exact[name], 0.0).abs()
        assert (error <= bound).all(), f"{name} is off by {(error / bound).nan_to_num().max():.3g} of what it may be"
    # Nothing may come of padding, in either direction.
    keys, queries = case.real.shape[1], case.inputs[0].shape[1]
    asked = case.real[:, keys - queries :]
    for name, real in (("out", asked), ("dq", asked), ("dk", case.real), ("dv", case.real), ("dlog_f", case.real)):
        assert (results[name][~real] == 0.0).all(), f"{name} is not zero in padding"


def largest_value(case: Case) -> float:
    v = case.inputs[2].detach().cpu().double()[case.real]
    return v.abs().max().item() if v.numel() else 0.0


@pytest.mark.fuzz
def test_attention_in_pytorch() -> None:
    def one_case(rng: random.Random) -> None:
        case = draw_case(rng, PYTORCH, 150, [1, 2, 3, 8, 16, 31, 64, 80, 128, 256, 257], "cpu")
        wide = case.inputs[0].dtype == torch.float64
        check(case, *((2.0**-51, 2.0**-51, 1e-250) if wide else (2.0**-24, 2.0**-24, math.exp(-75.0))))

    fuzz(one_case)


def test_a_decay_that_is_off_by_one_token_is_caught() -> None:
    """Negative control."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, log_f.roll(1, 1).nan_to_num(0.0, 0.0).clamp(max=0.0), **options)

    def one_case(rng: random.Random) -> None:
        check(draw_case(rng, [torch.float32], 150, [8], "cpu"), 2.0**-24, 2.0**-24, math.exp(-75.0), wrong)

    with pytest.raises(AssertionError, match="is off by"):
        fuzz(one_case, seconds=60.0)


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=ON_KERNELS) for dtype in DTYPES], ids=str)
def test_attention_by_kernels(dtype: torch.dtype) -> None:
    def one_case(rng: random.Random) -> None:
        # Some of the head sizes: for each choice of tiles, and none that fills them.
        case = draw_case(rng, [dtype], 139 if INTERPRETED else 400, [1, 16, 40, 64, 80, 128, 256], DEVICE)
        floor = math.exp(-75.0) if dtype == torch.float32 else 2.0**-24
        check(case, 2.0**-24, torch.finfo(dtype).eps, floor)

    fuzz(one_case, seconds=5.0)
