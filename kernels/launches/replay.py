"""Repeat what a function launches, for a fraction of what the function costs the host.

Between two matmuls of a layer some ten kernels are launched by functions that allocate, look at strides and sizes, make
views and fill in dozens of arguments; each layer of a model does so with the same numbers and other addresses. What is
`replayed` does it twice for each *signature* of its arguments: the first call runs plainly, the second is recorded, and
later ones allocate the results, put addresses in their places and launch.

=================  =====================================================================================================
argument           what of it is in the signature
=================  =====================================================================================================
tensor             dtype, shape, strides, alignment to 16 bytes, and which other arguments have its address
tuple              all of these, of what is in it; its length is always the same
anything else      type and value
=================  =====================================================================================================

So the function may depend on these, on the current device, which all tensors must be on, on what does not change within
a process, and on whether float32 matmuls may run in TF32. It returns tensors, new or its own arguments, and None.

Operators of PyTorch are called again with other tensors, unless they draw random numbers, return something else than
tensors or are not PyTorch's own. Whatever else a recording meets (a kernel that is compiled just then, a tensor that is
neither new nor an argument, a part of an argument that could be part of another one) is not repeated: calls with that
signature run plainly.
"""

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from ..devices import capability_of
from ..operators import recording
from .launch import IS_KNOWN, launches_plainly
from .tape import INCOMPLETE, Recorder, Tape

# That a function remembers: a prompt of another length has one of its own.
_MOST_SIGNATURES = 512
# In the place of a tape, before the first call.
_NOT_CALLED = "not called"
_shape_and_dtype = operator.attrgetter("shape", "dtype")
_misalignment = (15).__and__


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of positional, hashable arguments that does nothing but compute on a GPU."""
    return functools.wraps(function)(Replayed(function)) if IS_KNOWN else function


class Recordings:
    """Tapes by signature.

    Attributes:
        tapes: None where nothing can be repeated.
    """

    def __init__(self) -> None:
        self.tapes: dict[Any, Tape | str | None] = {}
        _made.add(self)

    def call(
        self,
        signature: Any,
        tensors: tuple[Tensor, ...],
        addresses: list[int],
        device: int,
        function: Callable[..., Any],
        *arguments: Any,
    ) -> Any:
        """``function(*arguments)``, or the same from memory.

        Args:
            signature: all that the function depends on but values of tensors; hashable.
            tensors: that it is given.
            addresses: theirs; more are added.
            device: the current one, where they are.
        """
        tape = self.tapes.get(signature, _NOT_CALLED)
        if type(tape) is Tape and tape.can_play():
            return tape.play(tensors, addresses, device)
        if tape is _NOT_CALLED:
            if len(self.tapes) >= _MOST_SIGNATURES:
                self.tapes.clear()
            self.tapes[signature] = INCOMPLETE
        elif tape is INCOMPLETE:
            with Recorder(tensors) as recorder:
                result = function(*arguments)
            self.tapes[signature] = recorder.tape(result)
            return result
        return function(*arguments)

    def forget(self) -> None:
        """Begin again."""
        self.tapes.clear()


_made: "weakref.WeakSet[Recordings]" = weakref.WeakSet()


def forget_all() -> None:
    """Begin again, where what functions depend on has changed after all."""
    for recordings in _made:
        recordings.forget()


def may_repeat() -> bool:
    """Whether launches of this thread are nothing but that, see `launches_plainly`, and not being recorded."""
    return recording.recorder is None and launches_plainly()


def common_device(tensors: tuple[Tensor, ...]) -> int | None:
    """The current device, if it is a GPU that all of these tensors are on; else None."""
    if not tensors or capability_of(tensors[0]) is None:
        return None
    device = triton.runtime.driver.active.get_current_device()
    # On another device the function launches with that as the current one.
    return device if list(map(Tensor.get_device, tensors)).count(device) == len(tensors) else None


def signature_of(tensors: tuple[Tensor, ...], addresses: list[int]) -> tuple[Any, ...]:
    """What of tensors is in a signature, and how matmuls of the first one's dtype run."""
    return (
        *map(_shape_and_dtype, tensors),
        *map(Tensor.stride, tensors),
        *map(_misalignment, addresses),
        *map(addresses.index, addresses),
        tensors[0].dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
    )


class Replayed:
    """See above.

    Args:
        function: what computes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.recordings = Recordings()
        # By types of arguments.
        self._picks: dict[tuple[type, ...], _Pick] = {}

    def __call__(self, *arguments: Any) -> Any:
        if not may_repeat():
            return self._function(*arguments)
        flat: list[Any] = []
        for x in arguments:
            if isinstance(x, tuple):
                flat += x
            else:
                flat.append(x)
        types = tuple(map(type, flat))
        pick = self._picks.get(types)
        if pick is None:
            pick = self._picks[types] = _pick(types)
        tensors = pick.tensors(flat)
        device = common_device(tensors)
        if device is None:
            return self._function(*arguments)
        addresses = list(map(Tensor.data_ptr, tensors))
        signature = (types, pick.others(flat), device, *signature_of(tensors, addresses))
        return self.recordings.call(signature, tensors, addresses, device, self._function, *arguments)


class _Pick(NamedTuple):
    """Takes the tensors out of arguments of certain types, and the rest."""

    tensors: Callable[[list[Any]], tuple[Any, ...]]
    others: Callable[[list[Any]], tuple[Any, ...]]


def _pick(types: tuple[type, ...]) -> _Pick:
    """Takes no tensors where one is of a class that hides what it does, or a tuple is in a tuple."""
    which = [index for index, kind in enumerate(types) if kind is Tensor or kind is nn.Parameter]
    rest = [index for index in range(len(types)) if index not in which]
    if any(issubclass(types[index], (Tensor, tuple)) for index in rest):
        which, rest = [], []
    return _Pick(_getter(which), _getter(rest))


def _getter(indices: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    # For one index it would not be a tuple, and for none there is no such function.
    return operator.itemgetter(*indices) if len(indices) > 1 else lambda flat: tuple(flat[index] for index in indices)
