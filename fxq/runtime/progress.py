"""Progress with the time left: bars on a terminal, else a line now and then; silent when switched off."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from fxq.runtime.exclusive import one_at_a_time
from fxq.runtime.streams import is_terminal, stderr_console

INTERVAL = 15.0
"""Seconds between two lines where standard error is no terminal; what takes less says nothing."""


class Progress:
    """One line per step of a job on a terminal; elsewhere, in a log, a line of the running step every ``INTERVAL``.

    Args:
        enabled: whether to show anything.
        prefix: put before every step's name.
    """

    def __init__(self, enabled: bool = True, prefix: str = "") -> None:
        self.prefix = prefix
        console = stderr_console()
        bars = is_terminal(sys.stderr) and not console.is_dumb_terminal
        self._log = console if enabled and not bars else None
        self._said = time.monotonic()
        # Only where nothing else is meant to be in the process's streams: what others print goes above the bars.
        main = threading.current_thread() is threading.main_thread()
        self._bar = RichProgress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled or not bars,
            redirect_stdout=main,
            redirect_stderr=main,
        )

    def __enter__(self) -> Progress:
        with one_at_a_time():
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with one_at_a_time():
            self._bar.stop()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[int, int | None], None]]:
        """A named step; the yielded function takes (done, total or None)."""
        task, started = self._bar.add_task(self.prefix + name, total=1), time.monotonic()

        def update(done: int, total: int | None) -> None:
            self._bar.update(task, completed=done, total=total)
            now = time.monotonic()
            if self._log is not None and now - self._said >= INTERVAL:
                self._said = now
                self._log.print(_line(self.prefix + name, done, total, now - started), markup=False, soft_wrap=True)

        yield update
        task_ = self._bar.tasks[self._bar.task_ids.index(task)]
        self._bar.update(task, completed=task_.total or 1, total=task_.total or 1)


def _line(name: str, done: int, total: int | None, seconds: float) -> str:
    """What a log says of a step: how far it is, how long it runs, and how long it may still take."""
    if not total:
        return f"{name}: {done}, {seconds:.0f} s"
    left = f", about {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"{name}: {done} of {total}, {seconds:.0f} s{left}"
