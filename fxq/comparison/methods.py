"""The methods that ``fxq compare`` knows by name. A new one is one line of :data:`METHODS`."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence

from fxq.core.config import Recipe, RecipeError, Scheme
from fxq.core.method import Method
from fxq.core.pipeline import Transform
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.gram_adaround import GramAdaRound
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.methods.signround import SignRound
from fxq.passes.transforms.balance import Balance
from fxq.passes.transforms.low_rank import LowRank
from fxq.passes.transforms.rotate import Rotate
from fxq.passes.transforms.smooth import Smooth
from fxq.presets import PRESETS, Q_ARVD, minmax, single_scale, wan_recipe, with_groups, with_iterations
from fxq.recipes import get_recipe, recipe_from_json, recipe_to_json
from fxq.runtime.messages import did_you_mean


def _plain(preset: Recipe, *methods: Method, transforms: tuple[Transform, ...] = ()) -> Recipe:
    """One scale a layer and rows that weigh the same, with other methods, on a float graph that transforms rewrite."""
    return dataclasses.replace(single_scale(preset), methods=methods, weighting="uniform", transforms=transforms)


def _q_arvd(preset: Recipe) -> Recipe:
    """The published method at the preset's width (arXiv 2605.21072)."""
    (scheme,) = {rule.scheme for rule in preset.rules if rule.pattern == "*" and rule.scheme is not None}
    return wan_recipe(preset.name, scheme, Q_ARVD, "sensitivity")


METHODS: dict[str, Callable[[Recipe], Recipe]] = {
    "minmax": minmax,
    "percentile": lambda preset: _plain(preset, RangeSearch((0.999, 0.9999, 0.99999), ())),
    "nearest": lambda preset: _plain(preset, RangeSearch()),
    "adaround": lambda preset: _plain(preset, RangeSearch(), AdaRound()),
    "gram_adaround": lambda preset: _plain(preset, RangeSearch(), GramAdaRound()),
    "signround": lambda preset: _plain(preset, RangeSearch(), SignRound()),
    "gptq": lambda preset: _plain(preset, RangeSearch(), GPTQ()),
    "smoothquant": lambda preset: _plain(preset, RangeSearch(), transforms=(Smooth(),)),
    "ptq4dit": lambda preset: _plain(preset, RangeSearch(), AdaRound(), transforms=(Balance(),)),
    "rotation": lambda preset: _plain(preset, RangeSearch(), GPTQ(), transforms=(Rotate(),)),
    "svdquant": lambda preset: _plain(preset, RangeSearch(), GPTQ(), transforms=(LowRank(),)),
    "q_arvd": _q_arvd,
    "groups": with_groups,
    "least_error": lambda preset: preset,
}
"""By name: the recipe of a method from the preset of a width."""

VARIED = ("weighting", "share_inputs", "rows_per_call", "max_rows", "all_rows")
"""Keys of a recipe that ``METHOD:KEY=VALUE`` may set."""

_WIDTH = re.compile(r"w(\d)a(\d)")
_VARIANT = re.compile(r"(?P<name>.+?):(?P<changes>\w+=.*)")
_MANY = "mixed"


class ComparisonError(ValueError):
    """A comparison that cannot be made as asked, or whose results are of another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A row before it is measured.

    ``method`` and ``bits`` (``w4a8``) name it, ``recipe`` makes it.
    """

    method: str
    bits: str
    recipe: Recipe


def preset_of(bits: str) -> Recipe:
    """The preset of a width; one that no preset has, such as w8a6, gets the rules and methods of the presets.

    Raises:
        ComparisonError: when that is no width.
    """
    name = bits.lower()
    if name in PRESETS:
        return PRESETS[name]
    if (found := _WIDTH.fullmatch(name)) is None:
        hint = did_you_mean(name, PRESETS) or "expected bits of weights and inputs such as w4a8, or a preset."
        raise ComparisonError(f"bits {bits!r}: {hint} Presets: {', '.join(PRESETS)}")
    try:
        return wan_recipe(name, Scheme(weight_bits=int(found[1]), input_bits=int(found[2])))
    except RecipeError as error:
        raise ComparisonError(f"bits {bits!r}: {error}") from None


