"""What the values of a manifest may be: types with ranges, and checks of the facts and plans in it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from fxq.calls.conditions import MOST_CONDITIONS
from fxq.core.config import Scheme
from fxq.core.ir import LayerPlan
from fxq.dtypes import DTYPES
from fxq.numerics import MAX_WIDTH
from fxq.runtime.reading import MAX_INTEGER, MAX_NAME, MAX_RANK, MAX_TENSORS


def _dtype_name(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"{name[:40]!r} is no dtype of torch that a tensor may have")
    return name


def _printable(text: str) -> str:
    if not all(character.isprintable() or character in "\n\t" for character in text):
        raise ValueError("a text with control characters, which could steer a terminal")
    return text


DtypeName = Annotated[str, AfterValidator(_dtype_name)]
Text = Annotated[str, Field(max_length=2000), AfterValidator(_printable)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_printable)]
Size = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Shape = Annotated[tuple[Size, ...], Field(max_length=MAX_RANK)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Value = bool | int | float | Text | None

MAX_FEATURES = 2**31 - 1
_Class = TypeVar("_Class")


class SchemaError(ValueError):
    """A value of another type or outside its range; the message names its place."""


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def validated(cls: type[_Class], data: object) -> _Class:
    """``data``, values of JSON, as an instance of a dataclass; nothing is converted.

    Raises:
        SchemaError: naming the first place where it does not fit.
    """
    try:
        adapter: TypeAdapter[_Class] = _adapter(cls)  # type: ignore[arg-type]
        found = adapter.validate_json(json.dumps(data), strict=True)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise SchemaError(f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg'][:200]}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Constant:
    value: Value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Number:
    type: Literal["int", "float", "bool"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text:
    text: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RecipeFacts:
    name: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    place: Name
    error: Annotated[float, Field(ge=0)] | None
    reason: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attention:
    scheme: Text
    max_error: Finite
    layers: Annotated[list[_Chosen], Field(max_length=MAX_TENSORS)]


_Sizes = Annotated[list[Size | None], Field(max_length=MAX_RANK)] | _Constant | _Number | _Text | None
_Names = Annotated[list[Name], Field(max_length=MAX_TENSORS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Facts:
    """The facts that code reads; others may stand beside them."""

    recipe: _RecipeFacts
    calibration_hash: Text
    inputs: Annotated[list[_Sizes], Field(max_length=MAX_TENSORS)]
    passes: Annotated[list[tuple[Text, Size]], Field(max_length=1000)]
    environment: dict[Name, Text]
    dtypes: Annotated[list[DtypeName | None], Field(max_length=MAX_TENSORS)] | None = None
    conditions: Annotated[list[object], Field(max_length=MOST_CONDITIONS)] | None = None
    sensitivity: Annotated[list[float], Field(max_length=MAX_TENSORS)] | None = None
    chunk_weights: Annotated[list[float], Field(max_length=MAX_TENSORS)] | None = None
    never_called: _Names = dataclasses.field(default_factory=list)
    attention: _Attention | None = None


def check_facts(facts: dict[str, object]) -> None:
    """Check the facts of a manifest.

    Raises:
        SchemaError: naming the fact.
    """
    try:
        validated(_Facts, facts)
    except SchemaError as error:
        raise SchemaError(f"facts.{error}") from None
    for name in ("remarks", "notes", "parallel"):
        if name in facts:
            raise SchemaError(f"facts.{name}: a module that is optimized or split over ranks is never saved")


def check_plan(plan: LayerPlan) -> None:
    """Check types and ranges of a plan that was read from a file.

    Raises:
        SchemaError: naming the field.
    """
    where = f"the plan of {str(plan.layer)[:MAX_NAME]}"
    for field in ("layer", "reason", "outlier_reason", "transform"):
        value = getattr(plan, field)
        if not isinstance(value, str) or len(value) > 2000:
            raise SchemaError(f"{where}: {field} is no short text")
        try:
            _printable(value)
        except ValueError as error:
            raise SchemaError(f"{where}: {field} is {error}") from None
    for field in ("in_features", "out_features"):
        least = 0 if plan.scheme is None else 1
        if type(value := getattr(plan, field)) is not int or not least <= value <= MAX_FEATURES:
            raise SchemaError(f"{where}: {field} = {str(value)[:40]}, expected {least}..{MAX_FEATURES}")
    for field in ("output_sqnr", "bias_deviation"):
        value = getattr(plan, field)
        if value is not None and type(value) not in (int, float):
            raise SchemaError(f"{where}: {field} is no number")
    last = -1
    for channel in plan.outliers:
        if type(channel) is not int or not last < channel < plan.in_features:
            raise SchemaError(f"{where}: outliers are no ascending channels below {plan.in_features}")
        last = channel
    if plan.scheme is not None:
        _check_scheme(plan.scheme, where)
        if plan.in_features > MAX_WIDTH or plan.split < 1:
            raise SchemaError(f"{where}: {plan.in_features} inputs with {len(plan.outliers)} outliers cannot be exact")


def _check_scheme(scheme: Scheme, where: str) -> None:
    for field in dataclasses.fields(Scheme):
        value, default = getattr(scheme, field.name), field.default
        wanted = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in wanted or (isinstance(value, float) and not math.isfinite(value)):
            raise SchemaError(f"{where}: scheme.{field.name} is {str(value)[:40]!r}")
