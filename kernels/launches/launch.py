"""Launch a kernel for less than half of what Triton's `JITFunction.run` costs the host.

`run` finds out at each launch which compilation the arguments ask for. A kernel that is `launched` remembers: the first
launch goes through Triton, and later ones with an equal *key* call the compiled kernel's launcher. The key tells apart
at least what Triton does:

=================  =====================================================================================================
argument           what of it is in the key
=================  =====================================================================================================
all                the type, so None is told apart
tensor             dtype, and whether it is aligned to 16 bytes where that is specialized
int, bool          the value where it is specialized; where it is not, launches are remembered for 31 bits only
float              nothing more
tensor descriptor  dtype, shape of the tile, layout
constant, option   the value
=================  =====================================================================================================

It also holds the current device, which all tensors must be on. Whatever else there is, goes through Triton: see
`Launched.__getitem__` for settings and `_launch_of` for arguments.

With ``FOXLM_PLAIN_LAUNCHES=1`` in the environment everything does, and nothing is recorded (`replay`, layers of a
prompt): to find out whether a wrong result is due to this.
"""

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor, nn
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from ..operators import recording

try:
    from triton.backends.nvidia.driver import CudaLauncher, make_tensordesc_arg
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.knobs import HookChain
except ImportError:
    # Another release, or a build for AMD's GPUs alone.
    CudaLauncher = None

_IS_WANTED = os.environ.get("FOXLM_PLAIN_LAUNCHES", "0") in ("", "0")
# Any other release may call launchers in another way.
IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7.")) and CudaLauncher is not None and _IS_WANTED
# Launchers of 3.6 take the arguments one by one, those of 3.7 in one tuple.
_IS_FLAT = triton.__version__.startswith("3.6.")

# Of constants; values that are equal and of the same of these types compile the same kernel.
_CONSTANTS = (int, bool, str, float, tl.dtype)
# That a kernel remembers. Strides of batches are in keys, so each length of a prompt has some of its own.
_MOST_KEYS = 1024
_RUN = JITFunction.run


def launched(function: Any) -> Any:
    """Decorates what `triton.jit` or `gluon.jit` made of a kernel that the host launches."""
    return Launched(function) if IS_KNOWN and isinstance(function, JITFunction) else function


