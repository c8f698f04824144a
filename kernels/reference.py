"""Forgetting attention in plain PyTorch: the definition that every kernel is held to, and the CPU backend.

    S_ij = scale * q_i . k_j + D_ij,   kv_start_i <= j <= last_i     D_ij = c_i - c_j
    P    = softmax_j(S),               O = P V,   lse_i = log sum_j exp S_ij

    dV = P^T dO     dP = dO V^T     dS = P * (dP - delta)             delta_i = sum_j P_ij dP_ij - dlse_i
    dQ = scale dS K     dK = scale dS^T Q     dc_i = sum_j dS_ij     dc_j = -sum_i dS_ij

Both passes walk over chunks of queries and recompute the scores, so that memory is linear in the sequence
length. Matmuls run in float32 (float64 for float64 inputs; on a GPU in TF32 if torch is told to), whatever the input
type.

Two places decide whether accuracy survives long sequences:

* ``D`` is a difference of large sums. Near the diagonal it is taken in float64. For keys before the chunk it is
  split at the chunk's first query, ``(c_i - base) + (base - c_j)``: both terms have the sign of ``D``, so each is
  rounded relative to ``|D|`` itself, and the cost is one subtraction per row and column.
* The gradient of one log gate is ``sum of dS_ij over i >= t > j``, reached by summing ``dc`` over all later tokens,
  where all but the pairs across ``t`` cancel. The row and column sums are taken of the same rounded ``dS`` in
  float64, so they cancel to float64 rounding instead of leaving a random walk that grows with length.
"""

import torch
from torch import Tensor

from .decay import Decay
from .operators import NAMESPACE, refuse_second_derivative
from .validation import refuse_transforms

# Scores held at a time, in elements: 16 MiB in float32, small enough to stay near the caches of a CPU.
_CHUNK_ELEMENTS = 1 << 22
_MIN_CHUNK, _MAX_CHUNK = 16, 64

# Weights below exp of this, relative to their row's total, are taken as zero. They are far below rounding, and decay
# makes most weights tiny: left alone they become denormal numbers, which make matmuls on a CPU 30 times slower.
_LOG_ZERO = {torch.float32: -80.0, torch.float64: -600.0}


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Forgetting attention over ``decay``, differentiable once, in reverse mode, in q, k, v and the running sums.

    Args:
        q: ``[B, Tq, H, D]`` queries.
        k, v: ``[B, Tk, G, D]`` keys and values, ``H % G == 0``.
        decay: running sums and visible range of each query.
        scale: multiplies ``q . k``.
        dropout: probability of dropping an attention weight.

    Returns:
        Output ``[B, Tq, H, D]`` in the type of ``q`` and log-sum-exp ``[B, H, Tq]`` in float32 (float64 for float64).
    """
    refuse_transforms(q, k, v, decay.query, decay.key)
    # The seed is a tensor so that a compiled graph draws a new one at each call.
    seed = torch.randint(2**62, (), dtype=torch.int64) if dropout > 0.0 else None
    return _forward(q, k, v, decay.query, decay.key, decay.kv_start, decay.last, scale, dropout, seed)


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference_attention` without autograd."""
    # A seed is read on the host.
    seed = None if seed is None else seed.cpu()
    return _forward(q, k, v, decay.query, decay.key, decay.kv_start, decay.last, scale, dropout, seed)


