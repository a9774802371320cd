"""Rewrite: quantized layers that floats compute faster on this machine become linears in model dtype."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from fxq.core.config import RecipeError, Scheme
from fxq.core.graph import arguments, drop_unread_attributes, unused_tensors
from fxq.core.ir import (
    LayerPlan,
    QuantGraph,
    drop_tensor,
    example_value,
    get_tensor,
    inherit_meta,
    put_tensor,
    set_plan,
)
from fxq.core.layer import LayerTensors, QuantizedLayer, quantized_layers
from fxq.core.pipeline import Fusion
from fxq.core.signature import hint_of
from fxq.passes.fusions.merge_linears import unify_quantizes
from fxq.passes.kernel_times import LinearSize, kernel_seconds
from fxq.passes.match.blocks import block_of
from fxq.passes.measured.kept_times import KEPT, Times, note_trouble, power_of_two

MOST_ROWS = 2048
"""That are measured: the time of a row is the same in longer calls."""
PLACE = "layers in floats"
"""Under which the summary says how much memory they take."""
_FLOAT8 = "float8 has no kernel to measure beside floats: stays quantized"
_FUSED = "is fused already: not measured, stays quantized; this pass comes before the others"
_MANY_WAYS = "it or a layer beside it is called with other neighbours elsewhere: not measured, stays quantized"
_ROWS_UNKNOWN = "how many rows it has depends on the data: not measured, stays quantized"


@dataclasses.dataclass(frozen=True)
class FloatWhereFaster(Fusion):
    """Leaves no layer in integers that is slower in them than in floats, on this machine and at the captured sizes.

    Layers of one block that quantize one input alike count as the one product that
    :class:`~fxq.passes.fusions.merge_linears.MergeLinears` makes of them. Both ways are measured in turns on random
    numbers (:func:`~fxq.passes.kernel_times.kernel_seconds`, quantize included), once on a machine for each size (rows
    and outlier channels to the nearest power of two, at most MOST_ROWS rows), scheme and number of threads
    (:mod:`~fxq.passes.measured.kept_times`). Where floats take less than ``1 - margin`` of the time of integers, the
    layer gets its dequantized weight [N, K] and bias [N] in model dtype, which take the memory they had before
    quantization, and its input is no longer rounded: its result differs from the quantized one by that error. The
    reason of such a layer tells both times and the memory, a remark on the others both times or why there are none.
    Layers of which a call would save ``least`` seconds or less stay as they are.
    """

    margin: float = 0.1
    least: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least < math.inf:
            raise RecipeError(f"FloatWhereFaster: least = {self.least}, expected seconds, not negative")
        if not 0 <= self.margin < 1:
            raise RecipeError(f"FloatWhereFaster: margin = {self.margin}, expected at least 0 and less than 1")

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers that are computed in floats."""
        module = graph.module
        unify_quantizes(module)
        reasons = dict[str, str]()
        for names, calls in _calls(graph).items():
            floats, told = self._judged(graph, calls)
            for name in names:
                if floats:
                    reasons[name] = told
                else:
                    graph.remark(name, told)
        tensors, more = dict[str, torch.Tensor](), 0
        for layer in list(quantized_layers(module)):
            if reason := reasons.get(layer.name):
                if f"{layer.name}.weight" not in tensors:
                    stored = LayerTensors.of(module, layer.plan)
                    own = {"weight": stored.float_weight().to(layer.dtype), "bias": stored.bias().to(layer.dtype)}
                    tensors |= {f"{layer.name}.{name}": tensor for name, tensor in own.items()}
                    added = _bytes(own.values()) - _bytes(stored.by_name().values())
                    more, reasons[layer.name] = more + added, f"{reason}; {_sized(added)} more memory"
                _replace(module, layer, reasons[layer.name])
        drop_unread_attributes(module.graph)
        for name, tensor in tensors.items():
            put_tensor(module, name, tensor)
        for name in unused_tensors(module):
            drop_tensor(module, name)
        if reasons:
            graph.note(PLACE, f"{len(reasons)}, which take {_sized(more)} more memory than their integers")
        note_trouble(graph)
        return len(reasons)

    def _judged(self, graph: QuantGraph, calls: Sequence[Sequence[QuantizedLayer]]) -> tuple[bool, str]:
        """Whether floats win over all calls of layers, and why, or why not."""
        if calls[0][0].scheme.is_float8:
            return False, _FLOAT8
        try:
            sizes = [_size(graph, call) for call in calls]
        except ValueError:
            return False, _ROWS_UNKNOWN
        try:
            seconds = [_measured(size, call[0].scheme) for size, call in zip(sizes, calls, strict=True)]
        except (RuntimeError, MemoryError) as error:
            return False, f"could not be measured ({str(error).splitlines()[0]}): stays quantized"
        integers, floats = (math.fsum(column) for column in zip(*seconds, strict=True))
        rows = " and ".join(dict.fromkeys(str(_like(size).rows) for size in sizes))
        times = (
            f"{1e3 * floats:.3g} ms in floats, {1e3 * integers:.3g} ms in integers, as measured here for {rows} rows"
        )
        faster, worth = floats < (1 - self.margin) * integers, integers - floats > self.least
        if faster and not worth:
            times += f": saves no more than {1e3 * self.least:g} ms a call, stays quantized"
        return faster and worth, times


