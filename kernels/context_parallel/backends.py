"""What context parallelism runs on the device beside attention: operators of PyTorch, or one Triton launch for each.

It follows the `Backend` of attention, for which the device was looked at.
"""

from ..backends import HAS_TRITON, PYTORCH, Backend
from .attention import window_kv_start
from .exchange import find_needs
from .operations import ContextBackend
from .pruning import join_blocks, search_blocks, summarize
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
