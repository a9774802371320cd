"""What Python and torch keep once for a whole process: one thread at a time uses it, and puts it back."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from fxq.runtime.generated import shapes_let_go, sources_let_go

_P = ParamSpec("_P")
_R = TypeVar("_R")
_lock = threading.RLock()
_depth = 0


def _renew() -> None:
    """A thread that held the lock does not exist in a forked child and would never give it back."""
    global _lock, _depth
    _lock, _depth = threading.RLock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread is in such a block: ``torch.export`` and what fx generates are not thread-safe.

    What fx generates in the block is let go with the modules that it is for.
    """
    global _depth
    with _lock:
        outermost, _depth = not _depth, _depth + 1
        try:
            with contextlib.ExitStack() as stack:
                if outermost:
                    stack.enter_context(sources_let_go())
                    stack.enter_context(shapes_let_go())
                yield
        finally:
            _depth -= 1


def exclusive(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run by one thread at a time; see :func:`one_at_a_time`."""

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with one_at_a_time():
            return function(*args, **kwargs)

    return alone


class _Muted:
    """Standard error without what one thread writes; whoever keeps it sees the stream itself later on."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Write, unless it is the muted thread."""
        if self.stream is None or threading.get_ident() == self.thread:
            return len(text)
        self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless it is the muted thread."""
        if self.stream is not None and threading.get_ident() != self.thread:
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep torch from telling this thread what is of no use here, and let other threads wait and be heard.

    Warnings are ignored, the named loggers say errors only, and nothing that this thread prints reaches standard
    error, which may be missing or closed.
    """
    with one_at_a_time(), warnings.catch_warnings(), contextlib.ExitStack() as undo:
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, loggers):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        before: object = sys.stderr
        muted: Any = _Muted(before)
        sys.stderr = muted
        try:
            yield
        finally:
            muted.thread = -1
            if sys.stderr is muted:
                sys.stderr = before
