"""The backward pass for Hopper (sm_90), heads of 64 and 128 and 16-bit types, in Gluon, Triton's language below tiles.

It computes what `backward` does, by the same plan: scores once, a program walks from a block of 128 keys over the tiles
of 64 queries that see it and keeps ``dK``, ``dV`` and the keys' gradients of the decay; shares of ``dQ`` are added as
integers. What Gluon adds is a hand in who does what and when: copies by TMA, products that run beside other work,
and registers dealt out by role. `hopper_backward_64` and `hopper_backward_128` say who does what; here is the rest.

Why the bits are the same every time: whatever more than one program adds to is a sum of integers. For ``dQ`` these are
int32, in units of the least power of two, over ``2^30``, that bounds the row's sum (the bound is that of `backward`),
with room for rounding and for every partial sum. At heads of 128 two of them are added as one int64, the second on
top. For the sums of rows of ``dS`` they are int64, in units finer by ``2^18``. A power of two makes the way there and
back exact. Everything else is added in one program and in one order, whichever program draws which item: the counter
decides only when.

The sums of ``dQ`` lie in memory as the accumulators of a warpgroup have them, ``[tile, 64 columns, register, thread]``,
so that a warp adds to neighbours; `_hopper_finish_kernel` undoes that.

What is fragile, since ptxas decides it (look at its warnings, and at what cuobjdump shows, after every change):

* From one pass of the loop over tiles to the next only one group of products may be in flight, ``dK``. With more, or
  with an accumulator touched while its product runs, ptxas waits after each product (warning C7510 and its like).
  Zeros for accumulators therefore pass through a wait.
* ``dK`` reads ``dS`` from shared memory, where it must go for ``dQ`` anyhow. As an operand in registers it would live
  until the product is done, into the next tile, and spill.
* Registers are full: one more array that lives through a tile spills. ``z`` in the loops, always zero, keeps the
  compiler from computing addresses ahead. Branches on the diagonal load again what they can.
* A slot of a ring is released one tile late, after the barrier of the next tile, when every warp has waited for the
  products of the one before.
* Writes to shared memory that a product or TMA reads take a fence, then a barrier of the role.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..decay import Decay
from ..portable.backward_rows import MAXIMA_KEYS, row_norms, running_maxima
from ..portable.block_ranges import heaviest_first, kv_start_ranges, query_ranges
from ..tiles import Tile
from ..triton_common import INF, LOG2_E
from .backward_d64 import hopper_backward_64_kernel
from .backward_d128 import hopper_backward_128_kernel
from .common import UNITS_PER_QUANTUM

# Queries of a tile and keys of an item. The kernels have them built in.
_QUERIES, _KEYS = 64, 128
# Of tiles in shared memory. Made once: that takes the host as long as a launch.
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)

# Room for the rounding of bounds, and of the products that they bound.
_ROOM = tl.constexpr(1.03)
# Keeps bounds of dQ from vanishing with the keys.
_LEAST_KEY = tl.constexpr(2.0**-12)
# What is larger, as a bound, would have no unit: gradients are NaN.
_LARGEST_BOUND = tl.constexpr(1e18)


@triton.jit
def _exponent(x):
    """Biased exponent of the least power of two that is not below ``x``."""
    return (tl.minimum(tl.maximum(x, 1e-17), 1e18).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23


@triton.jit
def _hopper_keys_kernel(C_K, FINITE, ck_b, ck_h, HF, TK, BLOCK: tl.constexpr):
    """Running sums at keys; at hidden keys the least of their block, 0 if all are hidden."""
    head, block = tl.program_id(0), tl.program_id(1)
    keys = block * BLOCK + tl.arange(0, BLOCK)
    p_c = C_K + (head // HF).to(tl.int64) * ck_b + (head % HF).to(tl.int64) * ck_h
    c = tl.load(p_c + keys, mask=keys < TK, other=INF)
    least = tl.min(c, 0)
    least = tl.where(least == INF, 0.0, least)
    tl.store(FINITE + head.to(tl.int64) * TK + keys, tl.where(c == INF, least, c), mask=keys < TK)


@triton.jit
def _hopper_rows_kernel(
    D_OUT,
    OUT,
    C_Q,
    LSE,
    D_LSE,
    FIRST,
    MAXIMA,
    ROWS,
    SUMS,
    ROW_SUMS,
    do_b,
    do_t,
    do_h,
    o_b,
    o_t,
    o_h,
    cq_b,
    cq_h,
    dl_b,
    dl_h,
    first_b,
    first_h,
    TQ,
    TK,
    H,
    KV_GROUP,
    GATE_GROUP,
    FIRST_GROUP,
    NM,
    NB,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAXIMA_KEYS: tl.constexpr,
):
    """What the main kernel must know of a tile's rows, see `hopper_backward_parts`; and zeros for its sums."""
    head, m = tl.program_id(0), tl.program_id(1)
    tile = (head * NM + m).to(tl.int64)
    tl.store(SUMS + tile * (BLOCK_M * HEAD_DIM) + tl.arange(0, BLOCK_M * HEAD_DIM), 0)
    tl.store(ROW_SUMS + tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M], tl.int64))
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    tokens = rows[:, None].to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    mask = is_row[:, None]
    d_out = tl.load(D_OUT + b * do_b + h * do_h + tokens * do_t + dims, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(OUT + b * o_b + h * o_h + tokens * o_t + dims, mask=mask, other=0.0).to(tl.float32)
    d_lse = tl.load(D_LSE + b * dl_b + h * dl_h + rows, mask=is_row, other=0.0)
    delta = tl.sum(d_out * out, 1) - d_lse

    # The largest of the keys that a row can see, and of a few after it.
    p_maxima = MAXIMA + (head // KV_GROUP) * NB + tl.minimum((TK - TQ + rows) // MAXIMA_KEYS, NB - 1)
    largest_k, largest_v = tl.load(p_maxima), tl.load(p_maxima + tl.num_programs(0) // KV_GROUP * NB)
    # A delta that is not a number makes the bounds ones that are not either, and with them the gradients.
    bound = (2.0 * row_norms(d_out) * largest_v + tl.abs(d_lse)) * _ROOM + delta * 0.0
    # A power of two: 2^30 steps reach the largest dQ of a row, and so many of `UNITS_PER_QUANTUM` its sum of dS.
    bound *= tl.maximum(largest_k, _LEAST_KEY)
    per_quantum = ((284 - _exponent(bound)) << 23).to(tl.float32, bitcast=True)
    per_quantum = tl.where((bound != bound) | (bound > _LARGEST_BOUND), float("nan"), per_quantum)

    p_c = C_Q + b * cq_b + (h // GATE_GROUP) * cq_h
    base = tl.load(p_c + m * BLOCK_M) * LOG2_E
    relative = tl.load(p_c + rows, mask=is_row, other=0.0) * LOG2_E - base
    lse = tl.load(LSE + head.to(tl.int64) * TQ + rows, mask=is_row, other=0.0)
    # exp(-inf - 0) = 0 for a row that sees nothing, where exp(-inf + inf) would be NaN.
    shift = tl.where(lse == -INF, 0.0, lse).to(tl.float64) * LOG2_E
    high = relative.to(tl.float32)
    low = ((relative - high.to(tl.float64)) - shift).to(tl.float32)
    p_first = FIRST + b * first_b + (h // FIRST_GROUP) * first_h
    first = tl.load(p_first + rows, mask=is_row, other=0).to(tl.float32)
    base_high = base.to(tl.float32)
    base_low = (base - base_high.to(tl.float64)).to(tl.float32)
    o = tl.arange(0, BLOCK_M)
    of_tile = tl.where(o == 0, base_high, tl.where(o == 1, base_low, 0.0))
    of_tile = tl.where(o == 2, tl.max(first, 0), of_tile)
    p = ROWS + tile * (8 * BLOCK_M) + o
    tl.store(p, tl.where(is_row, (relative - shift).to(tl.float32), -INF))
    tl.store(p + BLOCK_M, tl.where(is_row, delta, 0.0))
    tl.store(p + 2 * BLOCK_M, tl.where(is_row, per_quantum, 0.0))
    tl.store(p + 3 * BLOCK_M, of_tile)
    tl.store(p + 4 * BLOCK_M, tl.where(is_row, high, 0.0))
    tl.store(p + 5 * BLOCK_M, tl.where(is_row, low, -INF))
    tl.store(p + 6 * BLOCK_M, first)


@triton.jit
def _hopper_finish_kernel(
    SUMS,
    ROWS,
    ROW_SUMS,
    DQ,
    DC,
    scale,
    TQ,
    H,
    NM,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    UNITS_PER_QUANTUM: tl.constexpr,
):
    """Integer sums to gradients of queries and of their running sums."""
    head, m = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    tile = (head * NM + m).to(tl.int64)
    PARTS: tl.constexpr = HEAD_DIM // 64
    part = tl.arange(0, PARTS)[:, None]
    word = tl.arange(0, 2048)[None, :]
    if PAIRS:
        pair = tl.load(SUMS + tile * (BLOCK_M * HEAD_DIM // 2) + part * 2048 + word)
        even = (pair << 32) >> 32
        x = tl.join(even.to(tl.float32), ((pair - even) >> 32).to(tl.float32))
    else:
        p_even = SUMS + tile * (BLOCK_M * HEAD_DIM) + part * 4096 + word
        x = tl.join(tl.load(p_even).to(tl.float32), tl.load(p_even + 2048).to(tl.float32))
    # From [64 columns, half, 8 columns, warp, row, pair of columns, column].
    x = tl.reshape(x, [PARTS, 2, 8, 4, 8, 4, 2])
    x = tl.reshape(tl.permute(x, (3, 1, 4, 0, 2, 5, 6)), [BLOCK_M, HEAD_DIM])
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < TQ
    p_rows = ROWS + tile * (8 * BLOCK_M)
    per_quantum = tl.load(p_rows + 2 * BLOCK_M + tl.arange(0, BLOCK_M), mask=is_row, other=1.0)
    dq = x * (scale / per_quantum)[:, None]
    p = ((b * TQ + rows[:, None]) * H + h) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(DQ + p, dq.to(DQ.dtype.element_ty), mask=is_row[:, None])

    row_sums = tl.load(ROW_SUMS + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.float64)
    row_sums = row_sums / (per_quantum.to(tl.float64) * UNITS_PER_QUANTUM)
    tl.store(DC + head.to(tl.int64) * TQ + rows, row_sums, mask=is_row)


def _steps(x: Tensor) -> list[int]:
    """Strides of ``[B, T, heads, D]`` but the last; that of a single element may be anything."""
    return [step if size > 1 else x.shape[-1] for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _for_tma(x: Tensor) -> Tensor:
    """``x``, ``[B, T, heads, D]``, copied if the tensor memory accelerator could not read it."""
    steps = [step * x.element_size() for step in _steps(x)]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """``x``, ``[B, T, heads, D]``, in blocks of ``rows`` tokens of one head."""
    return TensorDescriptor(x, list(x.shape), [*_steps(x), 1], [1, rows, 1, x.shape[-1]], _LAYOUT)


def hopper_backward_takes(q: Tensor, k: Tensor) -> bool:
    """Whether the indices of `hopper_backward` are large enough, for what `hopper_forward_takes`.

    Some are of 32 bits; and first keys are compared as float32 numbers.
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
    """As `backward.backward` without dropout, for what `hopper_forward_takes` and `hopper_backward_takes`.

    The last query is taken to be at the last key: there are no gradients through a cache with room to spare.

    Returns:
        Gradients of q, k and v, in their shapes and types, and of the running sums at queries and keys, per query
        head: ``[B, H, Tq]`` and ``[B, H, Tk]`` float64.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    pairs = head_dim == 128
    d_out, q, k, v = (_for_tma(x) for x in (d_out, q, k, v))
    blocks, key_blocks = triton.cdiv(queries, _QUERIES), triton.cdiv(keys, _KEYS)
    low, high = kv_start_ranges(decay.kv_start, decay.last, heads, _QUERIES)
    order = heaviest_first(low.view(batch * kv_heads, -1)).int()
    # Of its attributes only the sizes are looked at.
    stop, _ = query_ranges(low, high, decay.last, keys, Tile(_QUERIES, _KEYS, warps=8, stages=3))
    # The kernels count rows.
    stop = stop * _QUERIES
    c_k = decay.key.contiguous()
    finite = torch.empty_like(c_k)
    _hopper_keys_kernel[(batch * gates, key_blocks)](
        decay.key, finite, *decay.key.stride()[:2], gates, keys, BLOCK=_KEYS, num_warps=1
    )

    tiles = batch * heads * blocks
    rows = torch.empty(tiles * 2, 4 * _QUERIES, dtype=torch.float32, device=q.device)
    sums = torch.empty(tiles * _QUERIES * head_dim, dtype=torch.int32, device=q.device)
    row_sums = torch.empty(tiles * _QUERIES, dtype=torch.int64, device=q.device)
    maxima = running_maxima(k, v)
    _hopper_rows_kernel[(batch * heads, blocks)](
        d_out,
        out,
        decay.query,
        lse,
        d_lse,
        decay.kv_start,
        maxima,
        rows,
        sums,
        row_sums,
        *d_out.stride()[:3],
        *out.stride()[:3],
        *decay.query.stride()[:2],
        *d_lse.stride()[:2],
        *decay.kv_start.stride()[:2],
        queries,
        keys,
        heads,
        heads // kv_heads,
        heads // gates,
        heads // decay.kv_start.shape[1],
        blocks,
        maxima.shape[-1],
        HEAD_DIM=head_dim,
        BLOCK_M=_QUERIES,
        MAXIMA_KEYS=MAXIMA_KEYS,
        num_warps=4,
    )

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    columns = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    if pairs:
        sums = sums.view(torch.int64)
    row_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    row_descriptor = TensorDescriptor(rows, list(rows.shape), [4 * _QUERIES, 1], [1, 4 * _QUERIES], row_layout)
    sizes = (queries, keys, heads, kv_heads, heads // kv_heads, heads // gates, gates, key_blocks, blocks)
    element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    items = batch * kv_heads * key_blocks
    if pairs:
        hopper_backward_128_kernel[(items,)](
            _descriptor(q, _QUERIES),
            _descriptor(k, _KEYS),
            _descriptor(v, _KEYS),
            _descriptor(d_out, _QUERIES),
            row_descriptor,
            _descriptor(dk, _KEYS),
            _descriptor(dv, _KEYS),
            finite,
            c_k,
            stop,
            order,
            sums,
            row_sums,
            columns,
            float(scale),
            *sizes,
            ELEMENT=element,
            num_warps=8,
            maxnreg=168,
        )
    else:
        # A new counter each time: for CUDA graphs, for several streams, and after a launch that was cut short.
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        hopper_backward_64_kernel[(min(items, processors),)](
            _descriptor(q, _QUERIES),
            _descriptor(k, _KEYS // 2),
            _descriptor(v, _KEYS // 2),
            _descriptor(d_out, _QUERIES),
            row_descriptor,
            rows,
            finite,
            c_k,
            stop,
            order,
            counter,
            sums,
            row_sums,
            dk,
            dv,
            columns,
            float(scale),
            items,
            *sizes,
            ELEMENT=element,
            num_warps=4,
            maxnreg=128,
        )

    dc_q = torch.empty(batch, heads, queries, dtype=torch.float64, device=q.device)
    _hopper_finish_kernel[(batch * heads, blocks)](
        sums,
        rows,
        row_sums,
        dq,
        dc_q,
        scale,
        queries,
        heads,
        blocks,
        HEAD_DIM=head_dim,
        BLOCK_M=_QUERIES,
        PAIRS=pairs,
        UNITS_PER_QUANTUM=UNITS_PER_QUANTUM,
        num_warps=4,
    )
    # With a minus sign, as every logit of a column has its sum.
    return dq, dk, dv, dc_q, columns.double().neg_()
