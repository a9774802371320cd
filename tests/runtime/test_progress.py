import io
import sys

import pytest

from fxq.runtime import progress
from fxq.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def in_terminal(monkeypatch):
    """A terminal for standard error; in the test itself, since pytest sets the stream anew after fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def run(bar):
    with bar, bar.step("calibrate") as update:
        update(1, 4)
        update(3, None)


def test_a_step_is_shown_by_name_and_ends_full(monkeypatch):
    terminal = in_terminal(monkeypatch)
    bar = Progress(prefix="1 of 2: ")
    run(bar)
    (task,) = bar._bar.tasks
    assert task.description == "1 of 2: calibrate" and task.finished and (task.completed, task.total) == (4, 4)
    assert "1 of 2: calibrate" in terminal.getvalue()


def test_a_step_that_fails_is_not_shown_as_done(monkeypatch):
    in_terminal(monkeypatch)
    bar = Progress()
    with pytest.raises(KeyError), bar, bar.step("calibrate") as update:
        update(1, 4)
        raise KeyError
    assert not bar._bar.tasks[0].finished


def test_nothing_is_shown_when_switched_off_or_of_short_steps_in_a_log(monkeypatch):
    terminal = in_terminal(monkeypatch)
    run(Progress(False))
    assert terminal.getvalue() == ""
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    run(Progress())
    assert plain.getvalue() == ""


def test_a_log_gets_a_line_now_and_then_with_the_time_left(monkeypatch):
    log, clock = io.StringIO(), iter(range(0, 1000, 10))
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress(prefix="w4a8 ") as bar, bar.step("search [x]") as update:
        for done in range(1, 5):
            update(done, 4)
    assert log.getvalue().splitlines() == [
        "w4a8 search [x]: 1 of 4, 10 s, about 30 s left",
        "w4a8 search [x]: 3 of 4, 30 s, about 10 s left",
    ]
    log.truncate(0)
    with Progress(False) as bar, bar.step("search") as update:
        for done in range(1, 5):
            update(done, None)
    assert not log.getvalue()
