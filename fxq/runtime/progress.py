"""Progress bars with ETA for long steps; silent when switched off or when stderr is not a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from fxq.runtime.exclusive import one_at_a_time
from fxq.runtime.streams import is_terminal, stderr_console


class Progress:
    """One line per step of a job.

    Args:
        enabled: whether to show anything.
        prefix: put before every step's name.
    """

    def __init__(self, enabled: bool = True, prefix: str = "") -> None:
        self.prefix = prefix
        console = stderr_console()
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
            disable=not enabled or not is_terminal(sys.stderr) or console.is_dumb_terminal,
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
        task = self._bar.add_task(self.prefix + name, total=1)

        def update(done: int, total: int | None) -> None:
            self._bar.update(task, completed=done, total=total)

        yield update
        task_ = self._bar.tasks[self._bar.task_ids.index(task)]
        self._bar.update(task, completed=task_.total or 1, total=task_.total or 1)
