"""Checks of a graph that was read from a file: quantized layers read their own tensors, and those hold sound values.

The operators of fxq compare shapes and dtypes at every call, but not values: a kernel uses the entries of a permutation
as indices. What a file says of them is checked here once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from fxq import kernels, numerics
from fxq.core.ir import LayerPlan, get_tensor, planned, stored_names

MAX_ZERO_POINT = 2**21
_QUANTIZE, _PER_TOKEN = kernels.quantize_act.definition, kernels.quantize_per_token.definition
_LINEAR, _LINEAR_PER_TOKEN = (
    kernels.dual_scale_linear.definition,
    kernels.dual_scale_linear_per_token.definition,
)
_STORED = {
    _QUANTIZE: {"perm": "perm", "scale": "input_scale", "zero_point": "input_zero_point"},
    _PER_TOKEN: {"perm": "perm"},
    _LINEAR: {n: n for n in ("weight", "weight_scale", "input_scale", "offset")},
    _LINEAR_PER_TOKEN: {n: n for n in ("weight", "weight_scale", "offset")},
}
"""Operator -> its arguments that are tensors of the layer, with their names there."""


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
            quantize = _quantize_of(node, plan)
            _check_reads(node, plan)
            _check_reads(quantize, plan)
            done |= {node, quantize}
        operands |= {f"{layer}.{name}" for name in stored_names(plan)}
        if values:
            tensors = {name: get_tensor(module, f"{layer}.{name}") for name in stored_names(plan)}
            for problem in layer_problems(plan, tensors):
                raise StoredError(f"{layer}: {problem}")
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _STORED and node not in done:
            raise StoredError(f"node {node.name}: {node.target} belongs to no planned layer")
        if node.op == "get_attr" and node.target in operands and not all(user in done for user in node.users):
            raise StoredError(f"{node.target}: it is read by more than its layer")


def _quantize_of(node: fx.Node, plan: LayerPlan) -> fx.Node:
    """The node that quantizes the input of a layer's product."""
    assert plan.scheme is not None
    product, wanted = (_LINEAR_PER_TOKEN, _PER_TOKEN) if plan.scheme.per_token else (_LINEAR, _QUANTIZE)
    source: object = node.args[0] if node.target == product and node.args else None
    if plan.scheme.per_token:
        pair = {_item_of(node.args[i], i) for i in range(2)} if source is not None and len(node.args) > 1 else {None}
        source = pair.pop() if len(pair) == 1 else None
    if not isinstance(source, fx.Node) or source.target != wanted:
        raise StoredError(f"{plan.layer}: node {node.name} is no product of its quantized input")
    return source


def _item_of(node: object, number: int) -> object:
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == number:
        return node.args[0]
    return None


def _check_reads(node: fx.Node, plan: LayerPlan) -> None:
    """The node reads the layer's tensors, and the constants are those of the plan."""
    assert plan.scheme is not None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False))
    for argument, name in _STORED[node.target].items():  # type: ignore[index]
        read = given.get(argument)
        if name == "perm" and not plan.outliers:
            if read is not None:
                raise StoredError(f"{plan.layer}: node {node.name} has a permutation, the plan has no outliers")
        elif not isinstance(read, fx.Node) or read.op != "get_attr" or read.target != f"{plan.layer}.{name}":
            raise StoredError(
                f"{plan.layer}: node {node.name} does not read stored tensors in the operator's order: "
                f"{argument} is {read}, expected {plan.layer}.{name}"
            )
    for name, wanted in (("split", plan.split), ("bits", plan.scheme.weight_bits if "weight" in given else None)):
        if type(given.get(name)) is not int or wanted not in (None, given[name]):
            raise StoredError(f"{plan.layer}: {name} {given.get(name)}, the plan says {wanted}")


def layer_problems(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with the values of a layer's tensors; shapes of the product's operands are known to fit."""
    groups = 2 if plan.outliers else 1
    for name in ("weight_scale", "input_scale"):
        if name in tensors and not _is_scale(tensors[name]):
            yield f"{name} is no float32 of finite numbers above 0"
    if "input_scale" in tensors:
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
    if "input_scale" in tensors:
        scale = tensors["input_scale"][:, None] * tensors["weight_scale"]
        if not float((scale[1] / scale[0]).max()) <= 1.001 * numerics.ratio_limit(plan.in_features, plan.split):
            yield "the outlier scales are so much above the normal ones that integer sums may not fit 32 bits"
