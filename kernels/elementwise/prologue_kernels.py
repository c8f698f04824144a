"""Kernels of `prologue`: token shift, QK-norm and RoPE of a block of tokens of one head, forward and backward.

With states ``x_t`` of a head, ``x_prev(t)`` of the token before, weights ``w``, cosines and sines::

    s_t = (1 - alpha_t) x_t + alpha_t x_prev(t),   alpha_t = sigmoid(logit_t)
    n_t = w s_t r_t,                               r_t = (mean(s_t^2) + eps)^(-1/2)
    out_t = [n_1 cos_1 - n_2 sin_1, n_2 cos_2 + n_1 sin_2, n_3]

in float32, rounded once (names: `triton_common`). RoPE turns the first half of the dimensions that it rotates,
``n_1``, with the second, ``n_2``; ``n_3`` is what it leaves. So every tile is three, of ``HALF``, ``HALF`` and ``REST``
columns. Queries have no shift, values only a shift.

One launch computes all heads: program 0 of the grid's first axis has a block of tokens of one *slot*. Slots are ``NQ``
query heads, then ``NK`` key heads, then value heads.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..launches.launch import launched
from ..triton_common import wait_for_inputs


class _States(NamedTuple):
    """One of q, k and v, ``[B, T, heads, D]``, and what shifts it: None in `LOGITS` for nothing.

    `LOGITS` are ``[B, T, heads]``; `PAST` is the state before the first token, ``[B, heads, D]``, or None for zero; if
    it is ``[B, any, heads, D]``, `SLOT` points to the index of that state; `BEFORE` is the state before each token,
    ``[B, T, heads, D]`` with the strides of `PAST`, in place of all else that tells it, or None;
    `STARTS` marks where the state before is zero, ``[B, T]``, or None; `SOURCES` is the index of the token before, -1
    for that of the past, ``[B, 1 + T]``, or None for the one right before.
    """

    X: Any
    x_b: Any
    x_t: Any
    x_h: Any
    LOGITS: Any
    l_b: Any
    l_t: Any
    PAST: Any
    p_b: Any
    p_s: Any
    p_h: Any
    SLOT: Any
    BEFORE: Any
    STARTS: Any
    s_b: Any
    SOURCES: Any
    r_b: Any
    T: Any


class _Turn(NamedTuple):
    """Weights of a norm, ``[D]`` or ``[heads, D]``, or None; cosines and sines, ``[B or 1, T, 2 HALF]``, or None."""

    WEIGHT: Any
    w_h: Any
    EPS: Any
    COS: Any
    SIN: Any
    c_b: Any
    c_t: Any


@triton.jit
def _load(p_row, m_row, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Rows at ``p_row [BLOCK_T]`` as three float32 tiles, zero outside ``m_row``."""
    o_half, o_rest = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_REST)
    m_half = m_row[:, None] & (o_half < HALF)[None, :]
    p_half = p_row[:, None] + o_half[None, :]
    b_1 = tl.load(p_half, mask=m_half, other=0.0).to(tl.float32)
    b_2 = tl.load(p_half + HALF, mask=m_half, other=0.0).to(tl.float32)
    if REST > 0:
        m_rest = m_row[:, None] & (o_rest < REST)[None, :]
        b_3 = tl.load(p_row[:, None] + 2 * HALF + o_rest[None, :], mask=m_rest, other=0.0).to(tl.float32)
    else:
        b_3 = tl.zeros([p_row.shape[0], BLOCK_REST], tl.float32)
    return b_1, b_2, b_3


