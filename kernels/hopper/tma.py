"""Descriptors for the tensor memory accelerator (TMA), which copies tiles between global and shared memory."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def _strides(x: Tensor) -> list[int]:
    """Strides of ``[B, T, heads, D]`` but the last; that of a single element may be anything."""
    batch, tokens, heads, head_dim = x.shape
    b, t, h, _ = x.stride()
    return [b if batch > 1 else head_dim, t if tokens > 1 else head_dim, h if heads > 1 else head_dim]


def fits_tma(x: Tensor) -> bool:
    """Whether TMA can read ``x``, ``[B, T, heads, D]``: aligned to 16 bytes, strides are multiples of 16 bytes."""
    if x.stride(-1) != 1 or x.data_ptr() % 16 != 0:
        return False
    size = x.element_size()
    b, t, h = _strides(x)
    return b > 0 and t > 0 and h > 0 and (b * size | t * size | h * size) % 16 == 0


def for_tma(x: Tensor) -> Tensor:
    """``x``, ``[B, T, heads, D]``, copied unless it `fits_tma`."""
    return x if fits_tma(x) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def tile_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a tile of ``rows`` tokens in shared memory. To make one takes the host as long as a launch."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], element)


def describe_by_head(x: Tensor, rows: int) -> TensorDescriptor:
    """``x``, ``[B, T, heads, D]``, as ``[B, heads, T, D]`` in tiles of ``rows`` tokens of one head."""
    batch, tokens, heads, head_dim = x.shape
    b, t, h = _strides(x)
    return _described(x, [batch, heads, tokens, head_dim], [b, h, t, 1], [1, 1, rows, head_dim], rows)


def describe_by_token(x: Tensor, rows: int) -> TensorDescriptor:
    """``x``, ``[B, T, heads, D]``, in tiles of ``rows`` tokens of one head."""
    return _described(x, list(x.shape), [*_strides(x), 1], [1, rows, 1, x.shape[-1]], rows)


def _described(x: Tensor, shape: list[int], strides: list[int], block: list[int], rows: int) -> TensorDescriptor:
    """What the class itself makes, without its checks of what `fits_tma`: they take as long as two launches."""
    descriptor = object.__new__(TensorDescriptor)
    # As a dataclass its other fields are defaults of the class.
    descriptor.base, descriptor.shape, descriptor.strides = x, shape, strides
    descriptor.block_shape, descriptor.layout = block, tile_layout(rows, x.shape[-1], x.dtype)
    return descriptor
