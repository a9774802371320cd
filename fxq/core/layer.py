"""Quantized layers of a graph, read by name: how the operators of a layer hang together is known here alone."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxq import kernels, numerics
from fxq.core.graph import argument_names, arguments, set_arguments
from fxq.core.ir import LayerPlan, get_tensor, plan_of, stored_names
from fxq.core.method import Scheme
from fxq.kernels.gemm.panels import unpack_panels

_PARTS = (operator.getitem, torch.ops.aten.split_with_sizes.default)
"""Stand between a product that several layers share and the node of one of them."""

Target = Callable[..., object]


class LayerError(ValueError):
    """A node that is no result of a quantized layer."""


class Operators(NamedTuple):
    """The two operators of a layer in a frozen graph."""

    quantize: kernels.Op
    product: kernels.Op

    @classmethod
    def of(cls, scheme: Scheme) -> Operators:
        """Those of a scheme."""
        measured = FLOAT8_PER_TOKEN if scheme.is_float8 else ASYMMETRIC if scheme.asymmetric else PER_TOKEN
        return measured if scheme.per_token else FLOAT8 if scheme.is_float8 else STATIC


STATIC = Operators(kernels.quantize_act, kernels.dual_scale_linear)
PER_TOKEN = Operators(kernels.quantize_per_token, kernels.dual_scale_linear_per_token)
ASYMMETRIC = Operators(kernels.quantize_per_token_asymmetric, kernels.dual_scale_linear_per_token)
FLOAT8 = Operators(kernels.quantize_fp8, kernels.dual_scale_linear_fp8)
FLOAT8_PER_TOKEN = Operators(kernels.quantize_fp8_per_token, kernels.dual_scale_linear_fp8_per_token)
MEASURING: tuple[Target, ...] = tuple(each.quantize.definition for each in (PER_TOKEN, ASYMMETRIC, FLOAT8_PER_TOKEN))
"""Operators that give numbers and the scales they measure."""
_PAIRS = frozenset(o.definition for o in kernels.OPS if o.schema.endswith("(Tensor q, Tensor scale)"))
"""The same and those of an optimized graph, behind a norm."""
FROZEN_QUANTIZES: tuple[Target, ...] = (STATIC.quantize.definition, FLOAT8.quantize.definition, *MEASURING)
PER_TOKEN_PRODUCTS: tuple[Target, ...] = tuple(pair.product.definition for pair in (PER_TOKEN, FLOAT8_PER_TOKEN))
FROZEN_PRODUCTS: tuple[Target, ...] = (STATIC.product.definition, FLOAT8.product.definition, *PER_TOKEN_PRODUCTS)
"""Operators of a layer before fusions."""
PRODUCTS: tuple[Target, ...] = tuple(d for o in kernels.OPS if "weight_scale" in argument_names(d := o.definition))
"""Operators that multiply the numbers of a layer, alone or with what follows it."""

_STORED = {"scale": "input_scale", "zero_point": "input_zero_point"}
"""Argument of a quantize operator -> the layer's tensor it reads, where the names differ."""


