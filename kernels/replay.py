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
Whatever else a recording meets (an operator of PyTorch that computes, a kernel that is compiled just then, a part of an
argument that could be part of another one) is not repeated: calls with that signature run plainly.
"""

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .devices import capability_of
from .launch import IS_KNOWN, Globals, Launch, launches_plainly, recording

# That a function remembers: a prompt of another length has one of its own.
_MOST_SIGNATURES = 512
# Of the parts of the memory that a call needs for itself, as of PyTorch's allocations.
_ALIGNMENT = 512
# In the place of what to repeat, before the first call and after it.
_NOT_CALLED, _CALLED = "not called", "called"
_shape_and_dtype = operator.attrgetter("shape", "dtype")
_misalignment = (15).__and__
# Size, strides and offset.
_View = tuple[Any, Any, int]
_ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of positional, hashable arguments that computes on a GPU by kernels alone."""
    return functools.wraps(function)(Replayed(function)) if IS_KNOWN else function


class Replayed:
    """See above.

    Args:
        function: what computes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        _made.add(self)
        # By types of arguments.
        self._picks: dict[tuple[type, ...], _Pick] = {}
        # By signature, what to repeat; None where nothing can be.
        self._tapes: dict[tuple[Any, ...], Tape | str | None] = {}

    def __call__(self, *arguments: Any) -> Any:
        if not launches_plainly():
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
        if not tensors or capability_of(tensors[0]) is None:
            return self._function(*arguments)
        device = triton.runtime.driver.active.get_current_device()
        devices = list(map(Tensor.get_device, tensors))
        if devices.count(device) < len(devices):
            # On another device the function launches with that as the current one.
            return self._function(*arguments)
        addresses = list(map(Tensor.data_ptr, tensors))
        key = (
            types,
            pick.others(flat),
            *map(_shape_and_dtype, tensors),
            *map(Tensor.stride, tensors),
            *map(_misalignment, addresses),
            *map(addresses.index, addresses),
            device,
            tensors[0].dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        )
        tape = self._tapes.get(key, _NOT_CALLED)
        if type(tape) is Tape and tape.can_play():
            return tape.play(tensors, addresses, device)
        if tape is _NOT_CALLED:
            if len(self._tapes) >= _MOST_SIGNATURES:
                self._tapes.clear()
            self._tapes[key] = _CALLED
        elif tape is _CALLED:
            with _Recorder(tensors) as recorder:
                result = self._function(*arguments)
            self._tapes[key] = recorder.tape(result)
            return result
        return self._function(*arguments)

    def forget(self) -> None:
        """Begin again."""
        self._tapes.clear()


_made: "weakref.WeakSet[Replayed]" = weakref.WeakSet()


def forget_all() -> None:
    """Begin again, where what functions depend on has changed after all."""
    for replayed in _made:
        replayed.forget()


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


class _Repeated(NamedTuple):
    """A launch on a tape.

    Attributes:
        launch: the launch.
        values: what the launcher takes after grid and stream.
        places: which of them are addresses: by index, of what, and how many bytes after it.
        descriptors: likewise, and what makes a descriptor of an address.
    """

    launch: Launch
    values: list[Any]
    places: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, Callable[[int], Any]]]


class Tape(NamedTuple):
    """What to repeat. Tensors are counted: arguments, then new ones that are returned, then one for all others.

    Attributes:
        launches: in order.
        globals: that the kernels were compiled with, each once; see `launch.Globals`.
        hooks: of the kernels; all must be empty.
        new: size, strides, dtype and device of the tensors to be returned.
        scratch: bytes of what only the kernels read, and the device.
        results: what is returned: by number, and size, strides and offset where it is not the whole tensor; or None.
        returns: makes of a list of results what the function returns.
    """

    launches: list[_Repeated]
    globals: list[Globals]
    hooks: list[Any]
    new: list[tuple[Any, Any, torch.dtype, torch.device]]
    scratch: tuple[int, torch.device]
    results: list[tuple[int, _View | None] | None]
    returns: Callable[[list[Any]], Any]

    def can_play(self) -> bool:
        """Whether the kernels are still what was recorded."""
        for get, space, seen in self.globals:
            if get(space) != seen:
                return False
        return not any(self.hooks)

    def play(self, tensors: tuple[Tensor, ...], addresses: list[int], device: int) -> Any:
        """Launch for these arguments; ``addresses`` are theirs, and more are added."""
        whole = [*tensors]
        for size, strides, dtype, on in self.new:
            x = torch.empty_strided(size, strides, dtype=dtype, device=on)
            whole.append(x)
            addresses.append(x.data_ptr())
        if self.scratch[0]:
            scratch = torch.empty(self.scratch[0], dtype=torch.uint8, device=self.scratch[1])
            addresses.append(scratch.data_ptr())
        stream = triton.runtime.driver.active.get_current_stream(device)
        for launch, values, places, descriptors in self.launches:
            values = values.copy()
            for index, number, offset in places:
                values[index] = addresses[number] + offset
            for index, number, offset, describe in descriptors:
                values[index] = describe(addresses[number] + offset)
            launch.repeat(stream, values)
        found: list[Any] = []
        for result in self.results:
            if result is None:
                found.append(None)
            else:
                number, view = result
                found.append(whole[number] if view is None else whole[number].as_strided(*view))
        return self.returns(found)


class _Recorder(TorchDispatchMode):
    """Sees all that is allocated and launched, and whether anything else happens.

    Args:
        tensors: the arguments of the function.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._arguments = tensors
        # Kept, so that no other one gets the same memory.
        self._made: list[Tensor] = []
        self._launches: list[tuple[Launch, tuple[Any, ...]]] = []
        # Whether all was seen, and whether that of another call may be.
        self._is_complete = self._may_be = True

    def __enter__(self) -> Any:
        recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        recording.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and function.overloadpacket.__name__ in _ALLOCATIONS:
            self._made.append(result)
        else:
            self._may_be &= function.is_view
        return result

    def launched(self, launch: Launch, arguments: tuple[Any, ...]) -> None:
        """Called after a launch."""
        self._launches.append((launch, arguments))

    def give_up(self, for_good: bool = True) -> None:
        """Called before a launch that cannot be repeated: a compilation, or (``for_good``) one that always is so."""
        self._is_complete = False
        self._may_be &= not for_good

    def tape(self, result: Any) -> Tape | str | None:
        """What to repeat for ``result``; None if that cannot be, `_CALLED` if what another call does may be."""
        parts = result if isinstance(result, tuple) else (result,)
        places = [None if x is None else self._place(x) for x in parts]
        if not self._may_be or any(x is not None and place is None for x, place in zip(parts, places, strict=True)):
            return None
        if not self._is_complete:
            return _CALLED
        returned = sorted({place.made for place in places if place is not None and place.made is not None})
        given = len(self._arguments)
        numbers, size = {made: (given + index, 0) for index, made in enumerate(returned)}, 0
        for made, x in enumerate(self._made):
            if made not in numbers:
                numbers[made] = (given + len(returned), size)
                size += -(-x.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        results: list[tuple[int, _View | None] | None] = []
        for x, place in zip(parts, places, strict=True):
            if place is None:
                results.append(None)
            elif place.made is None:
                # A part of an argument may be what it is by that argument's values.
                if not any(x is argument for argument in self._arguments):
                    return None
                results.append((place.argument, None))
            else:
                memory, view = self._made[place.made], (x.shape, x.stride(), x.storage_offset())
                if x.dtype != memory.dtype:
                    return None
                whole = view == (memory.shape, memory.stride(), 0)
                results.append((numbers[place.made][0], None if whole else view))
        launches = [self._repeated(*one, numbers) for one in self._launches]
        repeated = [x for x in launches if x is not None]
        if len(repeated) < len(launches):
            return None
        new = [self._made[made] for made in returned]
        return Tape(
            repeated,
            list({id(x): x for one, *_ in repeated for x in one.compiled.read}.values()),
            list({id(one.function): one.function.pre_run_hooks for one, *_ in repeated}.values()),
            [(x.shape, x.stride(), x.dtype, x.device) for x in new],
            (size, self._arguments[0].device),
            results,
            getattr(type(result), "_make", tuple) if isinstance(result, tuple) else operator.itemgetter(0),
        )

    def _repeated(
        self, launch: Launch, arguments: tuple[Any, ...], numbers: dict[int, tuple[int, int]]
    ) -> _Repeated | None:
        """A launch with addresses left out; None if they are not certain.

        Args:
            launch, arguments: of the recording.
            numbers: of each new tensor, the number of its memory and where in it that begins.
        """
        values: list[Any] = []
        addresses: list[tuple[int, int, int]] = []
        descriptors: list[tuple[int, int, int, Callable[[int], Any]]] = []
        for argument, expanded in launch.expand(arguments):
            tensor = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
            if isinstance(tensor, Tensor) and tensor.numel():
                place = self._place(tensor)
                # A descriptor that the compiler has taken apart holds the tensor itself.
                if place is None or isinstance(expanded[0], Tensor):
                    return None
                number, begin = (place.argument, 0) if place.made is None else numbers[place.made]
                where = (len(values), number, begin + place.offset)
                if tensor is argument:
                    addresses.append(where)
                else:
                    descriptors.append((*where, launch.describe(len(descriptors), argument)))
            values += expanded
        return _Repeated(launch, values, addresses, descriptors)

    def _place(self, x: Any) -> "_Place | None":
        """Where ``x`` lies; None if that is not certain."""
        if not isinstance(x, Tensor):
            return None
        address, storage = x.data_ptr(), x.untyped_storage().data_ptr()
        for made, other in enumerate(self._made):
            if other.untyped_storage().data_ptr() == storage:
                return _Place(made, 0, address - storage)
        begins = [argument.data_ptr() for argument in self._arguments]
        if address in begins:
            return _Place(None, begins.index(address), 0)
        arguments = zip(begins, self._arguments, strict=True)
        around = {begin for begin, other in arguments if 0 < address - begin < _extent(other)}
        if len(around) != 1:
            return None
        return _Place(None, begins.index(min(around)), address - min(around))


class _Place(NamedTuple):
    """An address: so many bytes after that of a new tensor, or else of an argument."""

    made: int | None
    argument: int
    offset: int


def _extent(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0
