"""The rules of the line: one function per rule, each with the stage from which it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxq import kernels
from fxq.core.aliasing import read_around_writes, told
from fxq.core.graph import linear_sites, unused_tensors
from fxq.core.ir import QuantGraph, Stage, example_value, get_tensor, plan_of, planned
from fxq.core.layer import FROZEN_PRODUCTS, FROZEN_QUANTIZES, LayerError, Operators, QuantizedLayer, quantized_layers


class RuleError(RuntimeError):
    """A graph that breaks a rule; the message lists every violation."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A sentence about graphs that holds from ``since`` (until ``until`` if given)."""

    check: Callable[[QuantGraph], Iterator[str]]
    since: Stage
    until: Stage | None = None

    @property
    def name(self) -> str:
        """The sentence."""
        return self.check.__name__.replace("_", " ")


RULES: list[Rule] = []


def rule(
    since: Stage, until: Stage | None = None
) -> Callable[[Callable[[QuantGraph], Iterator[str]]], Callable[[QuantGraph], Iterator[str]]]:
    """Declare a rule; each line it yields is one violation."""

    def add(check: Callable[[QuantGraph], Iterator[str]]) -> Callable[[QuantGraph], Iterator[str]]:
        RULES.append(Rule(check, since, until))
        return check

    return add


@rule(Stage.TRACED, until=Stage.FROZEN)
def nothing_is_read_around_a_write(graph: QuantGraph) -> Iterator[str]:
    """A node is one value: what is read before or beside a write in place is not written."""
    for pair in read_around_writes(graph.module.graph):
        yield told([pair])


@rule(Stage.PLANNED)
def every_linear_is_decided(graph: QuantGraph) -> Iterator[str]:
    """A linear has a plan with a scheme or with a reason."""
    for site in linear_sites(graph.module):
        plan = plan_of(site.node)
        if plan is None:
            yield f"{site.layer}: no plan"
        elif plan.scheme is None and not plan.reason:
            yield f"{site.layer}: neither scheme nor reason"


@rule(Stage.PLANNED)
def call_sites_of_one_weight_agree(graph: QuantGraph) -> Iterator[str]:
    """A weight used at several sites has one plan."""
    for layer, (plan, nodes) in planned(graph.module).items():
        if any(plan_of(node) != plan for node in nodes):
            yield f"{layer}: its call sites carry different plans"


@rule(Stage.CALIBRATED, until=Stage.LOWERED)
def every_planned_layer_was_seen(graph: QuantGraph) -> Iterator[str]:
    """A layer that is to be quantized has calibration rows (or already its integers), or needs none."""
    for layer, plan in graph.quantized_plans.items():
        if not plan.quantization.per_token and layer not in graph.statistics and layer not in graph.updates:
            yield f"{layer}: planned, but calibration has no rows of it"


@rule(Stage.LOWERED)
def no_planned_linear_is_left(graph: QuantGraph) -> Iterator[str]:
    """A linear with a scheme was replaced."""
    for site in linear_sites(graph.module):
        plan = plan_of(site.node)
        if plan is not None and plan.scheme is not None:
            yield f"{site.layer}: planned as {plan.scheme.label} but still a float linear"


@rule(Stage.LOWERED, until=Stage.FUSED)
def integer_tensors_fit_their_plan(graph: QuantGraph) -> Iterator[str]:
    """Weights are int8, packed uint8 or float8 of the planned shape, scales float32 and finite."""
    for layer, (plan, nodes) in planned(graph.module).items():
        for node in nodes if plan.scheme is not None else ():
            if node.target not in FROZEN_PRODUCTS:
                yield f"{layer}: the plan lies on {node.target}"
            elif node.target != Operators.of(plan.quantization).product.definition:
                yield f"{layer}: its product is {node.target}, the plan says {plan.quantization.detail}"
            else:
                yield from (f"{layer}: {line}" for line in _misfits(graph.module, QuantizedLayer.of(node)))


def _misfits(module: fx.GraphModule, layer: QuantizedLayer) -> Iterator[str]:
    """What is wrong with a product of a planned layer."""
    plan = layer.plan
    try:
        tensors, split, packed = layer.operands(module), layer.split, layer.bits == 4
    except LayerError as error:
        yield str(error)
        return
    except AttributeError as error:
        yield f"a tensor is missing: {error}"
        return
    source, planned_op = layer.quantize, Operators.of(layer.scheme).quantize.definition
    if source is not None and source.target in FROZEN_QUANTIZES and source.target != planned_op:
        yield f"its input is made by {source.target}, the plan says {layer.scheme.detail}"
    stored = tensors.pop("weight")
    width = plan.in_features // 2 if packed else plan.in_features
    if tuple(stored.shape) != (plan.out_features, width):
        yield f"weight {tuple(stored.shape)}, expected {(plan.out_features, width)}"
    if stored.dtype != (torch.uint8 if packed else plan.quantization.input_dtype):
        yield f"weight dtype {stored.dtype}"
    groups = 2 if plan.outliers else 1
    shapes = [tuple(tensors[name].shape) for name in ("weight_scale", "input_scale") if name in tensors]
    if shapes != [(groups, plan.out_features), (groups,)][: len(shapes)]:
        yield f"scales {' and '.join(map(str, shapes))}, expected {groups} groups"
    # Float8 of a strange file: torch does not ask it whether it is finite.
    if not all(bool((t.float() if t.dtype.itemsize == 1 else t).isfinite().all()) for t in tensors.values()):
        yield "a scale or offset is not finite"
    if split != plan.split:
        yield f"split {split}, the plan says {plan.split}"


@rule(Stage.FROZEN)
def no_unused_tensor_is_left(graph: QuantGraph) -> Iterator[str]:
    """Float weights of quantized layers are gone."""
    for name in unused_tensors(graph.module):
        yield f"{name}: stored but never read"


@rule(Stage.FROZEN, until=Stage.FUSED)
def four_bit_weights_are_packed(graph: QuantGraph) -> Iterator[str]:
    """A 4-bit layer stores half a byte per weight."""
    for layer in quantized_layers(graph.module):
        if layer.scheme.code_bits == 4 and layer.bits != 4:
            yield f"{layer.name}: 4-bit weights in {layer.bits}-bit storage"


@rule(Stage.FUSED)
def operators_fit_their_arguments(graph: QuantGraph) -> Iterator[str]:
    """Every operator of fxq accepts the tensors it reads and the recorded values of its other arguments."""
    known = {str(op.definition): op for op in kernels.OPS}

    def value(node: fx.Node) -> Any:
        return get_tensor(graph.module, str(node.target)) if node.op == "get_attr" else example_value(node)

    for node in graph.module.graph.nodes:
        op = known.get(str(node.target)) if node.op == "call_function" else None
        if op is None:
            continue
        if missing := [n.name for n in node.all_input_nodes if value(n) is None]:
            yield f"{node.name}: no value is recorded for {', '.join(missing)}"
        elif reason := op.supports(*fx.map_arg(node.args, value)):
            yield f"{node.name}: {reason}"


def check(graph: QuantGraph, moment: str) -> None:
    """Check every rule that holds at the graph's stage.

    Args:
        graph: the graph.
        moment: when, for the message: ``"before LowerLinear"``.

    Raises:
        RuleError: listing every violation.
    """
    broken = []
    for item in RULES:
        if graph.stage >= item.since and (item.until is None or graph.stage < item.until):
            broken += [f"{moment}: {item.name}: {line}" for line in item.check(graph)]
    if broken:
        raise RuleError("\n".join(broken))
