"""A GPU that is none: graphs record what runs on the CPU and run it again, in the same memory, when they are replayed.

What a graph makes on the way lies in memory that all graphs of a pool share, so a replay ends with NaN in it, and
nothing that ran outside a capture is run again.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxq.runtime.cuda_graphs import refusals


class Recording(TorchDispatchMode):
    """Operators in their order, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    """A graph of the fake device."""

    made: ClassVar[list[FakeGraph]] = []
    """All that were captured since the fake was put in place."""
    keeps = False
    """Whether what a graph made outlives its replay, as outputs do that are held in the pool."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.pool: object = None

    def own(self) -> list[Tensor]:
        """Memory that the graph made: no argument's."""
        given, found = set[int](), []
        for _, args, kwargs, result in self.recording.tape:
            before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and (place := tensor.untyped_storage().data_ptr()) not in before | given:
                    given.add(place)
                    found.append(tensor)
        return found

    def replay(self) -> None:
        """Run the tape again into the same memory, and lose what lies in the pool."""
        with torch.no_grad():
            for func, args, kwargs, result in self.recording.tape:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            if not self.keeps:
                for tensor in self.own():
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


class FakeStream:
    """A stream; waits are counted."""

    waits = 0

    def __init__(self) -> None:
        self.used: list[Tensor] = []

    def wait_stream(self, other: FakeStream) -> None:
        """Counted."""
        FakeStream.waits += 1


@contextlib.contextmanager
def _capturing(graph: FakeGraph, pool: object = None, stream: object = None, capture_error_mode: str = "global") -> Any:
    assert pool is not None and stream is not None and capture_error_mode == "thread_local"
    try:
        with graph.recording:
            yield
    except Exception:
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904  as torch does
    graph.pool = pool
    FakeGraph.made.append(graph)


@contextlib.contextmanager
def _nothing(_: object) -> Any:
    yield


def fake_cuda(monkeypatch: Any) -> type[FakeGraph]:
    """Let graphs be captured on the CPU; the class of graphs, which counts them."""
    stream = FakeStream()
    monkeypatch.setattr(refusals, "DEVICE", "cpu")
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(FakeStream, "waits", 0)
    changed = {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": lambda *_: stream,
        "synchronize": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
        "graph_pool_handle": object,
        "graph": _capturing,
        "stream": _nothing,
        "device": _nothing,
    }
    for name, value in changed.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, other: other.used.append(tensor))
    return FakeGraph
