"""Outlines of graphs, short enough to review, and the golden files that hold them."""

import operator
import os
import pathlib
from collections import Counter

import torch
from torch import fx

from fxq.core.graph import arguments
from fxq.core.ir import example_value, module_path, plan_of

GOLDEN = pathlib.Path(__file__).parent / "golden"

TENSOR_OF = {
    "scale": "input_scale",
    "zero_point": "input_zero_point",
    "out_scale": "input_scale",
    "out_zero_point": "input_zero_point",
}
"""Argument of an operator -> the layer's tensor it reads, where the names differ."""


def golden(name, text):
    """Compare with a file; FXQ_GOLDEN_REWRITE=1 writes it instead."""
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("FXQ_GOLDEN_REWRITE"):
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs; FXQ_GOLDEN_REWRITE=1 pytest rewrites it"


def outline(module, under=""):
    """A line for each node: its place, operator, inputs, what else it is given, and its result.

    A layer's tensors have no lines of their own: what reads them has the layer for its place. One that an argument of
    another name reads is written out, and of optional ones the name is. Items of a tuple stand as ``name[2]`` where
    they are read. Sizes that vary are ``?``.

    Args:
        module: with the graph.
        under: only nodes whose module's path begins with this.
    """
    names, counts, lines = {}, Counter(), []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "call_function" and node.target is operator.getitem and plan_of(node) is None:
            names[node] = f"{names[node.args[0]]}[{node.args[1]}]"
        elif node.op == "output":
            lines.append((node, f"output({written(node.args[0], names)})"))
        else:
            name = node.name if node.op == "placeholder" else str(node.target.__name__).split(".")[0]
            counts[name] += 1
            names[node] = name + (f"_{counts[name]}" if counts[name] > 1 else "")
            lines.append((node, line(node, names)))
    return "".join(f"{text}\n" for node, text in lines if module_path(node).startswith(under))


def line(node, names):
    """One line of :func:`outline`."""
    result = shown(example_value(node))
    if node.op == "placeholder":
        return f"{names[node]} = input -> {result}"
    given, owners = [], []
    optional = {a.name for a in schema(node) if a.type.kind() == "OptionalType"}
    for argument, value in called_with(node):
        layer, _, leaf = names.get(value, "").rpartition(".") if isinstance(value, fx.Node) else ("", "", "")
        if layer and value.op == "get_attr" and leaf == TENSOR_OF.get(argument, argument):
            owners.append(layer)
            given += [argument] * (argument in optional)
        elif isinstance(value, fx.Node) and value.op != "get_attr":
            given.append(names[value])
        elif not isinstance(value, torch.dtype):  # the result says it
            given.append(f"{argument}={written(value, names)}")
    plan = plan_of(node)
    owners = [plan.layer, *owners] if plan else owners or [module_path(node)]
    place = " > ".join(dict.fromkeys(owners))
    what = "" if plan is None else f"  # {plan.scheme.detail if plan.scheme else f'kept: {plan.reason}'}"
    what += f", {len(plan.outliers)} outliers" if plan and plan.outliers else ""
    space = "fxq." if str(node.target).startswith("fxq.") else ""
    return f"{place}: {space}{names[node]}({', '.join(given)}) -> {result}{what}"


def schema(node):
    """Declared arguments of an operator; none of a function that is no operator."""
    return node.target._schema.arguments if hasattr(node.target, "_schema") else ()


def called_with(node):
    """(argument, value) of a call; those with their default value are left out."""
    if not schema(node):
        return [(str(number), value) for number, value in enumerate(node.args)]
    defaults = {argument.name: argument.default_value for argument in schema(node)}
    return [(name, value) for name, value in arguments(node).items() if value is not None and value != defaults[name]]


def written(value, names):
    """A value with the nodes in it by their names."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(written(item, names) for item in value)}]"
    return names[value] if isinstance(value, fx.Node) else str(value)


def shown(value):
    """Dtype and sizes of a tensor, or of those in a tuple."""
    if isinstance(value, list | tuple):
        texts = [shown(item) for item in value]
        return f"{len(texts)} x {texts[0]}" if len(set(texts)) == 1 else ", ".join(texts)
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    sizes = ", ".join(str(size) if isinstance(size, int) else "?" for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
