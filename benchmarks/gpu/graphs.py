"""Time on the device, and calls replayed from CUDA graphs, so that no measurement waits for Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fxq

COLD_BYTES = 256 << 20
"""Written before a cold call: more than the L2 cache of any GPU."""


class DeviceClock:
    """A clock that only the calls it wraps move: by their time on the device, between CUDA events.

    Wrapped calls queue up and are waited for when the clock is read. On a CPU every call takes a second, so that the
    control flow is that of a GPU and no number looks like a measurement.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self._now = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._scratch = torch.empty(COLD_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None

    def __call__(self) -> float:
        """Seconds that all wrapped calls have taken so far."""
        if self._pending:
            torch.cuda.synchronize()
            self._now += sum(start.elapsed_time(end) for start, end in self._pending) / 1000
            self._pending.clear()
        return self._now

    def timed(self, call: Callable[[], Any], cold: bool) -> Callable[[], Any]:
        """The call, its time counted; ``cold``: after everything else was flushed from the L2 cache."""

        def run() -> Any:
            if self._scratch is None:
                self._now += 1.0
                return call()
            if cold:
                self._scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            end.record()
            self._pending.append((start, end))
            return result

        return run


def replayed(function: Callable[..., Any], device: str, fresh_outputs: bool = True) -> Callable[..., Any]:
    """:class:`fxq.CudaGraphs` of a function or a module; on a CPU, in a dry run, that itself."""
    if torch.device(device).type != "cuda":
        return function
    return fxq.CudaGraphs(function, device=device, fresh_outputs=fresh_outputs)


def copies(x: Tensor) -> list[Tensor]:
    """``x`` and as many copies as no L2 cache holds together; 2 on a CPU."""
    count = max(2, math.ceil(COLD_BYTES / max(1, x.nbytes))) if x.is_cuda else 2
    return [x, *(x.clone() for _ in range(count - 1))]
