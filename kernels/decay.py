"""Exact decay of forgetting attention: running sums of log forget gates and what each query may see.

With log gates ``log f_l <= 0`` and ``c_i = sum_{l <= i} log f_l``, the logit of query ``i`` and key ``j <= i``
gets the bias ``D_ij = c_i - c_j = sum_{j < l <= i} log f_l`` (Forgetting Transformer, arXiv 2503.02130).
``c`` falls without bound while only *differences over short ranges* matter, so ``c`` is kept in float64: at
``c = -1e5`` one float32 ulp is 8e-3, a 1% error in a weight that should be exact, and it grows with length.

A gate of exactly zero (``log f = -inf``) hides everything before its token. It is not a number to be summed
but a boundary, as the start of a packed sequence is, so both become the first key that a query may see. Padding hides
keys, masks rows, and its values must not reach a matmul.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Gates below exp of this count as zero, that is as hard resets. They are far below any floating-point number, and one
# huge finite sum would cost all later differences their digits.
LOG_ZERO_GATE = -1e4


class Decay(NamedTuple):
    """What attention reads of the gates, beside q, k and v: the decay of ``Tq`` queries over ``Tk`` keys.

    ``Hf`` is the number of gates per token: the query heads, the key/value heads, or 1 (shared by all heads). With
    context parallelism all four are of this rank's tokens, but sums and indices count from the beginning of the
    sequence, and `last` rises by more than one where a segment of another rank lies between. Others are made of one by
    its class: what `_replace` made cannot leave a function that torch.compile has compiled on its own (torch 2.11).

    Attributes:
        query: ``[B, Hf, Tq]`` float64, running sum ``c_i`` at each query.
        key: ``[B, Hf, Tk]`` float64, running sum ``c_j`` at each key; ``+inf`` hides a key. Of a paged cache, a pool
            ``[P, max(1, Hf / G), 64]`` of the gates of each page's key/value head.
        kv_start: ``[B, H or Hf or 1, Tq]`` int64, first key that a query may see. Greater than `last` for a fully
            masked row, whose output is zero.
        last: ``[Tq]`` int64, last key that a query may see: its own index. Consecutive and ascending.
    """

    query: Tensor
    key: Tensor
    kv_start: Tensor
    last: Tensor

    def bias(self) -> Tensor:
        """The dense bias ``D`` as ``[B, Hf, Tq, Tk]`` float64, ``-inf`` where a query may not see a key."""
        keys = torch.arange(self.key.shape[-1], device=self.key.device)
        visible = (keys >= self.kv_start[..., None]) & (keys <= self.last[:, None])
        bias = self.query[..., None] - self.key[..., None, :]
        if visible.shape[1] > bias.shape[1] > 1:
            bias = bias.repeat_interleave(visible.shape[1] // bias.shape[1], dim=1)
        elif bias.shape[1] > visible.shape[1] > 1:
            visible = visible.repeat_interleave(bias.shape[1] // visible.shape[1], dim=1)
        return bias.masked_fill(~visible, float("-inf"))


def sum_gates(
    log_f: Tensor,
    starts: Tensor | None,
    no_reset: int,
    offset: int | Tensor = 0,
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Running sums of log gates, and the last reset up to each token: the definition, in PyTorch.

    Args:
        log_f: ``[B, T, Hf]`` float32 or float64.
        starts: ``[B, T]`` bool, resets beside those of gates below -1e4; None for none.
        no_reset: what a token without a reset gets, at most 0; 32 bits.
        offset, carry: as for `accumulate`, whose results they make of those.

    Returns:
        ``[B, Hf, T]`` float64, differentiable in ``log_f``, and int64.
    """
    # Contiguous along the sequence: on an H100 a float64 cumsum across strides took 3.1 ms, along it 0.06 ms.
    log_f = log_f.transpose(1, 2).contiguous()
    resets = log_f < LOG_ZERO_GATE
    c = log_f.masked_fill(resets, 0.0).double()
    if log_f.shape[-1] > 1:
        c = c.cumsum(-1)
    if starts is not None:
        resets = resets | starts[:, None, :]
    last_reset = torch.where(resets, torch.arange(log_f.shape[-1], device=log_f.device), no_reset)
    # cummax of an empty tensor raises
    return continued(c, running_max(last_reset) if last_reset.shape[-1] > 1 else last_reset, offset, carry)


