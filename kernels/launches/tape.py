"""What a function allocates, launches and computes, recorded in one call and repeated with other tensors (`replay`).

While a call is recorded, new tensors are counted in the order in which they are *made*, whether an allocation or an
operator makes them. When it is repeated, tensors are *held* in a list, by numbers: first the arguments, then one memory
for all that only kernels read, then, in order, those new tensors that need memory of their own. A step appends what it
makes to the list, and its address to a list of addresses; a later one finds both by number.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..operators import recording
from .launch import Globals, Launch

# Of the parts of the memory that a call needs for itself, as of PyTorch's allocations.
_ALIGNMENT = 512
# Bytes of a tensor that shares memory with others in a function that calls operators too.
_MOST_SHARED = 1 << 20
_ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
# Operators that may do another thing with the same shapes.
_UNCERTAIN_TAGS = frozenset(
    (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
)
# In the place of a tape, where another recording may succeed.
INCOMPLETE = "incomplete"


class _Part(NamedTuple):
    """A tensor that is held, or part of it.

    Attributes:
        number: of the one that is held.
        view: size, strides, and elements from its first one on; None for all of it.
    """

    number: int
    view: tuple[Any, Any, int] | None

    def of(self, held: list[Any]) -> Tensor:
        """The tensor."""
        x = held[self.number]
        if self.view is None:
            return x
        size, strides, offset = self.view
        return x.as_strided(size, strides, x.storage_offset() + offset)


# Steps have a method ``repeat(held, addresses, stream)``.


class _Allocation(NamedTuple):
    """A new tensor."""

    size: Any
    strides: Any
    dtype: torch.dtype
    device: torch.device

    def repeat(self, held: list[Any], addresses: list[int], stream: int) -> None:
        x = torch.empty_strided(self.size, self.strides, dtype=self.dtype, device=self.device)
        held.append(x)
        addresses.append(x.data_ptr())


class _Computation(NamedTuple):
    """An operator of PyTorch.

    Attributes:
        function: the operator.
        arguments, options: positional and by name.
        parts: tensors among the arguments, by index.
        lists: lists with tensors in them, likewise.
        named: tensors among the options, by name.
        new: which of its results are new tensors.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    options: dict[str, Any]
    parts: list[tuple[int, _Part]]
    lists: list[tuple[int, list[Any]]]
    named: list[tuple[str, _Part]]
    new: list[int]

    def repeat(self, held: list[Any], addresses: list[int], stream: int) -> None:
        arguments, options = self.arguments.copy(), self.options
        for index, part in self.parts:
            arguments[index] = held[part.number] if part.view is None else part.of(held)
        for index, parts in self.lists:
            arguments[index] = [x.of(held) if type(x) is _Part else x for x in parts]
        if self.named:
            options = options | {name: part.of(held) for name, part in self.named}
        result = self.function(*arguments, **options)
        if self.new:
            results = result if isinstance(result, (tuple, list)) else (result,)
            for index in self.new:
                held.append(results[index])
                addresses.append(results[index].data_ptr())

    def parts_read(self) -> list[_Part]:
        """All tensors that it is given."""
        return [
            *(part for _, part in self.parts),
            *(part for _, parts in self.lists for part in parts if type(part) is _Part),
            *(part for _, part in self.named),
        ]


class _Relaunch(NamedTuple):
    """A launch.

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

    def repeat(self, held: list[Any], addresses: list[int], stream: int) -> None:
        values = self.values.copy()
        for index, number, offset in self.places:
            values[index] = addresses[number] + offset
        for index, number, offset, describe in self.descriptors:
            values[index] = describe(addresses[number] + offset)
        self.launch.repeat(stream, values)


class Tape(NamedTuple):
    """What to repeat.

    Tensors that are held have numbers: arguments, then a memory for what only kernels read, then new ones in order.

    Attributes:
        steps: in order, each called with the tensors held so far, their addresses and the stream; and with it the
            numbers of those that no later step reads.
        globals: that the kernels were compiled with, each once; see `launch.Globals`.
        hooks: of the kernels; all must be empty.
        scratch: bytes of the memory for what only kernels read, and the device.
        results: what is returned: parts, or None.
        returns: makes of a list of results what the function returns.
    """

    steps: list[tuple[Callable[[list[Any], list[int], int], None], tuple[int, ...]]]
    globals: list[Globals]
    hooks: list[Any]
    scratch: tuple[int, torch.device]
    results: list[_Part | None]
    returns: Callable[[list[Any]], Any]

    def can_play(self) -> bool:
        """Whether the kernels are still what was recorded."""
        for get, space, seen in self.globals:
            if get(space) != seen:
                return False
        return not any(self.hooks)

    def play(self, tensors: tuple[Tensor, ...], addresses: list[int], device: int) -> Any:
        """Repeat the steps for these arguments; ``addresses`` are theirs, and those of what is made are added."""
        held: list[Any] = [*tensors, None]
        addresses.append(0)
        size, on = self.scratch
        if size:
            held[-1] = torch.empty(size, dtype=torch.uint8, device=on)
            addresses[-1] = held[-1].data_ptr()
        stream = triton.runtime.driver.active.get_current_stream(device)
        for repeat, unread in self.steps:
            repeat(held, addresses, stream)
            for number in unread:
                held[number] = None
        return self.returns([None if x is None else x.of(held) for x in self.results])


class _UncertainError(Exception):
    """A tensor's memory is not certain."""


