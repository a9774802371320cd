"""Run a graph or a module without keeping the weights in memory that are mapped from files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, fx, nn

from fxq.core.signature import flatten_call
from fxq.runtime.memory.residency import Residency


class SparingInterpreter(fx.Interpreter):
    """Runs a graph.

    A file-mapped weight leaves memory after each node that read it (see :mod:`fxq.runtime.memory.residency`).
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.residency = Residency()

    def run_node(self, n: fx.Node) -> object:
        """Run one node."""
        stored = [self.env[node] for node in n.all_input_nodes if node.op == "get_attr"]
        result = super().run_node(n)
        if weights := [value for value in stored if isinstance(value, Tensor) and value.ndim > 1]:
            self.residency.give_back(*weights)
        return result

    def call(self, *leaves: object) -> object:
        """The graph's result for flat inputs, in the form that its module returns."""
        graph = self.module.graph
        assert isinstance(graph, fx.Graph)
        return graph.process_outputs(self.run(*leaves, enable_io_processing=False))


def sparing_call(module: fx.GraphModule) -> Callable[..., object]:
    """A callable like the module, which runs it by :class:`SparingInterpreter` where weights are mapped from files."""
    runner = SparingInterpreter(module)
    if not runner.residency.mapped_bytes(*module.parameters(), *module.buffers()):
        return module

    def call(*args: object, **kwargs: object) -> object:
        return runner.call(*flatten_call(module, args, kwargs))

    return call


@contextlib.contextmanager
def sparing(model: nn.Module) -> Iterator[None]:
    """While the block runs, file-mapped weights leave memory after each call of the module that has them."""
    residency = Residency()

    def called(module: nn.Module, _: object, __: object) -> None:
        residency.give_back(*module.parameters(recurse=False))

    owners = [m for m in model.modules() if residency.mapped_bytes(*m.parameters(recurse=False))]
    handles = [owner.register_forward_hook(called) for owner in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
