"""Presets, and recipes on disk (TOML or JSON, one format in two spellings)."""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import tomllib
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fxq.core.config import Recipe, RecipeError, Rule, Scheme
from fxq.core.method import Method
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.recipe_files import MAX_RECIPE_BYTES, check_content
from fxq.runtime.reading import parse_json, read_bytes

_T = TypeVar("_T")

METHODS: dict[str, type[Method]] = {cls.__name__: cls for cls in (MinMax, RangeSearch, AdaRound)}
"""Methods by the name they have in recipe files."""

_KEPT = (
    ("time_embedding*", "time embedding: tiny and sensitive"),
    ("time_projection*", "time projection: tiny and sensitive"),
    ("head*", "prediction head: tiny and sensitive"),
    ("*time_embed*", "time embedding: tiny and sensitive"),
    ("*timestep_embed*", "time embedding: tiny and sensitive"),
    ("*time_proj*", "time projection: tiny and sensitive"),
    ("*delta_embed*", "time embedding: tiny and sensitive"),
    ("proj_out*", "prediction head: tiny and sensitive"),
)
_ONCE = ("text_embedding*", "*cross_attn.k", "*cross_attn.v")


def wan_recipe(
    name: str,
    scheme: Scheme,
    methods: tuple[Method, ...] = (RangeSearch(), AdaRound()),
    weighting: str = "sensitivity",
    seed: int = 0,
) -> Recipe:
    """The default rules for Wan-like transformers around one scheme.

    Time embedding, time projection and prediction head stay in model dtype; text embedding and cross-attention keys
    and values, which run once per prompt, are quantized but not reconstructed (arXiv 2605.21072). These rules hold
    inside wrappers too (``wrapped`` of :class:`~fxq.core.config.Rule`).
    """
    once = dataclasses.replace(scheme, reconstruct=False)
    rules = tuple(Rule(pattern, None, reason, optional=True, wrapped=True) for pattern, reason in _KEPT)
    rules += tuple(Rule(pattern, once, optional=True, wrapped=True) for pattern in _ONCE)
    return Recipe(name=name, rules=(*rules, Rule("*", scheme)), methods=methods, weighting=weighting, seed=seed)


def _without_data(name: str, weight_bits: int) -> Recipe:
    """Inputs of 8 bits with a scale per token; weights of least squared error: nothing is learned from data."""
    scheme = Scheme(weight_bits=weight_bits, per_token=True)
    return wan_recipe(name, scheme, methods=(RangeSearch(),), weighting="uniform")


PRESETS: dict[str, Recipe] = {
    "w8a8": wan_recipe("w8a8", Scheme(weight_bits=8, input_bits=8)),
    "w4a8": wan_recipe("w4a8", Scheme(weight_bits=4, input_bits=8)),
    "w4a6": wan_recipe("w4a6", Scheme(weight_bits=4, input_bits=6)),
    "w8a8-dynamic": _without_data("w8a8-dynamic", 8),
    "w4a8-dynamic": _without_data("w4a8-dynamic", 4),
}
"""Recipes by name; those called ``dynamic`` need no calibration data."""


def single_scale(recipe: Recipe) -> Recipe:
    """The recipe without dual scales."""
    rules = tuple(
        rule
        if rule.scheme is None
        else dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, dual_scale=False))
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, rules=rules)


def with_iterations(recipe: Recipe, iterations: int) -> Recipe:
    """The recipe with another number of reconstruction iterations."""
    methods = tuple(
        dataclasses.replace(m, iterations=iterations) if isinstance(m, AdaRound) else m for m in recipe.methods
    )
    return dataclasses.replace(recipe, methods=methods)


def minmax(recipe: Recipe) -> Recipe:
    """The MinMax baseline of a recipe: same bits and layers, one scale, no search, no reconstruction."""
    return dataclasses.replace(
        single_scale(recipe), name=f"{recipe.name}-minmax", methods=(MinMax(),), weighting="uniform"
    )


def get_recipe(recipe: Recipe | str | pathlib.Path) -> Recipe:
    """A recipe from itself, a preset's name, or a path to a TOML or JSON file.

    Raises:
        RecipeError: when the name is unknown or the file is missing, malformed or has unknown keys.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str) and recipe.lower() in PRESETS:
        return PRESETS[recipe.lower()]
    if not isinstance(recipe, str | os.PathLike):
        raise RecipeError(f"recipe is {type(recipe).__name__}, expected fxq.Recipe, a preset's name or a path")
    path = pathlib.Path(recipe)
    if path.suffix.lower() in (".toml", ".json"):
        return load_recipe(path)
    close = difflib.get_close_matches(str(recipe).lower(), PRESETS, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise RecipeError(
        f"unknown recipe {str(recipe)!r}{hint} Presets: {', '.join(PRESETS)}; a recipe file ends in .toml or .json"
    )


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file; see :func:`recipe_to_json` for its keys.

    Raises:
        RecipeError: naming the file and the key.
    """
    path = pathlib.Path(path)
    try:
        content = read_bytes(path, limit=MAX_RECIPE_BYTES)
        data = tomllib.loads(content.decode("utf-8")) if path.suffix.lower() == ".toml" else parse_json(content)
    except OSError as error:
        raise RecipeError(f"recipe file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"recipe file {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    try:
        check_content(data)
        return recipe_from_json(data)
    except ValueError as error:
        raise RecipeError(f"recipe file {path}: {error}") from error


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """JSON form: the fields of :class:`~fxq.core.config.Recipe`, methods as ``{"method": name, ...options}``."""
    data = dataclasses.asdict(dataclasses.replace(recipe, methods=()))
    data["methods"] = [{"method": type(m).__name__, **dataclasses.asdict(m)} for m in recipe.methods]
    return data


def recipe_from_json(data: Any) -> Recipe:
    """Inverse of :func:`recipe_to_json`; ``rules`` may omit defaults, and a rule without ``scheme`` keeps layers.

    Raises:
        RecipeError: on unknown keys (naming close ones), wrong types or unknown methods.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"a recipe is a table of keys, got {type(data).__name__}")
    _refuse_unknown(data, Recipe, "recipe")
    rules = []
    for i, entry in enumerate(_tables(data, "rules")):
        _refuse_unknown(entry, Rule, f"rules[{i}]")
        scheme = entry.get("scheme")
        if scheme is not None:
            _refuse_unknown(scheme, Scheme, f"rules[{i}].scheme")
            scheme = _validated(Scheme, scheme, f"rules[{i}].scheme")
        rules.append(_validated(Rule, {**entry, "scheme": scheme}, f"rules[{i}]"))
    methods = []
    for i, entry in enumerate(_tables(data, "methods")):
        options = dict(entry)
        name = options.pop("method", None)
        if not isinstance(name, str) or name not in METHODS:
            raise RecipeError(f"methods[{i}]: unknown method {name!r}; known: {', '.join(METHODS)}")
        _refuse_unknown(options, METHODS[name], f"methods[{i}]")
        methods.append(_validated(METHODS[name], options, f"methods[{i}]"))
    rest = {key: value for key, value in data.items() if key not in ("rules", "methods")}
    return _validated(Recipe, {**rest, "rules": tuple(rules), "methods": tuple(methods)}, "recipe")


def _tables(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = data.get(key, [])
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{key}: expected a list of tables")
    return list(entries)


def _refuse_unknown(entry: Any, cls: type[Any], where: str) -> None:
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: expected a table of keys, got {type(entry).__name__}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")


def _validated(cls: type[_T], data: dict[str, Any], where: str) -> _T:
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}{'.' + place if place else ''}: {first['msg']}") from None
