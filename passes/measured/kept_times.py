"""Seconds of two ways to compute one thing on this machine: measured once, and kept in a file.

The file lies beside the compiled kernels, one for each machine, version and number of threads. Nothing but the choice
between two correct kernels follows from what it says; what is there stays until one of these changes, so that a later
process chooses as the first one did.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fxq import cpu
from fxq.core.ir import QuantGraph
from fxq.kernels import native
from fxq.kernels.native.cache import lasting_folder
from fxq.runtime.reading import ReadError, read_json
from fxq.runtime.writable import whole_file
from fxq.version import __version__

FORMAT = 1
PLACE = "measured times"
"""Under which the summary says what is wrong with them."""
_ONLY = "measured for this process only: "
MOST_BYTES = 4 << 20
"""Of a file of times."""

Times = tuple[float, float]
"""Seconds of the quantized way, and of the way in floats."""


class KeptTimes:
    """Times by what they are of, in this process and in files.

    Attributes:
        trouble: why they are not kept, or what was found damaged; "" where all is well.
    """

    def __init__(self) -> None:
        self.trouble = ""
        self._known: dict[tuple[str, str], Times] = {}

    def of(self, what: str, device: str, measure: Callable[[], Times]) -> Times:
        """The times of ``what``, measured where this machine has none yet; times of a GPU last as long as the process.

        Args:
            what: names the call and its sizes; a key of the file.
            device: where it runs, as "cpu".
            measure: gives both times in seconds.
        """
        facts = machine() | {"device": device}
        name = _digest(facts)
        key = name, what
        if key not in self._known:
            file = self._file(name) if torch.device(device).type == "cpu" else None
            kept = {} if file is None else self._read(file, facts)
            found = kept[what] if what in kept else measure()
            if file is not None and what not in kept:
                found = self._write(file, facts, what, found)
            self._known[key] = found
        return self._known[key]

    def forget(self) -> None:
        """Know no more than the files say, as a new process does."""
        self._known.clear()
        self.trouble = ""

    def _file(self, name: str) -> pathlib.Path | None:
        folder, why_not = lasting_folder()
        if folder is None:
            self.trouble = f"{_ONLY}{why_not}"
            return None
        return folder / f"times-{name}.json"

    def _read(self, file: pathlib.Path, facts: Mapping[str, str]) -> dict[str, Times]:
        """What a file says; nothing where it is not there, or cannot be read."""
        try:
            return _checked(read_json(file, limit=MOST_BYTES), facts)
        except FileNotFoundError:
            return {}
        except (OSError, ReadError) as error:
            self.trouble = f"{file} is damaged ({_line(error)}): measured and written anew"
            return {}

    def _write(self, file: pathlib.Path, facts: Mapping[str, str], what: str, found: Times) -> Times:
        """Add times to a file; returns those of another process that were there first."""
        try:
            with _alone(file.parent):
                kept = self._read(file, facts)
                if what not in kept:
                    kept[what] = found
                    text = {"format": FORMAT, "machine": facts, "seconds": dict(sorted(kept.items()))}
                    with whole_file(file) as part:
                        part.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
                return kept[what]
        except OSError as error:
            self.trouble = f"{_ONLY}{file} cannot be written ({_line(error)})"
            return found


KEPT = KeptTimes()
"""Those of this process."""


def note_trouble(graph: QuantGraph) -> None:
    """Say in the summary why times are not kept, or that they were damaged."""
    told = KEPT.trouble
    if told and told not in graph.notes.get(PLACE, ()):
        graph.note(PLACE, told)
    if not told.startswith(_ONLY):  # the file is whole again
        KEPT.trouble = ""


def machine() -> dict[str, str]:
    """What times depend on beside what is timed."""
    limits = sorted({name for variables in cpu.LIBRARIES.values() for name in variables})
    return {
        "processor": cpu.name(),
        "kernels": native.name() if native.ready() else "none",
        "library": native.library_name(),
        "fxq": __version__,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "limits": " ".join(f"{name}={os.environ[name]}" for name in limits if name in os.environ),
        "threads": str(torch.get_num_threads()),
    }


def power_of_two(count: int) -> int:
    """The one nearest to a number by ratio, at least 1: what stands for all sizes near it."""
    return 1 << max(0, round(math.log2(max(1, count))))


def _digest(facts: Mapping[str, str]) -> str:
    return _hash(json.dumps(facts, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _checked(value: object, facts: Mapping[str, str]) -> dict[str, Times]:
    """Times as a file says them.

    Raises:
        ReadError: when it is not of this format and machine, or a time is none.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("machine") != facts:
        raise ReadError(f"expected times of this machine in format {FORMAT}")
    seconds = value.get("seconds")
    if not isinstance(seconds, dict):
        raise ReadError("expected an object 'seconds'")
    found: dict[str, Times] = {}
    for what, pair in seconds.items():
        numbers: list[Any] = pair if isinstance(pair, list) and len(pair) == 2 else [None]
        if not all(isinstance(number, float) and 0 < number < math.inf for number in numbers):
            raise ReadError(f"{what[:80]!r}: expected two times in seconds")
        found[what] = numbers[0], numbers[1]
    return found


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """No other process is in this block for the folder, where the system has locks."""
    try:
        import fcntl
    except ImportError:  # there is none on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _line(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
