"""The conditions that a capture rests on: what torch.export assumed of sizes and numbers, as data.

They come from the branches that the model's code took, from reshapes, and from the ranges of ``dynamic_shapes``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxq.calls.conditions import ConditionError, Expression
from fxq.capture.written_guards import written_guards
from fxq.core.ir import example_value

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._sympy.value_ranges import ValueRanges

_NAMES = {
    "Add": "+",
    "Mul": "*",
    "FloorDiv": "//",
    "CleanDiv": "//",
    "IntTrueDiv": "/",
    "FloatTrueDiv": "/",
    "Mod": "%",
    "PythonMod": "%",
    "Max": "max",
    "Min": "min",
    "CeilToInt": "ceil",
    "ceiling": "ceil",
    "FloorToInt": "floor",
    "floor": "floor",
    "TruncToInt": "trunc",
    "ToFloat": "float",
    "Abs": "abs",
    "RoundToInt": "round",
    "Equality": "==",
    "Unequality": "!=",
    "StrictLessThan": "<",
    "LessThan": "<=",
    "StrictGreaterThan": ">",
    "GreaterThan": ">=",
    "And": "and",
    "Or": "or",
    "Not": "not",
}
"""Class of sympy or torch -> operator of :mod:`fxq.calls.conditions`."""
_LAYOUT = re.compile(
    r"torch/_prims_common/.*\bin \w*(contiguous|strides|channels_last|non_overlapping)\w*"
    r"|torch/_refs/.*\bin _reshape_view_helper\w*"
)
"""Functions of torch that reason about strides."""


@dataclasses.dataclass
class Assumptions:
    """What holds for the inputs of a program.

    ``symbols``: where each free size or number of the inputs is read, an expression; ``lows``: its least value where
    torch assumes one; ``conditions``: all the others; ``shapes``: of each tensor input its sizes in symbols, of a
    number that may vary the number, else None; ``compared``: the symbols that the model's code compares with something.
    """

    symbols: dict[str, Expression] = dataclasses.field(default_factory=dict)
    lows: dict[str, int] = dataclasses.field(default_factory=dict)
    conditions: list[Expression] = dataclasses.field(default_factory=list)
    shapes: list[list[sympy.Expr] | None] = dataclasses.field(default_factory=list)
    compared: set[str] = dataclasses.field(default_factory=set)


def assumptions_of(
    program: ExportedProgram, compared: set[sympy.Symbol] | None = None, given: bool = True
) -> Assumptions:
    """What a program assumes of its inputs.

    Args:
        program: the capture.
        compared: symbols that the model's code compared; None when that is not known.
        given: whether the program may come from a file, where torch keeps guards as text.

    Raises:
        ConditionError: when a condition has no form as data.
    """
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in users]
    found, symbols = Assumptions(shapes=[_shape(node) for node in inputs]), dict[sympy.Symbol, Expression]()
    free = list(_free_sizes(inputs))
    for expression, place in free:
        if isinstance(expression, sympy.Symbol):
            if expression in symbols:
                found.conditions.append(["==", place, symbols[expression]])
            else:
                symbols[expression] = place
    for expression, place in free:
        if not isinstance(expression, sympy.Symbol):
            _derive(expression, place, symbols, found.conditions)
    found.symbols = {str(symbol): place for symbol, place in symbols.items()}
    env = _shape_env(inputs)
    watched = set(symbols) if compared is None else {s for c in compared for s in _current(env, c)}
    found.compared = {str(symbol) for symbol in watched}
    for symbol, place in symbols.items():
        _bound(str(symbol), place, program.range_constraints.get(symbol), found)
    guards = [] if env is None else [env.replace(guard.expr) for guard in env.guards if not _about_layout(guard)]
    for guard in guards:
        if guard.free_symbols <= symbols.keys():
            if guard.free_symbols:
                found.conditions.append(expression_of(guard, symbols))
        elif any(not _depends_on_data(symbol) for symbol in guard.free_symbols - symbols.keys()):
            raise ConditionError(f"the condition {guard} is on sizes that no input has by itself")
    if given:
        found.conditions += written_guards(program, len(inputs))
    found.conditions = list({str(c): c for c in found.conditions}.values())
    return found


def _free_sizes(inputs: list[fx.Node]) -> Iterator[tuple[sympy.Expr, Expression]]:
    """(expression in symbols, where it is read) of every size and number that may vary."""
    for i, node in enumerate(inputs):
        value = example_value(node)
        if isinstance(value, Tensor):
            sizes: list[Any] = list(value.shape)
            for dim, size in enumerate(sizes):
                if not isinstance(size, int) and size.node.maybe_as_int() is None:
                    yield size.node.expr, ["size", i, dim]
        elif isinstance(value, torch.SymInt | torch.SymFloat) and not value.node.expr.is_number:
            yield value.node.expr, ["value", i]


def _shape(node: fx.Node) -> list[sympy.Expr] | None:
    value = example_value(node)
    if isinstance(value, Tensor):
        return [_expression(size) for size in value.shape]
    return [_expression(value)] if isinstance(value, torch.SymInt) else None


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a number where it is fixed, else as an expression of symbols."""
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return size.node.expr if fixed is None else fixed  # type: ignore[union-attr]


