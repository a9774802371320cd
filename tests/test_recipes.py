import dataclasses
import json
import pathlib
import re

import pytest

from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.core.config import Budget, Recipe, RecipeError, Rule, Scheme, with_budget
from fxq.core.method import AttentionScheme
from fxq.passes import LowRank, Smooth
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.presets import PRESETS, minmax
from fxq.recipes import METHODS, TRANSFORMS, get_recipe, load_recipe, recipe_from_json, recipe_to_json, recipe_to_toml

TOML = """
name = "mine"
weighting = "uniform"
seed = 7

[[rules]]
pattern = "head*"
reason = "tiny"
optional = true

[[rules]]
pattern = "*"
scheme = { weight_bits = 4, input_bits = 6, dual_scale = false }

[[methods]]
method = "RangeSearch"
percentiles = [0.999, 1.0]

[[methods]]
method = "AdaRound"
iterations = 3
"""


def test_asymmetric_without_per_token_is_refused(tmp_path):
    message = "asymmetric without per_token: static inputs always have a zero point"
    with pytest.raises(RecipeError, match=message):
        Scheme(asymmetric=True)
    (tmp_path / "r.toml").write_text('extends = "w8a8"\n[[rules]]\npattern = "*"\nscheme = { asymmetric = true }\n')
    with pytest.raises(RecipeError, match=rf"r.toml: rules\[0\].scheme: .*{message}"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_recipe_survives_json(name):
    recipe = PRESETS[name]
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe
    assert recipe_from_json(recipe_to_json(minmax(recipe))) == minmax(recipe)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_recipe_written_as_toml_reads_back(name, tmp_path):
    odd = Rule(r're:a\.\d+"|\x7f', None, 'quotes " and \\ and ümläute\n')
    recipe = dataclasses.replace(PRESETS[name], rules=(odd, *PRESETS[name].rules), seed=2**62, weighting="uniform")
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.toml") == recipe


def test_toml_and_json_are_two_spellings_of_one_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(TOML)
    recipe = load_recipe(tmp_path / "r.toml")
    assert recipe.name == "mine" and recipe.seed == 7
    assert recipe.rules[0].scheme is None and recipe.rules[0].optional
    assert recipe.rules[1].scheme == Scheme(weight_bits=4, input_bits=6, dual_scale=False)
    assert recipe.methods == (RangeSearch(percentiles=(0.999, 1.0)), AdaRound(iterations=3))
    (tmp_path / "r.json").write_text(json.dumps(recipe_to_json(recipe)))
    assert load_recipe(str(tmp_path / "r.json")) == recipe == get_recipe(tmp_path / "r.toml")


CACHE = CachePolicy(window=21, sink=3, positions="relative", keys=Klt(1.0), values=Klt(2.0), span=2)


def test_a_cache_is_a_table_of_a_recipe(tmp_path):
    recipe = dataclasses.replace(PRESETS["w4a8"], cache=CACHE)
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert (
        load_recipe(tmp_path / "r.toml") == recipe == recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe))))
    )
    assert "cache" not in recipe_to_json(PRESETS["w4a8"])
    own = {"extends": "w4a8", "cache": {"window": 21, "keys": "klt", "span": 1}}
    assert recipe_from_json(own).cache == CachePolicy(window=21, keys=Klt(), span=1)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"windw": 3}, "cache: unknown setting 'windw'; did you mean 'window'"),
        ({"keys": "kltt"}, "cache.keys: unknown codec 'kltt'"),
        ({"positions": "relative"}, "positions = 'relative' needs a window"),
        ([1], "cache: expected a table"),
    ],
)
def test_a_wrong_cache_is_refused_with_the_setting(cache, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json({"extends": "w4a8", "cache": cache})


@pytest.mark.parametrize(
    "limit", [{"bits_per_weight": 5.5}, {"ratio": 0.31}, {"max_error": 1e-3, "widths": (4, 8, 16)}]
)
def test_a_budget_is_a_table_of_a_recipe(limit, tmp_path):
    recipe = dataclasses.replace(PRESETS["w4a8"], budget=Budget(**limit))
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert "[budget]" in (tmp_path / "r.toml").read_text()
    assert (
        load_recipe(tmp_path / "r.toml") == recipe == recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe))))
    )
    assert "budget" not in recipe_to_json(PRESETS["w4a8"])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits_per_wieght": 5}, "budget: unknown key 'bits_per_wieght'; did you mean 'bits_per_weight'"),
        ({"ratio": "small"}, "budget.ratio: Input should be a valid number"),
        (
            {"ratio": 0.3, "max_error": 1},
            "expected one of bits_per_weight, ratio, time, max_error, got ratio, max_error",
        ),
        ({}, "expected one of bits_per_weight, ratio, time, max_error, got none"),
        ({"ratio": 0.3, "widths": [8, 4]}, r"widths = \[8, 4\]: expected two or more of 4..8, 16, ascending"),
        ([1], "budget: expected a table"),
    ],
)
def test_a_wrong_budget_is_refused_with_the_key(budget, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json({"extends": "w4a8", "budget": budget})


@pytest.mark.parametrize("attention", ["int8", {"max_error": 0.02, "keep": ["blocks.0.*", "*.cross_attn"]}])
def test_attention_is_a_word_or_a_table_of_a_recipe(attention, tmp_path):
    recipe = recipe_from_json({"extends": "w8a8", "attention": attention})
    assert recipe.attention == (
        AttentionScheme()
        if attention == "int8"
        else AttentionScheme(**recipe_to_json(recipe)["attention"] | {"keep": tuple(attention["keep"])})
    )
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert (
        load_recipe(tmp_path / "r.toml") == recipe == recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe))))
    )
    assert "attention" not in recipe_to_json(PRESETS["w8a8"])


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("fp4", "attention: .*scheme 'fp4': expected int8"),
        ({"max_eror": 1}, "attention: unknown key 'max_eror'; did you mean 'max_error'"),
        ({"max_error": 0}, "attention: .*max_error = 0.*: expected a finite number above 0"),
        ([1], "attention: expected a table"),
    ],
)
def test_a_wrong_attention_is_refused_with_the_key(attention, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json({"extends": "w8a8", "attention": attention})


def test_another_limit_keeps_the_widths_of_a_budget():
    recipe = with_budget(PRESETS["w4a8"], ratio=0.3)
    assert recipe == dataclasses.replace(PRESETS["w4a8"], budget=Budget(ratio=0.3))
    wide = dataclasses.replace(recipe, budget=Budget(ratio=0.3, widths=(8, 16)))
    assert with_budget(wide, bits_per_weight=9).budget == Budget(bits_per_weight=9, widths=(8, 16))
    with pytest.raises(RecipeError, match="got bits_per_weight, ratio"):
        with_budget(recipe, bits_per_weight=5, ratio=0.3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a9", r"unknown recipe 'w4a9'; did you mean 'w4a\d'\? Presets: w8a8, w4a8, w4a6"),
        ("zzz", r"unknown recipe 'zzz'\. Presets"),
        (5, "recipe is int, expected fxq.Recipe"),
        (None, "recipe is NoneType"),
    ],
)
def test_an_unknown_recipe_is_refused(name, message):
    with pytest.raises(RecipeError, match=message):
        get_recipe(name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 7", "sed = 7", r"recipe: unknown key 'sed'; did you mean 'seed'\?"),
        (
            "weight_bits = 4",
            "weight_bit = 4",
            r"rules\[1\].scheme: unknown key 'weight_bit'; did you mean 'weight_bits'",
        ),
        ('reason = "tiny"', 'xyzzy = "tiny"', r"rules\[0\]: unknown key 'xyzzy'; known: pattern, scheme"),
        ("iterations = 3", "iteration = 3", r"methods\[1\]: unknown key 'iteration'; did you mean 'iterations'"),
        ("iterations = 3", 'iterations = "many"', r"methods\[1\].iterations: Input should be a valid integer"),
        ('method = "AdaRound"', 'method = "Ada"', r"methods\[1\]: unknown method 'Ada'; known: MinMax"),
        ('method = "AdaRound"', "method = [1]", r"methods\[1\]: unknown method \[1\]"),
        ("weight_bits = 4", "weight_bits = 3", "weight_bits = 3: expected 4..8"),
        ('pattern = "*"', 'pattern = "re:("', "is not a regular expression"),
        ('name = "mine"', "", "recipe.name"),
        ('weighting = "uniform"', "methods = 3", "methods|twice|overwrite"),
        ("percentiles = [0.999, 1.0]", "percentiles = []", "percentiles = .*expected at least one in 0.5..1"),
        ("[[rules]]", "[[rules", "is not valid TOML"),
    ],
)
def test_a_recipe_file_with_a_fault_is_refused_by_file_and_key(tmp_path, old, new, message):
    path = tmp_path / "bad.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a recipe is a table of keys, got list"),
        ({"name": "x", "rules": 5}, "rules: expected a list of tables"),
        ({"name": "x", "rules": ["*"]}, "rules: expected a list of tables"),
        ({"name": "x", "methods": ["MinMax"]}, "methods: expected a list of tables"),
        ({"name": "x", "methods": {"method": "MinMax"}}, "methods: expected a list of tables"),
        ({"name": "x", "rules": [{"pattern": "*", "scheme": 8}]}, r"rules\[0\].scheme: expected a table of keys"),
    ],
)
def test_json_of_another_shape_is_refused(data, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json(data)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.json: No such file"):
        get_recipe(tmp_path / "absent.json")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"bytes.toml is not valid TOML"):
        get_recipe(str(tmp_path / "bytes.toml"))


