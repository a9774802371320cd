"""Time on the device, and calls replayed from CUDA graphs, so that no measurement waits for Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3
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


class _Captured:
    """One CUDA graph with its input and output tensors; it keeps its memory, so outputs last until its next replay."""

    def __init__(self, function: Callable[..., Any], leaves: Sequence[Tensor], spec: Any) -> None:
        self.inputs = [leaf.clone() for leaf in leaves]
        self.last: list[Tensor | None] = [None] * len(leaves)
        args = pytree.tree_unflatten(self.inputs, spec)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*args)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*args)

    def replay(self, leaves: Sequence[Tensor]) -> Any:
        for i, leaf in enumerate(leaves):
            # Tensors of a rollout are never written in place: the same object holds the same values.
            if leaf is not self.last[i]:
                self.inputs[i].copy_(leaf)
                self.last[i] = leaf
        self.graph.replay()
        # New objects over the same memory: the next replay changes their values.
        return pytree.tree_map_only(Tensor, lambda t: t.view_as(t), self.output)


class Graphed:
    """A function of tensors (in lists, tuples, dicts), replayed from one CUDA graph per combination of input shapes.

    An input that is the object of the call before is not copied again. Outputs are overwritten by the next call of the
    same shapes. On a CPU the function is called.
    """

    def __init__(self, function: Callable[..., Any], device: str) -> None:
        self.function, self.on_gpu = function, torch.device(device).type == "cuda"
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}

    def __call__(self, *args: Any) -> Any:
        """Replay, after a capture where the shapes are new."""
        if not self.on_gpu:
            return self.function(*args)
        leaves, spec = pytree.tree_flatten(args)
        key = tuple(leaf.shape for leaf in leaves)
        if key not in self._captured:
            self._captured[key] = _Captured(self.function, leaves, spec)
        return self._captured[key].replay(leaves)

    @property
    def graphs(self) -> int:
        """Number of captured graphs."""
        return len(self._captured)


def copies(x: Tensor) -> list[Tensor]:
    """``x`` and as many copies as no L2 cache holds together; 2 on a CPU."""
    count = max(2, math.ceil(COLD_BYTES / max(1, x.nbytes))) if x.is_cuda else 2
    return [x, *(x.clone() for _ in range(count - 1))]