def entries(words: Sequence[str], bits: Sequence[str], iterations: int | None = None) -> list[Entry]:
    """The rows of methods at widths, in the order of the widths, then of the methods.

    Args:
        words: names of :data:`METHODS`, which make a row at each width; presets and recipe files, whose widths are
            their own, make one. ``:KEY=VALUE,...`` behind it sets keys of its recipe, see :data:`VARIED`.
        bits: widths, see :func:`preset_of`.
        iterations: of methods that learn; None: as the recipes say.

    Raises:
        ComparisonError: for names, widths or keys that are not known, two rows of one name, or a recipe that keeps its
            cache encoded, which these measures do not follow.
        RecipeError: when a recipe file or a value is not right.
    """
    widths = [name.lower() for name in bits]
    if not words or not widths:
        raise ComparisonError("nothing to compare: name a method and a width at least")
    made = [entry for word in words for entry in _of_word(word, widths, iterations)]
    order = list(dict.fromkeys([*widths, *(entry.bits for entry in made)]))
    made.sort(key=lambda entry: order.index(entry.bits))
    names = [(entry.method, entry.bits) for entry in made]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ComparisonError(f"two rows are called {' '.join(twice[0])}: name every method and width once")
    for entry in made:
        if entry.recipe.cache is not None:
            raise ComparisonError(
                f"{entry.method}: its recipe keeps the cache of keys and values encoded, which is not compared here: "
                "leave out [cache]; fxq cache compares codecs"
            )
    return made


def _of_word(word: str, widths: Sequence[str], iterations: int | None) -> list[Entry]:
    variant = _VARIANT.fullmatch(word)
    name, changes = (variant["name"], variant["changes"]) if variant else (word, "")
    suffix = f":{changes}" if changes else ""
    path = pathlib.Path(name)

    def finished(recipe: Recipe) -> Recipe:
        recipe = recipe if iterations is None else with_iterations(recipe, iterations)
        return _changed(recipe, changes, word)

    if (method := METHODS.get(name.lower())) is not None:
        made = []
        for width in widths:
            try:
                preset = method(preset_of(width))
            except RecipeError as error:
                raise ComparisonError(f"method {name} at {width}: {error}") from None
            recipe = dataclasses.replace(finished(preset), name=f"{width} {name.lower()}")
            made.append(Entry(method=name.lower() + suffix, bits=width, recipe=recipe))
        return made
    if name.lower() in PRESETS or path.suffix.lower() in (".toml", ".json"):
        recipe = finished(get_recipe(name))
        label = name.lower() if name.lower() in PRESETS else path.stem
        return [Entry(method=label + suffix, bits=width_of(recipe), recipe=recipe)]
    close = did_you_mean(name, [*METHODS, *PRESETS])
    raise ComparisonError(
        f"unknown method {name!r}; {close + ' ' if close else ''}Methods: {', '.join(METHODS)}; or a preset, or a "
        "recipe file that ends in .toml or .json"
    )


def width_of(recipe: Recipe) -> str:
    """The width that all rules of a recipe have, such as w4a8; ``mixed`` where they have several."""
    labels = {rule.scheme.label.lower() for rule in recipe.rules if rule.scheme is not None}
    return labels.pop() if len(labels) == 1 else _MANY


def _changed(recipe: Recipe, changes: str, word: str) -> Recipe:
    """The recipe with keys set by ``KEY=VALUE,...``."""
    if not changes:
        return recipe
    data = recipe_to_json(recipe)
    for pair in changes.split(","):
        key, equals, value = pair.partition("=")
        if key not in VARIED or not equals:
            hint = did_you_mean(key, VARIED) or f"known: {', '.join(VARIED)}"
            raise ComparisonError(f"method {word!r}: unknown key {key!r}; {hint}")
        data[key] = value
    return recipe_from_json(data)
