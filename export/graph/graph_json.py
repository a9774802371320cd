"""An fx graph as JSON and back: no code, no pickle, only named operators of an allow-list.

A graph is ``{"nodes": [...], "in_spec": ..., "out_spec": ..., "arguments": [...]}``. A node has ``name``, ``op``,
``target``, ``args``, ``kwargs`` and, on linears, ``plan``. Arguments are JSON values except for single-key objects:
``{"node": name}``, ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dtype": "float32"}``, ``{"device": "cpu"}``,
``{"layout": ...}``, ``{"memory_format": ...}``, ``{"float": "inf"}`` and ``{"slice": [start, stop, step]}``.
"""

from __future__ import annotations

import functools
import keyword
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import Argument

from fxq.calls.captured import CapturedModule
from fxq.core.ir import LayerPlan, get_tensor, plan_of, put_tensor, set_plan
from fxq.dtypes import DTYPES
from fxq.export.graph import operators
from fxq.export.graph.arguments import (
    ANY,
    LAYOUTS,
    MAX_ITEMS,
    MAX_TEXT,
    MEMORY_FORMATS,
    NOTHING,
    TENSOR,
    ArgumentError,
    Value,
    check_call,
)
from fxq.export.graph.foreign import advice, find_foreign, foreign_name, is_foreign
from fxq.export.graph.structure import StructureError, structure_from_json, structure_to_json
from fxq.runtime.exclusive import exclusive
from fxq.runtime.reading import MAX_NAME, Json

MAX_NODES, MAX_NODES_OF_SMALL, BYTES_PER_NODE = 50_000, 20_000, 4096
"""Most nodes of a graph; more than 20,000 need so many bytes of tensors each, as a node takes memory itself."""
MAX_PATH = 32  # parts of a tensor's dotted name
_CONSTANTS: dict[str, dict[str, Any]] = {"dtype": DTYPES, "layout": LAYOUTS, "memory_format": MEMORY_FORMATS}
_CLASSES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_DEVICE = re.compile(r"[a-z]{1,20}(:\d{1,4})?")
_SHADOWED = frozenset({"torch", "fx_pytree", "pytree", "device", "inf", "nan", "NoneType", "_fxq_flat"})
"""Globals of the source that fx generates; an argument of such a name would hide it."""


class GraphFormatError(ValueError):
    """A graph that cannot be written as JSON, or JSON that is not a graph fxq may run."""


def target_name(target: object, node: str) -> str:
    """Name of a call target.

    Raises:
        GraphFormatError: when it is not among the operators a bundle may call (:mod:`fxq.export.graph.operators`).
    """
    if (name := operators.name_of(target) or foreign_name(target)) is None:
        raise GraphFormatError(
            f"node {node}: {target} is neither an ATen or fxq operator nor integer arithmetic that a bundle may call; "
            "express it by other operators, or run the module without saving it"
        )
    return name


def find_target(name: Any, node: str) -> Any:
    """The call target of a name.

    Raises:
        GraphFormatError: unknown or refused name.
    """
    if isinstance(name, str) and (found := operators.find(name) or find_foreign(name)) is not None:
        return found
    if is_foreign(name):
        raise GraphFormatError(f"node {node}: operator {name!r} is not allowed in a bundle: {advice(name)}")
    shown = f"node {node}: operator {str(name)[:120]!r}"
    if isinstance(name, str) and name.startswith(operators.NAMESPACES) and not operators.exists(name):
        raise GraphFormatError(
            f"{shown} does not exist in torch {torch.__version__}; the bundle was made with another version"
        )
    raise GraphFormatError(f"{shown} is not allowed in a bundle")


def check_writable(module: fx.GraphModule) -> None:
    """Find out, at any stage of a graph, whether :func:`fxq.save` could write what it calls and how it is called.

    Raises:
        GraphFormatError: naming the node that has no place in a bundle.
    """
    graph_to_json(module)


def _check_names(name: Any, op: object, target: object, kwargs: Any) -> None:
    """Refuse names that fx would write into the source it generates as anything but a name."""
    for text in (name, target, *kwargs):
        if not isinstance(text, str):
            raise GraphFormatError(f"node {repr(name)[:80]}: {repr(text)[:80]} is not a name")
    for text in (name, *kwargs):
        _check_identifier(text, name)
    if op == "placeholder":
        _check_identifier(target, name)
    elif op == "get_attr":
        check_tensor_name(target, name)


def _check_identifier(text: Any, node: str) -> None:
    plain = isinstance(text, str) and text.isidentifier() and unicodedata.normalize("NFKC", text) == text
    if not plain or keyword.iskeyword(text) or len(text) > MAX_NAME:
        raise GraphFormatError(f"node {node[:80]}: {str(text)[:80]!r} is not an identifier")


