"""Recipes on disk (TOML or JSON, one format in two spellings)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxq import plugins
from fxq.cache.settings import CacheSettingsError, policy_from_json, policy_to_json
from fxq.core.config import Budget, Recipe, RecipeError, Rule, Scheme
from fxq.core.facts import Facts
from fxq.core.ir import planned
from fxq.core.method import AttentionScheme, Method
from fxq.core.pipeline import Transform
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.gram_adaround import GramAdaRound
from fxq.passes.methods.input_search import InputSearch
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.passes.methods.refit import RefitScales
from fxq.passes.methods.signround import SignRound
from fxq.passes.transforms.balance import Balance
from fxq.passes.transforms.conv_rot import ConvRot
from fxq.passes.transforms.low_rank import LowRank
from fxq.passes.transforms.rotate import Rotate
from fxq.passes.transforms.smooth import Smooth
from fxq.presets import PRESETS
from fxq.recipe_files import MAX_BASES, MAX_RECIPE_BYTES, check_content, refuse_unknown, tables, to_toml, validated
from fxq.runtime.messages import did_you_mean
from fxq.runtime.reading import parse_json, read_bytes

_SHIPPED = (MinMax, RangeSearch, InputSearch, AdaRound, GPTQ, CoordinateDescent, RefitScales, SignRound, GramAdaRound)
METHODS: dict[str, type[Method]] = {cls.__name__: cls for cls in _SHIPPED}
"""The shipped methods by the name they have in recipe files; others come by :mod:`fxq.plugins`."""

TRANSFORMS: dict[str, type[Transform]] = {cls.__name__: cls for cls in (Rotate, ConvRot, Smooth, Balance, LowRank)}
"""The transforms by the name they have in recipe files."""


def plain_recipe(module: fx.GraphModule) -> Recipe:
    """The recipe of a quantized module with a rule by name for each of its linears and no budget.

    It gives the same integers from the same data without a search. Where chunks are weighed by sensitivities these have
    to be given to :func:`fxq.quantize` too: they are measured before widths are chosen.

    Raises:
        RecipeError: when the recipe has a method that recipe files do not know.
        ValueError: when fxq did not make the module.
    """
    recipe = recipe_from_json(dict(Facts.of(module).recipe))
    plans = [plan for plan, _ in planned(module).values()]
    rules = tuple(Rule(plan.layer, plan.scheme, "" if plan.scheme else plan.reason) for plan in plans)
    return dataclasses.replace(recipe, rules=rules, budget=None)


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
    close = did_you_mean(str(recipe).lower(), PRESETS)
    hint = f"; {close}" if close else "."
    raise RecipeError(
        f"unknown recipe {str(recipe)!r}{hint} Presets: {', '.join(PRESETS)}; a recipe file ends in .toml or .json"
    )


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file; docs/recipes.md lists its keys.

    Raises:
        RecipeError: naming the file and the key.
    """
    return _load(pathlib.Path(path), None, ())


