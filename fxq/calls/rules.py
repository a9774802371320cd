"""What a captured graph may be called with, as data, and the check of a call against it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx._pytree import tree_flatten_spec
from torch.utils import _pytree as pytree

from fxq.calls.conditions import ConditionError, Expression, check_conditions, evaluator, holds, shown_inputs, text
from fxq.dtypes import DTYPES, dtype_name

Sizes = list[list[int | None] | dict[str, Any] | None]
"""Per flat input its shape with None for dynamic dimensions, ``{"value": v}`` for a constant, ``{"type": t}`` for a
number that may vary (``t`` "int", "float" or "bool"), ``{"text": s}`` for a dtype, device or the like, or None."""

_NUMBERS: dict[str, tuple[type, ...]] = {
    "int": (int, torch.SymInt),
    "float": (float, torch.SymFloat),
    "bool": (bool, torch.SymBool),
}
_KINDS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class InputError(ValueError):
    """A call whose arguments do not fit the captured graph."""


@dataclasses.dataclass(frozen=True)
class CallRules:
    """What a graph was captured for.

    Args:
        names: of the flat inputs.
        sizes: see :data:`Sizes`.
        dtypes: torch's name of each tensor input's dtype, None where it is not known or the input is no tensor.
        conditions: see :mod:`fxq.calls.conditions`; all of them hold for calls that the graph computes rightly.
    """

    names: tuple[str, ...]
    sizes: Sizes
    dtypes: tuple[str | None, ...]
    conditions: tuple[Expression, ...] = ()

    def __post_init__(self) -> None:
        ranks = [len(size) if isinstance(size, list) else None for size in self.sizes]
        checks = [(evaluator(condition), condition) for condition in check_conditions(list(self.conditions), ranks)]
        object.__setattr__(self, "_checks", checks)
        object.__setattr__(self, "_plans", [self._plan(i) for i in range(len(self.names))])

    def _plan(self, i: int) -> tuple[int, tuple[tuple[int, int], ...], torch.dtype | None] | None:
        """Rank, fixed dimensions and dtype of a tensor input, for the check of every call."""
        size, dtype = self.sizes[i], self.dtypes[i]
        if not isinstance(size, list):
            return None
        expected = None if dtype is None else DTYPES[dtype]
        return len(size), tuple((d, s) for d, s in enumerate(size) if s is not None), expected

    def __deepcopy__(self, memo: dict[int, object]) -> CallRules:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return CallRules, (self.names, self.sizes, self.dtypes, self.conditions)

    def to_json(self) -> dict[str, object]:
        """The entries of a module's facts: ``inputs``, ``dtypes`` and ``conditions``."""
        return {"inputs": self.sizes, "dtypes": list(self.dtypes), "conditions": list(self.conditions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], names: Sequence[str]) -> CallRules:
        """Rules from facts, which a file may bring; facts of older versions state ``inputs`` alone.

        Raises:
            ValueError: when the entries do not describe ``names``.
        """
        sizes, count = data.get("inputs", []), len(names)
        if not isinstance(sizes, list) or len(sizes) != count or not all(map(_is_size, sizes)):
            raise ValueError(f"the facts describe {str(sizes)[:200]} as inputs, the graph has {count}")
        dtypes = data.get("dtypes", [None] * count)
        if not isinstance(dtypes, list) or len(dtypes) != count or not all(map(_is_dtype, dtypes)):
            raise ValueError(f"the facts describe {str(dtypes)[:200]} as dtypes of {count} inputs")
        try:
            return cls(tuple(names), sizes, tuple(dtypes), tuple(data.get("conditions", [])))
        except (ConditionError, TypeError) as error:
            raise ValueError(f"the facts' conditions on inputs are damaged: {error}") from error

    def check(self, leaves: Sequence[object]) -> None:
        """Compare flat inputs with what the graph was captured for.

        Raises:
            InputError: naming the input, what it is and what the graph was captured for.
        """
        for i, plan in enumerate(self._plans):  # type: ignore[attr-defined]
            value = leaves[i]
            if plan is None:
                if self.sizes[i] is not None:
                    self._check_constant(i, value)
                continue
            rank, fixed, dtype = plan
            if not isinstance(value, Tensor) or len(shape := value.shape) != rank:
                self._refuse_shape(i, value)
            for dim, size in fixed:
                if shape[dim] != size:
                    self._refuse_shape(i, value)
            if dtype is not None and value.dtype != dtype:
                raise InputError(
                    f"input {self.names[i]} is {dtype_name(value.dtype)}, the graph was captured for "
                    f"{dtype_name(dtype)}: convert it before the call, or quantize with an example of that dtype"
                )
        for evaluate, condition in self._checks:  # type: ignore[attr-defined]
            if not holds(evaluate, leaves):
                self._refuse_condition(condition, leaves)

    def flat(
        self, args: Sequence[object], kwargs: Mapping[str, object] | None, spec: pytree.TreeSpec | None
    ) -> Sequence[object]:
        """A call's flat inputs, checked, in the order of ``spec``; without one ``args`` are they.

        Raises:
            InputError: as :func:`flatten` and :meth:`check`.
        """
        leaves = args if spec is None else flatten(args, kwargs or {}, spec)
        self.check(leaves)
        return leaves

    def _refuse_shape(self, i: int, value: object) -> NoReturn:
        size = self.sizes[i]
        assert isinstance(size, list)
        shown = ", ".join("any" if w is None else str(w) for w in size)
        if not isinstance(value, Tensor):
            raise InputError(
                f"input {self.names[i]} is {value!r}, the graph was captured for a tensor of shape [{shown}]"
            )
        raise InputError(
            f"input {self.names[i]} has shape {list(value.shape)}, the graph was captured for [{shown}]; "
            "capture it with dynamic_shapes that allow this size"
        )

    def _refuse_condition(self, condition: Expression, leaves: Sequence[object]) -> NoReturn:
        raise InputError(
            f"the graph was captured for {text(condition, self.names)}; this call has "
            f"{shown_inputs(condition, self.names, leaves)}: a branch or a reshape of the model depends on it, so the "
            "graph would compute something else. Quantize with an example and dynamic_shapes of this kind"
        )

    def _check_constant(self, i: int, value: object) -> None:
        want = self.sizes[i]
        assert isinstance(want, dict)
        shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        if "type" in want:
            if not isinstance(value, _NUMBERS[want["type"]]) or (isinstance(value, bool) and want["type"] != "bool"):
                raise InputError(f"input {self.names[i]} is {shown}, the graph was captured for any {want['type']}")
            return
        if "text" in want:
            same = isinstance(value, _KINDS) and str(value) == want["text"]
        else:
            same = not isinstance(value, Tensor) and type(value) is type(want["value"]) and _equal(value, want["value"])
        if not same:
            captured = want["text"] if "text" in want else repr(want["value"])
            raise InputError(
                f"input {self.names[i]} is {shown}, the graph was captured for {captured}: what is not a tensor "
                "is a constant of the graph; quantize once for each value that calls use"
            )