def _derive(
    expression: sympy.Expr, place: Expression, symbols: dict[sympy.Symbol, Expression], into: list[Expression]
) -> None:
    """A size that is computed from others: a condition; or, linear in one unknown symbol, where that one is read."""
    unknown = [symbol for symbol in expression.free_symbols if symbol not in symbols]
    if not unknown:
        into.append(["==", place, expression_of(expression, symbols)])
        return
    factor, rest = _linear(expression, unknown[0])
    if len(unknown) > 1 or not factor.is_Integer or factor == 0:
        raise ConditionError(f"the size {expression} does not say what {unknown[0]} is")
    difference = ["-", place, expression_of(rest, symbols)]
    symbols[unknown[0]] = ["//", difference, int(factor)]
    into.append(["==", ["%", difference, int(factor)], 0])


def _linear(expression: sympy.Expr, symbol: sympy.Symbol) -> tuple[sympy.Expr, sympy.Expr]:
    """``(a, b)`` of ``a * symbol + b``."""
    try:
        factor, rest = sympy.Poly(expression, symbol).all_coeffs()
    except (sympy.PolynomialError, ValueError):
        return sympy.Integer(0), expression
    return factor, rest


def _bound(name: str, place: Expression, bounds: ValueRanges[sympy.Expr] | None, found: Assumptions) -> None:
    """Conditions of a symbol's range. A least value of 2 is torch's own assumption of every size."""
    if bounds is None:
        return
    low, high = _int(bounds.lower), _int(bounds.upper)
    if low is not None:
        found.lows[name] = low
        if low > 2:
            found.conditions.append([">=", place, low])
    if high is not None:
        found.conditions.append(["<=", place, high])


def _int(bound: sympy.Expr) -> int | None:
    finite = getattr(bound, "is_Integer", False) and abs(int(bound)) < 2**62
    return int(bound) if finite else None


def _shape_env(inputs: list[fx.Node]) -> ShapeEnv | None:
    """What torch knows of the sizes, or None where all are fixed."""
    values = [example_value(node) for node in inputs]
    sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    sizes += [value for value in values if isinstance(value, torch.SymInt | torch.SymFloat)]
    return next((size.node.shape_env for size in sizes if not isinstance(size, int)), None)


def _about_layout(guard: object) -> bool:
    """Whether torch asked how a tensor lies in memory: an operator of the graph finds that out by itself each time."""
    return bool(_LAYOUT.search(str(getattr(getattr(guard, "sloc", None), "framework_loc", ""))))


def _current(env: ShapeEnv | None, symbol: sympy.Symbol) -> set[sympy.Symbol]:
    """What stands for a symbol since torch found that it equals others; nothing where it is fixed."""
    return set() if env is None else set(env.replace(symbol).free_symbols)


def _depends_on_data(symbol: sympy.Symbol) -> bool:
    """Whether a symbol stands for a number read from a tensor: the graph itself asserts what is assumed of it."""
    return str(symbol).lstrip("z").startswith("u")


def expression_of(expression: sympy.Basic, symbols: Mapping[sympy.Symbol, Expression]) -> Expression:
    """A sympy expression as data.

    Raises:
        ConditionError: when it has an operator or symbol without a form.
    """
    if expression in symbols:
        return symbols[expression]
    if getattr(expression, "is_Integer", False):
        return int(expression)
    if getattr(expression, "is_Rational", False):
        return ["/", int(expression.p), int(expression.q)]
    if getattr(expression, "is_Float", False):
        return float(expression)
    kind = type(expression).__name__
    operands = [expression_of(operand, symbols) for operand in expression.args]
    if kind == "Identity":
        return operands[0]
    if kind in ("Pow", "PowByNatural") and isinstance(operands[1], int) and 0 < operands[1] <= 8:
        name, operands = "*", operands[:1] * operands[1]
    elif (found := _NAMES.get(kind)) is None:
        raise ConditionError(f"the condition {expression} has no form that can be kept")
    else:
        name = found
    if len(operands) == 1:
        return [name, operands[0]]
    result = operands[0]
    for operand in operands[1:]:
        result = [name, result, operand]
    return result
