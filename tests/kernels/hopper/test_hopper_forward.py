"""The forward kernel for Hopper: compiled without a GPU it keeps within its registers; on one it is exact."""

import dataclasses
import math
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ahead_of_time import compiling_only
from foxlm.kernels.decay import Decay
from foxlm.kernels.hopper import forward as module
from foxlm.kernels.hopper.forward import hopper_forward, hopper_forward_takes
from foxlm.kernels.hopper.tma import describe_by_head, describe_by_token, fits_tma
from foxlm.kernels.reference import reference_attention
from foxlm.kernels.tiles import HOPPER_FORWARD

SHARED_MEMORY = 227 * 1024
REGISTERS = 65536
# Bytes that a thread may keep in memory for want of registers, all of it outside the loop over tiles but one number.
STACK = 64
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200"
    ),
]


def draw(
    head_dim: int,
    dtype: torch.dtype,
    heads: tuple[int, int, int] = (4, 2, 2),
    queries: int = 333,
    keys: int = 900,
    offset: int = 300,
    first_heads: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Decay]:
    """As from a static cache: keys from ``offset + queries`` on are not written yet. Queries see from 0 to all keys."""
    generator = torch.Generator().manual_seed(head_dim + queries)
    h, g, hf = heads
    # Keys and values as a fused projection leaves them.
    kv = torch.randn(2, keys, 2, g, head_dim, generator=generator).to(dtype)
    q = torch.randn(2, queries, h, head_dim, generator=generator).to(dtype)
    c = -0.05 * torch.rand(2, hf, keys, generator=generator, dtype=torch.float64)
    c[..., : offset + queries] = c[..., : offset + queries].cumsum(-1)
    hidden = c.clone()
    hidden[1, :, 50:70] = torch.inf
    last = torch.arange(offset, offset + queries)
    first = (torch.rand(2, first_heads, queries, generator=generator) * last).long()
    first[:, ::2] = last // 100 * 100
    first[1, -1, : queries // 2] = offset + queries + 3
    return q, kv[:, :, 0], kv[:, :, 1], Decay(c[..., offset : offset + queries], hidden, first, last)


def compile_for_hopper(head_dim: int, dtype: torch.dtype, **sizes: Any) -> Any:
    """The main kernel, as `hopper_forward` launches it."""
    q, k, v, decay = draw(head_dim, dtype, **sizes)
    with compiling_only(90) as compiled:
        out, lse = hopper_forward(q, k, v, decay, 0.1)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, dtype, (2, q.shape[2], q.shape[1]))
    names = ["_describe_blocks_kernel", "_head_order_kernel", "hopper_forward_kernel"]
    assert [kernel.metadata.name for kernel in compiled] == names
    return compiled[-1]