def _equal(a: object, b: object) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _is_size(value: object) -> bool:
    """Whether a file's entry is one of :data:`Sizes`."""
    if isinstance(value, list):
        return all(s is None or (isinstance(s, int) and not isinstance(s, bool) and s >= 0) for s in value)
    if isinstance(value, dict) and len(value) == 1:
        (kind, content), *_ = value.items()
        if kind == "value":
            return content is None or isinstance(content, bool | int | float | str)
        return isinstance(content, str) and (kind == "text" or (kind == "type" and content in _NUMBERS))
    return value is None


def _is_dtype(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in DTYPES)


def constant_entry(value: object) -> dict[str, Any] | None:
    """How :data:`Sizes` states an input that is no tensor; None when nothing is known of it."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, _KINDS):
        return {"text": str(value)}
    return next(({"type": kind} for kind, types in _NUMBERS.items() if isinstance(value, types)), None)


def flatten(args: Sequence[object], kwargs: Mapping[str, object], spec: pytree.TreeSpec) -> Sequence[object]:
    """A call as flat inputs in the order of ``spec``; keys of nested dicts may come in any order.

    Raises:
        InputError: when it is nested in another way.
    """
    call = (tuple(args), dict(kwargs))
    leaves, found = pytree.tree_flatten(call)
    if found == spec:
        return leaves
    try:
        ordered: list[object] = tree_flatten_spec(call, spec)
    except (LookupError, TypeError, ValueError, AttributeError):
        ordered = []
    if len(ordered) != len(leaves):
        raise InputError(f"arguments are nested in another way than the example: {found}, expected {spec}")
    return ordered


def bind(
    names: Sequence[str], spec: pytree.TreeSpec, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of a call as the example had them, positional or by keyword.

    Args:
        names: of the captured call's arguments.
        spec: structure of (args, kwargs) of the example.
        args: positional arguments of the call.
        kwargs: its keyword arguments.

    Raises:
        InputError: when names or number differ from the example's.
    """
    missing = [name for name in names[len(args) :] if name not in kwargs]
    unknown = [name for name in kwargs if name not in names[len(args) :]]
    if missing or unknown or len(args) > len(names):
        raise InputError(
            f"arguments do not fit the captured call {tuple(names)}: {len(args)} positional, missing {missing}, "
            f"unknown {unknown}; every call must use the arguments of the example"
        )
    values = [*args, *(kwargs[name] for name in names[len(args) :])]
    positional = spec.child(0).num_children
    return tuple(values[:positional]), dict(zip(names[positional:], values[positional:], strict=True))
