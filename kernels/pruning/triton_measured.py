"""Measured pruning in Triton: one kernel, after `search` has found first keys (names: `triton_common`)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import PRUNED_KEYS, PRUNED_QUERIES, cdiv, padded_head_dim
from ..triton_common import INF, INT32_MAX, INTERPRETED, LOG2_E, kernel, load_rows, split_fp64
from .measured import NEAR_SHARE, log_measured
from .predicates import raised, sink_bound
from .rounding import decay_margin, logit_margin, stored_margin

_QUERY_BLOCK, _KEY_BLOCK = tl.constexpr(PRUNED_QUERIES), tl.constexpr(PRUNED_KEYS)
_IS_INTERPRETED = tl.constexpr(INTERPRETED)
_NEAR_SHARE = tl.constexpr(NEAR_SHARE)
# What underflows on the way is no more than this.
_UNDERFLOW = 2.0**-126


@triton.jit
def _operand(x, IS_ROUNDED: tl.constexpr):
    """``x`` for matrix units, of 16 bits."""
    if not IS_ROUNDED:
        return x
    elif _IS_INTERPRETED:
        # The interpreter multiplies bfloat16 as if it were integers.
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x.to(tl.bfloat16)


@kernel
def _measure_kernel(
    Q, K, C_Q, C_K, KV_START, LAST, SINK, NORM, END, LOG_SUM, LARGEST, OUT,
    q_b, q_t, q_h, k_b, k_t, k_h, cq_b, cq_h, ck_b, ck_h, s_b, s_h, sink_b, sink_h,
    scale, log_eps, undecayed, margin, c_margin, underflow, TQ, TK, H, HF, KV_GROUP, GATE_GROUP, START_GROUP, NM, NB,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Raise ``OUT``, ``[B, H, TQ]``, of a block of queries of a head; ``KV_START`` is what it was before pruning."""
    i_bh, i_m = tl.program_id(0), NM - 1 - tl.program_id(1)
    i_b32, i_h = i_bh // H, i_bh % H
    i_b, i_gate, i_g = i_b32.to(tl.int64), i_h // GATE_GROUP, i_h // KV_GROUP
    o_m = i_m * _QUERY_BLOCK + tl.arange(0, _QUERY_BLOCK)
    m_q = o_m < TQ
    row = tl.load(LAST).to(tl.int32) + i_m * _QUERY_BLOCK
    last = row + tl.arange(0, _QUERY_BLOCK)
    p_row = i_bh.to(tl.int64) * TQ + o_m
    kv_start = tl.load(OUT + p_row, mask=m_q, other=INT32_MAX).to(tl.int32)
    is_seen = m_q & (kv_start <= last)
    first = tl.min(tl.where(is_seen, kv_start, INT32_MAX), 0) // _KEY_BLOCK * _KEY_BLOCK
    near = row - _KEY_BLOCK - tl.maximum(row - first, 0) // _NEAR_SHARE
    near = tl.maximum(near, first) // _KEY_BLOCK * _KEY_BLOCK
    p_cq = C_Q + i_b * cq_b + i_gate.to(tl.int64) * cq_h
    p_ck = C_K + i_b * ck_b + i_gate.to(tl.int64) * ck_h
    c_row = tl.load(p_cq + i_m * _QUERY_BLOCK)
    # Hidden keys, at +inf, count as decayed.
    is_open = (first < near) & (
        c_row - tl.load(p_ck + first + _KEY_BLOCK - 1, mask=first < near, other=0.0) <= undecayed
    )
    if is_open:
        b_q = load_rows(Q + i_b * q_b + i_h.to(tl.int64) * q_h, o_m, q_t, m_q, D, BLOCK_D, True)
        norm = tl.load(NORM + p_row, mask=m_q, other=0.0)
        maximum = tl.full([_QUERY_BLOCK], -INF, tl.float32)
        total = tl.zeros([_QUERY_BLOCK], tl.float32)
        if SINK is not None:
            p_sink = SINK + i_b * sink_b + i_g.to(tl.int64) * sink_h
            maximum = sink_bound(b_q.to(tl.float32), p_sink, norm, scale, margin, D, BLOCK_D) * LOG2_E
            total += 1.0
        b_q = _operand(b_q, IS_ROUNDED)
        p_k = K + i_b * k_b + i_g.to(tl.int64) * k_h
        base = c_row * LOG2_E
        c = tl.load(p_cq + o_m, mask=m_q, other=0.0)
        row_high, row_low = split_fp64(c * LOG2_E - base)
        row_high = tl.where(m_q, row_high, 0.0)
        qk_scale = scale * LOG2_E

        for n in range(near, tl.minimum(row + _QUERY_BLOCK, TK), BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_k = o_n < TK
            key_high, key_low = split_fp64(tl.load(p_ck + o_n, mask=m_k, other=INF) * LOG2_E - base)
            bias = (row_high[:, None] - key_high[None, :]) + (row_low[:, None] - key_low[None, :])
            b_k = _operand(load_rows(p_k, o_n, k_t, m_k, D, BLOCK_D, True), IS_ROUNDED)
            b_s = tl.dot(b_q, tl.trans(b_k)) * qk_scale + bias
            m_s = (o_n[None, :] <= last[:, None]) & (o_n[None, :] >= kv_start[:, None])
            b_s = tl.where(m_s, b_s, -INF)
            new_maximum = tl.maximum(maximum, tl.max(b_s, 1))
            shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
            total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(b_s - shift[:, None]), 1)
            maximum = new_maximum
        shift = tl.where(maximum == -INF, 0.0, maximum)

        p_largest = LARGEST + (i_b * (H // KV_GROUP) + i_g) * NB
        largest = tl.load(p_largest + tl.minimum(row + _QUERY_BLOCK - 1, TK - 1) // _KEY_BLOCK)
        limit = total * tl.exp2((log_eps - margin * norm * largest) * LOG2_E)
        # What the bound allows the keys before the first to add up to, if they are not hidden anyhow.
        tail = tl.zeros([_QUERY_BLOCK], tl.float32) + underflow
        if first > 0:
            before = first // _KEY_BLOCK - 1
            p_block = (i_b * HF + i_gate) * NB + before
            end = tl.load(END + p_block)
            decay = tl.where(end == INF, -INF, raised(c, c_margin) - tl.where(end == INF, 0.0, end))
            log_decays = (decay + tl.load(LOG_SUM + p_block)).to(tl.float32)
            dropped = tl.exp2((log_decays + norm * tl.load(p_largest + before)) * LOG2_E - shift)
            p_reset = KV_START + i_b * s_b + (i_h // START_GROUP).to(tl.int64) * s_h
            reset = tl.load(p_reset + o_m, mask=m_q, other=0).to(tl.int32)
            tail += tl.where(reset < first, dropped, 0.0)

        row_shift = shift - row_high
        found = first
        # Not `while`, which Triton cannot compile here; what follows the end of the search takes no time. The sum is
        # looked at in the step after: Triton for Blackwell cannot reduce again what it has just reduced of a product.
        for n in range(first, near + BLOCK_N, BLOCK_N):
            # A NaN is not negligible.
            is_open = is_open & (tl.max((is_seen & ~(tail <= limit)).to(tl.int32), 0) == 0)
            found = tl.where(is_open, n, found)
            c_end = tl.load(p_ck + n // _KEY_BLOCK * _KEY_BLOCK + _KEY_BLOCK - 1, mask=n < near, other=0.0)
            is_open = is_open & (c_row - c_end <= undecayed) & (n < near)
            if is_open:
                o_n = n + tl.arange(0, BLOCK_N)
                bias = (base - tl.load(p_ck + o_n) * LOG2_E).to(tl.float32)
                b_k = _operand(load_rows(p_k, o_n, k_t, o_n < TK, D, BLOCK_D, False), IS_ROUNDED)
                b_s = tl.dot(b_q, tl.trans(b_k)) * qk_scale + bias[None, :]
                b_s = tl.where(o_n[None, :] >= kv_start[:, None], b_s, -INF)
                tail += tl.sum(tl.exp2(b_s - row_shift[:, None]), 1)
        found = tl.maximum(kv_start, found // _KEY_BLOCK * _KEY_BLOCK)
        tl.store(OUT + p_row, found.to(tl.int64), mask=is_seen)


def measure(
    q: Tensor,
    k: Tensor,
    decay: Decay,
    kv_start: Tensor,
    norm: Tensor,
    end: Tensor,
    log_sum: Tensor,
    largest: Tensor,
    eps: float,
    scale: float,
    sink: Tensor | None,
) -> None:
    """Raise ``kv_start`` in place as `measured.measured_kv_start` does, in blocks of 128 queries and 64 keys.

    Args:
        q: ``[B, Tq, H, D]``, contiguous along its last dimension, as is k.
        k: ``[B, Tk, G, D]``, also of another dtype than q.
        decay: of these queries and keys, each tensor contiguous along its last dimension.
        kv_start: contiguous ``[B, H, Tq]`` int64, as `search.search` found it by the rule ``tight``.
        norm: ``[B, H, Tq]`` float32, of `search.Queries`.
        end, log_sum, largest: of `search.Blocks`.
        eps, scale: as for `prune.first_kept`.
        sink: ``[B, G, D]`` with contiguous rows, or None.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    is_rounded = q.dtype != k.dtype or q.dtype == torch.float32
    margin = logit_margin(head_dim, torch.float32) + (stored_margin(torch.bfloat16, 2) if is_rounded else 0.0)
    block_d, blocks = padded_head_dim(head_dim), cdiv(queries, PRUNED_QUERIES)
    _measure_kernel[(batch * heads, blocks)](
        Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
        K=k, k_b=k.stride(0), k_t=k.stride(1), k_h=k.stride(2),
        C_Q=decay.query, cq_b=decay.query.stride(0), cq_h=decay.query.stride(1),
        C_K=decay.key, ck_b=decay.key.stride(0), ck_h=decay.key.stride(1),
        KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
        LAST=decay.last,
        SINK=sink, sink_b=0 if sink is None else sink.stride(0), sink_h=0 if sink is None else sink.stride(1),
        NORM=norm,
        END=end,
        LOG_SUM=log_sum,
        LARGEST=largest,
        OUT=kv_start,
        scale=scale,
        log_eps=log_measured(eps, torch.float32, keys),
        undecayed=math.log(eps) / 2.0,
        margin=2.0 * margin,
        c_margin=decay_margin(end.shape[-1] * PRUNED_KEYS),
        underflow=_UNDERFLOW * keys,
        TQ=queries,
        TK=keys,
        H=heads,
        HF=gates,
        KV_GROUP=heads // kv_heads,
        GATE_GROUP=heads // gates,
        START_GROUP=heads // decay.kv_start.shape[1],
        NM=blocks,
        NB=end.shape[-1],
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_N=PRUNED_KEYS if block_d <= 128 else PRUNED_KEYS // 2,
        IS_ROUNDED=is_rounded,
        num_warps=4 if block_d <= 128 else 8,
        num_stages=2 if block_d <= 128 else 1,
        # Four programs then fit a multiprocessor, and nothing spills.
        maxnreg=128 if block_d <= 64 and q.dtype != torch.float32 else None,
    )  # fmt: skip
