"""Copying rows of keys, values and running sums: runs of tokens of one head, from where they lie to where they go.

A table says which: so a window of keys, or what is sent to another rank, is one launch however many heads and pieces
it has.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


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
        runs: what is copied, no row of the target twice; for the kernel on the device too, by `to_device`.
        add: add, in float32 or wider.
        back: what ``runs`` calls target is the source, and the other way around.
    """
    for *places, count in runs.table.tolist():
        ends = [(batch, slice(token, token + count), head) for batch, token, head in (places[:3], places[3:])]
        at, to = reversed(ends) if back else ends
        for x, y in zip(source, target, strict=True):
            y[to] = y[to] + x[at] if add else x[at]
