"""How a call's arguments and results are nested: lists, tuples, dicts, and types that this process has registered.

In a file a structure is ``[1, node]``, a node ``{"type": name, "context": ..., "children_spec": [nodes]}``: what
torch's pytree writes. torch's reader of it imports what a context names. Here a context is a list of keys or field
names and nothing else, and a type is a tuple, list, dict, or a named tuple or dataclass (as the outputs of diffusers
and transformers are) that the package it belongs to has registered with torch's pytree under this name.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import OrderedDict
from typing import Any, TypeVar

from torch.utils import _pytree as pytree

from fxq.runtime.reading import MAX_NAME, ReadError, parse_json

_K = TypeVar("_K")

MAX_LEAVES = 100_000
"""Most inputs, or results, of a call."""
PROTOCOL = 1
_SEQUENCES: dict[str, type] = {"builtins.tuple": tuple, "builtins.list": list}
_DICTS: dict[str, type] = {"builtins.dict": dict, "collections.OrderedDict": OrderedDict}
_NAMED_TUPLE = "collections.namedtuple"
_NAMES: dict[object, str] = {cls: name for name, cls in (_SEQUENCES | _DICTS).items()}


class StructureError(ValueError):
    """A nesting of arguments or results that has no form in a file, or a form that is none."""


def structure_to_json(spec: pytree.TreeSpec) -> object:
    """The JSON form.

    Raises:
        StructureError: a type that is no tuple, list, dict, registered named tuple or registered dataclass, or a key
            that is no string.
    """
    return [PROTOCOL, _node(spec)]


def _node(spec: pytree.TreeSpec) -> dict[str, object]:
    if spec.is_leaf():
        return {"type": None, "context": None, "children_spec": []}
    kind, context = spec.type, spec.context
    if kind in (tuple, list):
        name, written = _NAMES[kind], "null"
    elif kind in (dict, OrderedDict):
        name, written = _NAMES[kind], json.dumps([_key(key) for key in context])
    elif isinstance(context, type):
        name, written = _NAMED_TUPLE, _registered_name(context)
    else:
        name = _registered_name(kind)
        _fields(context)
        written = json.dumps(context)
    children = [_node(spec.child(i)) for i in range(spec.num_children)]
    return {"type": name, "context": written, "children_spec": children}


def _key(key: object) -> str | int:
    if type(key) is int or (isinstance(key, str) and len(key) <= MAX_NAME):
        return key
    raise StructureError(f"the calling convention has the key {str(key)[:80]!r}; a bundle holds strings as keys")


def _registered_name(cls: object) -> str:
    name = next((name for name, known in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items() if known is cls), None)
    if name is None or _find(name) is None:
        raise StructureError(
            f"the calling convention has a {getattr(cls, '__name__', cls)}; a bundle holds tuples, lists, dicts, and "
            "named tuples and dataclasses that are registered by name with torch.utils._pytree"
        )
    return name


def _find(name: object) -> type[Any] | None:
    """The named tuple or dataclass registered under a name, or None."""
    if not isinstance(name, str) or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
        return None
    cls = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if isinstance(cls, type) and (pytree.is_namedtuple_class(cls) or dataclasses.is_dataclass(cls)):
        return cls
    return None


def _fields(context: object) -> list[str]:
    """Names of the fields with a value: the context, or, for ``register_dataclass``, the first of its two lists."""
    found = context[0] if isinstance(context, list) and context and isinstance(context[0], list) else context
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise StructureError(f"malformed calling convention: {str(context)[:80]} names no fields")
    return found


def structure_from_json(data: object) -> pytree.TreeSpec:
    """The inverse of :func:`structure_to_json`.

    Raises:
        StructureError: malformed, or of a type that this process has not registered.
    """
    if not isinstance(data, list) or len(data) != 2 or type(data[0]) is not int or data[0] != PROTOCOL:
        raise StructureError("malformed calling convention: expected [1, {...}]")
    spec = pytree.tree_structure(_example(data[1], [MAX_LEAVES]))
    if structure_to_json(spec) != data:
        raise StructureError("malformed calling convention: it is not how its types nest their values")
    return spec


def _example(node: object, room: list[int]) -> object:
    """Something of this structure; its leaves are zeros."""
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        raise StructureError(f"malformed calling convention: {str(node)[:80]}")
    kind, below = node["type"], node["children_spec"]
    if not isinstance(below, list) or not (kind is None or isinstance(kind, str)):
        raise StructureError(f"malformed calling convention: {str(node)[:80]}")
    if kind is None:
        room[0] -= 1
        if room[0] < 0:
            raise StructureError(f"the calling convention has more than {MAX_LEAVES} leaves")
        return 0
    children = [_example(child, room) for child in below]
    if kind == _NAMED_TUPLE:
        cls = _find(node["context"])
        return _made(node["context"], list(cls._fields) if cls and pytree.is_namedtuple_class(cls) else [], children)
    context = _context(node["context"])
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](children)
    if kind in _DICTS:
        if not isinstance(context, list):
            raise StructureError(f"malformed calling convention: {str(context)[:80]} are no keys")
        return _DICTS[kind](_zip([_key(key) for key in context], children))
    return _made(kind, _fields(context) if _find(kind) else [], children)


def _context(context: object) -> object:
    try:
        found = parse_json(context) if isinstance(context, str) else context
    except ReadError as error:
        raise StructureError(f"malformed calling convention: {error}") from None
    if isinstance(found, dict):
        raise StructureError("the calling convention has a defaultdict or an enum; use plain dicts and strings")
    return found


def _zip(keys: list[_K], children: list[object]) -> dict[_K, object]:
    found = dict(zip(keys, children, strict=False))
    if not len(found) == len(keys) == len(children):
        raise StructureError(f"malformed calling convention: {len(children)} values of the keys {str(keys)[:80]}")
    return found


def _made(name: object, fields: list[str], children: list[object]) -> object:
    """An instance of a registered type."""
    cls = _find(name)
    if cls is None:
        raise StructureError(
            f"the calling convention has the type {str(name)[:80]!r}, which is not registered here as a named tuple or "
            "dataclass. Import the package that registers the type before loading"
        )
    values, parameters = _zip(fields, children), inspect.signature(cls).parameters
    if unknown := [field for field in fields if field not in parameters]:
        raise StructureError(f"the type {name} has no field {unknown[0][:80]!r}; install the version that wrote this")
    absent = {n: None for n, p in parameters.items() if n not in values and p.default is inspect.Parameter.empty}
    try:
        return cls(**values, **absent)
    except (TypeError, ValueError) as error:
        raise StructureError(f"the type {name} cannot be made of {str(fields)[:80]}: {error}") from error
