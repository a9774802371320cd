"""An fx graph as JSON and back: no code, no pickle, only named operators of an allow-list.

A graph is ``{"nodes": [...], "in_spec": ..., "out_spec": ..., "arguments": [...]}``. A node has ``name``, ``op``, ``target``,
``args``, ``kwargs`` and, on linears, ``plan``. Arguments are JSON values except for single-key objects: ``{"node": name}``,
``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dtype": "float32"}``, ``{"device": "cpu"}``, ``{"layout": ...}``, ``{"memory_format": ...}``,
``{"float": "inf"}`` and ``{"slice": [start, stop, step]}``.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxq.ir import LayerPlan, get_tensor, plan_of, put_tensor, set_plan

_NAMESPACES = ("aten", "fxq", "prims")
_REFUSED = ("aten.from_file.default",)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.pow,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
    )
} | {f"torch.{f.__name__}": f for f in (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not)}
_NAMES = {f: name for name, f in _FUNCTIONS.items()}
_TORCH_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


class GraphFormatError(ValueError):
    """A graph that cannot be written as JSON, or JSON that is not a graph fxq may run."""


def target_name(target: Any, node: str) -> str:
    """Name of a call target.

    Raises:
        GraphFormatError: when the target has no place in the format.
    """
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise GraphFormatError(f"node {node}: {target} is neither an ATen or fxq operator nor integer arithmetic")


def find_target(name: str, node: str) -> Any:
    """The call target of a name.

    Raises:
        GraphFormatError: unknown or refused name.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    if namespace not in _NAMESPACES or name in _REFUSED:
        raise GraphFormatError(f"node {node}: operator {name!r} is not allowed in a bundle")
    packet_name, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet_name), overload)
    except (AttributeError, RuntimeError):
        raise GraphFormatError(
            f"node {node}: operator {name!r} does not exist in torch {torch.__version__}; the bundle was made with another version"
        ) from None


def _encode(value: Any, node: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, node) for v in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(v, node) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise GraphFormatError(f"node {node}: argument {value!r} of type {type(value).__name__} has no place in the format")


def _decode(value: Any, nodes: dict[str, fx.Node], node: str) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise GraphFormatError(f"node {node}: a bare JSON list is not an argument")
        return value
    if len(value) != 1:
        raise GraphFormatError(f"node {node}: malformed argument {value}")
    kind, content = next(iter(value.items()))
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind in ("list", "tuple", "slice") and isinstance(content, list):
        items = [_decode(v, nodes, node) for v in content]
        if kind == "slice" and len(items) == 3:
            return slice(*items)
        return items if kind == "list" else tuple(items)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind in _TORCH_KINDS and isinstance(found := getattr(torch, str(content), None), _TORCH_KINDS[kind]):
        return found
    raise GraphFormatError(f"node {node}: malformed argument {value}")


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    """The module's graph and calling convention; tensors are referred to by name.

    Raises:
        GraphFormatError: when a node cannot be expressed.
    """
    nodes = []
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise GraphFormatError(f"node {node.name}: {node.op} {node.target} has no place in the format")
        target = target_name(node.target, node.name) if node.op == "call_function" else str(node.target)
        entry = {
            "name": node.name,
            "op": node.op,
            "target": target,
            "args": [_encode(a, node.name) for a in node.args],
            "kwargs": {k: _encode(v, node.name) for k, v in node.kwargs.items()},
        }
        if (plan := plan_of(node)) is not None:
            entry["plan"] = plan.to_json()
        nodes.append(entry)
    codegen = module.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        raise GraphFormatError("the graph has no pytree calling convention; it was not made by fxq.quantize")
    info = codegen.pytree_info
    return {
        "nodes": nodes,
        "arguments": list(info.orig_args),
        "in_spec": json.loads(pytree.treespec_dumps(info.in_spec)),
        "out_spec": None if info.out_spec is None else json.loads(pytree.treespec_dumps(info.out_spec)),
    }


def graph_from_json(data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    """Build the module; the inverse of :func:`graph_to_json`.

    Args:
        data: the JSON object.
        tensors: every tensor the graph reads, by name.

    Raises:
        GraphFormatError: when the JSON is not such a graph, names an operator that is not allowed or does not exist, or
            reads a tensor that is not there.
    """
    try:
        return _build(data, tensors)
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        raise GraphFormatError(f"malformed graph: {type(error).__name__}: {error}") from None


def _build(data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    graph, nodes, root = fx.Graph(), dict[str, fx.Node](), torch.nn.Module()
    for entry in data["nodes"]:
        name, op, target = entry["name"], entry["op"], entry["target"]
        args = tuple(_decode(a, nodes, name) for a in entry["args"])
        kwargs = {k: _decode(v, nodes, name) for k, v in entry["kwargs"].items()}
        if op == "call_function":
            node = graph.create_node(op, find_target(target, name), args, kwargs, name=name)
        elif op == "get_attr":
            if target not in tensors:
                raise GraphFormatError(f"node {name}: tensor {target!r} is not in the bundle")
            put_tensor(root, target, tensors[target])
            node = graph.create_node(op, target, (), {}, name=name)
        elif op == "placeholder":
            node = graph.create_node(op, target, args, {}, name=name)
        elif op == "output":
            node = graph.output(args[0])
        else:
            raise GraphFormatError(f"node {name}: unknown kind {op!r}")
        if "plan" in entry:
            set_plan(node, LayerPlan.from_json(entry["plan"]))
        nodes[name] = node
    out_spec = None if data["out_spec"] is None else pytree.treespec_loads(json.dumps(data["out_spec"]))
    in_spec = pytree.treespec_loads(json.dumps(data["in_spec"]))
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(data["arguments"]), in_spec, out_spec)))
    graph.lint()
    return fx.GraphModule(root, graph)


def tensors_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every tensor the graph reads, by name, contiguous."""
    names = sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"})
    return {name: get_tensor(module, name).detach().contiguous() for name in names}
