"""What context parallelism runs on the device beside attention: operators of PyTorch, or one Triton launch for each.

It follows the `Backend` of attention, for which the device was looked at.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..backends import HAS_TRITON, PYTORCH, Backend
from .attention import window_kv_start
from .exchange import find_needs
from .pruning import Rows, join_blocks, search_blocks, summarize
from .row_copy import copy_rows
from .shards import carry_gates

if HAS_TRITON:
    from .kernels import carry_gates as triton_carry_gates
    from .kernels import copy_rows as triton_copy_rows
    from .kernels import find_needs as triton_find_needs
    from .kernels import join_blocks as triton_join_blocks
    from .kernels import search_blocks as triton_search_blocks
    from .kernels import summarize as triton_summarize
    from .kernels import window_kv_start as triton_window_kv_start


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
    summarize: Callable[..., tuple[Rows, Tensor]]
    join_blocks: Callable[..., Any]
    search_blocks: Callable[..., Tensor]


_IN_PYTORCH = ContextBackend(
    carry_gates=carry_gates,
    find_needs=find_needs,
    window_kv_start=window_kv_start,
    copy_rows=copy_rows,
    summarize=summarize,
    join_blocks=join_blocks,
    search_blocks=search_blocks,
)
_ON_TRITON = _IN_PYTORCH
if HAS_TRITON:
    _ON_TRITON = ContextBackend(
        carry_gates=triton_carry_gates,
        find_needs=triton_find_needs,
        window_kv_start=triton_window_kv_start,
        copy_rows=triton_copy_rows,
        summarize=triton_summarize,
        join_blocks=triton_join_blocks,
        search_blocks=triton_search_blocks,
    )


def context_backend_of(backend: Backend) -> ContextBackend:
    """What goes with the backend of attention."""
    return _IN_PYTORCH if backend is PYTORCH else _ON_TRITON