@triton.jit
def _store(
    p_row, m_row, b_1, b_2, b_3,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load`, rounded to the dtype of what ``p_row`` points to."""
    o_half, o_rest = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_REST)
    m_half = m_row[:, None] & (o_half < HALF)[None, :]
    p_half = p_row[:, None] + o_half[None, :]
    tl.store(p_half, b_1.to(p_row.dtype.element_ty), mask=m_half)
    tl.store(p_half + HALF, b_2.to(p_row.dtype.element_ty), mask=m_half)
    if REST > 0:
        m_rest = m_row[:, None] & (o_rest < REST)[None, :]
        tl.store(p_row[:, None] + 2 * HALF + o_rest[None, :], b_3.to(p_row.dtype.element_ty), mask=m_rest)


@triton.jit
def _load_previous(
    states: _States, i_b, i_h, o_t, m_t,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``x_prev(t)``."""
    if states.BEFORE is not None:
        p_before = states.BEFORE + i_b * states.p_b + i_h * states.p_h + o_t.to(tl.int64) * states.p_s
        b_1, b_2, b_3 = _load(p_before, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    else:
        b_1, b_2, b_3 = _load_neighbours(states, i_b, i_h, o_t, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    return b_1, b_2, b_3


@triton.jit
def _load_neighbours(
    states: _States, i_b, i_h, o_t, m_t,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``x_prev(t)`` of states that the layer has or had."""
    o_prev = o_t - 1
    if states.SOURCES is not None:
        o_prev = tl.load(states.SOURCES + i_b * states.r_b + o_t, mask=m_t, other=-1).to(tl.int32)
    m_prev = m_t
    if states.STARTS is not None:
        m_prev = m_prev & (tl.load(states.STARTS + i_b * states.s_b + o_t, mask=m_t, other=1) == 0)
    p_head = states.X + i_b * states.x_b + i_h * states.x_h
    p_prev = p_head + o_prev.to(tl.int64) * states.x_t
    b_1, b_2, b_3 = _load(p_prev, m_prev & (o_prev >= 0), HALF, REST, BLOCK_HALF, BLOCK_REST)
    if states.PAST is not None:
        # The same for every row that has it.
        p_past = states.PAST + i_b * states.p_b + i_h * states.p_h + tl.zeros_like(o_t)
        if states.SLOT is not None:
            p_past += tl.load(states.SLOT) * states.p_s
        p_1, p_2, p_3 = _load(p_past, m_prev & (o_prev < 0), HALF, REST, BLOCK_HALF, BLOCK_REST)
        b_1, b_2, b_3 = b_1 + p_1, b_2 + p_2, b_3 + p_3
    return b_1, b_2, b_3


@triton.jit
def _load_alpha(states: _States, i_b, i_h, o_t, m_t):
    """``[BLOCK_T, 1]``."""
    p_logit = states.LOGITS + i_b * states.l_b + o_t.to(tl.int64) * states.l_t + i_h
    return tl.sigmoid(tl.load(p_logit, mask=m_t, other=0.0).to(tl.float32))[:, None]


@triton.jit
def _mix(b_own, b_previous, alpha):
    """``(1 - alpha) own + alpha previous``, as `torch.lerp` rounds it: from whichever has the larger share."""
    difference = b_previous - b_own
    return tl.where(alpha < 0.5, b_own + alpha * difference, b_previous - (1.0 - alpha) * difference)


@triton.jit
def _inverse_rms(b_1, b_2, b_3, m_t, EPS, D: tl.constexpr):
    """``[BLOCK_T, 1]``; 1 or so for rows outside."""
    squares = tl.sum(b_1 * b_1, 1) + tl.sum(b_2 * b_2, 1) + tl.sum(b_3 * b_3, 1)
    return tl.rsqrt(tl.where(m_t, squares / D, 1.0) + EPS)[:, None]


@triton.jit
def _load_turn(
    turn: _Turn, i_b, o_t, m_t, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):  # fmt: skip
    """Cosines and sines of both halves."""
    offset = i_b * turn.c_b + o_t.to(tl.int64) * turn.c_t
    b_cos1, b_cos2, _ = _load(turn.COS + offset, m_t, HALF, 0, BLOCK_HALF, BLOCK_REST)
    b_sin1, b_sin2, _ = _load(turn.SIN + offset, m_t, HALF, 0, BLOCK_HALF, BLOCK_REST)
    return b_cos1, b_cos2, b_sin1, b_sin2


@triton.jit
def _load_weight(
    turn: _Turn, i_h,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The norm's weights of a head, ``[1, .]`` each."""
    one = tl.arange(0, 1)
    return _load(turn.WEIGHT + i_h * turn.w_h + one, one == 0, HALF, REST, BLOCK_HALF, BLOCK_REST)


@triton.jit
def _forward_head(
    states: _States, turn: _Turn, OUT, HEADS, i_b, i_h, o_t,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    m_t = o_t < states.T
    p_x = states.X + i_b * states.x_b + o_t.to(tl.int64) * states.x_t + i_h * states.x_h
    b_1, b_2, b_3 = _load(p_x, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if states.LOGITS is not None:
        alpha = _load_alpha(states, i_b, i_h, o_t, m_t)
        p_1, p_2, p_3 = _load_previous(states, i_b, i_h, o_t, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
        b_1, b_2, b_3 = _mix(b_1, p_1, alpha), _mix(b_2, p_2, alpha), _mix(b_3, p_3, alpha)
    if turn.WEIGHT is not None:
        rms = _inverse_rms(b_1, b_2, b_3, m_t, turn.EPS, 2 * HALF + REST)
        w_1, w_2, w_3 = _load_weight(turn, i_h, HALF, REST, BLOCK_HALF, BLOCK_REST)
        b_1, b_2, b_3 = w_1 * (b_1 * rms), w_2 * (b_2 * rms), w_3 * (b_3 * rms)
    if turn.COS is not None:
        b_cos1, b_cos2, b_sin1, b_sin2 = _load_turn(turn, i_b, o_t, m_t, HALF, BLOCK_HALF, BLOCK_REST)
        b_1, b_2 = b_1 * b_cos1 - b_2 * b_sin1, b_2 * b_cos2 + b_1 * b_sin2
    p_out = OUT + ((i_b * states.T + o_t) * HEADS + i_h) * (2 * HALF + REST)
    _store(p_out, m_t, b_1, b_2, b_3, HALF, REST, BLOCK_HALF, BLOCK_REST)


# Lengths, and strides that are multiples of nothing: no length of a prompt compiles a kernel of its own.
_VARYING = ["kl_b", "kl_t", "vl_b", "vl_t", "s_b", "r_b", "T", "NQ", "NK", "NV"]
# Read value by value, and often parts of other tensors: their alignment decides nothing.
_PARTS = ["KEY_LOGITS", "VALUE_LOGITS", "STARTS", "SOURCES", "PAST_SLOT"]


@launched
@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PARTS)
def prologue_forward_kernel(
    Q, K, V, OUT_Q, OUT_K, OUT_V,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    KEY_LOGITS, kl_b, kl_t, VALUE_LOGITS, vl_b, vl_t,
    KEY_PAST, kp_b, kp_s, kp_h, VALUE_PAST, vp_b, vp_s, vp_h, PAST_SLOT,
    STARTS, s_b, SOURCES, r_b,
    Q_WEIGHT, K_WEIGHT, w_h, EPS,
    COS, SIN, c_b, c_t,
    T, NQ, NK, NV,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAST_OF_EACH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values, contiguous ``[B, T, heads, D]``."""
    wait_for_inputs(OVERLAPS)
    # A branch's names are its own: Triton wants one type of what branches share. It compiles no branch of None.
    i_slot = tl.program_id(0) % (NQ + NK + NV)
    o_t = tl.program_id(0) // (NQ + NK + NV) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b = tl.program_id(1).to(tl.int64)
    if OUT_Q is not None and i_slot < NQ:
        q_states = _States(Q, q_b, q_t, q_h, None, 0, 0, None, 0, 0, 0, None, None, None, 0, None, 0, T)
        q_turn = _Turn(Q_WEIGHT, w_h, EPS, COS, SIN, c_b, c_t)
        _forward_head(q_states, q_turn, OUT_Q, NQ, i_b, i_slot, o_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    elif OUT_K is not None and i_slot < NQ + NK:
        k_states = _States(
            K, k_b, k_t, k_h, KEY_LOGITS, kl_b, kl_t, KEY_PAST, kp_b,
            kp_s, kp_h, PAST_SLOT, KEY_PAST if PAST_OF_EACH else None, STARTS, s_b, SOURCES, r_b, T,
        )  # fmt: skip
        k_turn = _Turn(K_WEIGHT, w_h, EPS, COS, SIN, c_b, c_t)
        _forward_head(k_states, k_turn, OUT_K, NK, i_b, i_slot - NQ, o_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    elif OUT_V is not None:
        v_states = _States(
            V, v_b, v_t, v_h, VALUE_LOGITS, vl_b, vl_t, VALUE_PAST, vp_b,
            vp_s, vp_h, PAST_SLOT, VALUE_PAST if PAST_OF_EACH else None, STARTS, s_b, SOURCES, r_b, T,
        )  # fmt: skip
        v_turn = _Turn(None, 0, 0.0, None, None, 0, 0)
        _forward_head(v_states, v_turn, OUT_V, NV, i_b, i_slot - NQ - NK, o_t, HALF, REST, BLOCK_HALF, BLOCK_REST)


@triton.jit
def _gradient_before_norm(
    states: _States, turn: _Turn, D_OUT, g_b, g_t, g_h, i_b, i_h, o_t, m_t,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``ds_t``; with a shift ``alpha_t`` and ``dalpha_t``; with a norm ``dw`` of each row; zero outside ``m_t``."""
    D: tl.constexpr = 2 * HALF + REST
    p_g = D_OUT + i_b * g_b + o_t.to(tl.int64) * g_t + i_h * g_h
    g_1, g_2, g_3 = _load(p_g, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    p_x = states.X + i_b * states.x_b + o_t.to(tl.int64) * states.x_t + i_h * states.x_h
    b_1, b_2, b_3 = _load(p_x, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
    # Of the previous state, its difference from the own one.
    p_1, p_2, p_3 = b_1, b_2, b_3
    alpha = tl.zeros([o_t.shape[0], 1], tl.float32)
    if states.LOGITS is not None:
        alpha = _load_alpha(states, i_b, i_h, o_t, m_t)
        p_1, p_2, p_3 = _load_previous(states, i_b, i_h, o_t, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST)
        s_1, s_2, s_3 = _mix(b_1, p_1, alpha), _mix(b_2, p_2, alpha), _mix(b_3, p_3, alpha)
        p_1, p_2, p_3 = p_1 - b_1, p_2 - b_2, p_3 - b_3
        b_1, b_2, b_3 = s_1, s_2, s_3
    if turn.COS is not None:
        b_cos1, b_cos2, b_sin1, b_sin2 = _load_turn(turn, i_b, o_t, m_t, HALF, BLOCK_HALF, BLOCK_REST)
        g_1, g_2 = g_1 * b_cos1 + g_2 * b_sin2, g_2 * b_cos2 - g_1 * b_sin1
    w_1, w_2, w_3 = g_1, g_2, g_3
    if turn.WEIGHT is not None:
        rms = _inverse_rms(b_1, b_2, b_3, m_t, turn.EPS, D)
        b_1, b_2, b_3 = b_1 * rms, b_2 * rms, b_3 * rms
        w_1, w_2, w_3 = _load_weight(turn, i_h, HALF, REST, BLOCK_HALF, BLOCK_REST)
        w_1, w_2, w_3, g_1, g_2, g_3 = g_1 * b_1, g_2 * b_2, g_3 * b_3, g_1 * w_1, g_2 * w_2, g_3 * w_3
        along = tl.sum(g_1 * b_1, 1) + tl.sum(g_2 * b_2, 1) + tl.sum(g_3 * b_3, 1)
        along = along[:, None] / D
        g_1, g_2, g_3 = rms * (g_1 - along * b_1), rms * (g_2 - along * b_2), rms * (g_3 - along * b_3)
    d_alpha = tl.sum(g_1 * p_1, 1) + tl.sum(g_2 * p_2, 1) + tl.sum(g_3 * p_3, 1)
    return g_1, g_2, g_3, alpha, d_alpha, w_1, w_2, w_3


@triton.jit
def _sum_rows(x):
    """``[1, .]`` sums over rows, as exact as torch's, which adds up more of them pairwise."""
    return tl.sum(x.to(tl.float64), 0)[None, :]


@triton.jit
def _backward_head(
    states: _States, turn: _Turn, D_OUT, g_b, g_t, g_h, DX, D_LOGITS, p_dw, HEADS, i_b, i_h, o_t,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``dx_t = (1 - alpha_t) ds_t + alpha_{t+1} ds_{t+1}``, unless ``t + 1`` starts a sequence."""
    m_t = o_t < states.T
    g_1, g_2, g_3, alpha, d_alpha, w_1, w_2, w_3 = _gradient_before_norm(
        states, turn, D_OUT, g_b, g_t, g_h, i_b, i_h, o_t, m_t, HALF, REST, BLOCK_HALF, BLOCK_REST
    )
    o_out = (i_b * states.T + o_t) * HEADS + i_h
    if states.LOGITS is not None:
        slope = alpha * (1.0 - alpha)
        d_logit = d_alpha[:, None] * slope
        tl.store(D_LOGITS + o_out[:, None], d_logit.to(D_LOGITS.dtype.element_ty), mask=m_t[:, None])
        o_next = o_t + 1
        m_next = o_next < states.T
        if states.STARTS is not None:
            m_next = m_next & (tl.load(states.STARTS + i_b * states.s_b + o_next, mask=m_next, other=1) == 0)
        # Computed again rather than handed over: the rows are those of this program but for the last.
        n_1, n_2, n_3, to_next, _, _, _, _ = _gradient_before_norm(
            states, turn, D_OUT, g_b, g_t, g_h, i_b, i_h, o_next, m_next, HALF, REST, BLOCK_HALF, BLOCK_REST
        )
        own = 1.0 - alpha
        g_1, g_2, g_3 = own * g_1 + to_next * n_1, own * g_2 + to_next * n_2, own * g_3 + to_next * n_3
    _store(DX + o_out * (2 * HALF + REST), m_t, g_1, g_2, g_3, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if turn.WEIGHT is not None:
        one = tl.arange(0, 1)
        w_1, w_2, w_3 = _sum_rows(w_1), _sum_rows(w_2), _sum_rows(w_3)
        _store(p_dw + one, one == 0, w_1, w_2, w_3, HALF, REST, BLOCK_HALF, BLOCK_REST)


@launched
@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PARTS)
def prologue_backward_kernel(
    D_OUT_Q, D_OUT_K, D_OUT_V, DQ, DK, DV, D_KEY_LOGITS, D_VALUE_LOGITS, DW,
    gq_b, gq_t, gq_h, gk_b, gk_t, gk_h, gv_b, gv_t, gv_h,
    Q, K, V,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    KEY_LOGITS, kl_b, kl_t, VALUE_LOGITS, vl_b, vl_t,
    KEY_PAST, kp_b, kp_s, kp_h, VALUE_PAST, vp_b, vp_s, vp_h, PAST_SLOT,
    STARTS, s_b, SOURCES, r_b,
    Q_WEIGHT, K_WEIGHT, w_h, EPS,
    COS, SIN, c_b, c_t,
    T, NQ, NK, NV,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradients, contiguous ``[B, T, heads, D]``; of logits ``[B, T, heads]``; and of norm weights, float32, the part
    of each sequence and block of tokens: ``DW [B, blocks, NQ + NK, D]``."""
    i_slot, i_block = tl.program_id(0) % (NQ + NK + NV), tl.program_id(0) // (NQ + NK + NV)
    o_t = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b = tl.program_id(1).to(tl.int64)
    p_dw = DW
    if DW is not None:
        p_dw = DW + ((i_b * tl.cdiv(T, BLOCK_T) + i_block) * (NQ + NK) + i_slot) * (2 * HALF + REST)
    if DQ is not None and i_slot < NQ:
        q_states = _States(Q, q_b, q_t, q_h, None, 0, 0, None, 0, 0, 0, None, None, None, 0, None, 0, T)
        q_turn = _Turn(Q_WEIGHT, w_h, EPS, COS, SIN, c_b, c_t)
        _backward_head(
            q_states, q_turn, D_OUT_Q, gq_b, gq_t, gq_h, DQ, None, p_dw, NQ, i_b, i_slot, o_t,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif DK is not None and i_slot < NQ + NK:
        k_states = _States(
            K, k_b, k_t, k_h, KEY_LOGITS, kl_b, kl_t, KEY_PAST, kp_b,
            kp_s, kp_h, PAST_SLOT, None, STARTS, s_b, SOURCES, r_b, T,
        )  # fmt: skip
        k_turn = _Turn(K_WEIGHT, w_h, EPS, COS, SIN, c_b, c_t)
        _backward_head(
            k_states, k_turn, D_OUT_K, gk_b, gk_t, gk_h, DK, D_KEY_LOGITS, p_dw, NK, i_b, i_slot - NQ, o_t,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif DV is not None:
        v_states = _States(
            V, v_b, v_t, v_h, VALUE_LOGITS, vl_b, vl_t, VALUE_PAST, vp_b,
            vp_s, vp_h, PAST_SLOT, None, STARTS, s_b, SOURCES, r_b, T,
        )  # fmt: skip
        v_turn = _Turn(None, 0, 0.0, None, None, 0, 0)
        _backward_head(
            v_states, v_turn, D_OUT_V, gv_b, gv_t, gv_h, DV, D_VALUE_LOGITS, p_dw, NV, i_b, i_slot - NQ - NK, o_t,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