def test_every_method_option_reaches_the_file():
    for method in (MinMax(), RangeSearch(), AdaRound()):
        recipe = dataclasses.replace(PRESETS["w8a8"], methods=(method,))
        assert recipe_to_json(recipe)["methods"] == [{"method": type(method).__name__, **dataclasses.asdict(method)}]


def test_a_wrapped_rule_can_be_written_in_a_file(tmp_path):
    (tmp_path / "r.toml").write_text(TOML.replace("optional = true", "wrapped = true"))
    assert load_recipe(tmp_path / "r.toml").rule_for("model.head.head").reason == "tiny"


EXTENDING = """
extends = "w4a8"
name = "mine"
seed = 5

[[rules]]
pattern = "re:.*ffn.*"
scheme = { weight_bits = 8 }
"""


def test_a_recipe_that_extends_a_preset_says_what_is_other(tmp_path):
    (tmp_path / "r.toml").write_text(EXTENDING)
    recipe, base = load_recipe(tmp_path / "r.toml"), PRESETS["w4a8"]
    assert (recipe.name, recipe.seed, recipe.weighting) == ("mine", 5, base.weighting)
    assert recipe.rules == (Rule("re:.*ffn.*", Scheme(weight_bits=8)), *base.rules) and recipe.methods == base.methods
    bits = {name: recipe.rule_for(name).scheme for name in ("blocks.0.ffn.0", "blocks.0.self_attn.q", "head.head")}
    assert [scheme and scheme.weight_bits for scheme in bits.values()] == [8, 4, None]
    assert recipe_from_json({"extends": "W4A8"}) == base
    (method,) = recipe_from_json({"extends": "w4a8", "methods": [{"method": "MinMax"}]}).methods
    assert method == MinMax()


