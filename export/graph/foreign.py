"""Operators of other libraries in a bundle: written by name, run only when the caller of ``load`` names them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_OWN = ("aten", "fxq", "prims", "prim", "quantized_decomposed", "higher_order", "inductor", "profiler", "c10d")
"""Namespaces of torch and fxq: their operators are allowed or refused one by one."""
_ANY = "*"
_ALLOWED: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("operators", default=frozenset())


@contextlib.contextmanager
def allowing(operators: Iterable[str]) -> Iterator[None]:
    """While the block runs, graphs that are read may call these operators, named as ``library.name`` each."""
    token = _ALLOWED.set(frozenset(operators))
    try:
        yield
    finally:
        _ALLOWED.reset(token)


@contextlib.contextmanager
def allowing_all() -> Iterator[None]:
    """For graphs of this process, no file's: what is called here may be called again."""
    with allowing((_ANY,)):
        yield


def is_foreign(name: object) -> bool:
    """Whether a name has the form ``library.operator.overload`` of a library that is neither torch nor fxq."""
    if not isinstance(name, str) or len(name) > 300:
        return False
    parts = name.split(".")
    plain = all(part.isidentifier() and not part.startswith("__") for part in parts)
    return len(parts) == 3 and plain and parts[0] not in _OWN and not parts[0].startswith("_")


def foreign_name(target: object) -> str | None:
    """The name of another library's operator, or None."""
    return str(target) if isinstance(target, torch._ops.OpOverload) and is_foreign(str(target)) else None


def find_foreign(name: Any) -> object:
    """The operator of a name that the caller allows and that a library has registered, or None."""
    allowed = _ALLOWED.get()
    if not is_foreign(name) or not ({_ANY, name, name.rpartition(".")[0]} & allowed):
        return None
    library, packet, overload = name.split(".")
    try:
        found = getattr(getattr(getattr(torch.ops, library), packet), overload)
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, torch._ops.OpOverload) else None


def advice(name: str) -> str:
    """What to do about a foreign operator that is not allowed or not there."""
    short = name.rpartition(".")[0]
    return (
        f"it belongs to another library: if you trust the bundle, import that library and pass operators={[short]!r} "
        "to fxq.load"
    )
