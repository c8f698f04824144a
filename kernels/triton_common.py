"""What all Triton and Gluon kernels share: the names, constants and device functions.

Sizes and indices
    ===================  ===========================================================================================
    ``B``                sequences of a batch
    ``T, TQ, TK``        tokens, queries, keys of a sequence
    ``H, G, HF``         query heads, key/value heads, forget gates per token; ``HF`` is ``H``, ``G`` or 1
    ``*_GROUP``          query heads per key/value head (``KV_GROUP``), gate (``GATE_GROUP``) or row of ``KV_START``
    ``D``                size of a head; ``BLOCK_D`` is the power of two that it is padded to
    ``NM, NN, NB``       blocks of ``BLOCK_M`` queries, of ``BLOCK_N`` keys, of ``BASE_BLOCK`` keys
    ``x_b, x_t, x_h``    strides of tensor ``X`` in elements: batch, token, head; the last dimension has stride 1
    ``i_b, i_h, i_g``    a program's sequence, query head, key/value head; ``i_bh`` is ``i_b * H + i_h``
    ``i_m, i_n``         index of a block of queries, of keys
    ===================  ===========================================================================================

Values
    ===================  ===========================================================================================
    ``Q, C_Q, ...``      capitals: arguments of a launch, that is pointers to tensors, sizes and constants
    ``p_``               pointer, moved to the program's sequence and head
    ``o_``               offsets of a block's rows, ``[BLOCK_M]`` or ``[BLOCK_N]``, or of its columns, ``[BLOCK_D]``
    ``m_``               mask of such offsets that are inside the tensor
    ``b_``               tile in registers: ``b_q [BLOCK_M, BLOCK_D]``, scores ``b_s``, weights ``b_p``, output ``b_o``
    ``dq, dk, dv, dc``   gradients; ``b_ds`` and ``b_dp`` are those of scores and weights, ``b_do`` of the output
    ``acc_``             accumulator of an asynchronous matmul that may be in flight
    ``HAS_, IS_``        flags known when the kernel is compiled
    ``c``                running sum of log forget gates, float64; the bias of a score is ``c_i - c_j``
    ``base``             a float64 sum relative to which sums of a block fit in float32
    ``x_high, x_low``    a float64 value as the sum of two float32 ones
    ``kv_start``         first key that a query may attend to, by resets, packing, padding and pruning
    ===================  ===========================================================================================

Tiles of scores, ``BLOCK_M`` queries by ``BLOCK_N`` keys
    ===================  ===========================================================================================
    full tile            every pair is visible: no mask
    masked tile          some pairs may be hidden: it is on the diagonal or holds a ``kv_start``
    diagonal tile        holds the diagonal key of a query, the last one that it may attend to
    work tile            what one pass of a persistent kernel computes: a block of queries (forward) or keys (backward)
                         of a head. The dynamic scheduler hands them out by a counter in global memory
    ===================  ===========================================================================================

Warp-specialized kernels (Gluon)
    ===================  ===========================================================================================
    role                 what a group of warps does. A producer copies tiles to shared memory by TMA, a consumer
                         multiplies them; further roles are named where they are
    stage                slot of a ring of shared-memory buffers
    phase                parity of the ring's round, which a wait for an mbarrier names; it flips each time round
    ``x_full, x_empty``  pair of mbarriers of a stage: ``x`` has been written, ``x`` has been read by all. Waits for
                         *empty* name the opposite phase, which passes at once in the first round
    ===================  ===========================================================================================

Exponents are in units of log 2, since ``exp2`` is what the hardware has.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import capability_of
from .launches.launch import launched

# Triton reads the variable when a kernel is defined; and torch.compile cannot trace the reading of it.
INTERPRETED = triton.knobs.runtime.interpret
# Gluon, Triton's language below tiles, may change with any release: only those that our kernels were tried with.
HAS_GLUON = not INTERPRETED and triton.__version__.startswith(("3.6.", "3.7."))

# Keys (and, backward, queries) that share one float64 base.
BASE_BLOCK = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
INT32_MAX = tl.constexpr(2147483647)

# Triton compiles a kernel anew for an integer that is 1, for one that is a multiple of 16, and for a pointer aligned to
# 16 bytes. Sizes of a model and strides of queries, keys and values deserve that; what follows does not, since it
# changes from batch to batch: lengths, numbers of blocks, strides that are lengths, and tensors that may be parts of
# others. Names are those of parameters; a kernel need not have them all.
VARYING_SIZES = (
    "T", "TQ", "TK", "HAS_CARRY", "HEADS", "KV_HEADS", "NB", "NC", "NG", "NM", "NN", "NR", "OFFSET",
    "STEPS", "WORK_TILES",
    "c_b", "c_h", "carry_b", "carry_h", "ck_b", "ck_h", "cq_b", "cq_h", "decays_b", "decays_h", "dl_b", "dl_h", "f_b",
    "first_b", "first_h", "largest_b", "largest_h", "last_b", "pages_b", "real_b", "s_b", "s_h", "starts_b",
)  # fmt: skip
PARTS_OF_TENSORS = (
    "BASE", "C", "CARRY_C", "CARRY_FIRST", "C_K", "C_Q", "DC", "DELTA", "DIAGONAL", "DIAGONAL_BLOCK", "DQ_SCALE",
    "D_LSE", "END", "GREATEST",
    "HEAD_ORDER", "HELD_FROM", "KV_START", "LARGEST", "LAST", "LEAST", "LOG_DECAYS", "LOG_F", "LOG_SUM", "LSE",
    "M_END", "M_FULL_END", "NORM", "PAGES", "REAL", "RELATIVE", "ROW_BOUND", "ROW_TERM", "SHIFT", "STARTS",
    "WORK_COUNTER",
)  # fmt: skip


def kernel(function: Callable[..., Any]) -> Any:
    """Decorates a kernel that the host launches, so that one compilation serves all lengths and batches."""
    compiled = triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=PARTS_OF_TENSORS)
    return launched(compiled(function))


def overlapping(x: Tensor) -> dict[str, bool]:
    """Options of a launch that may begin before the kernel before it has ended, on a GPU that can: its blocks are then
    placed, and wait in `wait_for_inputs`. Decoding is a chain of kernels that run for a few microseconds each."""
    overlaps = not INTERPRETED and (capability_of(x) or (0, 0)) >= (9, 0)
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """First in a kernel launched as `overlapping`: wait until the kernel before has ended and all it wrote is seen.

    Only then may the next kernel begin. So none begins before the last but one has ended, and what a kernel reads
    before its wait is what only the kernel right before it could have changed.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_rows(p, o_rows, stride, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr):
    """Rows ``o_rows`` of a head at ``p``, ``[rows, BLOCK_D]``; zero outside ``m_rows`` (if ``HAS_MASK``) and ``D``."""
    o_d = tl.arange(0, BLOCK_D)
    p = p + o_rows[:, None].to(tl.int64) * stride + o_d[None, :]
    if HAS_MASK:
        return tl.load(p, mask=m_rows[:, None] & (o_d[None, :] < D), other=0.0)
    elif D != BLOCK_D:
        return tl.load(p, mask=o_d[None, :] < D, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def split_fp64(x):
    """A float64 value as the sum of two float32 ones; an infinite one has no second part."""
    high = x.to(tl.float32)
    low = (x - high.to(tl.float64)).to(tl.float32)
    return high, tl.where(tl.abs(high) == INF, 0.0, low)


@triton.jit
def larger(a, b):
    """For scans: their maximum so far."""
    return tl.maximum(a, b)


@triton.jit
def make_running_maxima(P, N, BLOCK: tl.constexpr):
    """Of ``N`` numbers at ``P``, none of them negative, each becomes the largest up to it; ``BLOCK`` at a time."""
    before = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, N, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        largest = tl.load(P + index, mask=index < N, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.associative_scan(largest, 0, larger), before)
        tl.store(P + index, largest, mask=index < N)
        before = tl.max(largest, 0) + tl.zeros([BLOCK], tl.float32)


def dot_precision(q: Tensor) -> str:
    """``input_precision`` of matmuls of float32 tiles: as torch takes its own."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