def _load(path: pathlib.Path, folder: pathlib.Path | None, extending: tuple[pathlib.Path, ...]) -> Recipe:
    """A recipe file that lies in ``folder``, if given, and that the files ``extending`` extend one after the other."""
    try:
        content = read_bytes(path, folder, MAX_RECIPE_BYTES)
        data = tomllib.loads(content.decode("utf-8")) if path.suffix.lower() == ".toml" else parse_json(content)
    except OSError as error:
        raise RecipeError(f"recipe file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"recipe file {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    try:
        check_content(data)
        return _recipe(data, (*extending, path))
    except ValueError as error:
        raise RecipeError(f"recipe file {path}: {error}") from error


def recipe_to_json(recipe: Recipe) -> dict[str, object]:
    """JSON form: the fields of :class:`~fxq.core.config.Recipe`, methods as ``{"method": name, ...options}``."""
    plain = dataclasses.replace(recipe, methods=(), transforms=(), cache=None, budget=None, attention=None)
    data = dataclasses.asdict(plain)
    del data["cache"], data["budget"], data["transforms"], data["attention"]
    if recipe.max_rows is None:
        del data["max_rows"]
    if not recipe.all_rows:
        del data["all_rows"]
    if recipe.budget is not None:
        data["budget"] = {key: value for key, value in dataclasses.asdict(recipe.budget).items() if value is not None}
    if recipe.cache is not None:
        data["cache"] = policy_to_json(recipe.cache)
    if recipe.attention is not None:
        data["attention"] = dataclasses.asdict(recipe.attention) | {"keep": list(recipe.attention.keep)}
    data["methods"] = _named("method", recipe.methods)
    if recipe.transforms:
        data["transforms"] = _named("transform", recipe.transforms)
    return data


def _named(key: str, steps: Sequence[Method | Transform]) -> list[dict[str, object]]:
    return [{key: type(step).__name__, **dataclasses.asdict(step)} for step in steps]


def recipe_to_toml(recipe: Recipe) -> str:
    """The text of a recipe file that :func:`load_recipe` reads back as an equal recipe; rules leave out defaults."""
    rules = [dataclasses.asdict(rule) for rule in recipe.rules]
    defaults = {f.name: f.default for f in dataclasses.fields(Rule) if f.default is not dataclasses.MISSING}
    said = [
        {key: value for key, value in rule.items() if key not in defaults or value != defaults[key]} for rule in rules
    ]
    return to_toml(recipe_to_json(recipe) | {"rules": said})


def recipe_from_json(data: object) -> Recipe:
    """Inverse of :func:`recipe_to_json`; ``rules`` may omit defaults, and a rule without ``scheme`` keeps layers.

    With ``extends`` the data say only what is to be other than in a preset: single keys replace the preset's, so do
    ``methods`` and ``transforms`` as a whole, and ``rules`` come before the preset's.

    Raises:
        RecipeError: on unknown keys (naming close ones), wrong types, unknown methods or an unknown preset.
    """
    return _recipe(data, ())


def _recipe(data: object, files: tuple[pathlib.Path, ...]) -> Recipe:
    """:func:`recipe_from_json` of what the last of ``files`` says, which the ones before extend in turn."""
    if not isinstance(data, dict):
        raise RecipeError(f"a recipe is a table of keys, got {type(data).__name__}")
    if "extends" in data:
        data = dict(data)
        base = _base(data.pop("extends"), files)
        own = _parsed(data)
        known = {field.name: getattr(base, field.name) for field in dataclasses.fields(Recipe)}
        return validated(Recipe, known | own | {"rules": (*own.get("rules", ()), *base.rules)}, "recipe")
    return validated(Recipe, {"rules": (), "methods": (), **_parsed(data)}, "recipe")


def _base(name: object, files: tuple[pathlib.Path, ...]) -> Recipe:
    """What ``extends`` names: a preset, or a recipe file beside the file that says so."""
    if isinstance(name, str) and name.lower() in PRESETS:
        return PRESETS[name.lower()]
    if not isinstance(name, str) or not name.lower().endswith((".toml", ".json")):
        raise RecipeError(
            f"extends = {name!r}: expected a preset ({', '.join(PRESETS)}) or a recipe file beside this one"
        )
    if not files or pathlib.PurePath(name).name != name:
        raise RecipeError(f"extends = {name!r}: a file is named by a recipe file in the same folder, without a path")
    folder = files[-1].parent
    path, seen = folder / name, [os.path.realpath(file) for file in files]
    if len(files) > MAX_BASES:
        raise RecipeError(f"extends = {name!r}: {len(files)} files extend one another, at most {MAX_BASES}")
    if os.path.realpath(path) in seen:
        raise RecipeError(f"extends goes in a circle: {' -> '.join(file.name for file in (*files, path))}")
    return _load(path, folder, files)


def _parsed(data: dict[str, object]) -> dict[str, Any]:
    """The keys of a recipe with rules and methods as objects."""
    refuse_unknown(data, Recipe, "recipe", "extends")
    rules = []
    for i, entry in enumerate(tables(data, "rules")):
        refuse_unknown(entry, Rule, f"rules[{i}]")
        scheme = entry.get("scheme")
        if scheme is not None:
            refuse_unknown(scheme, Scheme, f"rules[{i}].scheme")
            scheme = validated(Scheme, scheme, f"rules[{i}].scheme")
        rules.append(validated(Rule, {**entry, "scheme": scheme}, f"rules[{i}]"))
    made: dict[str, object] = {"rules": tuple(rules)}
    for key, find in (("method", _method), ("transform", _transform)):
        made[f"{key}s"] = tuple(
            _step(entry, key, find, f"{key}s[{i}]") for i, entry in enumerate(tables(data, f"{key}s"))
        )
    if data.get("cache") is not None:
        try:
            made["cache"] = policy_from_json(data["cache"])
        except CacheSettingsError as error:
            raise RecipeError(str(error)) from error
    if data.get("budget") is not None:
        refuse_unknown(data["budget"], Budget, "budget")
        made["budget"] = validated(Budget, data["budget"], "budget")
    if (attention := data.get("attention")) is not None:
        attention = {"scheme": attention} if isinstance(attention, str) else attention
        refuse_unknown(attention, AttentionScheme, "attention")
        made["attention"] = validated(AttentionScheme, attention, "attention")
    return {key: made.get(key, value) for key, value in data.items()}


def _step(entry: dict[str, object], key: str, find: Callable[[object, str], type[Any]], where: str) -> Any:
    """A method or a transform from its table."""
    options = dict(entry)
    found = find(options.pop(key, None), where)
    refuse_unknown(options, found, where)
    return validated(found, options, where)


def _transform(name: object, where: str) -> type[Any]:
    if not isinstance(name, str) or name not in TRANSFORMS:
        hint = did_you_mean(str(name), TRANSFORMS) or f"known: {', '.join(TRANSFORMS)}"
        raise RecipeError(f"{where}: unknown transform {name!r}; {hint}")
    return TRANSFORMS[name]


def _method(name: object, where: str) -> type[Any]:
    """The class of a method: a shipped one, or one of a plug-in, which is imported for it."""
    try:
        plugin = plugins.find(plugins.METHODS, name, METHODS) if isinstance(name, str) else None
        if plugin is not None:
            found: type[Any] = plugin.load()
            return found
    except plugins.PluginError as error:
        raise RecipeError(f"{where}: {error}") from error
    if not isinstance(name, str) or name not in METHODS:
        known = (*METHODS, *plugins.names(plugins.METHODS))
        raise RecipeError(f"{where}: unknown method {name!r}; known: {', '.join(known)}")
    return METHODS[name]
