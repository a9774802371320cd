"""Recipe files as text: what one may ask for, work in proportion to the model whoever wrote it, and how one is written.

Recipes themselves are made of them in :mod:`fxq.recipes`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fxq.core.config import RecipeError
from fxq.runtime.messages import did_you_mean

_T = TypeVar("_T")

MAX_RECIPE_BYTES = 1 << 20
MAX_NUMBER = 10_000_000
"""Largest number of iterations, rows and the like."""
MAX_DEPTH = 20
MAX_PATTERN = 500
MAX_BASES = 20
"""Most files that one extends through others."""
MAX_REPEATS = 6
"""Most parts of a regular expression that match texts of any length: each multiplies the time of a mismatch."""
_SEED = "seed"


class RecipeFileError(ValueError):
    """A recipe file that asks for too much."""


def check_content(data: object) -> None:
    """Check numbers, nesting and patterns of a parsed recipe file.

    Raises:
        RecipeFileError: naming the key.
    """
    stack: list[tuple[str, object, int]] = [("recipe", data, 0)]
    while stack:
        place, value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise RecipeFileError(f"{place[:200]}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            stack.extend((f"{place}.{str(key)[:80]}", item, depth + 1) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend((f"{place}[{i}]", item, depth + 1) for i, item in enumerate(value))
        elif isinstance(value, int | float) and not (place.endswith(_SEED) and isinstance(value, int)):
            if not math.isfinite(value) or abs(value) > MAX_NUMBER:
                raise RecipeFileError(f"{place[:200]} = {str(value)[:40]}: expected at most {MAX_NUMBER}")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise RecipeFileError(f"{place[:200]}: a seed has at most 63 bits")
        elif isinstance(value, str) and place.endswith(".pattern"):
            check_pattern(value, place)


def check_pattern(pattern: str, place: str) -> None:
    """Refuse a pattern whose search can take longer than any model's names warrant.

    Raises:
        RecipeFileError: when it is long, or a regular expression repeats what repeats itself.
    """
    if len(pattern) > MAX_PATTERN:
        raise RecipeFileError(f"{place[:200]}: a pattern of {len(pattern)} characters, at most {MAX_PATTERN}")
    if not pattern.startswith("re:"):
        return
    try:
        re.compile(pattern[3:])
    except (re.error, RecursionError, OverflowError):
        return  # told with its cause where rules are made
    parser: Any = re._parser  # type: ignore[attr-defined]
    repeats = _repeats(parser.parse(pattern[3:]), False)
    if repeats > MAX_REPEATS:
        raise RecipeFileError(
            f"{place[:200]}: pattern {pattern[:80]!r} has repetitions in repetitions, or more than {MAX_REPEATS}, and "
            "may take for ever; write several rules"
        )


def _repeats(parsed: Any, inside: bool) -> int:
    """Number of parts of variable length in a parsed expression; one more than allowed when one lies in another."""
    found = 0
    for _, content in parsed:
        bounds = isinstance(content, tuple) and len(content) == 3 and isinstance(content[0], int)
        varies, repeats = bounds and content[0] != content[1], bounds and content[1] > 1
        if varies and inside:
            return MAX_REPEATS + 1
        found += varies
        for part in _parts(content):
            found += _repeats(part, inside or repeats)
    return found


def _parts(content: object) -> list[object]:
    """Parsed expressions in what a token holds."""
    if hasattr(content, "getwidth"):
        return [content]
    if isinstance(content, tuple | list):
        return [part for item in content for part in _parts(item)]
    return []


def to_toml(data: Mapping[str, Any]) -> str:
    """JSON values as TOML: plain keys, then tables, then a ``[[key]]`` for each of a list. What is None is left out.

    Raises:
        TypeError: when a value has no form in TOML.
    """
    tables = {key: value for key, value in data.items() if _is_tables(value)}
    sections = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    lines = list(_pairs({key: value for key, value in data.items() if key not in tables and key not in sections}))
    for key, section in sections.items():
        lines += ["", f"[{_key(key)}]", *_pairs(section)]
    for key, entries in tables.items():
        for entry in entries:
            lines += ["", f"[[{_key(key)}]]", *_pairs(entry)]
    return "\n".join(lines) + "\n"


def _is_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _pairs(table: Mapping[str, object]) -> Iterator[str]:
    yield from (f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_pairs(value))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"{value!r} has no form in TOML")


def tables(data: Mapping[str, object], key: str) -> list[dict[str, object]]:
    """The tables that a recipe has under a key.

    Raises:
        RecipeError: when it is no list of them.
    """
    entries = data.get(key, [])
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{key}: expected a list of tables")
    return list(entries)


def refuse_unknown(entry: object, cls: type[Any], where: str, *others: str) -> None:
    """Refuse keys that are neither fields of a dataclass nor among ``others``.

    Raises:
        RecipeError: naming the key and close ones.
    """
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: expected a table of keys, got {type(entry).__name__}")
    known = [*(field.name for field in dataclasses.fields(cls)), *others]
    for key in entry:
        if key not in known:
            hint = did_you_mean(key, known, 0.5) or f"known: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key {key!r}; {hint}")


def validated(cls: type[_T], data: object, where: str) -> _T:
    """A table as an instance of a dataclass.

    Raises:
        RecipeError: naming the first key whose value does not fit.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}{'.' + place if place else ''}: {first['msg']}") from None