def backward_pass(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the running sums at queries and keys, from what `forward_pass` returned and theirs."""
    seed = None if seed is None else seed.cpu()
    sums = (decay.query, decay.key, decay.kv_start, decay.last)
    return _backward(d_out, d_lse, q, k, v, *sums, lse, scale, dropout, seed, True)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _head_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, T, heads, D] -> [B, heads, T, D]``, contiguous: batched products of strided heads are slower."""
    return x.to(dtype).transpose(1, 2).contiguous()


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, T, H, D] -> [B, G, H / G, T, D]``: query heads beside the key/value head that they share."""
    return _head_first(x, dtype).unflatten(1, (kv_heads, -1))


def _per_kv_head(x: Tensor, kv_heads: int, heads: int) -> Tensor:
    """``[B, Hf, ...] -> [B, G or 1, H / G or 1, ...]``, ready to broadcast over grouped scores."""
    if x.shape[1] == heads:
        return x.unflatten(1, (kv_heads, -1))
    return x.unsqueeze(2)


def _reduce_heads(x: Tensor, gates: int) -> Tensor:
    """``[B, G, H / G, T] -> [B, Hf, T]``: sum a gradient over the heads that share a gate."""
    if gates == x.shape[1] * x.shape[2]:
        return x.flatten(1, 2)
    return x.sum(2) if gates == x.shape[1] else x.sum((1, 2))[:, None]


class _Chunks:
    """The chunks of queries, each with the range of keys it can see, and the scores of one chunk."""

    def __init__(
        self, q: Tensor, k: Tensor, c_q: Tensor, c_k: Tensor, kv_start: Tensor, last: Tensor, scale: float
    ) -> None:
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        self.dtype = _compute_dtype(q)
        self.q = _grouped(q, self.kv_heads, self.dtype) * scale
        self.k = _head_first(k, self.dtype)
        self.c_q = _per_kv_head(c_q, self.kv_heads, self.heads)
        self.c_k = _per_kv_head(c_k, self.kv_heads, self.heads)
        self.kv_start = _per_kv_head(kv_start, self.kv_heads, self.heads)
        self.last = last
        self.has_hidden_keys = not _on_host(c_k) or bool(torch.isposinf(c_k).any())
        if self.has_hidden_keys:
            self.hidden = torch.isposinf(c_k).all(1)
            self.k = self._without_hidden(self.k)
            self.q.masked_fill_((kv_start > last).all(1)[:, None, None, :, None], 0.0)

    def values(self, v: Tensor) -> Tensor:
        """``[B, Tk, G, D] -> [B, G, Tk, D]``, as the keys are held."""
        v = _head_first(v, self.dtype)
        return self._without_hidden(v) if self.has_hidden_keys else v

    def _without_hidden(self, x: Tensor) -> Tensor:
        # A weight of zero times a NaN is a NaN: whatever stands in padding must not reach a matmul.
        return x.masked_fill(self.hidden[:, None, :, None], 0.0)

    def __iter__(self):
        if self.q.numel() == 0:
            return
        rows, keys = self.q.shape[-2], self.k.shape[-2]
        elements_per_row = max(1, self.q.shape[0] * self.heads * keys)
        size = min(_MAX_CHUNK, max(_MIN_CHUNK, _CHUNK_ELEMENTS // elements_per_row))
        for start in range(0, rows, size):
            rows_of_chunk = slice(start, min(start + size, rows))
            yield rows_of_chunk, *self._key_range(rows_of_chunk, keys)

    def _key_range(self, rows: slice, keys: int) -> tuple[slice, int]:
        """Keys that the chunk can see, and how many of them come before its first query."""
        if not _on_host(self.last):
            # Reading the range would synchronise: take every key, all of them as if beside the diagonal.
            return slice(0, keys), 0
        low, high = int(self.kv_start[..., rows].min()), int(self.last[rows][-1]) + 1
        diagonal = int(self.last[rows][0])
        low = min(max(low, 0), diagonal)
        return slice(low, high), diagonal - low

    def scores(self, rows: slice, keys: slice, before: int) -> Tensor:
        """``S`` of one chunk, ``[B, G, H / G, rows, keys]``, ``-inf`` where a query may not see a key."""
        q = self.q[..., rows, :]
        scores = (q.flatten(2, 3) @ self.k[..., keys, :].mT).unflatten(2, q.shape[2:4])
        c_q, c_k = self.c_q[..., rows], self.c_k[..., keys]
        base = c_q[..., :1]
        scores[..., :before] += (c_q - base).to(self.dtype)[..., None]
        scores[..., :before] += (base - c_k[..., :before]).to(self.dtype)[..., None, :]
        scores[..., before:] += (c_q[..., None] - c_k[..., None, before:]).to(self.dtype)

        index = torch.arange(keys.start, keys.stop, device=q.device)
        kv_start, last = self.kv_start[..., rows, None], self.last[rows, None]
        if _on_host(last) and int(kv_start.max()) <= keys.start:
            # Only the triangle on the diagonal is cut: the usual case of one unbroken sequence.
            scores[..., before:].masked_fill_(index[before:] > last, float("-inf"))
        else:
            scores.masked_fill_((index < kv_start) | (index > last), float("-inf"))
        if self.has_hidden_keys:
            scores.masked_fill_(torch.isposinf(c_k)[..., None, :], float("-inf"))
        return scores


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _exp(x: Tensor) -> Tensor:
    """``exp(x)`` in place, exactly zero where it would be negligible."""
    return torch.threshold_(x, _LOG_ZERO[x.dtype], float("-inf")).exp_()


def _dropout_scale(weights: Tensor, dropout: float, seed: Tensor, chunk: int) -> Tensor:
    """0 for a dropped weight, ``1 / (1 - dropout)`` for a kept one; the same for the same seed and chunk."""
    generator = torch.Generator(weights.device).manual_seed((int(seed) + chunk) % 2**63)
    keep = torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator)
    return keep.div_(1.0 - dropout)


@torch.library.custom_op(f"{NAMESPACE}::reference_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # An operator runs under the caller's autocast, which would run the matmuls below in half precision.
    with torch.autocast(q.device.type, enabled=False):
        chunks = _Chunks(q, k, c_q, c_k, kv_start, last, scale)
        values = chunks.values(v)
        out = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=chunks.dtype, device=q.device)
        for rows, keys, before in chunks:
            scores = chunks.scores(rows, keys, before)
            # A fully masked row has maximum -inf: any finite shift leaves its weights at zero.
            shift = scores.amax(-1, keepdim=True)
            shift = shift.masked_fill(torch.isneginf(shift), 0.0)
            weights = _exp(scores.sub_(shift))
            total = weights.sum(-1, keepdim=True)
            lse[..., rows] = (shift + total.log()).squeeze(-1).flatten(1, 2)
            if seed is not None:
                weights = weights * _dropout_scale(weights, dropout, seed, rows.start)
            mixed = (weights.flatten(2, 3) @ values[..., keys, :]).unflatten(2, weights.shape[2:4])
            mixed = mixed / total.masked_fill(total == 0.0, 1.0)
            out[:, rows] = mixed.flatten(1, 2).transpose(1, 2).to(q.dtype)
        return out, lse


@_forward.register_fake
def _forward_fake(q, k, v, c_q, c_k, kv_start, last, scale, dropout, seed):
    out = q.new_empty(q.shape[:-1] + v.shape[-1:])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_compute_dtype(q))


@torch.library.custom_op(f"{NAMESPACE}::reference_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        chunks = _Chunks(q, k, c_q, c_k, kv_start, last, scale)
        values = chunks.values(v)
        dout_grouped = _grouped(dout, chunks.kv_heads, chunks.dtype)
        dlse = dlse.unflatten(1, (chunks.kv_heads, -1))
        # exp(-inf - 0) = 0 for a fully masked row, where exp(-inf + inf) would be NaN.
        log_total = lse.masked_fill(torch.isneginf(lse), 0.0).unflatten(1, (chunks.kv_heads, -1))

        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(chunks.k), torch.zeros_like(values)
        dc_q = torch.zeros_like(c_q, memory_format=torch.contiguous_format)
        dc_k = torch.zeros_like(c_k, memory_format=torch.contiguous_format)
        for rows, keys, before in chunks:
            weights = _exp(chunks.scores(rows, keys, before).sub_(log_total[..., rows, None]))
            dout_rows = dout_grouped[..., rows, :].flatten(2, 3)
            dweights = (dout_rows @ values[..., keys, :].mT).unflatten(2, weights.shape[2:4])
            kept_weights = weights
            if seed is not None:
                kept = _dropout_scale(weights, dropout, seed, rows.start)
                kept_weights, dweights = weights * kept, dweights * kept
            dv[..., keys, :] += kept_weights.flatten(2, 3).mT @ dout_rows
            # Not dO . O, which is the same but for O's rounding to the type of q: here rows of dS must sum to dlse.
            delta = (weights * dweights).sum(-1, keepdim=True, dtype=torch.float64) - dlse[..., rows, None]
            dscores = weights * dweights.sub_(delta.to(chunks.dtype))
            flat = dscores.flatten(2, 3)
            dq_rows = (flat @ chunks.k[..., keys, :]).mul_(scale).unflatten(2, weights.shape[2:4])
            dq[:, rows] = dq_rows.flatten(1, 2).transpose(1, 2).to(q.dtype)
            dk[..., keys, :] += flat.mT @ chunks.q[..., rows, :].flatten(2, 3)
            if need_decay:
                gates = c_q.shape[1]
                dc_q[..., rows] = _reduce_heads(dscores.sum(-1, dtype=torch.float64), gates)
                dc_k[..., keys] -= _reduce_heads(dscores.sum(-2, dtype=torch.float64), gates)
        dk = dk.transpose(1, 2).to(k.dtype).contiguous()
        return dq, dk, dv.transpose(1, 2).to(v.dtype).contiguous(), dc_q, dc_k


@_backward.register_fake
def _backward_fake(dout, dlse, q, k, v, c_q, c_k, kv_start, last, lse, scale, dropout, seed, need_decay):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, c_q, c_k))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, scale, dropout, seed = inputs
    _, lse = output
    ctx.save_for_backward(*tensors, lse, seed)
    ctx.scale, ctx.dropout = scale, dropout


def _autograd(ctx, dout: Tensor, dlse: Tensor):
    *tensors, seed = ctx.saved_tensors
    need_decay = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grads = _backward(dout, dlse, *tensors, ctx.scale, ctx.dropout, seed, need_decay)
    return *grads, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)
_backward.register_autograd(refuse_second_derivative)
