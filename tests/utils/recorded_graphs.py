"""A stand-in for CUDA graphs on a CPU: it records the operators of a call, and runs them again on the same tensors.

As in a real graph, recording changes nothing, numbers of the host are those of the recording, and what would wait for
the device is refused. Kernels that Triton's interpreter runs are recorded as a whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foxlm.modeling import decoding_graphs, token_layout
from kernel_device import INTERPRETED

_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}
        # So that no address is used twice.
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        arguments = func._schema.arguments
        given = dict(zip((x.name for x in arguments), args, strict=False)) | kwargs
        written = [given.get(x.name) for x in arguments if x.alias_info is not None and x.alias_info.is_write]
        self.keep(x for x in tree_leaves(written) if isinstance(x, Tensor))
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view:
            self._own |= {x.untyped_storage().data_ptr() for x in results} - {
                x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
            }
            self.steps.append(lambda: self._again(func, args, kwargs, [] if written else results))
        self._kept += results
        return result

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
        for held, new in zip(results, again, strict=False):
            held.copy_(new)

    def keep(self, tensors: Iterator[Tensor]) -> None:
        """Remember what is about to be written to, if it was there before."""
        for x in tensors:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._own and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()

    def undo(self) -> None:
        """Give everything that was written to its values from before."""
        for storage, values in self._before.values():
            storage.copy_(values)


class RecordedGraph:
    """As `decoding_graphs.StepGraph`."""

    captures = replays = 0
    new_pool = staticmethod(object)

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._steps: list[Callable[[], None]] = []

    def capture(self, call: Callable[[], Tensor]) -> Tensor:
        recorder = _Recorder()
        try:
            with recorder, pytest.MonkeyPatch.context() as patch:
                if INTERPRETED:
                    _record_kernels(recorder, patch)
                result = call()
        finally:
            with torch.inference_mode():
                recorder.undo()
        self._steps = recorder.steps
        type(self).captures += 1
        # Nothing has been computed yet.
        return result.fill_(torch.nan)

    def replay(self) -> None:
        type(self).replays += 1
        # Recorded in any mode, a graph is replayed in any.
        with torch.inference_mode():
            for step in self._steps:
                step()


def _record_kernels(recorder: _Recorder, patch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        with torch.utils._python_dispatch._disable_current_modes():
            recorder.keep(iter(tensors))
            launch(self, *args, **kwargs)
        recorder.steps.append(lambda: launch(self, *args, **kwargs))

    patch.setattr(GridExecutor, "__call__", recording)


def capture_on_this_device(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Have `generate` capture steps of up to 16 tokens on a CPU too; the counts of what is returned begin at zero."""
    monkeypatch.setattr(decoding_graphs, "StepGraph", RecordedGraph)
    # As on a GPU, whose values a step must not read.
    monkeypatch.setattr(token_layout, "is_readable", lambda x: False)
    if not INTERPRETED:
        monkeypatch.setattr(decoding_graphs, "runs_decode_kernels", lambda model, tokens=1: tokens <= 16)
    RecordedGraph.captures = RecordedGraph.replays = 0
    return RecordedGraph
