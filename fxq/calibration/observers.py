"""Run a graph as it is and show a collector the input of every planned linear, with gradients or without."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.node import Argument, Target
from torch.utils import _pytree as pytree

from fxq.calibration.attention_errors import see
from fxq.calibration.collect import CalibrationError, Collector
from fxq.calibration.rollout import current_call
from fxq.calibration.spill import Spill
from fxq.core.interpret import SparingInterpreter
from fxq.core.ir import plan_of
from fxq.runtime.memory.residency import trim
from fxq.runtime.messages import first_line

_TRIM = 1 << 26  # bytes of weights given back between two calls of the allocator
_ROWS = 2048  # of a gradient that are squared at a time
_LARGE = 1 << 15  # bytes from which on a tensor that backward needs goes to a file, and a weight is given back


class Observer(SparingInterpreter):
    """Shows the collector the input of every planned linear, and attentions where it measures them."""

    def __init__(self, module: fx.GraphModule, collector: Collector) -> None:
        super().__init__(module)
        self.collector = collector
        self.layers = {
            node: plan.layer
            for node in module.graph.nodes
            if (plan := plan_of(node)) is not None and plan.scheme is not None
        }

    def run_node(self, n: fx.Node) -> object:
        """Run one node; the input of a planned linear is shown before."""
        if (layer := self.layers.get(n)) is not None:
            x = n.args[0]
            assert isinstance(x, fx.Node)
            self.collector.add(layer, self.env[x])
        result = super().run_node(n)
        see(self.collector.attention, n, self.env, result)
        return result


@dataclasses.dataclass
class _Seen:
    """A planned linear in a call: its input's node and value, and what the backward pass told of its output.

    ``x`` [..., K] is what is kept of the value, None where another layer stands for this one. ``squares`` float64 [R]
    on the CPU are the gradient's sums of squares for each row, None where nothing depends on the output; ``width`` is
    that of the output.
    """

    layer: str
    node: fx.Node
    x: Tensor | tuple[Tensor, torch.device] | None
    rows: int
    width: int
    squares: Tensor | None = None

    def tell(self, gradient: Tensor | None) -> None:
        """Note the gradient [..., N] of the output; it is not kept."""
        if gradient is not None:
            parts = gradient.reshape(-1, self.width).split(_ROWS)
            self.squares = torch.cat([part.double().square().sum(1).cpu() for part in parts])


class GradientObserver(Observer):
    """Shows the collector the inputs of a call with how much the call's output depends on each row.

    For a random vector v the squared gradient of ``v . output`` by a linear's output is, in the mean over v, the
    squared Frobenius norm of the Jacobian between the two: what an error of the linear's output costs in squared error
    of the model's (Gauss and Newton's approximation). One backward pass gives it for every row, averaged over the
    outputs of the linear and of those that share its input. Of denoising calls the prediction counts; other calls of a
    rollout, whose prediction is not used, have gradients of zero. Calls outside of a rollout count with all outputs.

    With a collector's ``folder`` what the backward pass needs lies in files there, which leave no trace. A file-mapped
    weight leaves memory after the backward pass of its node, as it does after the forward.
    """

    def __init__(self, module: fx.GraphModule, collector: Collector) -> None:
        super().__init__(module, collector)
        self.place = (-1, 0)
        self.zero = torch.zeros((), dtype=torch.float32, requires_grad=True)
        self.seen: list[_Seen] = []
        self.spill, self.inputs = Spill(collector.allocate), Spill(collector.allocate)  # the latter are needed longer
        self.stored = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.read: list[Tensor] = []  # stored tensors that the backward pass has asked for and that are in memory
        self.freed = 0  # bytes of them since the allocator gave back what it keeps

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """A stored tensor, of which no gradient is wanted."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> object:
        """Run one node; a zero with a gradient is added to the output of a planned linear, whose own is then seen."""
        x = n.args[0] if n in self.layers else None
        value = self.env[x] if isinstance(x, fx.Node) else None
        result = SparingInterpreter.run_node(self, n)
        if not isinstance(x, fx.Node):
            see(self.collector.attention, n, self.env, result)
            return result
        assert isinstance(value, Tensor) and isinstance(result, Tensor)
        layer = self.layers[n]
        kept = None if layer in self.collector.leaders else self._put(value.detach(), self.inputs)
        seen = _Seen(layer, x, kept, value.shape[:-1].numel(), result.shape[-1])
        self.seen.append(seen)
        probed = result + self.zero.to(result.device)
        probed.register_hook(seen.tell)
        return probed

    def call(self, *leaves: object) -> object:
        """The graph's result for flat inputs, without gradients.

        Raises:
            CalibrationError: when the graph has an operator without a gradient.
        """
        batch = self.collector.batch
        self.place = (batch, self.place[1] + 1 if self.place[0] == batch else 0)
        self.seen = []
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            result = super().call(*leaves)
            self.spill.close()
            self.inputs.close()
            try:
                squares = self._squares(result)
            except (RuntimeError, NotImplementedError) as error:
                raise CalibrationError(
                    f"weighting = 'gradient' takes gradients of the model, and this fails: {first_line(error)}. Choose "
                    "another weighting in the recipe, as 'uniform'"
                ) from error
            finally:
                self._give_back()
        for seen, square in zip(self.seen, squares, strict=True):
            if seen.x is not None:
                self.collector.add(seen.layer, _value(seen.x), square)
                seen.x = None
        self.seen = []
        return pytree.tree_map_only(Tensor, Tensor.detach, result)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        """What is kept of a tensor until the backward pass."""
        return self._put(tensor, self.spill)

    def _put(self, tensor: Tensor, spill: Spill) -> Tensor | tuple[Tensor, torch.device]:
        """The tensor, or where its copy lies in a file and the device that it is of."""
        small = tensor.untyped_storage().nbytes() < _LARGE
        if self.collector.folder is None or small or tensor.untyped_storage().data_ptr() in self.stored:
            return tensor
        return spill.put(tensor), tensor.device

    def _unpack(self, kept: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        """What a node of the backward pass asks for; the weights of the nodes before it are through."""
        if not isinstance(kept, Tensor):
            return _value(kept)
        if kept.untyped_storage().data_ptr() in self.stored and kept.untyped_storage().nbytes() >= _LARGE:
            self._give_back()
            self.read.append(kept)
        return kept

    def _give_back(self) -> None:
        self.freed += self.residency.give_back(*self.read)
        self.read.clear()
        if self.freed >= _TRIM:
            self.freed = 0
            trim()

    def _squares(self, result: object) -> list[Tensor]:
        """The squared gradient of each seen linear's rows, float64 [R] on the CPU."""
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        if (current := current_call()) is not None:
            outputs = outputs[:1] if current.kind == "denoise" else []
        outputs = [t for t in outputs if t.requires_grad]
        if not outputs:
            return [torch.zeros(seen.rows, dtype=torch.float64) for seen in self.seen]
        number = (self.collector.seed * 1_000_003 + self.place[0]) * 1_000_003 + self.place[1]
        generator = torch.Generator().manual_seed(number % 2**63)
        vectors = [torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t) for t in outputs]
        torch.autograd.grad(outputs, self.zero, vectors, allow_unused=True)
        keys = [(self.collector.leaders.get(seen.layer, seen.layer), seen.node) for seen in self.seen]
        sums = {key: torch.zeros(seen.rows, dtype=torch.float64) for key, seen in zip(keys, self.seen, strict=True)}
        widths = dict.fromkeys(keys, 0)
        for key, seen in zip(keys, self.seen, strict=True):
            widths[key] += seen.width
            if seen.squares is not None:
                sums[key] += seen.squares
        return [sums[key] / widths[key] for key in keys]


def _value(kept: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].to(kept[1])
