"""The backward kernels for Hopper compile without a GPU, fit in its registers, and leave their products in flight."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from foxlm.kernels.triton_common import HAS_GLUON

if not HAS_GLUON:
    pytest.skip("needs Gluon's compiler", allow_module_level=True)

import triton

from ahead_of_time import compiling_only
from foxlm.kernels.decay import Decay
from foxlm.kernels.hopper.backward import hopper_backward, hopper_backward_takes

# By head size: bytes that a thread may keep in memory for want of registers. As fast as measured with 0 and 40 to 48.
STACK = {64: 16, 128: 96}
SHARED_MEMORY = 227 * 1024
BEFORE = [
    "_describe_blocks_kernel",
    "_query_range_kernel",
    "_maxima_kernel",
    "_running_maxima_kernel",
    "_tile_rows_kernel",
]


def launch(
    head_dim: int, dtype: torch.dtype, *, heads: tuple[int, int, int], queries: int = 200, keys: int = 333
) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """Compile for an H100: the kernels, what `hopper_backward` returned, and what it differentiates."""
    h, g, hf = heads
    q, d_out = (torch.zeros(2, queries, h, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(2, keys, g, head_dim, dtype=dtype) for _ in range(2))
    lse, d_lse = (torch.zeros(2, h, queries) for _ in range(2))
    c = torch.zeros(2, hf, keys, dtype=torch.float64)
    last = torch.arange(keys - queries, keys)
    decay = Decay(c[..., keys - queries :], c, torch.zeros(2, 1, queries, dtype=torch.int64), last)
    with compiling_only(90) as compiled:
        # As after ``out.sum().backward()``: strides that no copy engine takes.
        gradients = hopper_backward(d_out[:, :, :1, :1].expand_as(q), d_lse, q, k, v, decay, q, lse, 0.1)
    return compiled, list(gradients), [q, k, v, lse.double(), c.new_zeros(2, h, keys)]


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers of a thread before roles share them out, ``REG``, and what did not fit, ``STACK`` in bytes."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def serialized(kernel: Any, folder: Path) -> list[str]:
    """Warnings of ptxas that it waits after each product."""
    file = folder / "kernel.ptx"
    file.write_text(kernel.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(file), "-o", str(folder / "out")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [line for line in text.splitlines() if "wgmma" in line]


@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 1)], ids=["mha", "gqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_fit(head_dim, dtype, heads, tmp_path):
    compiled, gradients, expected = launch(head_dim, dtype, heads=heads)
    main = f"hopper_backward_d{head_dim}_kernel"
    kernels = {kernel.metadata.name: kernel for kernel in compiled}
    assert list(kernels) == [*BEFORE, main, "_hopper_backward_finish_kernel"]
    for kernel in compiled:
        assert kernel.metadata.target.arch == 90
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.name
    assert resources(kernels[main], tmp_path)["STACK"] <= STACK[head_dim]
    assert serialized(kernels[main], tmp_path) == []
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in expected]
    assert all(x.is_contiguous() for x in gradients)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sizes_of_one_compile(head_dim):
    """Sizes of one become constants, and constants fold."""
    compiled, *_ = launch(head_dim, torch.bfloat16, heads=(1, 1, 1), queries=1, keys=1)
    assert len(compiled) == len(BEFORE) + 2


def test_indices_that_do_not_fit_are_refused():
    q, k = (torch.empty(1, device="meta").expand(1, 2**24, 1, 64) for _ in range(2))
    assert not hopper_backward_takes(q, k)
    assert hopper_backward_takes(q, k[:, : 2**20])
    assert not hopper_backward_takes(q.expand(2**12, -1, -1, -1), k[:, : 2**20].expand(2**12, -1, -1, -1))