def continued(
    c: Tensor, last_reset: Tensor, offset: int | Tensor = 0, carry: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Sums and resets of tokens after others, from those of the tokens alone; the rest as for `accumulate`."""
    if carry is not None:
        return c + carry[0][..., None], torch.maximum(last_reset + offset, carry[1][..., None])
    if isinstance(offset, int) and offset == 0:
        return c, last_reset
    return c, (last_reset + offset).clamp(min=0)


def accumulate(
    log_f: Tensor,
    offset: int | Tensor = 0,
    carry: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    sum_gates: Callable[..., tuple[Tensor, Tensor]] = sum_gates,
) -> tuple[Tensor, Tensor]:
    """Sum log gates along the sequence and find the first key each token may see.

    Args:
        log_f: ``[B, T, Hf]`` log forget gates, ``<= 0``, below -1e4 for a hard reset; summed in float64.
        offset: index of the first of these tokens in its sequence (tokens seen before this block).
        carry: ``(c, kv_start)`` of the token before the block, ``[B, Hf]`` float64 and integer.
        starts: ``[B, T]`` bool, True where a new packed sequence begins.
        sum_gates: that of the `Backend`.

    Returns:
        ``c`` as ``[B, Hf, T]`` float64 (differentiable in ``log_f``) and ``kv_start`` as ``[B, Hf, T]`` int64.
    """
    unbroken = carry is None and isinstance(offset, int) and offset == 0
    # Far enough below zero that no offset makes it an index.
    return sum_gates(log_f, starts, 0) if unbroken else sum_gates(log_f, starts, -(1 << 31), offset, carry)


def running_max(x: Tensor) -> Tensor:
    """Largest element up to each, along the last dimension."""
    if not torch.onnx.is_in_onnx_export():
        return x.cummax(-1).values
    # ONNX has no such operator: all that come before each, side by side.
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(index <= index[:, None], x[..., None, :], torch.iinfo(x.dtype).min).amax(-1)


def sequence_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Mark the first token of every packed sequence.

    Args:
        cu_seqlens: ``[N + 1]`` integer offsets ``0 = o_0 <= o_1 <= ... <= o_N = length``.
        length: number of packed tokens.

    Returns:
        ``[1, length]`` bool.
    """
    # One slot more than tokens: an empty sequence at the end starts at ``length``.
    starts = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return starts.index_fill(0, cu_seqlens.long(), True)[None, :length]


def hide_padding(decay: Decay, real: Tensor) -> Decay:
    """Hide padding from every query, and everything from the queries that are padding.

    Args:
        decay: of ``Tq`` queries over ``Tk`` keys.
        real: ``[B, Tk]`` bool, False for padding.
    """
    if real.shape[1] == 0:
        return decay
    return skip_keys(hide_keys(decay, real), first_visible(real, real.index_select(1, decay.last), decay.last))


def first_visible(real_keys: Tensor, real: Tensor, last: Tensor) -> Tensor:
    """First key that padding leaves to each query, ``[B, 1, Tq]`` int64; for padding itself the one after its own.

    Args:
        real_keys: ``[B, any]`` bool, False for padding, of all tokens up to the last query at least.
        real: ``[B, Tq]`` bool, the same of the queries.
        last: ``[Tq]`` int64, own key of each query.
    """
    # Left padding ends before the first real key: kernels do not even visit it.
    return torch.where(real[:, None, :], real_keys.int().argmax(1)[:, None, None], last + 1)


def skip_keys(decay: Decay, first: Tensor) -> Decay:
    """``decay`` of queries that attend to no key before ``first``, ``[B, 1, Tq]`` int64."""
    return Decay(decay.query, decay.key, torch.maximum(decay.kv_start, first), decay.last)


def hide_keys(decay: Decay, real: Tensor) -> Decay:
    """Hide the keys of padding from every query; ``real`` as for `hide_padding`."""
    return Decay(decay.query, decay.key.masked_fill(~real[:, None, :], float("inf")), decay.kv_start, decay.last)


def mask_rows(decay: Decay, real: Tensor) -> Decay:
    """Fully mask the rows of padding; ``real`` is ``[B, Tq]`` bool, of the queries."""
    kv_start = torch.where(real[:, None, :], decay.kv_start, decay.last + 1)
    return Decay(decay.query, decay.key, kv_start, decay.last)


def without_padding(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero what stands in padding, if there is any: a weight of zero times a NaN is a NaN.

    Args:
        q, k, v: ``[B, T, heads, D]``.
        decay: as `hide_padding` leaves it.
        real: ``[B, Tk]`` bool, False for padding; None without.
    """
    if real is None:
        return q, k, v
    fully_masked = (decay.kv_start > decay.last).all(1)[..., None, None]
    hidden = ~real[..., None, None]
    return q.masked_fill(fully_masked, 0.0), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
