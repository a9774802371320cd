"""What a call of an allowed operator may be given: checked against its schema before anything is run.

Nothing is computed here. Numbers that are computed at a call, from sizes, get a bound on their bits instead: a graph
must not make a number that takes long to compute or to store.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload

from fxq.cache.named import codecs_from_text
from fxq.cache.settings import CacheSettingsError
from fxq.dtypes import DTYPES
from fxq.export.graph.operators import ARITHMETIC_NAMES
from fxq.runtime.reading import MAX_INTEGER

Kind = Literal["tensor", "tensors", "number", "any", "nothing"]

MAX_BITS = 2048
"""Most bits of a whole number computed from sizes; an input or a size has 63, a float that becomes whole 1024."""
MAX_TEXT = 2000
MAX_ITEMS = 100_000
"""Most entries of a list."""

LAYOUTS: dict[str, torch.layout] = {"strided": torch.strided}
MEMORY_FORMATS: dict[str, torch.memory_format] = {
    str(form).removeprefix("torch."): form
    for form in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}

_DTYPE_SET: frozenset[torch.dtype] = frozenset(DTYPES.values())
_TEXTS = {
    "approximate": r"none|tanh",
    "rounding_mode": r"trunc|floor",
    "equation": r"[A-Za-z., >-]{1,200}",
    "padding": r"same|valid",
    "mode": r"reduced|complete|r|constant|reflect|replicate|circular",
    "padding_side": r"left|right",
    "reduce": r"sum|prod|mean|amax|amin|add|multiply",
    "indexing": r"ij|xy",
    "norm": r"backward|forward|ortho",
    "side": r"left|right",
    "codec": r"[\w{}\[\]\":,. +-]{1,1000}",
    "assert_msg": rf"[\s\S]{{0,{MAX_TEXT}}}",
}
"""Text arguments by name and what they may be."""

_FIXED: dict[str, dict[str, tuple[object, ...]]] = {
    "aten.dropout.default": {"train": (False,)},
    "aten.feature_dropout.default": {"train": (False,)},
    "aten.batch_norm.default": {"training": (False,)},
    **{
        f"aten.{name}.default": {"interpolation_mode": (0, 1, 2), "padding_mode": (0, 1, 2)}
        for name in ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
    },
}
"""Arguments that may have some constants only: no random numbers, no hidden writes, no codes without a meaning."""


class ArgumentError(ValueError):
    """A call that does not fit its operator's schema, or asks for what a bundle must not ask for."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a node's result: its kind, and for numbers a bound on the bits of a whole one."""

    kind: Kind
    bits: int = 63


TENSOR, TENSORS, NUMBER, NOTHING, ANY = (
    Value("tensor"),
    Value("tensors"),
    Value("number"),
    Value("nothing"),
    Value("any"),
)


def check_call(
    target: Any, args: Sequence[object], kwargs: Mapping[str, object], known: Mapping[fx.Node, Value]
) -> Value:
    """Check a call and say what it gives.

    Args:
        target: of the list of allowed operators.
        args: constants, nodes, and lists of them.
        kwargs: alike.
        known: what earlier nodes give.

    Raises:
        ArgumentError: naming the argument.
    """
    if isinstance(target, OpOverload):
        return _check_operator(target, args, kwargs, known)
    if kwargs:
        raise ArgumentError(f"{ARITHMETIC_NAMES[target]} takes no keywords")
    return _check_arithmetic(target, args, known)


def _check_operator(
    target: OpOverload, args: Sequence[object], kwargs: Mapping[str, object], known: Mapping[fx.Node, Value]
) -> Value:
    declared, name = target._schema.arguments, str(target)
    positional = [argument for argument in declared if not argument.kwarg_only]
    if len(args) > len(positional):
        raise ArgumentError(f"{name} takes {len(positional)} positional arguments, not {len(args)}")
    given: dict[str, object] = {argument.name: value for argument, value in zip(positional, args, strict=False)}
    for key, value in kwargs.items():
        if key in given or all(argument.name != key for argument in declared):
            raise ArgumentError(f"{name} has no argument {key!r}, or it is given twice")
        given[key] = value
    fixed = {} if name.endswith("dropout.default") and given.get("p") == 0 else _FIXED.get(name, {})
    for argument in declared:
        if argument.name not in given:
            if not argument.has_default_value():
                raise ArgumentError(f"{name} needs the argument {argument.name!r}")
            value = argument.default_value
        else:
            value = given[argument.name]
            _check(str(argument.real_type), argument.name, value, known, name)
        if argument.name in fixed and (isinstance(value, fx.Node) or value not in fixed[argument.name]):
            raise ArgumentError(f"{name}: {argument.name} is {value!r}, a bundle may only have {fixed[argument.name]}")
    if name == "aten.instance_norm.default" and given.get("use_input_stats") and given.get("running_mean") is not None:
        raise ArgumentError(f"{name} would write its running statistics")
    if name == "fxq.attention_packed.default":
        try:
            codecs_from_text(str(given["codec"]))
        except CacheSettingsError as error:
            raise ArgumentError(f"{name}: {error}") from None
    results = [str(result.real_type) for result in target._schema.returns]
    if not results:
        return NOTHING
    if len(results) > 1 or results[0].startswith("List["):
        return TENSORS
    return TENSOR if results[0] == "Tensor" else NUMBER


def _check(kind: str, name: str, value: object, known: Mapping[fx.Node, Value], call: str) -> None:
    if kind.startswith("Optional["):
        if value is None:
            return
        kind = kind.removeprefix("Optional[").removesuffix("]")
    if kind.startswith("List["):
        inner = kind.removeprefix("List[").removesuffix("]")
        if isinstance(value, fx.Node) and inner == "Tensor" and known[value].kind in ("tensors", "any"):
            return
        items = value if isinstance(value, list | tuple) else [value]
        if len(items) > MAX_ITEMS or (items is not value and inner.endswith("Tensor]")):
            raise ArgumentError(f"{call}: {name} is no list of at most {MAX_ITEMS}")
        for item in items:
            _check(inner, name, item, known, call)
        return
    if not _FITS[kind](value, known) if kind in _FITS else not _fits_text(name, value):
        shown = value.name if isinstance(value, fx.Node) else repr(value)[:80]
        raise ArgumentError(f"{call}: {name} is {shown}, expected {kind}")
    if name in _AXES and isinstance(value, fx.Node):
        raise ArgumentError(
            f"{call}: {name} is {value.name}, expected a number: no capture computes which axis is meant"
        )
    if name == "pin_memory" and value is not False:
        raise ArgumentError(f"{call}: pin_memory is {value!r}, a bundle may only have False")


def _is_number(value: object, known: Mapping[fx.Node, Value]) -> bool:
    return isinstance(value, fx.Node) and known[value].kind in ("number", "any")


def _fits_int(value: object, known: Mapping[fx.Node, Value]) -> bool:
    return (type(value) is int and abs(value) <= MAX_INTEGER) or _is_number(value, known)


def _fits_scalar(value: object, known: Mapping[fx.Node, Value]) -> bool:
    return isinstance(value, bool | float) or _fits_int(value, known)


def _fits_bool(value: object, known: Mapping[fx.Node, Value]) -> bool:
    return isinstance(value, bool) or _is_number(value, known)


def _fits_tensor(value: object, known: Mapping[fx.Node, Value]) -> bool:
    if isinstance(value, fx.Node):
        return known[value].kind in ("tensor", "number", "any")
    return _fits_scalar(value, known)


def _fits_text(name: str, value: object) -> bool:
    return isinstance(value, str) and name in _TEXTS and re.fullmatch(_TEXTS[name], value) is not None


_FITS: dict[str, Callable[[object, Mapping[fx.Node, Value]], bool]] = {
    "Tensor": _fits_tensor,
    "int": _fits_int,
    "SymInt": _fits_int,
    "float": _fits_scalar,
    "number": _fits_scalar,
    "bool": _fits_bool,
    "ScalarType": lambda value, known: isinstance(value, torch.dtype) and value in _DTYPE_SET,
    "Layout": lambda value, known: isinstance(value, torch.layout) and value in LAYOUTS.values(),
    "MemoryFormat": lambda value, known: isinstance(value, torch.memory_format),
    "Device": lambda value, known: isinstance(value, torch.device),
}


_AXES = frozenset({"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"})
"""Arguments that say which axis of a tensor is meant."""

_UNARY = frozenset(
    {f"operator.{name}" for name in ("neg", "pos", "abs")}
    | {f"torch.{name}" for name in ("sym_int", "sym_float", "sym_not", "_sym_sqrt", "sym_sqrt")}
    | {"math.ceil", "math.floor", "math.trunc"}
)


def _check_arithmetic(target: Callable[..., object], args: Sequence[object], known: Mapping[fx.Node, Value]) -> Value:
    name = ARITHMETIC_NAMES[target]
    if target is operator.getitem and len(args) == 2 and isinstance(args[0], fx.Node):
        if known[args[0]].kind not in ("tensors", "any") or type(args[1]) is not int or abs(args[1]) > MAX_ITEMS:
            raise ArgumentError("operator.getitem takes one result, by its number, of an operator that has several")
        return TENSOR
    if name == "torch.sym_sum" and len(args) == 1 and isinstance(args[0], list | tuple):
        bits = [_bits(item, known, name) for item in args[0]]
        return _number(max(bits, default=1) + len(bits).bit_length(), name)
    wanted = 1 if name in _UNARY else 3 if name == "torch.sym_ite" else 2
    if len(args) != wanted or target is operator.getitem:
        raise ArgumentError(f"{name} takes {wanted} numbers, not {str(args)[:80]}")
    bits = [_bits(item, known, name) for item in args]
    if target is operator.mul:
        return _number(sum(bits), name)
    if target is operator.pow:
        exponent = args[1] if len(args) == 2 else None
        if isinstance(exponent, bool) or not isinstance(exponent, int | float) or abs(exponent) > 64:
            raise ArgumentError("operator.pow takes a constant exponent of at most 64")
        return _number(bits[0] * max(1, int(abs(exponent)) + 1), name)
    if name in ("torch.sym_int", "math.ceil", "math.floor", "math.trunc"):
        return _number(max(1024, *bits), name)
    return _number(max(bits) + 1, name)


def _number(bits: int, name: str) -> Value:
    if bits > MAX_BITS:
        raise ArgumentError(f"{name} could give a number of {bits} bits; a bundle computes with at most {MAX_BITS}")
    return Value("number", bits)


def _bits(value: Any, known: Mapping[fx.Node, Value], name: str) -> int:
    if _is_number(value, known):
        return known[value].bits
    if not _fits_scalar(value, known):
        shown = value.name if isinstance(value, fx.Node) else repr(value)[:80]
        raise ArgumentError(f"{name} takes numbers, not {shown}")
    return abs(value).bit_length() if isinstance(value, int) else 1
