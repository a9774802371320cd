"""One CUDA graph: the call that was recorded, the memory it reads, and what it gives back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.runtime.cuda_graphs.memory import Memories, Memory, layout_of
from fxq.runtime.cuda_graphs.refusals import CudaGraphError
from fxq.runtime.messages import kind_and_line

WARM_UP = 3
"""Calls before a capture: what compiles, chooses or allocates at first does it then."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a graph finds one of its tensors: ``view`` of ``memory``, and what it is called."""

    name: str
    memory: Memory
    view: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor, memories: Memories) -> Place:
        """Room for a tensor."""
        memory = memories.at(name, tensor.dtype, tensor.numel())
        return cls(name, memory, memory.view(layout_of(tensor)))


@dataclasses.dataclass(frozen=True)
class Recorder:
    """What all graphs of a module share.

    Attributes:
        function: what is called.
        device: the GPU.
        stream: of warm-up and capture.
        pool: of the memory of all graphs' intermediate values.
        inputs: memory of inputs.
        outputs: memory of outputs; None: they stay in the pool.
    """

    function: Callable[..., Any]
    device: torch.device
    stream: torch.cuda.Stream
    pool: Any
    inputs: Memories
    outputs: Memories | None


@contextlib.contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps no copies of weights: they would be gone when it ends, and a graph would go on reading them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is garbage-collected: a graph that is freed while another is captured breaks the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Capture:
    """A graph for calls of one combination of shapes.

    Args:
        recorder: what it shares with others.
        names: of the leaves of the call, each once.
        leaves: of (args, kwargs).
        spec: how they are nested.

    Raises:
        CudaGraphError: when the call writes into its inputs, or cannot be captured.
    """

    def __init__(
        self, recorder: Recorder, names: Sequence[str], leaves: Sequence[object], spec: pytree.TreeSpec
    ) -> None:
        self.form = {name: form_of(leaf) for name, leaf in zip(names, leaves, strict=True)}
        self.places = [
            Place.of(name, leaf, recorder.inputs) if isinstance(leaf, Tensor) else None
            for name, leaf in zip(names, leaves, strict=True)
        ]
        self.filled = self.fill(leaves)
        given = [leaf if place is None else place.view for place, leaf in zip(self.places, leaves, strict=True)]
        self._record(recorder, *pytree.tree_unflatten(given, spec))

    def fill(self, leaves: Sequence[object]) -> list[int]:
        """Copy inputs to where the graph reads them; bytes of each copy."""
        copied = []
        for place, leaf in zip(self.places, leaves, strict=True):
            if place is not None and isinstance(leaf, Tensor) and (count := place.memory.fill(place.view, leaf)):
                copied.append(count)
        return copied

    def _record(self, recorder: Recorder, args: Sequence[object], kwargs: dict[str, object]) -> None:
        stream, caller = recorder.stream, torch.cuda.current_stream()
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream), _uncached_casts():
                self._warm_up(recorder, args, kwargs)
                self._capture(recorder, args, kwargs)
        finally:
            caller.wait_stream(stream)

    def _warm_up(self, recorder: Recorder, args: Sequence[object], kwargs: dict[str, object]) -> None:
        before = [0 if place is None else place.view._version for place in self.places]
        for _ in range(WARM_UP):
            output = recorder.function(*args, **kwargs)
        leaves, self._spec = pytree.tree_flatten(output)
        self._outputs = self._room(recorder, leaves)
        for place, version in zip(self.places, before, strict=True):
            if place is not None and place.view._version != version:
                raise CudaGraphError(
                    f"the call writes into its input {place.name}, which a replayed graph would not do to the caller's "
                    "tensor: return the new values as outputs"
                )

    def _capture(self, recorder: Recorder, args: Sequence[object], kwargs: dict[str, object]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU.
        recording = torch.cuda.graph(
            self._graph, pool=recorder.pool, stream=recorder.stream, capture_error_mode="thread_local"
        )
        try:
            with _uncollected(), recording:
                self._keep(pytree.tree_leaves(recorder.function(*args, **kwargs)))
        except Exception as error:
            broke = error.__context__ or error  # behind the error of ending a broken capture
            raise CudaGraphError(
                f"the call cannot be captured, {kind_and_line(broke)}: it does work on the host that waits for the GPU "
                "or moves data to it (.item(), a branch on a value, a tensor made on the CPU). Call the module itself"
            ) from error

    def _room(self, recorder: Recorder, leaves: Sequence[object]) -> list[object]:
        """Outputs of the warm-up as the graph will give them: places for tensors, constants as they are."""
        if recorder.outputs is None:
            return [None] * len(leaves)
        return [
            Place.of(str(i), leaf, recorder.outputs) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]

    def _keep(self, leaves: Sequence[object]) -> None:
        """Record where outputs go; those that stay in the pool are held, so that no later graph takes their memory."""
        for i, leaf in enumerate(leaves):
            place = self._outputs[i]
            if isinstance(leaf, Tensor) and isinstance(place, Place):
                place.view.copy_(leaf)
            elif not isinstance(place, Place):
                self._outputs[i] = leaf

    def replay(self) -> Any:
        """Run the graph on what was filled in; the outputs, new tensors or views of its own."""
        self._graph.replay()
        given = [
            output.view.clone() if isinstance(output, Place) else output.view_as(output)
            if isinstance(output, Tensor) else output
            for output in self._outputs
        ]  # fmt: skip
        return pytree.tree_unflatten(given, self._spec)


def form_of(leaf: object) -> str:
    """A leaf in messages: ``bfloat16[1, 60, 2, 32]``."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join(map(str, leaf.shape))}]"
