"""An fx graph as JSON and back: no code, no pickle, only named operators of an allow-list.

A graph is ``{"nodes": [...], "in_spec": ..., "out_spec": ..., "arguments": [...]}``. A node has ``name``, ``op``,
``target``, ``args``, ``kwargs`` and, on linears, ``plan``. Arguments are JSON values except for single-key objects:
``{"node": name}``, ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dtype": "float32"}``, ``{"device": "cpu"}``,
``{"layout": ...}``, ``{"memory_format": ...}``, ``{"float": "inf"}`` and ``{"slice": [start, stop, step]}``.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxq.exclusive import exclusive
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
    if isinstance(target, torch._ops.OpOverload) and str(target).partition(".")[0] in _NAMESPACES:
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
        found = getattr(getattr(getattr(torch.ops, namespace), packet_name), overload)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload) or str(found) != name:
        raise GraphFormatError(
            f"node {node}: operator {name!r} does not exist in torch {torch.__version__}; "
            "the bundle was made with another version"
        )
    return found


def _check_names(entry: dict[str, Any]) -> None:
    """Refuse names that fx would write into the source it generates as anything but a name."""
    name, op, target = entry["name"], entry["op"], entry["target"]
    for text in (name, target, *entry["kwargs"]):
        if not isinstance(text, str):
            raise GraphFormatError(f"node {name!r}: {text!r} is not a name")
    for text in entry["kwargs"]:
        _check_identifier(text, name)
    if op == "placeholder":
        _check_identifier(target, name)
    elif op == "get_attr" and not all(p.isprintable() and not {'"', "\\"} & set(p) for p in target.split(".")):
        raise GraphFormatError(f"node {name}: {target!r} is not a tensor's name")


def _check_identifier(text: Any, node: str) -> None:
    if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
        raise GraphFormatError(f"node {node}: {text!r} is not an identifier")


def _spec_to_json(spec: pytree.TreeSpec) -> Any:
    try:
        return json.loads(pytree.treespec_dumps(spec))
    except (NotImplementedError, TypeError) as error:
        raise GraphFormatError(f"the calling convention cannot be written: {error}") from None


def _spec_from_json(data: Any) -> pytree.TreeSpec:
    """A pytree structure; types that torch would import by a name in the file are refused.

    Raises:
        GraphFormatError: malformed, or of a type that this process has not registered.
    """
    text = json.dumps(data)
    if "__enum__" in text or "collections.defaultdict" in text:
        raise GraphFormatError("the calling convention has a defaultdict or an enum; use plain dicts and strings")
    try:
        return pytree.treespec_loads(text)
    except NotImplementedError as error:
        raise GraphFormatError(f"{error} Import the package that registers the type before loading") from None
    except (AssertionError, ValueError) as error:
        raise GraphFormatError(f"malformed calling convention: {error}") from None


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


def _decode(value: Any, nodes: dict[str, fx.Node], node: str, device: torch.device) -> Any:
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
        items = [_decode(v, nodes, node, device) for v in content]
        if kind == "slice" and len(items) != 3:
            raise GraphFormatError(f"node {node}: malformed argument {value}")
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device" and isinstance(content, str):
        return device
    if kind in _TORCH_KINDS and isinstance(found := getattr(torch, str(content), None), _TORCH_KINDS[kind]):
        return found
    raise GraphFormatError(f"node {node}: malformed argument {value}")


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    """The module's graph and calling convention; tensors are referred to by name.

    Raises:
        GraphFormatError: when a node cannot be expressed.
    """
    nodes: list[dict[str, Any]] = []
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
        _check_names(entry)
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
        "in_spec": _spec_to_json(info.in_spec),
        "out_spec": None if info.out_spec is None else _spec_to_json(info.out_spec),
    }


@exclusive
def graph_from_json(
    data: dict[str, Any], tensors: dict[str, torch.Tensor], device: str | torch.device = "cpu"
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
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise GraphFormatError(f"malformed graph: {type(error).__name__}: {error}") from None


def _build(data: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> fx.GraphModule:
    graph, nodes, root = fx.Graph(), dict[str, fx.Node](), torch.nn.Module()
    for entry in data["nodes"]:
        _check_names(entry)
        name, op, target = entry["name"], entry["op"], entry["target"]
        if name in nodes:
            raise GraphFormatError(f"node {name}: the name is used twice")
        args = tuple(_decode(a, nodes, name, device) for a in entry["args"])
        kwargs = {k: _decode(v, nodes, name, device) for k, v in entry["kwargs"].items()}
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
    out_spec = None if data["out_spec"] is None else _spec_from_json(data["out_spec"])
    in_spec = _spec_from_json(data["in_spec"])
    # The generated source quotes argument names and the keys of the keyword arguments.
    for argument in [*data["arguments"], *(in_spec.child(1).context or ())]:
        _check_identifier(argument, "arguments")
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(data["arguments"]), in_spec, out_spec)))
    graph.lint()
    return fx.GraphModule(root, graph)


def tensors_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every tensor the graph reads, by name, contiguous."""
    names = sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"})
    return {name: get_tensor(module, name).detach().contiguous() for name in names}
