"""The backward pass in Triton: every score is computed once, and results are bitwise deterministic.

    dV_j = sum_i P_ij dO_i,   dS_ij = P_ij (dO_i . V_j - delta_i),   delta_i = dO_i . O_i - dlse_i
    dQ_i = scale sum_j dS_ij K_j,   dK_j = scale sum_i dS_ij Q_i,   dc_i = sum_j dS_ij,   dc_j = -sum_i dS_ij

(names: `triton_common`). A program holds one block of keys of one key/value head and loops over the blocks of queries
that attend to it. It accumulates their ``dK``, ``dV`` and ``dc_j``; its share of ``dQ`` must be added to that of other
programs. Floating-point sums in the order of arrival would differ from run to run, so shares are rounded to integers,
whose sums do not depend on order. The fixed-point scale of row ``i`` is ``2^30`` (``2^62`` for float32 inputs) over
what bounds its sum,

    |sum_j dS_ij k_jd| <= (2 |dO_i| max_j |v_j| + |dlse_i|) max_jd |k_jd|

with the maxima over the keys up to that row.

A row of ``dS`` sums to ``dlse_i``, but for the rounding of ``O`` in ``delta_i``. Summed along the sequence those
residues would grow into the gates' gradients, so the rows are summed too, of the same ``dS`` as the columns, and in the
same way: in the gradient of a gate all but the pairs across it cancel.

For float32 inputs the residues would be the largest error, so a first pass finds them, and ``delta_i`` becomes the sum
of the very ``P_ij dP_ij`` that it is subtracted from. Scores are rounded as in the forward pass, and what the
log-sum-exp loses as a float32 value is a factor of the row's weights: they sum to one as those of a softmax that
divides.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..decay import Decay
from ..tiles import Tile, cdiv, padded_head_dim
from ..triton_common import dot_precision
from .backward_kernel import backward_finish_kernel, backward_kernel
from .backward_rows import row_statistics, running_maxima
from .block_ranges import describe_blocks, query_ranges


class _Gradients(NamedTuple):
    """``sums`` and ``row_sums`` are fixed-point, the others what `backward` returns."""

    sums: Tensor
    row_sums: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dc_q: Tensor
    dc_k: Tensor


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> _Gradients:
    batch, queries, heads, head_dim = q.shape
    words = head_dim if q.dtype == torch.float32 else cdiv(head_dim, 2)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return _Gradients(
        sums=torch.zeros(batch, heads, queries, words, dtype=torch.int64, device=q.device),
        row_sums=torch.zeros(batch, heads, queries, dtype=torch.int64, device=q.device),
        dq=dq,
        dk=dk,
        dv=dv,
        dc_q=torch.empty(batch, heads, queries, dtype=torch.float64, device=q.device),
        dc_k=torch.empty(batch, heads, k.shape[1], dtype=torch.float64, device=q.device),
    )


def backward(
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
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass. Each tensor is contiguous along its last dimension.

    Args:
        d_out, d_lse: gradients of ``out``, ``[B, Tq, H, D]``, and ``lse``, ``[B, H, Tq]`` float32.
        q, k, v, decay, scale, dropout, seed: what `forward` took.
        out, lse: what it returned.
        tile: shape and resources of a program.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes, and of the running sums at queries and keys, per query
        head: ``[B, H, Tq]`` and ``[B, H, Tk]`` float64.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    least, greatest, *_ = describe_blocks(decay, heads, tile.queries, tile.keys)
    blocks, key_blocks = least.shape[-1], cdiv(keys, tile.keys)
    m_end, full_end, order = query_ranges(least, greatest, decay.last, keys, kv_heads, tile)
    is_fp32 = q.dtype == torch.float32
    rows = row_statistics(d_out, d_lse, out, lse, decay, running_maxima(k, v), dropout, tile)
    gradients = _empty_gradients(q, k, v)
    for is_residue_pass in (True, False) if is_fp32 else (False,):
        backward_kernel[(key_blocks * batch * kv_heads,)](
            Q=q, q_b=q.stride(0), q_t=q.stride(1), q_h=q.stride(2),
            K=k, k_b=k.stride(0), k_t=k.stride(1), k_h=k.stride(2),
            V=v, v_b=v.stride(0), v_t=v.stride(1), v_h=v.stride(2),
            D_OUT=d_out, do_b=d_out.stride(0), do_t=d_out.stride(1), do_h=d_out.stride(2),
            C_Q=decay.query, cq_b=decay.query.stride(0), cq_h=decay.query.stride(1),
            C_K=decay.key, ck_b=decay.key.stride(0), ck_h=decay.key.stride(1),
            KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
            LAST=decay.last,
            DELTA=rows.DELTA,
            SHIFT=rows.SHIFT,
            ROW_TERM=rows.ROW_TERM,
            BASE=rows.BASE,
            DQ_SCALE=rows.DQ_SCALE,
            ROW_BOUND=rows.ROW_BOUND,
            M_END=m_end,
            M_FULL_END=full_end,
            HEAD_ORDER=order,
            SEED=seed,
            DQ=gradients.sums,
            DK=gradients.dk,
            DV=gradients.dv,
            DC=gradients.dc_k,
            ROW_SUMS=gradients.row_sums,
            scale=scale,
            dropout=dropout,
            TQ=queries,
            TK=keys,
            H=heads,
            G=kv_heads,
            KV_GROUP=heads // kv_heads,
            GATE_GROUP=heads // gates,
            START_GROUP=heads // decay.kv_start.shape[1],
            NM=blocks,
            NN=key_blocks,
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            IS_FP32=is_fp32,
            IS_RESIDUE_PASS=is_residue_pass,
            HAS_DROPOUT=dropout > 0.0,
            PRECISION=dot_precision(q),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        if is_residue_pass:
            # What else it stored is overwritten.
            rows.DELTA.add_(gradients.row_sums * (rows.ROW_BOUND.double() / 2**62) - d_lse)
            gradients.row_sums.zero_()
    backward_finish_kernel[(batch * heads, blocks)](
        SUMS=gradients.sums,
        DQ_SCALE=rows.DQ_SCALE,
        ROW_SUMS=gradients.row_sums,
        ROW_BOUND=rows.ROW_BOUND,
        DQ=gradients.dq,
        DC=gradients.dc_q,
        scale=scale,
        TQ=queries,
        H=heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tile.queries,
        IS_FP32=is_fp32,
    )
    return gradients.dq, gradients.dk, gradients.dv, gradients.dc_q, gradients.dc_k
