"""The most memory that a piece of work has taken."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import torch

from fxq.runtime.memory.residency import peak_resident_bytes, trim

_CLEAR = pathlib.Path("/proc/self/clear_refs")
_PEAK = "5"
"""Written there it makes the kernel begin anew with the peak."""


def kind_of(device: torch.device) -> str:
    """What :func:`watched` measures there, in words."""
    return "allocated on the GPU" if device.type == "cuda" else "of the process in RAM, mapped weights included"


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that says how many bytes were in use at most since the block was entered, on the device.

    On the CPU that is the process's resident memory, all models in it; where the system cannot begin anew with its
    peak, the peak since the process started.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    trim()
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_PEAK, encoding="ascii")
    yield peak_resident_bytes
