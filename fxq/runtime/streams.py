"""Standard streams as they are found: missing, closed, of another encoding, or objects that can only be written to."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Any, Literal

from rich.console import Console

_BROKEN = (AttributeError, OSError, TypeError, ValueError)
"""What streams raise that are closed, have no reader any more, or lack a method."""
_TABLE_WIDTH = 160
_TEXT_WIDTH = 140


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; what cannot tell is none."""
    try:
        return bool(stream.isatty())
    except Exception:  # such objects are anybody's, and so are their errors
        return False


class _Stream:
    """A standard stream, looked up anew at every write; characters that it cannot encode are escaped.

    What cannot be said on standard error is lost, as nobody listens; results on standard output are not.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self.name = name

    @property
    def stream(self) -> Any:
        """The stream that the process has now, behind the one that rich puts there while a bar is shown."""
        found = getattr(sys, self.name)
        return getattr(found, "rich_proxied_file", found)

    @property
    def encoding(self) -> str:
        encoding = getattr(self.stream, "encoding", None)
        return encoding if isinstance(encoding, str) else "utf-8"

    def write(self, text: str) -> int:
        """Write all of a text."""
        if self.stream is None:
            return len(text)
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except Exception:
            if self.name == "stdout":
                raise
        return len(text)

    def flush(self) -> None:
        """Flush where the stream can."""
        try:
            flush = getattr(self.stream, "flush", None)
            if flush is not None:
                flush()
        except Exception:
            if self.name == "stdout":
                raise

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return is_terminal(self.stream)

    def fileno(self) -> int:
        """The file descriptor.

        Raises:
            OSError: when there is none.
        """
        try:
            return int(self.stream.fileno())
        except _BROKEN as error:
            raise OSError(f"{self.name} is no file") from error


def stderr_console(quiet: bool = False) -> Console:
    """Console for what is said beside the results."""
    return Console(file=_Stream("stderr"), quiet=quiet, highlight=False)  # type: ignore[arg-type]


def stdout_console(width: int = _TABLE_WIDTH, highlight: bool = True) -> Console:
    """Console for results; ``width`` columns, as tables need, where standard output is not a terminal."""
    given = None if is_terminal(sys.stdout) else width
    return Console(file=_Stream("stdout"), width=given, highlight=highlight)  # type: ignore[arg-type]


def as_text(result: object, width: int = _TEXT_WIDTH) -> str:
    """What a console shows of a result, without colours: as wide as the terminal, or ``width`` columns without one."""
    console = Console(width=stdout_console(width).width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(result)
    return capture.get()


def emit(text: str) -> None:
    """Write a result and a line's end to standard output."""
    _Stream("stdout").write(text + "\n")


def warn(message: str, stacklevel: int = 1) -> None:
    """``warnings.warn`` that goes on where standard error cannot be written to.

    Raises:
        UserWarning: when the filters turn warnings into errors.
    """
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except _BROKEN:
        return


def finish_output() -> bool:
    """Write out what is left in standard output; False when its reader is gone, and then nothing more is written."""
    try:
        _Stream("stdout").flush()
    except BrokenPipeError:
        # What is left would be tried again at the end of the process, and complained about.
        with contextlib.suppress(*_BROKEN), open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return False
    return True
