"""What torch keeps for ever of each graph that it works on, let go with the graph."""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import graph_module as _fx


def _forget(file: str) -> None:
    """Remove a generated file from the caches of fx and of tracebacks."""
    getattr(getattr(_fx, "_loader", None), "eval_cache", {}).pop(file, None)
    linecache.cache.pop(file, None)


def _code_of(namespace: dict[str, object], known: set[str]) -> Iterator[types.CodeType]:
    for value in list(namespace.values()):
        if isinstance(value, types.FunctionType) and value.__code__.co_filename in known:
            yield value.__code__


@contextlib.contextmanager
def sources_let_go() -> Iterator[None]:
    """Let the source of every graph that this thread compiles in the block go when its code goes.

    fx keeps the source of each compilation for ever, for tracebacks; a pass compiles its graph anew, so that one call
    of ``fxq.optimize`` would leave a megabyte. Only one thread may be in such a block. Where torch has no such cache,
    nothing is done.
    """
    compile_source: Any = getattr(_fx, "_exec_with_source", None)
    cache = getattr(getattr(_fx, "_loader", None), "eval_cache", None)
    if compile_source is None or not isinstance(cache, dict):
        yield
        return
    thread = threading.get_ident()

    def compiled(src: str, globals: dict[str, object], *rest: object, **options: object) -> None:
        before = set(cache) if threading.get_ident() == thread else None
        compile_source(src, globals, *rest, **options)
        if before is None:
            return
        new = set(cache) - before
        for code in _code_of(globals, new):
            weakref.finalize(code, _forget, code.co_filename).atexit = False

    _fx._exec_with_source = compiled
    try:
        yield
    finally:
        _fx._exec_with_source = compile_source


@contextlib.contextmanager
def shapes_let_go() -> Iterator[None]:
    """Let what torch notes of operators' results on shapes alone go at the end of the block.

    The notes are made for the symbols of one graph, which no other graph has, and hold all that is known of them. Where
    torch has no such cache, nothing is done.
    """
    found: object = getattr(FakeTensorMode, "cache", None)
    cache: dict[object, object] = found if isinstance(found, dict) else {}
    before = set(cache)
    try:
        with _inputs_let_go():
            yield
    finally:
        for key in [key for key in list(cache) if key not in before]:
            cache.pop(key, None)
        # Where nothing has imported it, nothing is kept.
        shapes = sys.modules.get("torch.fx.experimental.symbolic_shapes")
        for method in vars(getattr(shapes, "ShapeEnv", object)).values():
            _clear(method)


@contextlib.contextmanager
def _inputs_let_go() -> Iterator[None]:
    """Let the example inputs of captures in the block go: a capture lists them, and they hold it, outside of Python."""
    shapes: Any = sys.modules.get("torch.fx.experimental.symbolic_shapes")
    if shapes is None:
        yield
        return
    thread, made = threading.get_ident(), weakref.WeakSet[Any]()
    start = shapes.ShapeEnv.__init__

    @functools.wraps(start)
    def begin(env: object, *args: object, **options: object) -> None:
        start(env, *args, **options)
        if threading.get_ident() == thread:
            made.add(env)

    shapes.ShapeEnv.__init__ = begin
    try:
        yield
    finally:
        shapes.ShapeEnv.__init__ = start
        for env in made:
            inputs = getattr(env, "tracked_fakes", None)
            if isinstance(inputs, list):
                inputs.clear()


def _clear(method: object) -> None:
    """Empty the caches around a method: their keys are the arguments, and hold the method's object."""
    while method is not None:
        clear = getattr(method, "cache_clear", None)
        if callable(clear):
            clear()
        method = getattr(method, "__wrapped__", None)
