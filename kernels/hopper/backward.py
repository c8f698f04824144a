"""The backward pass for Hopper (sm_90), heads of 64 and 128 and 16-bit dtypes, in Gluon, Triton's lower-level language.

It computes what `portable.backward` does (names: `triton_common`), by the same plan: every score once, a program loops
from a block of 128 keys over the tiles of 64 queries that attend to it and accumulates ``dK``, ``dV`` and the keys'
gradients of the decay; shares of ``dQ`` are added as integers. Gluon adds control over the hardware: copies by TMA,
asynchronous matmuls, warp groups with different roles and numbers of registers. `backward_d64` and `backward_d128` say
what each role does; here is what holds for both.

Results are bitwise deterministic, because whatever more than one program adds to is a sum of integers. For ``dQ`` these
are int32, whose fixed-point scale is ``2^30`` over the least power of two that bounds the row's sum (the bound is that
of `portable.backward`), with room for rounding and for every partial sum. At heads of 128 two of them are added as one
int64, the second on top. For the row sums of ``dS`` they are int64, with a scale finer by ``2^18``. A power of two
makes the conversion there and back exact. Everything else is added in one program and in one order, whichever program
draws which work tile: the scheduler decides only when.

The sums of ``dQ`` lie in memory as the accumulators of a warp group have them, ``[tile, 64 columns, register,
thread]``, so that a warp adds to neighbours; `backward_rows.finish_queries` undoes that.

What is fragile, since ptxas decides it (look at its warnings, and at what cuobjdump shows, after every change):

* From one iteration of the loop over tiles to the next only one group of matmuls may be in flight, ``dK``. With more,
  or with an accumulator touched while its matmul runs, ptxas waits after each matmul (warning C7510 and its like).
  Zeros for accumulators therefore pass through a wait.
* ``dK`` reads ``dS`` from shared memory, where it must go for ``dQ`` anyhow. As an operand in registers it would live
  until the matmul is done, into the next tile, and spill.
* Registers are full: one more array that lives through a tile spills. ``zero`` in the loops, always zero, keeps the
  compiler from computing addresses ahead. Branches for diagonal tiles load again what they can.
* A stage of a ring is released one tile late, after the barrier of the next tile, when every warp has waited for the
  matmuls of the one before.
* Writes to shared memory that a matmul or TMA reads take a fence, then a barrier of the role.
"""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..decay import Decay
from ..devices import multiprocessors_of
from ..portable.block_ranges import describe_blocks, query_ranges
from ..tiles import Tile, cdiv
from .backward_d64 import hopper_backward_d64_kernel
from .backward_d128 import hopper_backward_d128_kernel
from .backward_rows import finish_queries, prepare_rows
from .tma import describe_by_token, for_tma

# Queries of a tile and keys of a work tile. The kernels have them built in.
_TILE_QUERIES, _TILE_KEYS = 64, 128
# One object: kernels remember what they were compiled for by that (`launch`).
_ROW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def hopper_backward_takes(q: Tensor, k: Tensor) -> bool:
    """Whether the indices of `hopper_backward` are large enough, for what `hopper_forward_takes`.

    Some are of 32 bits; and ``kv_start`` is compared as a float32 value.
    """
    batch, keys, kv_heads, head_dim = k.shape
    return batch * q.shape[2] * (keys + 256) < 2**31 and keys * kv_heads * head_dim < 2**31 and keys < 2**24


def hopper_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `portable.backward.backward` without dropout, for what `hopper_forward_takes` and `hopper_backward_takes`.

    The last query is taken to be at the last key: there are no gradients through a cache with room to spare.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes, and of the running sums at queries and keys, per query
        head: ``[B, H, Tq]`` and ``[B, H, Tk]`` float64.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    is_d128 = head_dim == 128
    d_out, q, k, v = (for_tma(x) for x in (d_out, q, k, v))
    blocks, key_blocks = cdiv(queries, _TILE_QUERIES), cdiv(keys, _TILE_KEYS)
    described = describe_blocks(decay, heads, _TILE_QUERIES, _TILE_KEYS if is_d128 else _TILE_KEYS // 2)
    # Of its attributes only the sizes are looked at.
    tile = Tile(_TILE_QUERIES, _TILE_KEYS, warps=8, stages=3)
    m_end, _, order = query_ranges(described.least, described.greatest, decay.last, keys, kv_heads, tile)
    rows, sums, row_sums = prepare_rows(d_out, d_lse, k, v, decay, out, lse, _TILE_QUERIES)
    if is_d128:
        sums = sums.view(torch.int64)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dc_k = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    row_shape, row_block = list(rows.shape), [1, 4 * _TILE_QUERIES]
    arguments = dict(
        q_desc=describe_by_token(q, _TILE_QUERIES),
        do_desc=describe_by_token(d_out, _TILE_QUERIES),
        row_desc=TensorDescriptor(rows, row_shape, [row_shape[1], 1], row_block, _ROW_LAYOUT),
        BASE=described.base,
        C_K=decay.key.contiguous(),
        M_END=m_end,
        HEAD_ORDER=order,
        DQ=sums,
        ROW_SUMS=row_sums,
        DC=dc_k,
        scale=float(scale),
        TQ=queries,
        TK=keys,
        H=heads,
        G=kv_heads,
        KV_GROUP=heads // kv_heads,
        GATE_GROUP=heads // gates,
        HF=gates,
        NN=key_blocks,
        NM=blocks,
        ELEMENT=gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16,
    )
    work_tiles = batch * kv_heads * key_blocks
    if is_d128:
        hopper_backward_d128_kernel[(work_tiles,)](
            **arguments,
            k_desc=describe_by_token(k, _TILE_KEYS),
            v_desc=describe_by_token(v, _TILE_KEYS),
            dk_desc=describe_by_token(dk, _TILE_KEYS),
            dv_desc=describe_by_token(dv, _TILE_KEYS),
            num_warps=8,
            maxnreg=168,
        )
    else:
        hopper_backward_d64_kernel[(min(work_tiles, multiprocessors_of(q) or 1),)](
            **arguments,
            k_desc=describe_by_token(k, _TILE_KEYS // 2),
            v_desc=describe_by_token(v, _TILE_KEYS // 2),
            ROWS=rows,
            WORK_COUNTER=described.counter,
            DK=dk,
            DV=dv,
            WORK_TILES=work_tiles,
            num_warps=4,
            maxnreg=128,
        )
    dq, dc_q = finish_queries(q, sums, rows, row_sums, scale, _TILE_QUERIES)
    # With a minus sign, as the bias of every logit of a column has its sum.
    return dq, dk, dv, dc_q, torch.mul(dc_k, -1.0, out=torch.empty_like(dc_k, dtype=torch.float64))