class Launched:
    """A kernel whose launches, ``kernel[grid](...)``, cost little from the second on; else as ``function``.

    Args:
        function: the kernel as Triton has it.
    """

    def __init__(self, function: JITFunction) -> None:
        self.function = function
        self._launches: dict[tuple[type, ...], Callable[..., Any]] = {}
        self._bind = _binder(function, self._launches, self._first_launch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if type(grid) is tuple and not self.function.pre_run_hooks and launches_plainly():
            return functools.partial(self._bind, grid)
        if recording.recorder is not None:
            recording.recorder.give_up()
        return self.function[grid]

    def _first_launch(self, grid: tuple[int, ...], options: dict[str, Any], *arguments: Any) -> Any:
        """The first one with arguments of these types."""
        types = tuple(map(type, arguments))
        launch = self._launches[types] = _launch_of(self.function, types)
        return launch(grid, options, *arguments)


def launches_plainly() -> bool:
    """Whether a launch is nothing but that: nobody watches it or puts something else in its place."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        # Others put functions of their own in its place, as `ahead_of_time` does.
        JITFunction.run is _RUN
        and (before is None or (type(before) is HookChain and not before.calls))
        and (after is None or (type(after) is HookChain and not after.calls))
        and runtime.add_stages_inspection_hook is None
        and not runtime.debug
        and not triton.knobs.compilation.instrumentation_mode
    )


class _Compiled(NamedTuple):
    """A compiled kernel as launches need it.

    Attributes:
        kernel: Triton's.
        launch: its launcher, which takes a grid, a stream, ``first`` and the kernel's arguments.
        first: what is the same in each launch.
        metadata: of each tensor descriptor.
        layouts: of the descriptors; a key has their addresses, which are theirs as long as they are kept.
        read: globals that were compiled into it, as `_globals_of` gives them; all must still be what they were.
    """

    kernel: Any
    launch: Callable[..., None]
    first: tuple[Any, ...]
    metadata: list[Any]
    layouts: tuple[Any, ...]
    read: "list[Globals]"


class Launch(NamedTuple):
    """A launch that can be repeated with other addresses.

    Attributes:
        function: the kernel.
        compiled: what was launched.
        grid: three numbers.
    """

    function: JITFunction
    compiled: _Compiled
    grid: tuple[int, int, int]

    def expand(self, arguments: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        """Each of the kernel's arguments, and what the launcher takes in its place."""
        metadata = iter(self.compiled.metadata)
        return [(x, _expanded(x, metadata)) for x in arguments]

    def repeat(self, stream: int, values: list[Any]) -> None:
        """Launch with what `expand` gave, in which addresses may be others."""
        compiled = self.compiled
        if _IS_FLAT:
            compiled.launch(*self.grid, stream, *compiled.first, *values)
        else:
            compiled.launch(*self.grid, stream, *compiled.first, tuple(values))

    def describe(self, index: int, descriptor: Any) -> Callable[[int], Any]:
        """What makes the first value of the ``index``-th descriptor for another address; it keeps no tensor."""
        fields = {name: x for name, x in vars(descriptor).items() if name != "base"}
        return functools.partial(_filled, fields, self.compiled.metadata[index])


class _Address:
    """In the place of a tensor, of which a descriptor takes only the address."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _expanded(x: Any, metadata: Iterator[Any]) -> Any:
    if isinstance(x, Tensor):
        return (x.data_ptr(),)
    return make_tensordesc_arg(x, next(metadata)) if isinstance(x, TensorDescriptor) else (x,)


def _filled(fields: dict[str, Any], metadata: Any, address: int) -> Any:
    other = object.__new__(TensorDescriptor)
    vars(other).update(fields, base=_Address(address))
    return make_tensordesc_arg(other, metadata)[0]


class Globals(NamedTuple):
    """Those of a namespace that a kernel reads.

    Attributes:
        get: gives their values as a tuple.
        space: what it gets them from.
        seen: what it gave when the kernel was compiled.
    """

    get: Callable[..., tuple[Any, ...]]
    space: dict[str, Any]
    seen: tuple[Any, ...]


def _binder(function: JITFunction, launches: dict[tuple[type, ...], Callable[..., Any]], first: Any) -> Any:
    """Takes a launch's arguments as Python does them fastest: by a function that has the kernel's parameters."""
    names = function.arg_names
    defaults = {f"_default_{p.name}": p.default for p in function.params if p.has_default}
    parameters = ", ".join(f"{x}=_default_{x}" if f"_default_{x}" in defaults else x for x in names)
    source = f"""
def bind(_grid, {parameters}, **_options):
    _launch = _launches.get(({"".join(f"type({x}), " for x in names)}), _first)
    return _launch(_grid, _options, {", ".join(names)})
"""
    return _define("bind", source, function, _launches=launches, _first=first, **defaults)


def _launch_of(function: JITFunction, types: tuple[type, ...]) -> Callable[..., Any]:
    """What launches the kernel for arguments of these types, which decide what the key is made of."""
    names = ", ".join(function.arg_names)
    key, passed = ["_device", "*(_options and _options.items())"], []
    tensors: list[str] = []
    descriptors: list[str] = []
    narrow: list[str] = []
    # What must be true for there to be a key.
    conditions = ["(not _options or _OPTIONS.issuperset(map(type, _options.values())))"]
    for parameter, kind in zip(function.params, types, strict=True):
        x, argument = parameter.name, parameter.name
        if kind is type(None) or (kind is float and not parameter.is_constexpr):
            pass
        elif parameter.is_constexpr and kind in _CONSTANTS:
            key.append(x)
        elif parameter.is_constexpr:
            return functools.partial(_never_remembered, function)
        elif kind is int and parameter.do_not_specialize:
            narrow.append(x)
        elif kind is int or kind is bool:
            key.append(x)
        elif kind is Tensor or kind is nn.Parameter:
            tensors.append(x)
            argument = f"_p_{x}"
            key.append(f"{x}.dtype")
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                key.append(f"{argument} & 15 == 0")
        elif kind is TensorDescriptor:
            argument = f"*_expand({x}, _found.metadata[{len(descriptors)}])"
            descriptors.append(x)
            key += [f"{x}.base.dtype", f"*{x}.block_shape", f"id({x}.layout)"]
        else:
            return functools.partial(_never_remembered, function)
        passed.append(argument)
    conditions += [f"{x}.get_device() == _device" for x in (*tensors, *(f"{x}.base" for x in descriptors))]
    if narrow:
        conditions.append(f"0 <= ({' | '.join(narrow)}) <= 0x7FFFFFFF")
    # The launcher takes addresses, which it would otherwise ask tensors for and look up.
    source = f"""
def launch(_grid, _options, {names}):
    _driver = _DRIVERS.active
    _device = _driver.get_current_device()
    _key = None
    if {" and ".join(conditions)}:
        {"".join(f"_p_{x} = {x}.data_ptr(); " for x in tensors)}
        _key = ({", ".join(key)})
        _found = _compiled.get(_key)
        if _found is not None:
            for _get, _space, _seen in _found.read:
                # It is for Triton to raise an error.
                if _get(_space) != _seen: break
            else:
                _x, _y, _z = (*_grid, 1, 1)[:3]
                _stream = _driver.get_current_stream(_device)
                _found.launch(_x, _y, _z, _stream, *_found.first, {"*" * _IS_FLAT}({", ".join(passed)},))
                if _recording.recorder is not None:
                    _recording.recorder.launched(_Launch(_function, _found, (_x, _y, _z)), ({names},))
                return _found.kernel
    return _remember(_grid, _options, _key, ({"".join(f"{x}.layout, " for x in descriptors)}), {names})
"""
    compiled: dict[Any, _Compiled] = {}
    return _define(
        "launch",
        source,
        function,
        _compiled=compiled,
        _remember=functools.partial(_remember, function, compiled),
        _expand=make_tensordesc_arg,
        _function=function,
        _Launch=Launch,
        _recording=recording,
        _DRIVERS=triton.runtime.driver,
        _OPTIONS=frozenset((int, bool, type(None))),
    )


def _remember(
    function: JITFunction,
    compiled: dict[Any, _Compiled],
    grid: tuple[int, ...],
    options: dict[str, Any],
    key: Any,
    layouts: tuple[Any, ...],
    *arguments: Any,
) -> Any:
    """Launch through Triton, and remember what it compiled under ``key`` unless that is None."""
    if recording.recorder is not None:
        recording.recorder.give_up(for_good=key is None)
    kernel = _through_triton(function, grid, options, *arguments)
    # It is of another type while it is compiled in the background.
    if key is None or type(kernel) is not CompiledKernel:
        return kernel
    launcher = kernel.run
    if type(launcher) is CudaLauncher and launcher.global_scratch_size == launcher.profile_scratch_size == 0:
        if len(compiled) >= _MOST_KEYS:
            compiled.clear()
        # With tensor descriptors it calls a function that expands them and calls the launcher proper.
        inside = inspect.getclosurevars(launcher.launch).nonlocals if inspect.isfunction(launcher.launch) else {}
        no_scratch, no_hooks = (None, None), (None, None, None)
        if _IS_FLAT:
            rest: tuple[Any, ...] = (*no_scratch, kernel.packed_metadata, *no_hooks)
        else:
            signature = (launcher.arg_annotations, launcher.kernel_signature)
            rest = (kernel.packed_metadata, *no_hooks, *no_scratch, *signature)
        first = (kernel.function, launcher.launch_cooperative_grid, launcher.launch_pdl, *rest)
        launch, metadata = inside.get("launcher", launcher.launch), inside.get("tensordesc_meta", [])
        compiled[key] = _Compiled(kernel, launch, first, metadata, layouts, _globals_of(function))
    return kernel


def _never_remembered(function: JITFunction, grid: tuple[int, ...], options: dict[str, Any], *arguments: Any) -> Any:
    if recording.recorder is not None:
        recording.recorder.give_up()
    return _through_triton(function, grid, options, *arguments)


def _through_triton(function: JITFunction, grid: tuple[int, ...], options: dict[str, Any], *arguments: Any) -> Any:
    return function[grid](**dict(zip(function.arg_names, arguments, strict=True)), **options)


def _globals_of(function: JITFunction) -> list[Globals]:
    names: dict[int, list[str]] = {}
    spaces: dict[int, dict[str, Any]] = {}
    for (name, _), (_, space) in function.used_global_vals.items():
        names.setdefault(id(space), []).append(name)
        spaces[id(space)] = space
    # One of them twice: of a single one there would be no tuple.
    getters = [(operator.itemgetter(names[i][0], *names[i]), space) for i, space in spaces.items()]
    return [Globals(get, space, get(space)) for get, space in getters]


def _define(name: str, source: str, function: JITFunction, **names: Any) -> Callable[..., Any]:
    """The function ``name`` of ``source``, which reads ``names`` as globals."""
    exec(compile(source, f"<{name} {function.__name__}>", "exec"), names)
    defined: Callable[..., Any] = names[name]
    return defined