def test_a_recipe_file_extends_another_one_beside_it(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"extends": "w8a8", "name": "base", "max_rows": 64}))
    (tmp_path / "r.toml").write_text('extends = "base.json"\nname = "top"\n')
    recipe = load_recipe(tmp_path / "r.toml")
    assert (recipe.name, recipe.max_rows, recipe.rules) == ("top", 64, PRESETS["w8a8"].rules)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a9", r"extends = 'w4a9': expected a preset \(w8a8, .*\) or a recipe file beside this one"),
        (5, "extends = 5: expected a preset"),
        ("../r.toml", "without a path"),
        ("/etc/r.toml", "without a path"),
        ("absent.toml", r"recipe file .*absent\.toml: No such file"),
        ("link.toml", "link to a place outside its folder"),
        ("r.json", r"extends goes in a circle: r\.json -> r\.json"),
        ("other.json", r"extends goes in a circle: r\.json -> other\.json -> r\.json"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path, name, message):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (tmp_path / "outside.toml").write_text('extends = "w8a8"')
    (folder / "link.toml").symlink_to(tmp_path / "outside.toml")
    (folder / "other.json").write_text(json.dumps({"extends": "r.json"}))
    (folder / "r.json").write_text(json.dumps({"extends": name}))
    with pytest.raises(RecipeError, match=message):
        load_recipe(folder / "r.json")
    with pytest.raises(RecipeError, match="extends = "):
        recipe_from_json({"extends": name})


