"""The steps of context parallelism that run on the device beside attention, as a backend offers them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class ContextBackend(NamedTuple):
    """One way to run the steps between ranks, of which functions with the same name take and return the same.

    Attributes:
        carry_gates: running sums over the whole sequence: `shards.carry_gates`.
        find_needs: what the queries of each segment need: `exchange.find_needs`.
        window_kv_start: first keys within the window of a task: `attention.window_kv_start`.
        copy_rows: keys, values and running sums between places: `row_copy.copy_rows`.
        summarize, join_blocks, search_blocks: the steps of pruning: see `pruning`. What `join_blocks` returns only
            `search_blocks` of the same backend reads.
    """

    carry_gates: Callable[..., tuple[Tensor, Tensor]]
    find_needs: Callable[..., tuple[Tensor, Tensor]]
    window_kv_start: Callable[..., Tensor]
    copy_rows: Callable[..., None]
    summarize: Callable[..., tuple[Any, Tensor]]
    join_blocks: Callable[..., Any]
    search_blocks: Callable[..., Tensor]
