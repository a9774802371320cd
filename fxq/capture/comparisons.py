"""Which sizes a model's own code compares while it is captured, those comparisons too that torch answers by itself.

torch.export takes every free size for at least 2, so ``if x.shape[0] == 1`` is false without a trace of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from fxq.core.places import is_model_code

if TYPE_CHECKING:
    import sympy

_METHODS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__")
_LOCK = threading.Lock()
_RECORDER: contextvars.ContextVar[set[sympy.Symbol] | None] = contextvars.ContextVar("compared", default=None)
_ACTIVE: list[tuple[str, Callable[..., object]]] = []
_COUNT = [0]


@contextlib.contextmanager
def compared_sizes() -> Iterator[set[sympy.Symbol]]:
    """A set that gets the symbols (of sympy) of all sizes that model code compares in the block, in this thread."""
    found: set[sympy.Symbol] = set()
    token = _RECORDER.set(found)
    _watch()
    try:
        yield found
    finally:
        _RECORDER.reset(token)
        _unwatch()


def _watch() -> None:
    with _LOCK:
        _COUNT[0] += 1
        if _COUNT[0] == 1:
            _ACTIVE[:] = [(name, getattr(torch.SymInt, name)) for name in _METHODS]
            for name, method in _ACTIVE:
                setattr(torch.SymInt, name, _noting(method))


def _unwatch() -> None:
    with _LOCK:
        _COUNT[0] -= 1
        if _COUNT[0] == 0:
            for name, method in _ACTIVE:
                setattr(torch.SymInt, name, method)


def _noting(method: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(method)
    def compare(self: object, *others: object) -> object:
        if (found := _RECORDER.get()) is not None and is_model_code(sys._getframe(1).f_code.co_filename):
            for size in (self, *others):
                if isinstance(size, torch.SymInt):
                    found.update(getattr(size.node.expr, "free_symbols", ()))
        return method(self, *others)

    return compare
