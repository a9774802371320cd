"""Progress bars with ETA for long steps; silent when switched off or when stderr is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """One line per step of a job.

    Args:
        enabled: whether to show anything.
        prefix: put before every step's name.
    """

    def __init__(self, enabled: bool = True, prefix: str = "") -> None:
        self.prefix = prefix
        self._bar = RichProgress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled or not sys.stderr.isatty(),
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
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
