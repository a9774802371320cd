"""What transforms share: the layers that they may change, what these read, and the edits of the float graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from fxq.core.graph import LinearSite, arguments, linear_sites, set_arguments
from fxq.core.ir import LayerPlan, example_value, inherit_meta, plan_of, put_tensor, set_plan
from fxq.passes.detect_outliers import outlier_channels
from fxq.passes.share_inputs import input_groups


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that is to be quantized, with every place where it is called, in graph order."""

    plan: LayerPlan
    sites: tuple[LinearSite, ...]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.plan.layer

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes that it reads."""
        return [arguments(site.node)["input"] for site in self.sites]

    @property
    def dtype(self) -> torch.dtype:
        """Of the input; the weight may be stored in another one and cast in the graph."""
        dtype: torch.dtype = example_value(self.inputs[0]).dtype
        return dtype

    def weight(self, module: fx.GraphModule) -> Tensor:
        """Float weight [N, K] as it is stored."""
        return self.sites[0].weight(module)


def layers_of(module: fx.GraphModule) -> dict[str, Layer]:
    """The layers that rules quantize, by name, in graph order."""
    sites: dict[str, list[LinearSite]] = {}
    plans: dict[str, LayerPlan] = {}
    for site in linear_sites(module):
        plan = plan_of(site.node)
        if plan is not None and plan.scheme is not None:
            sites.setdefault(site.layer, []).append(site)
            plans[site.layer] = plan
    return {name: Layer(plans[name], tuple(found)) for name, found in sites.items()}


def groups_of(module: fx.GraphModule) -> list[list[Layer]]:
    """The same layers, those that read one input (:func:`~fxq.passes.share_inputs.input_groups`) together."""
    layers = layers_of(module)
    groups = {name: [layer] for name, layer in layers.items()}
    for first, *others in input_groups(module):
        groups[first.layer] += [groups.pop(site.layer)[0] for site in others]
    return list(groups.values())


def wide(tensor: Tensor) -> Tensor:
    """In the dtype that transforms compute in: float32, float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def stored(before: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """A node in front of ``before`` that reads a registered tensor."""
    with before.graph.inserting_before(before):
        node = before.graph.create_node("get_attr", name)
    inherit_meta(node, before, example_value(before).new_empty(tuple(tensor.shape), dtype=tensor.dtype))
    return node


def call(before: fx.Node, target: Callable[..., object], args: tuple[object, ...], shape: Sequence[object]) -> fx.Node:
    """A call in front of ``before``, of its origin and dtype, whose result has this shape."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)  # type: ignore[arg-type]
    inherit_meta(node, before, example_value(before).new_empty(tuple(shape)))
    return node


def shape_of(x: fx.Node) -> tuple[object, ...]:
    """Sizes of an input, of which some may vary."""
    return tuple(example_value(x).shape)


def change_inputs(layers: Iterable[Layer], change: Callable[[fx.Node, fx.Node, str], fx.Node]) -> None:
    """Let all calls of layers read changed inputs, one for each input.

    Args:
        layers: whose calls read it.
        change: makes the new input in front of a node, from the old one, for the first layer that reads it.
    """
    changed: dict[fx.Node, fx.Node] = {}
    for site in sorted((site for layer in layers for site in layer.sites), key=lambda site: site.node):
        x = arguments(site.node)["input"]
        if x not in changed:
            changed[x] = change(site.node, x, site.layer)
        set_arguments(site.node, input=changed[x])


def replace_weight(module: fx.GraphModule, layer: Layer, weight: Tensor) -> None:
    """Let a layer read another weight [N, K], registered as ``<layer>.weight``; what it read before is not written."""
    old, new = layer.sites[0].weight_name, f"{layer.name}.weight"
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target == old:
            node.target = new
    put_tensor(module, new, weight)


def mark(layer: Layer, transform: str, outliers: tuple[int, ...] | None = None) -> None:
    """Note a transform in the plan of a layer, and the outlier channels that its weight has now."""
    plan = layer.plan
    said = " + ".join(filter(None, (plan.transform, transform)))
    if outliers is None:
        outliers = plan.outliers
    elif bool(outliers) != bool(plan.outliers):
        plan = dataclasses.replace(plan, outlier_reason="" if outliers else "no channel above the threshold")
    for site in layer.sites:
        set_plan(site.node, dataclasses.replace(plan, transform=said, outliers=outliers))


def outliers_of(weights: Sequence[Tensor], plans: Sequence[LayerPlan]) -> list[tuple[int, ...]]:
    """Outlier channels of layers on one input, for weights [N, K] that are not those they were detected on.

    Those of the stacked weights where the layers had the same before, else each layer's own.
    """
    scheme = plans[0].quantization
    if not scheme.dual_scale or plans[0].in_features % scheme.align:
        return [()] * len(plans)
    if all(plan.outliers == plans[0].outliers for plan in plans):
        return [outlier_channels(torch.cat(list(weights)), scheme)[0]] * len(plans)
    return [outlier_channels(weight, scheme)[0] for weight in weights]
