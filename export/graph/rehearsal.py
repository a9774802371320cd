"""A graph from a file is run on tensors without data: does every call fit, and what would it cost?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxq.core.ir import get_tensor
from fxq.export.graph.kernel_rules import misfit, tensors_in, work_of
from fxq.runtime.messages import first_line

FLOOR_BYTES = 1 << 29
FACTOR = 256
"""A value of a call may take ``FLOOR_BYTES``, or ``FACTOR`` times the bytes of the inputs and the stored tensors."""
MAX_WORK = 10**15
"""Most multiplications and elements of a call."""
_UNKNOWN = object()
"""Stands for what depends on data, or on inputs whose sizes are not known."""
_NO_RULE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,
)


class RehearsalError(ValueError):
    """A graph with a call that does not fit its arguments, or that makes more than its inputs and tensors warrant."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call takes: most bytes of values alive at a time, and multiplications or elements written.

    ``known`` is False where sizes depend on data, or inputs were not known: the cost then is that of the rest.
    """

    bytes: int
    work: int
    known: bool


def rehearse(module: fx.GraphModule, leaves: Sequence[object] | None) -> Cost:
    """Run the graph on fake tensors of the inputs' sizes.

    Args:
        module: the graph with its tensors; they are not read.
        leaves: flat inputs, tensors on the meta device or constants; None where they are not known: what depends on
            them is left out.

    Returns:
        What a call would cost.

    Raises:
        RehearsalError: naming the node.
    """
    mode = FakeTensorMode(allow_fallback_kernels=False)
    reads = module.graph.find_nodes(op="get_attr")
    device = next((get_tensor(module, str(node.target)).device for node in reads), torch.device("cpu"))
    with torch.no_grad(), mode, enable_python_dispatcher():
        stored = {str(n.target): mode.from_tensor(get_tensor(module, str(n.target)), static_shapes=True) for n in reads}
        inputs = [
            torch.empty(leaf.shape, dtype=leaf.dtype, device=device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves or [_UNKNOWN] * len(module.graph.find_nodes(op="placeholder"))
        ]
        run = _Rehearsal(module, stored, inputs)
        with run.meter:
            run.run(*inputs, enable_io_processing=False)
    return Cost(run.meter.peak, run.meter.work, run.known)


class Meter(TorchDispatchMode):
    """Counts what the operators below composite ones make."""

    def __init__(self, limit: int, max_work: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.max_work = limit, max_work
        self.live = self.peak = self.work = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        result = func(*args, **(kwargs or {}))
        self.count(func, args, result)
        if reason := misfit(func, args, kwargs or {}):
            raise RehearsalError(reason)
        return result

    def count(self, func: Any, args: Sequence[Any], result: Any) -> int:
        """Add up one operator's results; returns their bytes.

        Raises:
            RehearsalError: when they are larger than the limits.
        """
        made, read = tensors_in(result), tensors_in(args)
        old = {tensor.untyped_storage()._cdata for tensor in read}
        size = sum(s.nbytes() for t in made if (s := t.untyped_storage())._cdata not in old)
        self.peak, self.work = max(self.peak, self.live + size), self.work + work_of(str(func), read, made)
        if size > self.limit:
            raise RehearsalError(f"{func} would make {size} bytes, more than {self.limit}")
        if self.work > self.max_work:
            raise RehearsalError(f"a call would take more than {self.max_work} multiplications")
        return size


class Brake(Meter):
    """Tries every operator of a real call on fake tensors first, and refuses it when all that was made is too much."""

    def __init__(self, limit: int, max_work: int) -> None:
        super().__init__(limit, max_work)
        self.mode = FakeTensorMode(allow_fallback_kernels=False)

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        def fake(value: object) -> object:
            return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

        given, named = pytree.tree_map(fake, (tuple(args), dict(kwargs or {})))
        try:
            with self.mode:
                result = func(*given, **named)
            self.live += self.count(func, given, result)
        except _NO_RULE:
            self.live += 8 * sum(tensor.nbytes for tensor in tensors_in(args))
        if self.live > self.limit:
            raise RehearsalError(f"the values up to {func} take {self.live} bytes, more than {self.limit}")
        return func(*args, **(kwargs or {}))


class _Rehearsal(fx.Interpreter):
    """Runs node by node; values die after their last reader, as in a call."""

    def __init__(self, module: fx.GraphModule, stored: Mapping[str, Tensor], inputs: Sequence[object]) -> None:
        super().__init__(module)
        own = sum(v.nbytes for v in (*stored.values(), *inputs) if isinstance(v, Tensor))
        self.stored, self.known = stored, True
        self.meter = Meter(max(FLOOR_BYTES, FACTOR * own), MAX_WORK)
        self.held: dict[fx.Node, tuple[tuple[int, int], ...]] = {}
        self.readers: dict[int, int] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.op == "get_attr":
            return self.stored[str(n.target)]
        if n.op == "output" or any(self.env[source] is _UNKNOWN for source in n.all_input_nodes):
            return _UNKNOWN
        try:
            value = super().run_node(n)
        except RehearsalError as error:
            raise RehearsalError(
                f"node {n.name}: {error}: a value takes at most {FACTOR} times the inputs and tensors of the bundle"
            ) from error
        except _NO_RULE:
            value = _UNKNOWN
        except Exception as error:
            raise RehearsalError(
                f"node {n.name}: {n.target} does not fit its arguments: {first_line(error, 300)}"
            ) from error
        self.known = self.known and value is not _UNKNOWN
        self._hold(n, value)
        return value

    def _hold(self, node: fx.Node, value: object) -> None:
        """Bytes of the storages that are alive behind this node."""
        storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors_in(value))}
        for key, size in storages.items():
            if key not in self.readers:
                self.readers[key] = 0
                self.meter.live += size
            self.readers[key] += 1
        self.held[node] = tuple(storages.items())
        for dead in self.user_to_last_uses.get(node, ()):
            for key, size in self.held.pop(dead, ()):
                self.readers[key] -= 1
                if not self.readers[key]:
                    del self.readers[key]
                    self.meter.live -= size
