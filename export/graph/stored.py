"""Checks of a graph that was read from a file: quantized layers read their own tensors, and those hold sound values.

The operators of fxq compare shapes and dtypes at every call, but not values: a kernel uses the entries of a permutation
as indices. What a file says of them is checked here once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from fxq import numerics
from fxq.core.graph import arguments
from fxq.core.ir import LayerPlan, planned, stored_names
from fxq.core.layer import FROZEN_PRODUCTS, FROZEN_QUANTIZES, LayerError, LayerTensors, QuantizedLayer
from fxq.kernels import float8

MAX_ZERO_POINT = 2**21


class StoredError(ValueError):
    """A graph whose quantized layers do not read tensors of their own with sound values."""


def check_stored(module: fx.GraphModule, *, values: bool = True) -> None:
    """Check every quantized layer of a frozen graph.

    Args:
        module: the graph with its tensors.
        values: whether to look at the tensors' values too; without, they may be stand-ins.

    Raises:
        StoredError: naming the layer or node.
    """
    plans, operands = planned(module), set[str]()
    done = set[fx.Node]()
    for layer, (plan, nodes) in plans.items():
        if plan.scheme is None:
            continue
        for node in nodes:
            try:
                found = QuantizedLayer.of(node)
                _check_reads(found)
            except LayerError as error:
                raise StoredError(f"{layer}: {error}") from None
            done |= {node, found.own_quantize}
        operands |= {f"{layer}.{name}" for name in stored_names(plan)}
        if values:
            for problem in layer_problems(plan, LayerTensors.of(module, plan).by_name()):
                raise StoredError(f"{layer}: {problem}")
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in (*FROZEN_QUANTIZES, *FROZEN_PRODUCTS) and node not in done:
            raise StoredError(f"node {node.name}: {node.target} belongs to no planned layer")
        if node.op == "get_attr" and node.target in operands and not all(user in done for user in node.users):
            raise StoredError(f"{node.target}: it is read by more than its layer")


def _check_reads(layer: QuantizedLayer) -> None:
    """The layer's operators read its tensors, and their constants are those of the plan."""
    plan = layer.plan
    for node, argument, name in layer.stored_reads():
        read = arguments(node)[argument]
        if not name:
            if read is not None:
                raise LayerError(f"node {node.name} has a permutation, the plan has no outliers")
        elif not isinstance(read, fx.Node) or read.op != "get_attr" or read.target != f"{plan.layer}.{name}":
            raise LayerError(
                f"node {node.name} does not read stored tensors in the operator's order: "
                f"{argument} is {read}, expected {plan.layer}.{name}"
            )
    product, quantize = layer.arguments, layer.quantization
    constants: list[tuple[str, object, int | None]] = [
        ("split", product["split"], plan.split),
        ("split", quantize["split"], plan.split),
    ]
    if not layer.scheme.is_float8:
        constants += [("bits", product["bits"], layer.scheme.code_bits), ("bits", quantize["bits"], None)]
    for name, given, wanted in constants:
        if type(given) is not int or wanted not in (None, given):
            raise LayerError(f"{name} {given}, the plan says {wanted}")


def layer_problems(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with the values of a layer's tensors; shapes of the product's operands are known to fit."""
    groups = 2 if plan.outliers else 1
    for name in ("weight_scale", "input_scale"):
        if name in tensors and not _is_scale(tensors[name]):
            yield f"{name} is no float32 of finite numbers above 0"
    if plan.quantization.is_float8 and float8.has_nan(tensors["weight"]):
        yield "the weight has NaN"
    if "input_zero_point" in tensors:
        zero = tensors["input_zero_point"]
        if zero.dtype != torch.int32 or zero.shape != (groups,):
            yield f"input_zero_point is {zero.dtype} {tuple(zero.shape)}, expected int32 ({groups},)"
        elif int(zero.min()) <= -MAX_ZERO_POINT or int(zero.max()) >= MAX_ZERO_POINT:
            yield f"input_zero_point {zero.tolist()} is not below {MAX_ZERO_POINT} in absolute value"
    if tensors["offset"].dtype != torch.float32:
        yield f"offset is {tensors['offset'].dtype}, expected float32"
    if plan.outliers:
        yield from _outlier_problems(plan, tensors)


def _is_scale(scale: Tensor) -> bool:
    return scale.dtype == torch.float32 and bool(((scale > 0) & scale.reciprocal().isfinite() & scale.isfinite()).all())


def _outlier_problems(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    perm = tensors["perm"]
    outliers = torch.tensor(plan.outliers, dtype=torch.int32)
    normal = torch.ones(plan.in_features, dtype=torch.bool)
    normal[outliers.long()] = False
    order = torch.cat((normal.nonzero().flatten().int(), outliers))
    if perm.dtype != torch.int32 or perm.shape != order.shape or not torch.equal(perm.cpu(), order):
        yield "perm is not the order of normal channels and outliers that the plan states"
    if "input_zero_point" in tensors:
        scale = tensors["input_scale"][:, None] * tensors["weight_scale"]
        if not float((scale[1] / scale[0]).max()) <= 1.001 * numerics.ratio_limit(plan.in_features, plan.split):
            yield "the outlier scales are so much above the normal ones that integer sums may not fit 32 bits"
