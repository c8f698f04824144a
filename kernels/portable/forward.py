"""The forward pass in Triton (names: `triton_common`).

    O_i = sum_j P_ij V_j,  P_ij = exp(S_ij - lse_i),  S_ij = scale Q_i . K_j + c_i - c_j,  lse_i = log sum_j exp(S_ij)

over the keys ``kv_start_i <= j <= last_i``, by an online softmax. A program holds one block of queries of one head and
loops over the blocks of keys that it may attend to. How the bias ``c_i - c_j`` is rounded depends on the tile:

* *Masked tiles*: the bias is a difference of float64 values, each split in two float32 halves relative to the
  block's first row, so it is exact however large the sums.
* *Full tiles*: the bias of a column is added to the scores, ``(base - c_last) + (c_last - c_j)`` with one float64
  value per block of 64 keys; that of a row, ``c_i - base``, is only needed where the exponent is taken, and joins the
  running maximum there. All three have the same sign, so each is rounded relative to the bias itself.

For float32 inputs full tiles take the bias of masked ones, as in the backward pass: both must round a score alike. And
the log-sum-exp is float64, since all weights of a row would share its rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, padded_head_dim
from ..triton_common import BASE_BLOCK, INF, LN_2, LOG2_E, dot_precision, kernel, load_rows, split_fp64
from .block_ranges import describe_blocks, heaviest_first


@triton.jit
def dropout_scale(SEED, i_bh, o_m, o_n, TQ, TK, dropout):
    """0 for a dropped weight and ``1 / (1 - dropout)`` for a kept one, by seed, head, query and key alone."""
    offset = (i_bh.to(tl.int64) * TQ + o_m.to(tl.int64)) * TK + o_n
    return tl.where(tl.rand(tl.load(SEED), offset) < dropout, 0.0, 1.0 / (1.0 - dropout))


@triton.jit
def _key_bias(p_relative, p_base, o_n, n, base, BLOCK_N: tl.constexpr):
    """``base - c_j`` of the keys of a full tile from ``n`` on, float32; float64 enters once per block of 64 keys."""
    relative = tl.load(p_relative + o_n)
    if BLOCK_N <= BASE_BLOCK:
        distance = (base - tl.load(p_base + n // BASE_BLOCK)).to(tl.float32)
        return distance - relative
    else:
        tl.static_assert(BLOCK_N == 2 * BASE_BLOCK)
        first = (base - tl.load(p_base + n // BASE_BLOCK)).to(tl.float32)
        second = (base - tl.load(p_base + n // BASE_BLOCK + 1)).to(tl.float32)
        return tl.where(o_n < n + BASE_BLOCK, first, second) - relative


@kernel
def _forward_kernel(
    Q, K, V, C_Q, C_K, RELATIVE, BASE, KV_START, LAST, LEAST, GREATEST, HEAD_ORDER, SEED, OUT, LSE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, cq_b, cq_h, ck_b, ck_h, s_b, s_h,
    scale, dropout, TQ, TK, H, HF, KV_GROUP, GATE_GROUP, START_GROUP, NM, NB,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_FP32: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one block of queries of one head; arguments as in `forward`."""
    # Heads with the most work first, and in each the longest rows first: the short ones fill the gaps at the end.
    pid = tl.program_id(0)
    i_bh = tl.load(HEAD_ORDER + pid // NM).to(tl.int32)
    i_m = NM - 1 - pid % NM
    i_b32, i_h = i_bh // H, i_bh % H
    i_b, i_gate = i_b32.to(tl.int64), i_h // GATE_GROUP
    p_k = K + i_b * k_b + (i_h // KV_GROUP).to(tl.int64) * k_h
    p_v = V + i_b * v_b + (i_h // KV_GROUP).to(tl.int64) * v_h
    p_cq = C_Q + i_b * cq_b + i_gate.to(tl.int64) * cq_h
    p_ck = C_K + i_b * ck_b + i_gate.to(tl.int64) * ck_h
    p_relative = RELATIVE + (i_b * HF + i_gate) * TK
    p_base = BASE + (i_b * HF + i_gate) * NB

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_m < TQ
    b_q = load_rows(Q + i_b * q_b + i_h.to(tl.int64) * q_h, o_m, q_t, m_q, D, BLOCK_D, True)
    base = tl.load(p_cq + i_m * BLOCK_M) * LOG2_E
    row_high, row_low = split_fp64(tl.load(p_cq + o_m, mask=m_q, other=0.0) * LOG2_E - base)
    row_high = tl.where(m_q, row_high, 0.0)
    offset = tl.load(LAST).to(tl.int32)
    last = o_m + offset
    p_start = KV_START + i_b * s_b + (i_h // START_GROUP).to(tl.int64) * s_h
    kv_start = tl.load(p_start + o_m, mask=m_q, other=0).to(tl.int32)

    # Tiles from full_begin to full_end are full, those before and after are masked. Full ones end at or before the
    # block's first row, and so does the block of keys that shares their base: else the parts of a bias would not have
    # one sign.
    ALIGNED: tl.constexpr = BLOCK_N if BLOCK_N > BASE_BLOCK else BASE_BLOCK
    n_end = tl.minimum(offset + tl.minimum((i_m + 1) * BLOCK_M, TQ), TK)
    n_begin = tl.minimum(tl.load(LEAST + i_bh * NM + i_m) // BLOCK_N * BLOCK_N, n_end)
    full_end = tl.maximum((offset + i_m * BLOCK_M + 1) // ALIGNED * ALIGNED, n_begin)
    full_begin = tl.minimum(tl.cdiv(tl.load(GREATEST + i_bh * NM + i_m), BLOCK_N) * BLOCK_N, full_end)
    full_begin = tl.maximum(full_begin, n_begin)
    tiles_after = tl.cdiv(tl.maximum(n_end - full_end, 0), BLOCK_N)
    tiles_before = (full_begin - n_begin) // BLOCK_N

    maximum = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float64 if IS_FP32 else tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2_E
    for i in tl.range(0, tiles_after + tiles_before):
        n = tl.where(i < tiles_after, full_end + i * BLOCK_N, n_begin + (i - tiles_after) * BLOCK_N)
        o_n = n + tl.arange(0, BLOCK_N)
        m_k = o_n < TK
        b_k = load_rows(p_k, o_n, k_t, m_k, D, BLOCK_D, True)
        key_high, key_low = split_fp64(tl.load(p_ck + o_n, mask=m_k, other=INF) * LOG2_E - base)
        bias = (row_high[:, None] - key_high[None, :]) + (row_low[:, None] - key_low[None, :])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * qk_scale + bias
        m_s = (o_n[None, :] <= last[:, None]) & (o_n[None, :] >= kv_start[:, None])
        b_s = tl.where(m_s, b_s, -INF)
        new_maximum = tl.maximum(maximum, tl.max(b_s, 1))
        # A row without a visible key so far has maximum -inf: 0 as the shift avoids NaN.
        shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
        b_p = tl.exp2(b_s - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(b_p, 1)
        if HAS_DROPOUT:
            b_p *= dropout_scale(SEED, i_bh, o_m[:, None], o_n[None, :], TQ, TK, dropout)
        b_v = load_rows(p_v, o_n, v_t, m_k, D, BLOCK_D, True)
        b_o = b_o * rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        maximum = new_maximum
    for n in tl.range(full_begin, full_end, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, o_n, k_t, o_n < TK, D, BLOCK_D, False)
        if IS_FP32:
            key_high, key_low = split_fp64(tl.load(p_ck + o_n) * LOG2_E - base)
            bias = (row_high[:, None] - key_high[None, :]) + (row_low[:, None] - key_low[None, :])
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * qk_scale + bias
            new_maximum = tl.maximum(maximum, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - new_maximum[:, None])
        else:
            bias = _key_bias(p_relative, p_base, o_n, n, base, BLOCK_N)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * qk_scale + bias[None, :]
            new_maximum = tl.maximum(maximum, tl.max(b_s, 1) + row_high)
            b_p = tl.exp2(b_s - (new_maximum - row_high)[:, None])
        rescale = tl.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(b_p, 1)
        if HAS_DROPOUT:
            b_p *= dropout_scale(SEED, i_bh, o_m[:, None], o_n[None, :], TQ, TK, dropout)
        b_v = load_rows(p_v, o_n, v_t, o_n < TK, D, BLOCK_D, False)
        b_o = b_o * rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        maximum = new_maximum

    b_o = b_o / tl.where(total == 0.0, 1.0, total).to(tl.float32)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    p_out = OUT + ((i_b * TQ + o_m[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, b_o.to(OUT.dtype.element_ty), mask=m_q[:, None] & (o_d[None, :] < D))
    lse = maximum.to(tl.float64) * LN_2 + tl.log(total) if IS_FP32 else (maximum + tl.log2(total)) * LN_2
    tl.store(LSE + i_bh.to(tl.int64) * TQ + o_m, lse, mask=m_q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float, dropout: float, seed: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass. Arguments as for `reference_attention`, each tensor contiguous along its last dimension.

    Args:
        q: ``[B, Tq, H, D]``.
        k, v: ``[B, Tk, G, D]``, of the dtype of ``q``.
        decay: of these queries and keys.
        scale: multiplies ``q . k``.
        dropout: share of the weights that is dropped, in ``[0, 1)``.
        seed: one int64 if ``dropout`` is not zero.
        tile: shape and resources of a program.

    Returns:
        Output ``[B, Tq, H, D]`` in the dtype of ``q`` and log-sum-exp ``[B, H, Tq]``, float32 (float64 for float32).
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    is_fp32 = q.dtype == torch.float32
    lse = torch.empty(batch, heads, queries, dtype=torch.float64 if is_fp32 else torch.float32, device=q.device)
    described = describe_blocks(decay, heads, tile.queries, BASE_BLOCK.value)
    blocks = described.least.shape[-1]
    _forward_kernel[(blocks * batch * heads,)](
        Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
        K=k, k_b=k.stride(0), k_t=k.stride(1), k_h=k.stride(2),
        V=v, v_b=v.stride(0), v_t=v.stride(1), v_h=v.stride(2),
        C_Q=decay.query, cq_b=decay.query.stride(0), cq_h=decay.query.stride(1),
        C_K=decay.key, ck_b=decay.key.stride(0), ck_h=decay.key.stride(1),
        RELATIVE=described.relative,
        BASE=described.base,
        KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
        LAST=decay.last,
        LEAST=described.least,
        GREATEST=described.greatest,
        HEAD_ORDER=heaviest_first(described.least.flatten(0, 1)),
        SEED=seed,
        OUT=out,
        LSE=lse,
        scale=scale,
        dropout=dropout,
        TQ=queries,
        TK=keys,
        H=heads,
        HF=gates,
        KV_GROUP=heads // kv_heads,
        GATE_GROUP=heads // gates,
        START_GROUP=heads // decay.kv_start.shape[1],
        NM=blocks,
        NB=described.base.shape[-1],
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        IS_FP32=is_fp32,
        HAS_DROPOUT=dropout > 0.0,
        PRECISION=dot_precision(q),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