def stack(kernel: Any, folder: Path) -> int:
    """Bytes that a thread keeps in memory for want of registers."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"\bSTACK:(\d+)", text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HOPPER_FORWARD)
def test_kernel_fits(head_dim, dtype, tmp_path):
    kernel = compile_for_hopper(head_dim, dtype)
    assert kernel.metadata.target.arch == 90
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert kernel.metadata.num_warps * 32 * HOPPER_FORWARD[head_dim].initial_registers <= REGISTERS
    assert stack(kernel, tmp_path) <= STACK


def test_want_of_registers_is_seen(monkeypatch, tmp_path):
    """Negative control: twice the size of a head needs more."""
    monkeypatch.setattr(module, "HOPPER_FORWARD", {128: HOPPER_FORWARD[64]})
    kernel = compile_for_hopper(128, torch.bfloat16)
    assert stack(kernel, tmp_path) > STACK


def test_sizes_of_one_need_no_other_kernel():
    """Sizes are not built in: a length that comes for the first time is no reason to compile."""
    one = compile_for_hopper(64, torch.bfloat16)
    sizes: dict[str, Any] = {"heads": (1, 1, 1), "queries": 1, "keys": 1, "offset": 0, "first_heads": 1}
    assert compile_for_hopper(64, torch.bfloat16, **sizes).hash == one.hash


# ---- What is taken


def test_other_devices_are_not_taken():
    q, k, v, _ = draw(64, torch.bfloat16)
    assert not hopper_forward_takes(q, k, v, 0.0)


def test_what_a_copy_engine_can_read():
    x = torch.zeros(2, 10, 3, 4, 64, dtype=torch.bfloat16)
    assert fits_tma(x[:, :, 0]) and fits_tma(x[:, 1:, 2, 1:]) and fits_tma(x[:, :, 0].transpose(1, 2))
    # Too few bytes between rows; none; a start between its units; numbers apart.
    assert not fits_tma(torch.zeros(2, 10, 4, 68, dtype=torch.bfloat16)[..., :64])
    assert not fits_tma(x[:, :, 0, :1].expand(-1, -1, 4, -1))
    assert not fits_tma(torch.zeros(2 * 10 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 10, 4, 64))
    assert not fits_tma(torch.zeros(2, 10, 64, 4, dtype=torch.bfloat16).transpose(2, 3))


def test_the_stride_of_a_single_element_does_not_matter():
    x = torch.zeros(1000, dtype=torch.bfloat16).as_strided((1, 5, 1, 64), (3, 64, 0, 1))
    assert fits_tma(x)
    descriptor = describe_by_head(x, 64)
    assert (descriptor.shape, descriptor.strides) == ([1, 1, 5, 64], [64, 64, 64, 1])


def test_descriptors_are_those_that_the_class_makes():
    x = torch.zeros(2, 10, 3, 64, dtype=torch.bfloat16)
    for found in (describe_by_head(x, 64), describe_by_token(x, 32)):
        made = TensorDescriptor(found.base, found.shape, found.strides, found.block_shape, found.layout)
        names = [field.name for field in dataclasses.fields(TensorDescriptor)]
        assert type(found) is TensorDescriptor and found.base is x
        assert all(getattr(found, name) == getattr(made, name) for name in names if name != "base")


# ---- On a GPU


def on_gpu(q: Tensor, k: Tensor, v: Tensor, decay: Decay) -> tuple[Tensor, Tensor, Tensor, Decay]:
    gates = Decay(decay.query.cuda(), decay.key.cuda(), decay.kv_start.cuda(), decay.last.cuda())
    return q.cuda(), k.cuda(), v.cuda(), gates


SIZES: dict[str, dict[str, Any]] = {
    "static cache": {},
    "one query": {"queries": 1, "offset": 700, "first_heads": 2},
    "whole": {"queries": 700, "keys": 700, "offset": 0},
    "one head": {"heads": (1, 1, 1), "queries": 65, "keys": 257, "offset": 192, "first_heads": 1},
    "shared gates": {"heads": (4, 1, 1), "queries": 193, "first_heads": 1},
    "many items": {"heads": (24, 24, 24), "queries": 700, "keys": 850, "offset": 100, "first_heads": 24},
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HOPPER_FORWARD)
class TestOnHopper:
    pytestmark = ON_HOPPER

    def test_is_exact_and_the_same_each_time(self, head_dim, dtype, name):
        q, k, v, decay = draw(head_dim, dtype, **SIZES[name])
        exact, exact_lse = reference_attention(q.double(), k.double(), v.double(), decay, scale=0.2)
        inputs = on_gpu(q, k, v, decay)
        assert hopper_forward_takes(*inputs[:3], 0.0)
        out, lse = hopper_forward(*inputs, 0.2)
        # Weights and output are rounded to 16 bits, each by at most half an eps; values are below 6.
        error, eps = out.cpu().double() - exact, torch.finfo(dtype).eps
        assert error.abs().max() <= 6 * eps
        assert error.norm() <= eps * exact.norm()
        torch.testing.assert_close(lse.cpu().double(), exact_lse.double(), rtol=1e-5, atol=1e-5)
        for _ in range(3):
            again, again_lse = hopper_forward(*inputs, 0.2)
            assert torch.equal(again, out) and torch.equal(again_lse, lse)

    def test_is_exact_however_much_a_work_tile_forgets(self, head_dim, dtype, name):
        if name != "whole":
            pytest.skip("one size will do")
        q, k, v, decay = draw(head_dim, dtype, heads=(8, 8, 8), queries=700, keys=700, offset=0, first_heads=8)
        # At some the rows of a work tile decay by just less or just more than what a bias in one part is for.
        rows = 64 * HOPPER_FORWARD[head_dim].consumers
        just = 64.0 * math.log(2.0) / rows
        rates = torch.tensor([0.0, 0.01, 0.1, 0.99 * just, 1.01 * just, 0.5, 3.0, 100.0], dtype=torch.float64)
        c = -rates[:, None] * torch.arange(700)
        decay = Decay(c.expand(2, 8, 700), c.expand(2, 8, 700), decay.kv_start, decay.last)
        exact, exact_lse = reference_attention(q.double(), k.double(), v.double(), decay, scale=0.2)
        out, lse = hopper_forward(*on_gpu(q, k, v, decay), 0.2)
        error, eps = out.cpu().double() - exact, torch.finfo(dtype).eps
        of_head, largest = (x.square().sum((0, 1, 3)).sqrt() for x in (error, exact))
        assert (of_head <= eps * largest).all(), (of_head / largest / eps).tolist()
        torch.testing.assert_close(lse.cpu().double(), exact_lse.double(), rtol=1e-5, atol=1e-5)

    def test_replays_in_a_graph_beside_another_stream(self, head_dim, dtype, name):
        inputs = on_gpu(*draw(head_dim, dtype, **SIZES[name]))
        expected = hopper_forward(*inputs, 0.2)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = hopper_forward(*inputs, 0.2)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        for _ in range(3):
            graph.replay()
            with torch.cuda.stream(other):
                beside = hopper_forward(*inputs, 0.2)
        torch.cuda.synchronize()
        for x, y, z in zip(expected, captured, beside, strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)