@functools.cache
def _taken() -> frozenset[str]:
    """Names that mean something else on a module."""
    return frozenset({*dir(fx.GraphModule(torch.nn.Module(), fx.Graph())), *dir(torch.nn.Module())})


def check_tensor_name(name: object, node: str) -> None:
    """Refuse a dotted name under which no tensor of a module can lie.

    Raises:
        GraphFormatError: naming the node.
    """
    parts = name.split(".") if isinstance(name, str) and len(name) <= MAX_NAME else [""]
    plain = all(part and part.isprintable() and not {'"', "\\"} & set(part) for part in parts)
    if not plain or len(parts) > MAX_PATH or _taken().intersection(parts):
        raise GraphFormatError(f"node {node[:80]}: {str(name)[:120]!r} is not a tensor's name")


def _encode(value: object, node: str) -> object:
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
    for kind, cls in _CLASSES.items():
        if isinstance(value, cls) and (name := str(value).removeprefix("torch.")) in _CONSTANTS[kind]:
            return {kind: name}
    raise GraphFormatError(f"node {node}: argument {value!r} of type {type(value).__name__} has no place in the format")


def _decode(value: Json, nodes: dict[str, fx.Node], node: str, device: torch.device) -> Argument:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise GraphFormatError(f"node {node}: a bare JSON list is not an argument")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise GraphFormatError(f"node {node}: a text of {len(value)} characters, at most {MAX_TEXT}")
        return value
    kind, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if kind == "node" and isinstance(content, str) and content in nodes:
        return nodes[content]
    if kind in ("list", "tuple", "slice") and isinstance(content, list) and len(content) <= MAX_ITEMS:
        items = [_decode(v, nodes, node, device) for v in content]
        if kind != "slice":
            return items if kind == "list" else tuple(items)
        if len(items) == 3:
            return slice(*items)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device" and isinstance(content, str) and _DEVICE.fullmatch(content):
        return device
    if kind in _CONSTANTS and isinstance(content, str) and content in _CONSTANTS[kind]:
        return _CONSTANTS[kind][content]
    raise GraphFormatError(f"node {node}: malformed argument {str(value)[:200]}")


def graph_to_json(module: fx.GraphModule) -> dict[str, object]:
    """The module's graph and calling convention; tensors are referred to by name.

    Raises:
        GraphFormatError: when a node cannot be expressed.
    """
    nodes: list[dict[str, object]] = []
    known: dict[fx.Node, Value] = {}
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
        _check_names(node.name, node.op, target, node.kwargs)
        known[node] = _value(node, known)
        if (plan := plan_of(node)) is not None:
            entry["plan"] = plan.to_json()
        nodes.append(entry)
    reads = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    _check_count(nodes, {name: get_tensor(module, name) for name in reads})
    codegen = module.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        raise GraphFormatError("the graph has no pytree calling convention; it was not made by fxq.quantize")
    info = codegen.pytree_info
    _check_arguments(info.orig_args, info.in_spec)
    try:
        in_spec = structure_to_json(info.in_spec)
        out_spec = None if info.out_spec is None else structure_to_json(info.out_spec)
    except StructureError as error:
        raise GraphFormatError(str(error)) from None
    return {"nodes": nodes, "arguments": list(info.orig_args), "in_spec": in_spec, "out_spec": out_spec}


@exclusive
def graph_from_json(
    data: dict[str, object], tensors: dict[str, torch.Tensor], device: str | torch.device = "cpu"
) -> fx.GraphModule:
    """Build the module; the inverse of :func:`graph_to_json`.

    Args:
        data: the JSON object.
        tensors: every tensor the graph reads, by name.
        device: takes the place of every device named in the graph.

    Raises:
        GraphFormatError: when the JSON is not such a graph, names an operator that is not allowed or does not exist, or
            reads a tensor that is not there.
    """
    try:
        return _build(data, tensors, torch.device(device))
    except GraphFormatError:
        raise
    except StructureError as error:
        raise GraphFormatError(str(error)) from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise GraphFormatError(f"malformed graph: {type(error).__name__}: {str(error)[:200]}") from None


