"""From a frozen graph to what the exporters of torch take: lowered to plain operators, and as an ExportedProgram."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxq import kernels
from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph, example_value, forget_origin, stored_names
from fxq.core.pipeline import run_passes
from fxq.core.signature import hint_of, input_sizes
from fxq.core.verify import RuleError, check
from fxq.kernels.op import NAMESPACE
from fxq.passes.match.cache_inputs import TABLES
from fxq.passes.qdq.qdq_layers import LOWERED_TENSORS
from fxq.passes.qdq.to_qdq import ToQdq, refuse_float8
from fxq.runtime.exclusive import exclusive
from fxq.runtime.messages import first_line

Example = tuple[tuple[object, ...], Any]
"""Arguments of a call and its ``dynamic_shapes``, as :meth:`fxq.Rollout.example_call` gives them."""


class ExportError(ValueError):
    """A module that cannot be exported, or an export that is missing, damaged or does not run as it should."""


def plain_metadata(metadata: Mapping[str, object] | None) -> dict[str, object]:
    """A copy of ``metadata`` as JSON gives it back.

    Raises:
        ExportError: when it holds anything else.
    """
    try:
        copy: dict[str, object] = json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise ExportError(f"metadata cannot be written as JSON: {error}") from None
    return copy


def frozen(module: fx.GraphModule) -> QuantGraph:
    """A copy of a quantized module's graph, for rewriting.

    Raises:
        ExportError: when the module was not made by fxq, or was optimized.
    """
    try:
        if Facts.of(module).optimized:
            raise ValueError("this module is optimized for its device; export the module it was made from")
        graph = QuantGraph.of(module).fork()
        check(graph, "before export")
    except (ValueError, RuleError) as error:
        raise ExportError(str(error)) from None
    return graph


CACHE = frozenset(op.definition for op in (kernels.attention_packed, kernels.attention_weighted, kernels.absorb))
"""Operators that read an encoded or absorbed cache: there are no operators of torch for them."""


INTEGERS = frozenset(op.definition for op in kernels.ATTENTIONS.values())
"""Attention in 8 bits: there is no operator of torch for it either."""


def lower(
    module: fx.GraphModule, in_halves: bool = False, signed: bool = False, keeps: Container[object] = ()
) -> QuantGraph:
    """A copy of a quantized module's graph in operators of torch alone, see :class:`~fxq.passes.qdq.to_qdq.ToQdq`.

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`.
        in_halves: as there.
        signed: as there.
        keeps: operators of fxq that may stay.

    Raises:
        ExportError: as :func:`frozen`, when a layer is of float8, when an operator of fxq is left, and when the model
            has a tensor where a layer needs the place for one of its own.
    """
    whole = frozen(module)
    if reason := refuse_float8(whole):
        raise ExportError(reason)
    _refuse_taken_names(whole)
    graph = run_passes(whole, (ToQdq(in_halves, signed),))
    nodes = [node for node in graph.module.graph.nodes if str(node.target).startswith(f"{NAMESPACE}.")]
    left = [node for node in nodes if node.target not in keeps]
    if encoded := [node.name for node in left if node.target in CACHE]:
        raise ExportError(
            f"{encoded[0]} reads an encoded or absorbed cache, which this format has no operator for: export the "
            "module that it was made from, or use fxq.export_program"
        )
    if integers := [node.name for node in left if node.target in INTEGERS]:
        raise ExportError(
            f"{integers[0]} is attention in 8-bit integers, which this format has no operator for: quantize without "
            "attention in the recipe, or use fxq.export_program"
        )
    if left:
        names = ", ".join(node.name for node in left[:4])
        raise ExportError(f"{names}: only the products of a frozen graph can be lowered; {graph.remarks}")
    return graph


def _refuse_taken_names(graph: QuantGraph) -> None:
    read = {str(node.target) for node in graph.module.graph.find_nodes(op="get_attr")}
    for layer, plan in graph.quantized_plans.items():
        own = stored_names(plan)
        if taken := [name for name in LOWERED_TENSORS if name not in own and f"{layer}.{name}" in read]:
            raise ExportError(
                f"the model has a tensor of its own named {layer}.{taken[0]}, a name that the export needs for the "
                "quantized layer: rename it in the model, or keep the layer by a rule"
            )


@exclusive
def capture(module: fx.GraphModule, example: Example | None = None) -> ExportedProgram:
    """The module as an ExportedProgram whose sizes vary where the module's do.

    Args:
        module: with values recorded at its inputs, unless ``example`` is given.
        example: a call and its dynamic shapes.

    Raises:
        ExportError: when there is neither a recorded call nor an example, or a size that varied became fixed.
    """
    if example is None:
        args, kwargs, shapes = _recorded_call(module)
    else:
        (args, shapes), kwargs = example, {}
    try:
        with torch.no_grad():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(f"torch.export cannot capture the quantized graph: {first_line(error)}") from error
    forget_origin(program.graph_module)
    _compare_sizes(module, program)
    _let_the_cache_be_empty(program)
    return program


def _let_the_cache_be_empty(program: ExportedProgram) -> None:
    """Drop the least number of encoded tokens, which is that of the example: ``attention_packed`` takes any, and none.

    A cache that holds k spans of the example's k made torch conclude that there always are as many.
    """
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in TABLES and _varies(size := example_value(node).shape[0]):
            program.range_constraints[size.node.expr] = ValueRanges(2, int_oo)  # torch takes 2 for 0 and more


def _recorded_call(module: fx.GraphModule) -> tuple[tuple[object, ...], dict[str, object], dict[str, object]]:
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    values = [example_value(node) for node in module.graph.find_nodes(op="placeholder")]
    if any(value is None for value in values):
        raise ExportError(
            "this module has no recorded example call (one of an older bundle has none): "
            "pass example=(args, dynamic_shapes), as Rollout.example_call() gives them"
        )
    args, kwargs = pytree.tree_unflatten([_stand_in(v) for v in values], info.in_spec)
    dynamic_args, dynamic_kwargs = pytree.tree_unflatten([_dynamic(v) for v in values], info.in_spec)
    names = [name for name in info.orig_args if name != "self"]
    return args, kwargs, dict(zip(names, dynamic_args, strict=False)) | dynamic_kwargs


def _stand_in(value: object) -> object:
    """Zeros of the recorded sizes; numbers as they are."""
    if not isinstance(value, Tensor):
        return hint_of(value) if isinstance(value, torch.SymInt) else value
    return torch.zeros([hint_of(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _dynamic(value: object) -> object:
    if not isinstance(value, Tensor):
        return Dim.AUTO if isinstance(value, torch.SymInt) else None
    return {i: Dim.AUTO for i, size in enumerate(value.shape) if _varies(size)}


def _varies(size: int | torch.SymInt) -> bool:
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def _compare_sizes(module: fx.GraphModule, program: ExportedProgram) -> None:
    # ``user_inputs`` of the signature has the values of constants in the place of their names.
    own = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in own]
    known = all(example_value(node) is not None for node in module.graph.find_nodes(op="placeholder"))
    wanted = input_sizes(module) if known else Facts.of(module).inputs
    for node, want in zip(inputs, wanted, strict=True):
        value = example_value(node)
        sizes = value.shape if isinstance(value, Tensor) and isinstance(want, list) else ()
        fixed = [i for i, size in enumerate(sizes) if isinstance(want, list) and want[i] is None and not _varies(size)]
        if fixed:
            raise ExportError(
                f"input {node.name}: dimension {fixed[0]} varies in the module and is fixed at {sizes[fixed[0]]} in "
                "the export; pass an example whose dynamic_shapes let it vary and whose size there is at least 2"
            )
