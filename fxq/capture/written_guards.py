"""Guards of a program that was read from a file, where torch keeps them as text: understood, never run."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.calls.conditions import ConditionError, Expression

_PYTHON: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.And: "and",
    ast.Or: "or",
    ast.Not: "not",
}
_SOURCE = re.compile(r"L(?:\['\w+'\]|\[\d+\]|\.\w+)+?(?=\.size\(\)|[^\[\w.]|$)")


def written_guards(program: ExportedProgram, count: int) -> list[Expression]:
    """Guards of a program that was read from a file: text, of which comparisons of sizes are understood."""
    guards = getattr(program, "_guards_code", None) or []
    sources = _sources(program, count) if guards else {}
    return [_parsed(guard, sources) for guard in guards]


def _sources(program: ExportedProgram, count: int) -> dict[str, int]:
    """The names by which torch's text may call each flat input."""
    names = {f"L['flat_args'][{i}]": i for i in range(count)}
    args, kwargs = pytree.tree_unflatten(list(range(count)), program.call_spec.in_spec)
    graph: Any = program.module(check_guards=False).graph
    given = [name for name in graph._codegen.pytree_info.orig_args if name != "self"]
    named = dict(zip(given, args, strict=False)) | kwargs
    for path, i in pytree.tree_flatten_with_path({**named})[0]:
        names[f"L{pytree.keystr(path)}"] = i
    return names


def _parsed(guard: str, sources: Mapping[str, int]) -> Expression:
    """A guard's text as data; nothing of it is run.

    Raises:
        ConditionError: when it is more than arithmetic and comparisons of sizes.
    """
    plain = _SOURCE.sub(lambda m: f"__{sources.get(m.group(), -1)}", guard)
    try:
        return _python(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ConditionError, RecursionError):
        raise ConditionError(f"the condition {guard} has no form that can be kept") from None


def _python(node: ast.AST) -> Expression:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and (name := _PYTHON.get(type(node.op))):
        return [name, _python(node.left), _python(node.right)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return ["-", 0, _python(node.operand)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ["not", _python(node.operand)]
    if isinstance(node, ast.BoolOp):
        result = _python(node.values[0])
        for value in node.values[1:]:
            result = [_PYTHON[type(node.op)], result, _python(value)]
        return result
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and (name := _PYTHON.get(type(node.ops[0]))):
        return [name, _python(node.left), _python(node.comparators[0])]
    if isinstance(node, ast.Name) and re.fullmatch(r"__\d+", node.id):
        return ["value", int(node.id[2:])]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.value, ast.Call):
        source = node.value.func
        if isinstance(source, ast.Attribute) and source.attr == "size" and isinstance(source.value, ast.Name):
            position = _python(source.value)
            if isinstance(position, list) and isinstance(node.slice.value, int):
                return ["size", position[1], node.slice.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if called in ("min", "max") and len(node.args) == 2:
            return [called, *map(_python, node.args)]
        if called in ("ceil", "floor", "trunc", "float", "abs", "round") and len(node.args) == 1:
            return [called, _python(node.args[0])]
    raise ConditionError(ast.dump(node))
