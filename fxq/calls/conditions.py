"""Conditions on the sizes and numbers of a call, as data: checked without running code that a file brings.

An expression is a number, ``["size", input, dimension]``, ``["value", input]`` or an operator with its operands, as in
``["==", ["%", ["size", 0, 0], 2], 0]``. Inputs are counted as the graph's placeholders.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor

Expression: TypeAlias = float | str | list["Expression"]
"""A value of the form above."""
Evaluate = Callable[[Sequence[Any]], Any]
"""Value of an expression for the flat inputs of a call."""

MOST_PARTS, MOST_CONDITIONS, DEEPEST = 400, 4000, 40
"""Limits: parts and nesting of one condition, number of conditions."""

_TWO: dict[str, Callable[[Any, Any], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CALLS: dict[str, tuple[Callable[..., float], int]] = {
    "min": (min, 2),
    "max": (max, 2),
    "ceil": (math.ceil, 1),
    "floor": (math.floor, 1),
    "trunc": (math.trunc, 1),
    "float": (float, 1),
    "abs": (abs, 1),
    "round": (round, 1),
}
_JOINED = ("and", "or")


class ConditionError(ValueError):
    """Data that is no condition, or a condition that has no form as data."""


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _index(value: object, count: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def check_conditions(data: object, ranks: Sequence[int | None]) -> list[Expression]:
    """Conditions of a file, every part looked at.

    Args:
        data: a list of expressions.
        ranks: number of dimensions of each input, None for what is no tensor.

    Raises:
        ConditionError: when a part is none of the forms, or names an input or dimension that is not there.
    """
    if not isinstance(data, list) or len(data) > MOST_CONDITIONS:
        raise ConditionError(f"conditions: expected a list of at most {MOST_CONDITIONS}")
    for condition in data:
        _check(condition, ranks)
        if not isinstance(condition, list) or condition[0] not in (*_JOINED, "not", "==", "!=", "<", "<=", ">", ">="):
            raise ConditionError(f"{str(condition)[:80]} is no condition")
    return data


def _check(condition: Expression, ranks: Sequence[int | None]) -> None:
    """Iterative, so that nesting has a limit that Python's does not decide."""
    todo, parts = [(condition, 0)], 0
    while todo:
        part, depth = todo.pop()
        parts += 1
        if parts > MOST_PARTS or depth > DEEPEST:
            raise ConditionError(f"a condition has more than {MOST_PARTS} parts or {DEEPEST} levels")
        if _number(part):
            continue
        if not isinstance(part, list) or not part or not isinstance(part[0], str):
            raise ConditionError(f"{str(part)[:80]} is no expression of sizes")
        name, operands = part[0], part[1:]
        if name == "size":
            if not (
                len(operands) == 2 and _index(operands[0], len(ranks)) and _index(operands[1], ranks[operands[0]] or 0)
            ):
                raise ConditionError(f"{str(part)[:80]} is no size of an input")
        elif name == "value":
            if not (len(operands) == 1 and _index(operands[0], len(ranks)) and ranks[operands[0]] is None):
                raise ConditionError(f"{str(part)[:80]} is no input that is a number")
        elif not (len(operands) >= 2 if name in _JOINED else len(operands) == _operands(name)):
            raise ConditionError(f"{str(part)[:80]}: unknown operator, or another number of operands than it has")
        else:
            todo += [(operand, depth + 1) for operand in operands]


def _operands(name: str) -> int:
    """Number of operands of an operator, -1 when there is no such operator."""
    if name in _TWO:
        return 2
    return 1 if name == "not" else _CALLS[name][1] if name in _CALLS else -1


def _parts(expression: Expression) -> tuple[str, list[Expression]]:
    """Operator and operands of what is no number."""
    if not isinstance(expression, list) or not isinstance(name := expression[0], str):
        raise ConditionError(f"{str(expression)[:80]} is no expression of sizes")
    return name, expression[1:]


def _place(operand: Expression) -> int:
    if not isinstance(operand, int):
        raise ConditionError(f"{str(operand)[:80]} is no position of an input or dimension")
    return operand


def evaluator(expression: Expression) -> Evaluate:
    """A function of a call's flat inputs that gives the expression's value."""
    if _number(expression):
        return lambda leaves: expression
    name, operands = _parts(expression)
    if name == "size":
        position, dim = map(_place, operands)
        return lambda leaves: leaves[position].shape[dim]
    if name == "value":
        position = _place(operands[0])
        return lambda leaves: leaves[position]
    values = [evaluator(operand) for operand in operands]
    if name == "not":
        return lambda leaves: not values[0](leaves)
    if name == "and":
        return lambda leaves: all([bool(value(leaves)) for value in values])
    if name == "or":
        return lambda leaves: any([bool(value(leaves)) for value in values])
    a, b = values[0], values[-1]
    if name in _CALLS and len(values) == 1:
        call = _CALLS[name][0]
        return lambda leaves: call(a(leaves))
    function = _CALLS[name][0] if name in _CALLS else _TWO[name]
    return lambda leaves: function(a(leaves), b(leaves))


def holds(evaluate: Evaluate, leaves: Sequence[object]) -> bool:
    """Whether a condition is met; one that divides by zero is not."""
    try:
        return bool(evaluate(leaves))
    except (ArithmeticError, ValueError):
        return False


def text(expression: Expression, names: Sequence[str]) -> str:
    """The expression as Python would write it, for messages."""
    if _number(expression):
        return str(expression)
    name, operands = _parts(expression)
    if name == "size":
        return f"{names[_place(operands[0])]}.shape[{operands[1]}]"
    if name == "value":
        return names[_place(operands[0])]
    shown = [text(operand, names) for operand in operands]
    if name in _CALLS:
        return f"{name}({', '.join(shown)})"
    nested = [isinstance(o, list) and o[0] in (*_TWO, "and", "or") for o in operands]
    shown = [f"({s})" if inner else s for s, inner in zip(shown, nested, strict=True)]
    return f"not {shown[0]}" if name == "not" else f" {name} ".join(shown)


def inputs_of(expression: Expression) -> Iterator[int]:
    """Positions of the inputs that an expression reads."""
    if isinstance(expression, list):
        if expression[0] in ("size", "value"):
            yield _place(expression[1])
        else:
            for operand in expression[1:]:
                yield from inputs_of(operand)


def shown_inputs(condition: Expression, names: Sequence[str], leaves: Sequence[object]) -> str:
    """The inputs that a condition reads and what they are in a call."""
    found = [
        f"{names[i]} of shape {list(leaf.shape)}" if isinstance(leaf := leaves[i], Tensor) else f"{names[i]} = {leaf!r}"
        for i in dict.fromkeys(inputs_of(condition))
    ]
    return ", ".join(found)