class _Place(NamedTuple):
    """An address: so many bytes after that of a new tensor, or else of an argument."""

    made: int | None
    argument: int
    offset: int


class _Operator(NamedTuple):
    """An operator that was called, and which of its results are new tensors."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    new: list[int]


class Recorder(TorchDispatchMode):
    """Sees all that is allocated, launched and computed, and whether anything else happens.

    Args:
        tensors: the arguments of the function.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._arguments = tensors
        # Kept, so that no other one gets the same memory.
        self._made: list[Tensor] = []
        # Which of them were allocated, rather than computed.
        self._allocated: set[int] = set()
        # In order: the index of an allocated tensor, a launch and its arguments, or an operator.
        self._events: list[int | tuple[Launch, tuple[Any, ...]] | _Operator] = []
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
            self._allocated.add(len(self._made))
            self._events.append(len(self._made))
            self._made.append(result)
        else:
            self._may_be &= self._may_repeat(function, args, kwargs or {}, result)
        return result

    def _may_repeat(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> bool:
        """Note an operator, if it can be repeated."""
        results = result if isinstance(result, (tuple, list)) else (result,)
        given, returned = list(_tensors_in([args, kwargs])), list(_tensors_in(results))
        if not given and not returned:
            # What is computed of numbers and dtypes is always the same.
            return True
        # Memory that is neither new nor an argument's may be other memory in the next call.
        if len(returned) < len(results) or any(self._place(x) is None for x in given):
            return False
        changes = function._schema.is_mutable
        new = [index for index, x in enumerate(results) if self._place(x) is None]
        if not new and not changes:
            # Views; some operators, such as `reshape`, return one only where they need not copy.
            return True
        shared = {x.untyped_storage().data_ptr() for x in (*self._arguments, *given)}
        if any(results[index].untyped_storage().data_ptr() in shared for index in new):
            # A part of an argument that may be one of another, too.
            return False
        # What is picked by numbers, unlike by a mask, is as much as there are numbers.
        picks = function is torch.ops.aten.index.Tensor and all(x.dtype == torch.int64 for x in _tensors_in(args[1]))
        is_certain = picks or not _UNCERTAIN_TAGS.intersection(function.tags)
        # An operator that changes a tensor returns that one.
        if function.namespace != "aten" or not is_certain or (changes and new):
            return False
        self._events.append(_Operator(function, args, kwargs, new))
        self._made += [results[index] for index in new]
        return True

    def launched(self, launch: Launch, arguments: tuple[Any, ...]) -> None:
        """Called after a launch."""
        self._events.append((launch, arguments))

    def give_up(self, for_good: bool = True) -> None:
        """Called before a launch that cannot be repeated: a compilation, or (``for_good``) one that always is so."""
        self._is_complete = False
        self._may_be &= not for_good

    def tape(self, result: Any) -> Tape | str | None:
        """What to repeat for ``result``; None if nothing can be, `INCOMPLETE` if what another call does may be."""
        if not self._may_be:
            return None
        if not self._is_complete:
            return INCOMPLETE
        parts = result if isinstance(result, tuple) else (result,)
        try:
            returned = {self._made_of(x) for x in parts if x is not None}
            numbers, size = self._numbers(returned)
            # What shares memory needs no allocation.
            apart = [x for x in self._events if type(x) is not int or numbers[x][0] > len(self._arguments)]
            steps = [self._step(event, numbers) for event in apart]
            results = [None if x is None else self._part(x, numbers) for x in parts]
        except _UncertainError:
            return None
        launches = [event[0] for event in self._events if type(event) is tuple]
        return Tape(
            self._with_last_readers(steps, {x.number for x in results if x is not None}),
            list({id(x): x for launch in launches for x in launch.compiled.read}.values()),
            list({id(launch.function): launch.function.pre_run_hooks for launch in launches}.values()),
            (size, self._arguments[0].device),
            results,
            getattr(type(result), "_make", tuple) if isinstance(result, tuple) else operator.itemgetter(0),
        )

    def _numbers(self, returned: set[int | None]) -> tuple[dict[int, tuple[int, int]], int]:
        """Of each new tensor the number, and where in that memory it begins; and bytes of the memory for kernels."""
        shared = len(self._arguments)
        operators = [event for event in self._events if type(event) is _Operator]
        apart = set(returned)
        for event in operators:
            apart.update(map(self._made_of, _tensors_in([event.arguments, event.options])))
        # Beside what operators return, large ones would be a weight on memory until the last step.
        most = _MOST_SHARED if operators else math.inf
        apart |= {made for made, x in enumerate(self._made) if made not in self._allocated or x.nbytes > most}
        numbers: dict[int, tuple[int, int]] = {}
        size, number = 0, shared
        for made, x in enumerate(self._made):
            if made in apart:
                number += 1
                numbers[made] = number, 0
            else:
                numbers[made] = shared, size
                size += -(-x.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        return numbers, size

    def _made_of(self, x: Tensor) -> int | None:
        """The new tensor that ``x`` is part of."""
        place = self._place(x)
        return None if place is None else place.made

    def _step(self, event: Any, numbers: dict[int, tuple[int, int]]) -> Any:
        if type(event) is int:
            return self._allocation(event)
        if type(event) is not _Operator:
            return self._relaunch(event[0], event[1], numbers)

        arguments, options = list(event.arguments), dict(event.options)
        parts, lists, named = [], [], []
        for index, x in enumerate(arguments):
            if isinstance(x, Tensor):
                parts.append((index, self._part(x, numbers)))
                arguments[index] = None
            elif _has_tensors(x):
                lists.append((index, [self._part(y, numbers) if isinstance(y, Tensor) else y for y in x]))
                arguments[index] = None
        for name, x in options.items():
            if isinstance(x, Tensor):
                named.append((name, self._part(x, numbers)))
            elif _has_tensors(x):
                raise _UncertainError
        options = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
        return _Computation(event.function, arguments, options, parts, lists, named, event.new)

    def _allocation(self, made: int) -> _Allocation:
        x = self._made[made]
        return _Allocation(x.shape, x.stride(), x.dtype, x.device)

    def _relaunch(self, launch: Launch, arguments: tuple[Any, ...], numbers: dict[int, tuple[int, int]]) -> _Relaunch:
        """A launch with addresses left out."""
        values: list[Any] = []
        addresses: list[tuple[int, int, int]] = []
        descriptors: list[tuple[int, int, int, Callable[[int], Any]]] = []
        for argument, expanded in launch.expand(arguments):
            tensor = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
            if isinstance(tensor, Tensor) and tensor.numel():
                place = self._place(tensor)
                # A descriptor that the compiler has taken apart holds the tensor itself.
                if place is None or isinstance(expanded[0], Tensor):
                    raise _UncertainError
                number, begin = (place.argument, 0) if place.made is None else numbers[place.made]
                where = (len(values), number, begin + place.offset)
                if tensor is argument:
                    addresses.append(where)
                else:
                    descriptors.append((*where, launch.describe(len(descriptors), argument)))
            values += expanded
        return _Relaunch(launch, values, addresses, descriptors)

    @staticmethod
    def _with_last_readers(steps: list[Any], results: set[int]) -> list[Any]:
        """`Tape.steps`."""
        last: dict[int, int] = {}
        for index, step in enumerate(steps):
            for number in _numbers_of(step):
                last[number] = index
        unread: list[list[int]] = [[] for _ in steps]
        for number, index in last.items():
            if number not in results:
                unread[index].append(number)
        return [(step.repeat, tuple(numbers)) for step, numbers in zip(steps, unread, strict=True)]

    def _part(self, x: Tensor, numbers: dict[int, tuple[int, int]]) -> _Part:
        place = self._place(x)
        if place is None:
            raise _UncertainError
        memory = self._arguments[place.argument] if place.made is None else self._made[place.made]
        number = place.argument if place.made is None else numbers[place.made][0]
        offset, rest = divmod(place.offset, x.element_size())
        if x.dtype != memory.dtype or rest:
            raise _UncertainError
        view = (x.shape, x.stride(), offset)
        return _Part(number, None if view == (memory.shape, memory.stride(), 0) else view)

    def _place(self, x: Tensor) -> _Place | None:
        """Where ``x`` lies; None in memory that is neither new nor an argument's, or where it is not certain whose."""
        storage = x.untyped_storage().data_ptr()
        # As `x.data_ptr()`, which is 0 of a part without elements.
        address = storage + int(x.storage_offset()) * x.element_size()
        for made, other in enumerate(self._made):
            if storage and other.untyped_storage().data_ptr() == storage:
                return _Place(made, 0, address - other.data_ptr())
        begins = [argument.data_ptr() for argument in self._arguments]
        extents = list(map(_extent, self._arguments))
        around = {begin for begin, extent in zip(begins, extents, strict=True) if 0 <= address - begin < extent}
        begin = address if address in around else min(around, default=0)
        if not around or (len(around) > 1 and begin != address):
            return None
        # The longest of those that begin there, of which the others are parts.
        argument = max((index for index, x in enumerate(begins) if x == begin), key=extents.__getitem__)
        return _Place(None, argument, address - begin)


def _has_tensors(x: Any) -> bool:
    return next(_tensors_in(x), None) is not None


def _tensors_in(x: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and dictionaries."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _tensors_in(y)


def _numbers_of(step: Any) -> list[int]:
    """Of what a step reads."""
    if type(step) is _Relaunch:
        return [x[1] for x in step.places] + [x[1] for x in step.descriptors]
    return [part.number for part in step.parts_read()] if type(step) is _Computation else []


def _extent(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0
