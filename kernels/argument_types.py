"""The types of arguments, held against the annotations of a public function: `typed`."""

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

P = ParamSpec("P")
R = TypeVar("R")

# A text is a sequence of texts to Python, and never what was meant.
_SEVERAL = (Sequence, Collection, Iterable)


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which names an argument whose type is not that of its annotation, before anything is computed.

    For functions that people call once, not many times a step: it binds arguments to their names. Held is the outermost
    type: of ``Sequence[int]`` that it is a sequence. Flags (``bool``) may be anything, as everywhere in Python, and so
    may what has a quoted annotation.

    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            # Python says better which argument is missing, and of what function.
            return function(*args, **kwargs)
        for name, value in given.items():
            parameter = signature.parameters[name]
            one = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if one and parameter.annotation is not parameter.empty:
                _check(name, value, parameter.annotation)
        return function(*args, **kwargs)

    return checked


def _check(name: str, value: object, annotation: Any) -> None:
    accepted = _accepted(annotation)
    if accepted is None or any(_is(value, kind) for kind in accepted):
        return
    words = [_WORDS.get(kind, kind.__name__) for kind in accepted]
    named = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    raise ValueError(f"{name} must be {named}, got {value!r} of type {type(value).__name__}")


_WORDS: dict[type, str] = {
    type(None): "None",
    Real: "a number",
    Integral: "a whole number",
    str: "a text",
    Callable: "a function",  # type: ignore[dict-item]  # which `isinstance` takes for a type
    Sequence: "a sequence",
    Collection: "a collection",
    Iterable: "an iterable",
}


def _accepted(annotation: Any) -> list[type] | None:
    """The types that ``annotation`` lets through; None for all."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_accepted(part) for part in get_args(annotation)]
        return None if None in parts else [kind for part in parts if part is not None for kind in part]
    if annotation is Any:
        return None
    kind = get_origin(annotation) or annotation
    kind = {float: Real, int: Integral, None: type(None)}.get(kind, kind)
    # Values of a `Literal` are the function's own to check, which has words for them.
    return [kind] if isinstance(kind, type) and kind is not bool else None


def _is(value: object, kind: type) -> bool:
    if kind in (Real, Integral) and isinstance(value, bool):
        return False
    if kind in _SEVERAL:
        # An array of numpy or torch is as good as what Python counts among them.
        return hasattr(value, "__iter__") and not isinstance(value, str | bytes)
    return isinstance(value, kind)