def _item(node: object, number: int) -> object:
    """What a node is item ``number`` of, or None."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == number:
        return node.args[0]
    return None


def measured_pair(node: object) -> fx.Node | None:
    """The node whose integers or measured scales a node takes, or None."""
    pair = node.args[0] if isinstance(node, fx.Node) and node.target is operator.getitem else None
    return pair if isinstance(pair, fx.Node) and pair.target in _PAIRS else None


def quantize_of(product: fx.Node) -> fx.Node | None:
    """The node that makes the integers a product reads, whatever its operator; None where it reads no node."""
    q = arguments(product)["q"]
    if not isinstance(q, fx.Node):
        return None
    pair = measured_pair(q)
    return q if pair is None else pair


def product_of(node: fx.Node) -> fx.Node | None:
    """The product whose result, or a part of it, a node is; None where it is of no product."""
    found: object = node
    while isinstance(found, fx.Node) and found.target in _PARTS and found.args:
        found = found.args[0]
    return found if isinstance(found, fx.Node) and found.target in PRODUCTS else None


def layers_reading(quantize: fx.Node) -> list[str]:
    """Layers whose input a quantize node makes, also as parts of one product."""
    return list(dict.fromkeys(_plans_after(quantize)))


def _plans_after(node: fx.Node) -> Iterator[str]:
    for user in node.users:
        if (plan := plan_of(user)) is not None:
            yield plan.layer
        elif user.target in PRODUCTS or user.target in _PARTS:
            yield from _plans_after(user)


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """One quantized layer at one of its call sites.

    Attributes:
        plan: of the layer.
        node: the layer's result, which carries the plan.
        product: the node that multiplies: ``node``, or one that does it for several layers.
    """

    plan: LayerPlan
    node: fx.Node
    product: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> QuantizedLayer:
        """The layer whose plan a node carries.

        Raises:
            LayerError: when it carries none, the plan keeps the layer in model dtype, or no operator multiplies
                integers for it.
        """
        plan = plan_of(node)
        if plan is None or plan.scheme is None:
            raise LayerError(f"{node.name} is no quantized layer: {'no plan' if plan is None else plan.reason}")
        product = product_of(node)
        if product is None:
            raise LayerError(f"the plan lies on {node.target}")
        return cls(plan, node, product)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.plan.layer

    @property
    def scheme(self) -> Scheme:
        """How the layer is quantized."""
        return self.plan.quantization

    @property
    def per_token(self) -> bool:
        """Whether the product reads input scales measured per token."""
        return self.product.target in PER_TOKEN_PRODUCTS

    @property
    def operator(self) -> Target:
        """The product's operator."""
        assert callable(self.product.target)
        return self.product.target

    @property
    def frozen(self) -> bool:
        """Whether the layer has a product of its own that is fused with nothing."""
        return self.product is self.node and self.product.target in FROZEN_PRODUCTS

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the product by name."""
        return arguments(self.product)

    @property
    def quantize(self) -> fx.Node | None:
        """The node that makes the integers; None where they come from no node."""
        return quantize_of(self.product)

    @property
    def quantization(self) -> dict[str, Any]:
        """Arguments of :attr:`own_quantize` by name.

        Raises:
            LayerError: as there.
        """
        return arguments(self.own_quantize)

    @property
    def own_quantize(self) -> fx.Node:
        """The quantize operator of a layer in a frozen graph.

        Raises:
            LayerError: when the layer's two operators are not those of its scheme, one right after the other.
        """
        wanted, named = Operators.of(self.scheme), self.arguments
        sources = {named["q"]}
        if self.scheme.per_token:
            sources = {_item(named["q"], 0), _item(named.get("input_scale"), 1)}
        source = sources.pop()
        fits = self.product is self.node and self.product.target == wanted.product.definition and not sources
        if not fits or not isinstance(source, fx.Node) or source.target != wanted.quantize.definition:
            raise LayerError(f"node {self.product.name} is no product of its quantized input")
        return source

    @property
    def input_bits(self) -> int:
        """Bits of the activations; those of the format where the operator names none.

        Raises:
            LayerError: as :attr:`own_quantize`.
        """
        return int(self.quantization.get("bits", self.scheme.input_bits))

    @property
    def weight(self) -> fx.Node:
        """The node that reads the stored weight."""
        return self._node("weight")

    @property
    def weight_scale(self) -> fx.Node:
        """The node that reads the weight's scales."""
        return self._node("weight_scale")

    @property
    def offset(self) -> fx.Node:
        """The node that reads the offset, in which the bias is."""
        return self._node("offset")

    def _node(self, name: str) -> fx.Node:
        node = self.arguments[name]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            where = f"{self.product.name} does not read stored tensors in the operator's order"
            raise LayerError(f"{where}: {name} is {node}")
        return node

    def _number(self, name: str) -> int:
        value = self.arguments[name]
        if type(value) is not int:
            raise LayerError(f"{name} of {self.product.name} is {value}, expected a number")
        return value

    @property
    def split(self) -> int:
        """Number of normal channels of the product."""
        return self._number("split")

    @property
    def bits(self) -> int:
        """Bits of the stored weight; 4 is packed. 8 up to :class:`~fxq.passes.freeze.Freeze`, and of float8."""
        return self.scheme.weight_bits if self.scheme.is_float8 else self._number("bits")

    @property
    def dtype(self) -> torch.dtype:
        """Of the product's result; fused operators have none of their own."""
        dtype: torch.dtype = self.arguments["dtype"]
        return dtype

    def codes(self, module: fx.GraphModule) -> Tensor:
        """The product's weight int8 or float8 [N, K], whatever its layout; rows of all layers that share it."""
        weight, offset = (get_tensor(module, str(node.target)) for node in (self.weight, self.offset))
        if weight.ndim == 4:
            return unpack_panels(weight, len(offset), self.plan.in_features, self.split)
        return numerics.unpacked(weight, self.bits)

    def operands(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """The stored tensors that the product reads, by the names of its arguments.

        Raises:
            LayerError: when one of them is no stored tensor.
            AttributeError: when one is missing.
        """
        names = set(stored_names(self.plan)).intersection(self.arguments)
        return {name: get_tensor(module, str(self._node(name).target)) for name in self.arguments if name in names}

    def stored_reads(self) -> Iterator[tuple[fx.Node, str, str]]:
        """(node, argument, the layer's tensor that it should read) of both operators; "" where it should be None.

        Raises:
            LayerError: as :attr:`own_quantize`.
        """
        names = stored_names(self.plan)
        for node in (self.product, self.own_quantize):
            for argument in arguments(node):
                name = _STORED.get(argument, argument)
                if name in names or argument == "perm":
                    yield node, argument, name if name in names else ""

    def set_arguments(self, **changes: object) -> None:
        """Replace arguments of the product by name."""
        set_arguments(self.product, **changes)


def quantized_layers(module: fx.GraphModule) -> Iterator[QuantizedLayer]:
    """Layers that operators of fxq compute, at every call site, in graph order."""
    for node in module.graph.nodes:
        plan = plan_of(node)
        if plan is not None and plan.scheme is not None and (product := product_of(node)) is not None:
            yield QuantizedLayer(plan, node, product)


def told_in_graph(plans: Iterable[LayerPlan], reader: str) -> str:
    """Why layers cannot be read out of their graph, which holds a part of what they compute; "" where they can be."""
    held = [f"{plan.layer}: {plan.transform}" for plan in plans if plan.transform]
    if not held:
        return ""
    return (
        f"{reader} takes layers out of their graph, and of {len(held)} the graph changes the input or the output "
        f"({', '.join(held[:3])}). Their integers alone compute something else: run the bundle's own graph (fxq.load), "
        "export it (.pt2, ONNX), or quantize with a recipe without transforms"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What a quantized layer of a frozen graph stores.

    ``weight`` int8 or float8 [N, K] or packed uint8 [N, K / 2], ``weight_scale`` float32 [G, N], ``offset`` float32
    [N], ``perm`` int32 [K] or None, ``input_scale`` float32 [G] and ``input_zero_point`` int32 [G], None where inputs
    are scaled per token, the latter of float8 too. Channels are in ``[normal | outlier]`` order.
    """

    plan: LayerPlan
    weight: Tensor
    weight_scale: Tensor
    offset: Tensor
    perm: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    @classmethod
    def of(cls, module: fx.GraphModule, plan: LayerPlan, device: torch.device | str | None = None) -> LayerTensors:
        """Those of a planned layer, moved where ``device`` is given.

        Raises:
            AttributeError: when one is missing.
        """
        found = {name: get_tensor(module, f"{plan.layer}.{name}") for name in stored_names(plan)}
        return cls(plan=plan, **(found if device is None else {name: t.to(device) for name, t in found.items()}))

    def by_name(self) -> dict[str, Tensor]:
        """Tensors by the names of :func:`~fxq.core.ir.stored_names`."""
        return {name: getattr(self, name) for name in stored_names(self.plan)}

    def codes(self) -> Tensor:
        """The weight int8 or float8 [N, K]."""
        return numerics.unpacked(self.weight, self.plan.quantization.code_bits)

    def bias(self) -> Tensor:
        """The bias float64 [N] that is in the offset, up to the offset's rounding."""
        if self.input_scale is None or self.input_zero_point is None:
            return self.offset.double()
        scales = self.weight_scale, self.input_scale, self.input_zero_point
        return numerics.unfolded_bias(self.offset, self.codes(), *scales, self.plan.split)

    def float_weight(self) -> Tensor:
        """float32 [N, K]: what the numbers stand for, channels in the model's order."""
        weight = numerics.dequantize_weight(self.codes(), self.weight_scale, self.plan.split)
        return weight if self.perm is None else weight[:, self.perm.long().argsort()]