def _calls(graph: QuantGraph) -> Mapping[tuple[str, ...], list[list[QuantizedLayer]]]:
    """Layers that one product can compute, by their names, at each place where they are called together."""
    together: dict[object, list[QuantizedLayer]] = {}
    for layer in quantized_layers(graph.module):
        if layer.frozen:
            key = layer.own_quantize, block_of(layer.name), layer.scheme, layer.dtype
            together.setdefault(key, []).append(layer)
        else:
            graph.remark(layer.name, _FUSED)
    found: dict[tuple[str, ...], list[list[QuantizedLayer]]] = {}
    for layers in together.values():
        found.setdefault(tuple(layer.name for layer in layers), []).append(layers)
    ways: dict[str, int] = {}
    for names in found:
        for name in names:
            ways[name] = ways.get(name, 0) + 1
    several = {names for names in found if any(ways[name] > 1 for name in names)}
    for name in dict.fromkeys(name for names in found if names in several for name in names):
        graph.remark(name, _MANY_WAYS)
    return {names: calls for names, calls in found.items() if names not in several}


def _size(graph: QuantGraph, layers: Sequence[QuantizedLayer]) -> LinearSize:
    """Of one call of layers as one product.

    Raises:
        ValueError: when the number of rows depends on data.
    """
    first = layers[0]
    value = example_value(arguments(first.own_quantize)["x"])
    return LinearSize(
        rows=math.prod(hint_of(length) for length in value.shape[:-1]),
        inputs=first.plan.in_features,
        outputs=sum(layer.plan.out_features for layer in layers),
        split=first.split,
        dtype=first.dtype,
        device=str(get_tensor(graph.module, str(first.weight.target)).device),
    )


def _like(size: LinearSize) -> LinearSize:
    """The size that is measured for all that are near it."""
    outliers = size.inputs - size.split
    rounded = power_of_two(outliers) if outliers else 0
    split = size.inputs - (rounded if rounded < size.inputs else outliers)
    return dataclasses.replace(size, rows=min(MOST_ROWS, power_of_two(size.rows)), split=split)


def _measured(size: LinearSize, scheme: Scheme) -> Times:
    """Seconds of one call in integers and in floats, of the size that is measured for it."""
    like = _like(size)
    names = ("integer_bits", "input_bits", "per_token", "asymmetric")
    known = dataclasses.asdict(like) | {name: getattr(scheme, name) for name in names}
    what = " ".join(f"{name}={value}" for name, value in known.items() if name != "device")

    def measure() -> Times:
        integers, floats = kernel_seconds(like, [scheme, None])
        return integers, floats

    return KEPT.of(f"linear {what}", size.device, measure)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sized(count: int) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if abs(count) >= s), ("B", 1))
    return f"{count / size:.3g} {unit}"


def _replace(module: fx.GraphModule, layer: QuantizedLayer, reason: str) -> None:
    """Put a linear in the place of a layer's product, and take away what it quantized where nothing else reads it."""
    product, quantize = layer.product, layer.own_quantize
    with module.graph.inserting_before(product):
        read = [module.graph.create_node("get_attr", f"{layer.name}.{name}") for name in ("weight", "bias")]
        linear = module.graph.call_function(torch.ops.aten.linear.default, (arguments(quantize)["x"], *read))
    for node in read:
        inherit_meta(node, product, None)
    inherit_meta(linear, product, example_value(product))
    kept: LayerPlan = dataclasses.replace(layer.plan, scheme=None, reason=reason, outliers=(), output_sqnr=None)
    set_plan(linear, kept)
    product.replace_all_uses_with(linear)
    parts = dict.fromkeys((*product.all_input_nodes, quantize))  # a pair's integers and scales before the pair
    module.graph.erase_node(product)
    for node in parts:
        if not node.users and node.op == "call_function":
            module.graph.erase_node(node)
