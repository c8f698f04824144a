"""The forward pass for Hopper (sm_90) in Gluon, Triton's lower-level language: a persistent, warp-specialized kernel.

Mathematics and tiles are those of `portable.forward`, names those of `triton_common`; here is how they map to the
hardware. So is the bias, but that near the diagonal it is in two parts only where the rows of a work tile decay by more
than a factor of 2^64. One program runs on each multiprocessor and draws *work tiles* from a dynamic scheduler until
none is left. A work tile is one block of ``CONSUMERS * 64`` queries of a head; its tiles of ``BLOCK_N`` keys are
computed from the last, on the diagonal, down to the first. The roles of a program's warps:

* *Consumers*, ``CONSUMERS`` warp groups with 64 queries each, compute the matmuls and the softmax (`forward_consumer`).
* The *bias producer*, two warps, writes to shared memory what consumers must know of a work tile's rows, and the bias
  of each tile's keys: one float32 value, or two parts where the rows decay much. Consumers need the registers that
  float64 values would take, and none waits for global memory between two work tiles.
* The *producer*, one warp, draws work tiles and copies queries, keys and values by the tensor memory accelerator (TMA).

**Barriers.** All roles go through the same sequence of tiles, from one work tile to the next without a break; tile
``t`` of that sequence lies in stage ``t % STAGES`` of a ring.

=============== ========================================================================= ======================
mbarrier        meaning                                                                   arrivals
=============== ========================================================================= ======================
``k_full``      keys are copied and the bias is written; of the first tile, rows too      both producers
``v_full``      values are copied                                                         producer
``kv_empty``    no consumer needs the keys and bias of tile t, the values of tile t - 1   every consumer
``q_full``      queries of a work tile are copied (a ring of ``Q_STAGES``)                producer
``q_empty``     their stage is free; a consumer's output leaves through it too, while     every consumer
                the next work tile begins
``work_full``   the next work tile is described (a ring of ``WORK_STAGES``)               producer
``work_empty``  no role needs the description and the rows                                consumers, bias producer
=============== ========================================================================= ======================

A consumer multiplies the weights of tile ``t - 1`` with its values while the scores of tile ``t`` are computed: hence
values are released one tile later than keys, and the producer waits with the values of a tile for the ``kv_empty`` of
the *next* stage. A consumer skips tiles that only others attend to, but waits and arrives for them as if it had used
them: a phase tells a round only from its neighbours, so no role may run two rounds ahead. One work tile may end and the
next begin within a ring, so work tiles that are short, once pruned, do not wait for the pipeline to fill.

**Lazy rescaling** (``IS_LAZY``). Weights are ``exp2(s_ij - m_i)``, and the output is their sum over values divided by
their sum: any ``m_i`` gives the same result as long as nothing overflows. It is the running maximum, but raised only
when that is more than 2^8 ahead; so weights are below 2^8, which float16 holds as well, and have the same relative
rounding. Almost always a tile leaves it alone; then whole warps skip the multiplication of the output by one.

**The fence** (``HAS_FENCE``). The weights of a tile should be computed while the matmul before runs. Left to itself,
ptxas moves the wait for that matmul ahead of the softmax. A wait for an mbarrier that has long been passed ends the
basic block, which it does not move code across.

**Schedule.** A counter in global memory hands out work tiles: heads by falling work, ``HEAD_SWIZZLE`` at a time so that
few heads' keys share the L2 cache, and of these the last, longest blocks first. Which program computes a work tile does
not change its bits.

**Registers** limit the speed. A consumer has as many live values as registers, so whether ptxas keeps them there
depends on details such as the order of independent statements: with values and bias in variables of their own, written
before what else goes into the same expression, heads of 64 spilled 236 times per tile instead of once. After any change
look at the loops' STL and LDL in SASS. All consumers together must also fit the instruction cache (128 KiB); therefore
full and masked tiles share one loop.
"""

import torch
from torch import Tensor

from ..decay import Decay
from ..devices import capability_of, multiprocessors_of
from ..portable.block_ranges import describe_blocks, heaviest_first
from ..tiles import HOPPER_FORWARD, cdiv
from ..triton_common import BASE_BLOCK
from .forward_kernel import hopper_forward_kernel
from .forward_state import QUERIES
from .tma import describe_by_head, fits_tma


def hopper_forward_takes(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether `hopper_forward` computes this: on sm_90, 16-bit, heads of 64 or 128, without dropout."""
    return (
        dropout == 0.0
        and capability_of(q) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] in HOPPER_FORWARD
        and q.numel() > 0
        and fits_tma(q)
        and fits_tma(k)
        and fits_tma(v)
    )


def hopper_forward(q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float) -> tuple[Tensor, Tensor]:
    """As `portable.forward.forward` without dropout, for what `hopper_forward_takes`.

    Returns:
        Output ``[B, Tq, H, D]`` in the dtype of ``q`` and log-sum-exp ``[B, H, Tq]`` float32.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads, gates = k.shape[1], k.shape[2], decay.key.shape[1]
    shape = HOPPER_FORWARD[head_dim]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    described = describe_blocks(decay, heads, QUERIES, BASE_BLOCK.value)
    blocks = cdiv(queries, QUERIES * shape.consumers)
    programs = min(blocks * batch * heads, multiprocessors_of(q) or 1)
    hopper_forward_kernel[(programs,)](
        q_descriptor=describe_by_head(q, QUERIES),
        k_descriptor=describe_by_head(k, shape.keys),
        v_descriptor=describe_by_head(v, shape.keys),
        out_descriptor=describe_by_head(out, QUERIES),
        C_Q=decay.query.contiguous(),
        C_K=decay.key, ck_b=decay.key.stride(0), ck_h=decay.key.stride(1),
        RELATIVE=described.relative,
        BASE=described.base,
        LSE=lse,
        KV_START=decay.kv_start, s_b=decay.kv_start.stride(0), s_h=decay.kv_start.stride(1),
        LAST=decay.last,
        HEAD_ORDER=heaviest_first(described.least.flatten(0, 1)),
        LEAST=described.least,
        GREATEST=described.greatest,
        WORK_COUNTER=described.counter,
        scale=scale,
        HEADS=batch * heads,
        NM=blocks,
        NR=described.least.shape[-1],
        TQ=queries,
        TK=keys,
        NB=described.base.shape[-1],
        H=heads,
        KV_GROUP=heads // kv_heads,
        HF=gates,
        GATE_GROUP=heads // gates,
        START_GROUP=heads // decay.kv_start.shape[1],
        CONSUMERS=shape.consumers,
        BLOCK_N=shape.keys,
        STAGES=shape.stages,
        Q_STAGES=shape.query_stages,
        HEAD_SWIZZLE=shape.head_swizzle,
        IS_LAZY=shape.lazy,
        HAS_FENCE=shape.fence,
        REGISTERS=shape.registers,
        PRODUCER_REGISTERS=shape.producer_registers,
        num_warps=4,
        maxnreg=shape.initial_registers,
    )  # fmt: skip
    return out, lse