def test_a_long_chain_of_files_is_refused(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.json").write_text(json.dumps({"extends": f"{i + 1}.json" if i < 39 else "w8a8"}))
    with pytest.raises(RecipeError, match=r"extends = .*: 21 files extend one another, at most 20"):
        load_recipe(tmp_path / "0.json")
    assert load_recipe(tmp_path / "30.json") == PRESETS["w8a8"]


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "recipes.md"


def page_rows(heading):
    """(key, type, default) of a table of the page, by its heading."""
    text = PAGE.read_text().split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]{10,} \|$", text, re.M)


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("The recipe", Recipe),
        ("A rule", Rule),
        ("A scheme", Scheme),
        ("A budget", Budget),
        ("Attention", AttentionScheme),
        *METHODS.items(),
        *TRANSFORMS.items(),
    ],
)
def test_the_page_on_recipes_lists_every_key_with_its_default(heading, cls):
    rows = {key: default.strip() for key, _, default in page_rows(heading)}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert set(rows) - {"extends", "method", "transform"} == set(fields)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING or name == "scheme":
            assert rows[name] == "-", name
        else:
            want = list(field.default) if isinstance(field.default, tuple) else field.default
            assert rows[name] == f"`{json.dumps(want)}`", name


def test_the_recipe_on_the_page_loads(tmp_path):
    text, cache, attention, budget, float8, transforms = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "attention.toml").write_text(attention)
    assert load_recipe(tmp_path / "attention.toml").attention == AttentionScheme(max_error=0.02, keep=("blocks.0.*",))
    (tmp_path / "budget.toml").write_text(budget)
    assert load_recipe(tmp_path / "budget.toml").budget == Budget(bits_per_weight=5)
    (tmp_path / "float8.toml").write_text(float8)
    mixed = load_recipe(tmp_path / "float8.toml")
    assert [mixed.rule_for(f"blocks.{i}.ffn.0").scheme.label for i in (0, 1)] == ["W8A8", "FP8"]
    (tmp_path / "transforms.toml").write_text(transforms)
    assert load_recipe(tmp_path / "transforms.toml").transforms == (Smooth(), LowRank(32))
    (tmp_path / "cache.toml").write_text(cache)
    assert load_recipe(tmp_path / "cache.toml").cache.codec("keys", 0) == Klt(1.0)
    (tmp_path / "r.toml").write_text(text)
    recipe = load_recipe(tmp_path / "r.toml")
    assert recipe.rule_for("blocks.0.ffn.2").scheme.weight_bits == 8 and len(recipe.methods) == 5
