"""Which Python objects a module reaches besides its registered parts: lists, closures, bound methods, attributes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import types
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

_LEAVES = (
    *(str, bytes, bytearray, int, float, complex, type(None), type, range, slice),
    *(types.ModuleType, types.CodeType, types.FrameType, types.GeneratorType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, Tensor, fx.Graph, fx.Node),
)
_REGISTERED = ("_modules", "_parameters", "_buffers")
_HOOKS = "_hooks"  # the end of the names of a module's tables of hooks


@dataclasses.dataclass(frozen=True)
class Holder:
    """A place that holds an object: its path from the root, and the object whose attribute or element it is."""

    path: str
    owner: object


def holders(root: nn.Module, wanted: Collection[int]) -> dict[int, list[Holder]]:
    """Every place below a module that holds one of some objects.

    Modules, containers, plain objects, functions (what they close over, not their globals), methods, partial calls and
    weak references are looked into; tables of hooks are not.

    Args:
        root: where to start.
        wanted: ids of the objects; they are looked into like all others.
    """
    found: dict[int, list[Holder]] = {}
    seen, queue = {id(root)}, collections.deque[tuple[str, object]]([("", root)])
    while queue:
        path, owner = queue.popleft()
        for name, child in _children(owner):
            if isinstance(child, _LEAVES) and id(child) not in wanted:
                continue
            place = f"{path}{name}" if path or not name.startswith(".") else name[1:]
            if id(child) in wanted:
                found.setdefault(id(child), []).append(Holder(place, owner))
            if id(child) not in seen and not isinstance(child, _LEAVES):
                seen.add(id(child))
                queue.append((place, child))
    return found


def _children(owner: object) -> Iterator[tuple[str, object]]:
    """What an object holds, each with how it is written after the object's own path."""
    if isinstance(owner, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in _pairs(owner))
    elif isinstance(owner, list | tuple | set | frozenset | collections.deque):
        yield from ((f"[{i}]", value) for i, value in enumerate(list(owner)))
    elif isinstance(owner, types.FunctionType):
        yield from _of_function(owner)
    elif isinstance(owner, types.MethodType):
        yield from ((".__self__", owner.__self__), (".__func__", owner.__func__))
    elif isinstance(owner, functools.partial):
        yield from ((".func", owner.func), (".args", owner.args), (".keywords", owner.keywords))
        yield from ((f".{name}", value) for name, value in _pairs(vars(owner)))
    elif isinstance(owner, weakref.ref):
        yield "()", owner()
    else:
        yield from _of_object(owner)


def _pairs(table: Any) -> list[tuple[object, object]]:
    try:
        return list(table.items())
    except Exception:  # a mapping of somebody else's that computes its values
        return []


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"'s variable {name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from (("'s default", value) for value in function.__defaults__ or ())
    yield from (("'s default", value) for value in (function.__kwdefaults__ or {}).values())
    yield from ((f".{name}", value) for name, value in vars(function).items())


def _of_object(owner: object) -> Iterator[tuple[str, object]]:
    attributes = getattr(owner, "__dict__", None)
    slots = [name for cls in type(owner).__mro__ for name in _slots(cls)]
    if not isinstance(attributes, dict) and not slots:
        yield from (("'s content", value) for value in gc.get_referents(owner))
        return
    for name, value in list((attributes or {}).items()):
        if isinstance(owner, nn.Module) and name in _REGISTERED:
            yield from ((f".{key}", child) for key, child in _pairs(value))
        elif not (isinstance(owner, nn.Module) and name.endswith(_HOOKS)):
            yield f".{name}", value
    for name in slots:
        try:
            yield f".{name}", object.__getattribute__(owner, name)
        except AttributeError:
            continue


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))
