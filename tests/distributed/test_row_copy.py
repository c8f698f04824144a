"""Copies of rows between tensors, in PyTorch and by kernels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import PYTORCH, TRITON
from foxlm.kernels.context_parallel.backends import context_backend_of
from foxlm.kernels.context_parallel.row_copy import NO_RUNS, Place, Rows, Runs, copy_rows, to_device
from kernel_device import DEVICE, ON_KERNELS

BACKENDS = ["pytorch", pytest.param("triton", marks=ON_KERNELS)]


def _rows(shape: tuple[int, int, int], size: int, gates: int, dtype: torch.dtype, device: str) -> Rows:
    k, v = torch.randn(2, *shape, size, device=device).to(dtype).unbind()
    c = torch.randn(shape[0], shape[2] * gates, shape[1], dtype=torch.float64, device=device)
    return Rows(k, v, c.unflatten(1, (shape[2], gates)).permute(0, 3, 1, 2))


def _on(device: str, runs: Runs) -> Runs:
    (table,) = to_device([runs.table], torch.device(device))
    return runs._replace(device=table)


def _expected(source: Tensor, target: Tensor, table: np.ndarray, add: bool, back: bool) -> Tensor:
    target, wide = target.clone(), torch.promote_types(source.dtype, torch.float32)
    for row in table:
        (b, t, h), (b2, t2, h2), count = (row[3:6], row[:3], row[6]) if back else (row[:3], row[3:6], row[6])
        for i in range(count):
            x = source[b, t + i, h]
            target[b2, t2 + i, h2] = (target[b2, t2 + i, h2].to(wide) + x.to(wide)).to(x.dtype) if add else x
    return target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size, gates", [(8, 1), (12, 2)])
@pytest.mark.parametrize("add, back", [(False, False), (True, False), (True, True)])
def test_copies_runs(backend: str, dtype: torch.dtype, size: int, gates: int, add: bool, back: bool) -> None:
    torch.manual_seed(0)
    device = DEVICE if backend == "triton" else "cpu"
    copy_rows = context_backend_of(TRITON if backend == "triton" else PYTORCH).copy_rows
    source, target = (_rows(shape, size, gates, dtype, device) for shape in ((2, 150, 3), (2, 130, 2)))
    # Of one more than a program has, of one row, and of none.
    count = np.array([[100, 1], [65, 0]])
    runs = Runs.between(
        Place(np.array([[0], [1]]), np.array([[20, 3], [0, 7]]), np.array([2, 0])),
        Place(np.array([[1], [0]]), np.array([[30, 0], [1, 0]]), np.arange(2)),
        count,
    )
    assert len(runs.table) == 3
    if back:
        source, target = target, source
    expected = [_expected(x, y, runs.table, add, back) for x, y in zip(source, target, strict=True)]
    copy_rows(source, target, _on(device, runs), add=add, back=back)
    for x, y in zip(expected, target, strict=True):
        assert torch.equal(x, y)


def test_runs_of_nothing_copy_nothing() -> None:
    source, target = (_rows((1, 4, 1), 8, 1, torch.float32, "cpu") for _ in range(2))
    before = target.k.clone()
    none = Runs.between(Place(0, np.arange(3), 0), Place(0, np.arange(3), 0), np.zeros(3, np.int64))
    copy_rows(source, target, _on("cpu", none))
    copy_rows(source, target, NO_RUNS)
    assert torch.equal(target.k, before)
    assert len(Runs.joined([]).table) == len(none.table) == 0
