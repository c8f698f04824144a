"""Copying rows of keys, values and running sums: runs of tokens of one head, from where they lie to where they go.

A table says which: so a window of keys, or what is sent to another rank, is one launch however many heads and pieces
it has.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backend import HAS_TRITON, runs_kernels

_ROWS = 64


class Rows(NamedTuple):
    """Keys and values ``[B, T, G, D]`` with their running sums ``[B, T, G, gates of each]`` float64; views.

    Keys and values are contiguous along the last dimension.
    """

    k: Tensor
    v: Tensor
    c: Tensor


class Place(NamedTuple):
    """Where runs begin: integers, alike in shape or broadcast.

    Attributes:
        batch, token, head: of the first row.
    """

    batch: np.ndarray | int
    token: np.ndarray | int
    head: np.ndarray | int


class Runs(NamedTuple):
    """Which rows are copied where.

    Attributes:
        table: ``[N, 7]`` int64: place of the source, place of the target, and how many tokens.
        device: the same where `copy_rows` is to use it; None until then.
    """

    table: np.ndarray
    device: Tensor | None = None

    @classmethod
    def between(cls, source: Place, target: Place, count: np.ndarray | int) -> "Runs":
        """Runs of ``count`` tokens; those of none are left out."""
        columns = (*source, *target, count)
        table = np.empty((*np.broadcast(*columns).shape, 7), np.int64)
        # Not by np.broadcast_arrays, for a GPU may be waiting: that takes ten times as long.
        for i, x in enumerate(columns):
            table[..., i] = x
        table = table.reshape(-1, 7)
        return cls(table[table[:, 6] > 0])

    @classmethod
    def joined(cls, parts: "list[Runs]") -> "Runs":
        """All of them, of the same source and target."""
        return cls(np.concatenate([NO_RUNS.table, *(x.table for x in parts)]))

    def part(self, which: slice) -> "Runs":
        """Some of them."""
        return Runs(self.table[which], None if self.device is None else self.device[which])


NO_RUNS = Runs(np.empty((0, 7), np.int64))


def to_device(tables: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Tables of integers, each as one int64 tensor, brought there together: the host waits for none of them."""
    flat = torch.from_numpy(np.concatenate([np.ravel(x) for x in tables]).astype(np.int64))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([np.size(x) for x in tables])
    return [part.view(x.shape) for x, part in zip(tables, parts, strict=True)]


def copy_rows(source: Rows, target: Rows, runs: Runs, *, add: bool = False, back: bool = False) -> None:
    """Copy rows, or add them to what is there.

    Args:
        source, target: alike in head size and gates.
        runs: what is copied, no row of the target twice; on the device, by `to_device`.
        add: add, in float32 or wider.
        back: what ``runs`` calls target is the source, and the other way around.
    """
    if not len(runs.table):
        return
    if HAS_TRITON and runs_kernels(source.k) and source.k.dtype != torch.float64:
        launch_copy(source, target, runs, add, back)
        return
    for *places, count in runs.table.tolist():
        ends = [(batch, slice(token, token + count), head) for batch, token, head in (places[:3], places[3:])]
        at, to = reversed(ends) if back else ends
        for x, y in zip(source, target, strict=True):
            y[to] = y[to] + x[at] if add else x[at]


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _copy(SOURCE, TARGET, rows, is_row, columns, is_column, s_t, s_c, t_t, t_c, ADD: tl.constexpr):
        mask = is_row[:, None] & is_column[None, :]
        x = tl.load(SOURCE + rows[:, None] * s_t + columns[None, :] * s_c, mask=mask)
        p = TARGET + rows[:, None] * t_t + columns[None, :] * t_c
        if ADD:
            # Of half precision in float32, and rounded once.
            x = _sum(x, tl.load(p, mask=mask))
        tl.store(p, x, mask=mask)

    @triton.jit
    def _sum(x, y):
        if x.dtype == tl.float64:
            return x + y
        return (x.to(tl.float32) + y.to(tl.float32)).to(y.dtype)

    @triton.jit
    def _copy_kernel(
        RUNS,
        SK,
        SV,
        SC,
        TK,
        TV,
        TC,
        sk_b,
        sk_t,
        sk_h,
        sv_b,
        sv_t,
        sv_h,
        sc_b,
        sc_t,
        sc_h,
        sc_g,
        tk_b,
        tk_t,
        tk_h,
        tv_b,
        tv_t,
        tv_h,
        tc_b,
        tc_t,
        tc_h,
        tc_g,
        GATES,
        HEAD_DIM: tl.constexpr,
        PADDED_DIM: tl.constexpr,
        PADDED_GATES: tl.constexpr,
        ROWS: tl.constexpr,
        SOURCE: tl.constexpr,
        TARGET: tl.constexpr,
        ADD: tl.constexpr,
    ):
        p = RUNS + tl.program_id(0).to(tl.int64) * 7
        rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < tl.load(p + 6)
        s_batch, s_token, s_head = tl.load(p + SOURCE), tl.load(p + SOURCE + 1), tl.load(p + SOURCE + 2)
        t_batch, t_token, t_head = tl.load(p + TARGET), tl.load(p + TARGET + 1), tl.load(p + TARGET + 2)
        columns = tl.arange(0, PADDED_DIM)
        is_column = columns < HEAD_DIM
        _copy(
            SK + s_batch * sk_b + s_token * sk_t + s_head * sk_h,
            TK + t_batch * tk_b + t_token * tk_t + t_head * tk_h,
            rows, is_row, columns, is_column, sk_t, 1, tk_t, 1, ADD,
        )  # fmt: skip
        _copy(
            SV + s_batch * sv_b + s_token * sv_t + s_head * sv_h,
            TV + t_batch * tv_b + t_token * tv_t + t_head * tv_h,
            rows, is_row, columns, is_column, sv_t, 1, tv_t, 1, ADD,
        )  # fmt: skip
        gates = tl.arange(0, PADDED_GATES)
        _copy(
            SC + s_batch * sc_b + s_token * sc_t + s_head * sc_h,
            TC + t_batch * tc_b + t_token * tc_t + t_head * tc_h,
            rows, is_row, gates, gates < GATES, sc_t, sc_g, tc_t, tc_g, ADD,
        )  # fmt: skip

    def launch_copy(source: Rows, target: Rows, runs: Runs, add: bool, back: bool) -> None:
        """`copy_rows` of some runs on the device."""
        head_dim, gates = source.k.shape[-1], source.c.shape[-1]
        grid = (len(runs.table), triton.cdiv(int(runs.table[:, 6].max()), _ROWS))
        with torch.cuda.device_of(source.k):
            _copy_kernel[grid](
                runs.device,
                *source,
                *target,
                *source.k.stride()[:3],
                *source.v.stride()[:3],
                *source.c.stride(),
                *target.k.stride()[:3],
                *target.v.stride()[:3],
                *target.c.stride(),
                gates,
                HEAD_DIM=head_dim,
                PADDED_DIM=triton.next_power_of_2(head_dim),
                PADDED_GATES=triton.next_power_of_2(gates),
                ROWS=_ROWS,
                SOURCE=3 if back else 0,
                TARGET=0 if back else 3,
                ADD=add,
            )