def _build(data: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> fx.GraphModule:
    graph, root = fx.Graph(), torch.nn.Module()
    nodes, known = dict[str, fx.Node](), dict[fx.Node, Value]()
    _check_count(data["nodes"], tensors)
    for entry in data["nodes"]:
        _check_names(entry["name"], entry["op"], entry["target"], entry["kwargs"])
        name = entry["name"]
        if name in nodes:
            raise GraphFormatError(f"node {name}: the name is used twice")
        if graph._root.prev.op == "output":
            raise GraphFormatError(f"node {name}: it stands behind the output")
        node = _node(graph, root, entry, nodes, tensors, device)
        known[node] = _value(node, known)
        if "plan" in entry:
            set_plan(node, LayerPlan.from_json(entry["plan"]))
        nodes[name] = node
    in_spec = structure_from_json(data["in_spec"])
    out_spec = None if data["out_spec"] is None else structure_from_json(data["out_spec"])
    _check_arguments(data["arguments"], in_spec)
    _check_leaves(graph, in_spec, out_spec)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(data["arguments"]), in_spec, out_spec)))
    graph.lint()
    return CapturedModule(root, graph)


def _check_count(nodes: list[Any], tensors: Mapping[str, torch.Tensor]) -> None:
    stored = sum(tensor.nbytes for tensor in tensors.values())
    limit = min(MAX_NODES, max(MAX_NODES_OF_SMALL, stored // BYTES_PER_NODE))
    if len(nodes) > limit:
        raise GraphFormatError(f"the graph has {len(nodes)} nodes, a bundle of this size holds at most {limit}")


def _node(
    graph: fx.Graph,
    root: torch.nn.Module,
    entry: dict[str, Any],
    nodes: dict[str, fx.Node],
    tensors: dict[str, torch.Tensor],
    device: torch.device,
) -> fx.Node:
    name, op, target = entry["name"], entry["op"], entry["target"]
    if not isinstance(entry["args"], list) or not isinstance(entry["kwargs"], dict):
        raise GraphFormatError(f"node {name}: args are no list, or kwargs no object")
    args = tuple(_decode(a, nodes, name, device) for a in entry["args"])
    kwargs = {k: _decode(v, nodes, name, device) for k, v in entry["kwargs"].items()}
    if op == "call_function":
        return graph.create_node(op, find_target(target, name), args, kwargs, name=name)
    if op not in ("get_attr", "placeholder", "output"):
        raise GraphFormatError(f"node {name}: unknown kind {str(op)[:40]!r}")
    if kwargs or len(args) != (op == "output"):
        raise GraphFormatError(f"node {name}: {len(args)} arguments of a node of kind {str(op)[:40]!r}")
    if op == "output":
        return graph.output(args[0])
    if op == "get_attr":
        if target not in tensors:
            raise GraphFormatError(f"node {name}: tensor {target!r} is not in the bundle")
        put_tensor(root, target, tensors[target])
    return graph.create_node(op, target, (), {}, name=name)


def _value(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """What a node gives; its call is checked on the way."""
    if node.op == "call_function":
        try:
            return check_call(node.target, node.args, node.kwargs, known)
        except ArgumentError as error:
            raise GraphFormatError(f"node {node.name}: {error}") from None
    if node.op == "output":
        return NOTHING
    return TENSOR if node.op == "get_attr" else ANY


def _check_arguments(arguments: object, in_spec: Any) -> None:
    """The generated source quotes the names of arguments and the keys of the keyword arguments."""
    if not isinstance(arguments, list | tuple):
        raise GraphFormatError("arguments is no list of names")
    if in_spec.type is not tuple or in_spec.num_children != 2 or in_spec.child(1).type is not dict:
        raise GraphFormatError("in_spec is no tuple of positional arguments with a dict of keywords")
    keywords = in_spec.child(1).context or ()
    for name in (*arguments, *keywords):
        _check_identifier(name, "arguments")
        if name in _SHADOWED:
            raise GraphFormatError(f"the argument {name!r} has the name of a global of the generated source; rename it")
    own = [name for name in arguments if name != "self"]
    if len(set(arguments)) != len(arguments) or len(own) != in_spec.child(0).num_children + len(keywords):
        raise GraphFormatError(f"the arguments {str(list(arguments))[:200]} are not those of in_spec")


def _check_leaves(graph: fx.Graph, in_spec: Any, out_spec: Any) -> None:
    """Inputs and results are as many as the calling convention has leaves."""
    inputs = len(graph.find_nodes(op="placeholder"))
    if in_spec.num_leaves != inputs:
        raise GraphFormatError(f"in_spec has {in_spec.num_leaves} leaves, the graph has {inputs} inputs")
    outputs = graph.find_nodes(op="output")
    if len(outputs) != 1:
        raise GraphFormatError(f"the graph has {len(outputs)} outputs, expected one")
    results = outputs[0].args[0]
    if out_spec is not None and (not isinstance(results, list | tuple) or len(results) != out_spec.num_leaves):
        raise GraphFormatError(f"out_spec has {out_spec.num_leaves} leaves, the output is {str(results)[:80]}")


def tensors_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every tensor the graph reads, by name, contiguous."""
    names = sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"})
    return {name: get_tensor(module, name).detach().contiguous() for name in names}
