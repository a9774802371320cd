"""A module whose calls are replayed from CUDA graphs: one for each combination of input shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.runtime.cuda_graphs.capture import Capture, Recorder, form_of
from fxq.runtime.cuda_graphs.memory import Memories, layout_of
from fxq.runtime.cuda_graphs.refusals import (
    CudaGraphError,
    check_module,
    device_of,
    label,
    readable,
    refuse,
    too_many,
    weights_of,
)

_Key = tuple[object, ...]


class CudaGraphs:
    """Calls of a module on a GPU, replayed from CUDA graphs: no Python and no launches between its kernels.

    The first call of every combination of input shapes, dtypes and constants is captured, three warm-up calls before;
    later ones copy their inputs to where its graph reads them, replay it, and return copies of its outputs. After the
    captures a call does not wait for the GPU. It takes what the module takes, gives what the module gives, and stands
    in the module's place in :meth:`fxq.Rollout.using`.

    Graphs read their inputs from memory of their own at fixed addresses: one piece for each place among the arguments,
    shared by all shapes that come there. A tensor that was copied is not copied again until it is written to in place
    (``Tensor._version``) or another one comes to its place. Of a view that has grown, as a rollout's cache of one video
    grows, what was added is copied. A tensor that moves to another place, as the pieces of a rolling window do, and a
    window that moves along its memory are copied once per move. Tensors made under ``torch.inference_mode`` do not tell
    whether they were written to: they are copied in every call. Writes that torch does not count (``Tensor.data``, a
    kernel of another library) are not seen.

    Weights may be changed in place; moved ones are an error, replaced ones are not seen. Calls run under
    ``torch.no_grad``. One call runs at a time: other threads wait.

    Args:
        module: of :func:`fxq.optimize`, :func:`fxq.quantize` or :func:`fxq.load`, or another ``nn.Module`` in eval
            mode, on a GPU; or a function of tensors, which is called with no other state than what it holds.
        device: where a function runs that has no weights; a module's own by default.
        limit: most graphs; one more is an error that names the inputs that vary. None: no limit.
        fresh_outputs: False gives the graph's own memory instead of copies: the next call, of any shapes, writes over
            it, so outputs have to be read, or copied, before. Every graph then has memory for its outputs.

    Attributes:
        copies: inputs, or what was added to them, that were copied so far.
        copied: bytes of these copies.

    Raises:
        CudaGraphError: when the module does not lie on one GPU, is in training mode, needs values on the host or writes
            into its inputs; at a call, when an input lies elsewhere, requires grad or is neither a tensor nor a
            constant, when the call cannot be captured, or beyond ``limit``.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        *,
        device: torch.device | str | None = None,
        limit: int | None = None,
        fresh_outputs: bool = True,
    ) -> None:
        if limit is not None and limit < 1:
            raise CudaGraphError(f"limit = {limit}: expected at least 1, or None")
        self._device = device_of(module, device)
        self._weights = [(weight, weight.data_ptr()) for weight in weights_of(module).values()]
        check_module(module)
        self._orig_mod = module
        self._limit, self._fresh = limit, fresh_outputs
        self._lock = threading.RLock()
        self.close()

    @property
    def module(self) -> Callable[..., Any]:
        """What is called."""
        return self._orig_mod

    @property
    def captures(self) -> tuple[Mapping[str, str], ...]:
        """Per graph, in the order of their captures, its inputs by name: ``bfloat16[1, 60, 2, 32]``."""
        return tuple(capture.form for capture in self._graphs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that inputs are copied to and outputs from; that of values in between is not counted."""
        return self._inputs.nbytes + (0 if self._outputs is None else self._outputs.nbytes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the call, after a capture where its shapes are new.

        Returns:
            What the module returns, tensors as new ones (see ``fresh_outputs``).
        """
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            key = self._key(leaves, spec, args, kwargs)
            self._check()
            capture = self._graphs.get(key)
            if capture is None:
                capture = self._captured(args, kwargs)
                self._graphs[key], copied = capture, capture.filled
            else:
                copied = capture.fill(leaves)
            self.copies += len(copied)
            self.copied += sum(copied)
            return capture.replay()

    def reserve(self, *args: Any, **kwargs: Any) -> None:
        """Make room for the inputs of a call, such as that with the longest cache, so that nothing grows on the way.

        Args:
            args: as of the call; only shapes and dtypes are read, so tensors may lie on the ``meta`` device.
            kwargs: as ``args``.
        """
        with self._lock, torch.inference_mode(False):
            for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
                if isinstance(leaf, Tensor):
                    self._inputs.at(label(self._orig_mod, path), leaf.dtype, leaf.numel(), exactly=True)

    def close(self) -> None:
        """Give back all graphs and their memory, as dropping the object does; a later call captures anew."""
        with self._lock:
            if getattr(self, "_graphs", None):
                torch.cuda.synchronize(self._device)
            self._graphs: dict[_Key, Capture] = {}
            self._recorder: Recorder | None = None
            self._stream: torch.cuda.Stream | None = None
            self._inputs = Memories(self._device)
            self._outputs = Memories(self._device) if self._fresh else None
            self.copies = self.copied = 0

    def _key(self, leaves: Sequence[object], spec: pytree.TreeSpec, args: Any, kwargs: Any) -> _Key:
        cast = torch.get_autocast_dtype(self._device.type) if torch.is_autocast_enabled(self._device.type) else None
        found: list[object] = [spec, cast]
        for i, leaf in enumerate(leaves):
            if not readable(leaf, self._device):
                path = pytree.tree_flatten_with_path((args, kwargs))[0][i][0]
                refuse(label(self._orig_mod, path), leaf, self._device)
            if isinstance(leaf, Tensor):
                found.append((leaf.dtype, layout_of(leaf)))
            else:  # by its text, as 0.0 equals -0.0, and nan is no nan
                found.append((type(leaf), repr(leaf)))
        return tuple(found)

    def _check(self) -> None:
        """Refuse weights that were moved; wait, on the GPU, for the call before where it ran on another stream."""
        if any(weight.data_ptr() != address for weight, address in self._weights):
            raise CudaGraphError(
                f"weights of {type(self._orig_mod).__name__} were moved since, and graphs read them where they lay: "
                "make a new CudaGraphs"
            )
        if torch.cuda.is_current_stream_capturing():
            raise CudaGraphError("this call is being captured into another graph: capture the module itself there")
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
            for memories in filter(None, (self._inputs, self._outputs)):
                memories.used_on(stream)
        self._stream = stream

    def _captured(self, args: Any, kwargs: Any) -> Capture:
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        names = [label(self._orig_mod, path) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        if self._limit is not None and len(self._graphs) >= self._limit:
            call = {name: form_of(leaf) for name, leaf in zip(names, leaves, strict=True)}
            raise too_many(self.captures, call, self._limit)
        if self._recorder is None:
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            shared = self._orig_mod, self._device, stream, pool, self._inputs, self._outputs
            self._recorder = Recorder(*shared)
        try:
            return Capture(self._recorder, names, leaves, spec)
        except CudaGraphError:
            self._recorder = None  # a pool in which a capture broke is not captured into again
            raise
