"""The dispatcher's view of a class of arguments: its schema, and the object of the flat arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, get_type_hints

import torch
from torch import Tensor

A = TypeVar("A", bound=tuple[object, ...])

TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
}
"""Type of a field -> the dispatcher's name for it."""


def _is_arguments(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def fields(kind: type[tuple[object, ...]]) -> Iterator[tuple[str, object]]:
    """(name, type) of the flat arguments that a class stands for."""
    for name, hint in get_type_hints(kind).items():
        if _is_arguments(hint):
            yield from fields(hint)
        else:
            yield name, hint


def schema_of(name: str, kind: type[tuple[object, ...]], results: Sequence[str] = ()) -> str:
    """``name(arguments) -> Tensor`` in the dispatcher's language, or ``-> (Tensor q, ...)`` of named results.

    Raises:
        TypeError: when a field has a type that the dispatcher does not know.
    """
    arguments = []
    for field, hint in fields(kind):
        if hint not in TYPES:
            known = ", ".join(getattr(t, "__name__", str(t)) for t in TYPES)
            raise TypeError(f"{kind.__name__}.{field} is a {hint}: expected one of {known}, or a class of these")
        arguments.append(f"{TYPES[hint]} {field}")
    result = f"({', '.join(f'Tensor {r}' for r in results)})" if results else "Tensor"
    return f"{name}({', '.join(arguments)}) -> {result}"


def taker(kind: type[A]) -> Callable[[tuple[object, ...]], A]:
    """A function that makes an object of the class from the flat arguments, whose number the dispatcher has checked.

    Raises:
        TypeError: when the class has more than one field that is a class of arguments.
    """
    # tuple.__new__ counts nothing and takes half the time of the class: this is part of every call.
    make: Callable[[tuple[object, ...]], A] = partial(tuple.__new__, kind)
    hints = list(get_type_hints(kind).values())
    nested = [place for place, hint in enumerate(hints) if _is_arguments(hint)]
    if not nested:
        return make
    if len(nested) > 1:
        raise TypeError(f"{kind.__name__} has {len(nested)} fields that are classes of arguments: expected one")
    first, inner = nested[0], taker(hints[nested[0]])
    last = first + len(list(fields(hints[first])))
    if first == 1 and len(hints) == 2:
        return lambda values: make((values[0], inner(values[1:])))
    return lambda values: make((*values[:first], inner(values[first:last]), *values[last:]))


def flatten(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """The flat arguments that an object stands for."""
    flat: list[object] = []
    for value in arguments:
        flat.extend(flatten(value) if isinstance(value, tuple) and hasattr(value, "_fields") else (value,))
    return tuple(flat)
