"""Descriptors for the tensor memory accelerator (TMA), which copies tiles between global and shared memory."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def _strides(x: Tensor) -> list[int]:
    """Strides of ``[B, T, heads, D]`` but the last; that of a single element may be anything."""
    return [step if size > 1 else x.shape[-1] for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def fits_tma(x: Tensor) -> bool:
    """Whether TMA can read ``x``, ``[B, T, heads, D]``: aligned to 16 bytes, strides are multiples of 16 bytes."""
    strides = [step * x.element_size() for step in _strides(x)]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in strides)


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
    block, layout = [1, 1, rows, head_dim], tile_layout(rows, head_dim, x.dtype)
    return TensorDescriptor(x, [batch, heads, tokens, head_dim], [b, h, t, 1], block, layout)


def describe_by_token(x: Tensor, rows: int) -> TensorDescriptor:
    """``x``, ``[B, T, heads, D]``, in tiles of ``rows`` tokens of one head."""
    head_dim = x.shape[-1]
    layout = tile_layout(rows, head_dim, x.dtype)
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, rows, 1, head_dim], layout)
