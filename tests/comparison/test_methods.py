import dataclasses

import pytest

from fxq.comparison.methods import METHODS, ComparisonError, entries, preset_of, width_of
from fxq.passes import LowRank, Rotate, Smooth
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.presets import PRESETS
from fxq.recipes import RecipeError, recipe_to_toml


def test_every_method_makes_a_row_at_each_width_in_the_order_of_the_widths():
    rows = entries(["q_arvd", "MinMax"], ["W4A8", "w8a8"])
    assert [(r.bits, r.method) for r in rows] == [
        ("w4a8", "q_arvd"),
        ("w4a8", "minmax"),
        ("w8a8", "q_arvd"),
        ("w8a8", "minmax"),
    ]
    assert [r.recipe.name for r in rows] == ["w4a8 q_arvd", "w4a8 minmax", "w8a8 q_arvd", "w8a8 minmax"]


def test_names_mean_what_they_say():
    made = {row.method: row.recipe for row in entries(list(METHODS), ["w4a8"])}
    assert [type(m) for m in made["minmax"].methods] == [MinMax]
    assert [type(m) for m in made["nearest"].methods] == [RangeSearch]
    assert [type(m) for m in made["adaround"].methods] == [RangeSearch, AdaRound]
    assert [type(m) for m in made["gptq"].methods] == [RangeSearch, GPTQ]
    for name in ("minmax", "nearest", "adaround", "gptq"):
        assert made[name].weighting == "uniform"
        assert not any(rule.scheme.dual_scale for rule in made[name].rules if rule.scheme)
    for name, preset in (("q_arvd", "q_arvd-w4a8"), ("least_error", "w4a8")):
        assert dataclasses.replace(made[name], name="") == dataclasses.replace(PRESETS[preset], name="")
    assert width_of(made.pop("groups")) == "w4g32a8"
    assert {width_of(recipe) for recipe in made.values()} == {"w4a8"}
    rivals = {"smoothquant": ("nearest", Smooth()), "rotation": ("gptq", Rotate()), "svdquant": ("gptq", LowRank())}
    for name, (base, transform) in rivals.items():
        want = dataclasses.replace(made[base], name=made[name].name, transforms=(transform,))
        assert made[name] == want and not made[base].transforms


def test_iterations_are_those_of_methods_that_learn():
    nearest, learned = (row.recipe.methods for row in entries(["nearest", "adaround"], ["w4a8"], iterations=3))
    assert nearest == (RangeSearch(),) and learned == (RangeSearch(), AdaRound(iterations=3))


def test_a_variant_sets_keys_of_its_recipe_and_has_them_in_its_name():
    plain, varied = entries(["q_arvd", "q_arvd:weighting=uniform,share_inputs=false,max_rows=512"], ["w4a8"])
    assert varied.method == "q_arvd:weighting=uniform,share_inputs=false,max_rows=512"
    assert (varied.recipe.weighting, varied.recipe.share_inputs, varied.recipe.max_rows) == ("uniform", False, 512)
    assert (plain.recipe.weighting, varied.recipe.rules) == ("sensitivity", plain.recipe.rules)


def test_a_preset_and_a_recipe_file_make_one_row_of_their_own_width(tmp_path):
    mixed = tmp_path / "mixed.toml"
    mixed.write_text('extends = "w4a8"\nname = "mine"\n[[rules]]\npattern = "*ffn*"\nscheme = { weight_bits = 8 }\n')
    same = tmp_path / "same.toml"
    same.write_text(recipe_to_toml(PRESETS["w4a6"]))
    rows = entries(["w8a8-dynamic", str(mixed), str(same), "minmax"], ["w4a6"])
    assert [(r.method, r.bits) for r in rows] == [
        ("same", "w4a6"),
        ("minmax", "w4a6"),
        ("w8a8-dynamic", "w8a8"),
        ("mixed", "mixed"),
    ]


def test_a_width_without_preset_has_the_rules_of_the_presets():
    assert width_of(preset_of("w8a6")) == "w8a6"
    assert [rule.pattern for rule in preset_of("w8a6").rules] == [rule.pattern for rule in PRESETS["w8a8"].rules]


@pytest.mark.parametrize(
    ("words", "bits", "message"),
    [
        (["minmx"], ["w4a8"], r"unknown method 'minmx'; did you mean 'minmax'\? Methods: minmax, "),
        (["zzz"], ["w4a8"], "unknown method 'zzz'; Methods: "),
        (["minmax"], ["w4a88"], r"bits 'w4a88': did you mean 'w4a8'\? Presets: w8a8, "),
        (["minmax"], ["seven"], "bits 'seven': expected bits of weights and inputs"),
        (["minmax"], ["w3a8"], "bits 'w3a8': weight_bits = 3"),
        (["q_arvd:weightin=uniform"], ["w4a8"], r"unknown key 'weightin'; did you mean 'weighting'\?"),
        (["q_arvd:seed=3"], ["w4a8"], "unknown key 'seed'; known: weighting, "),
        (["minmax", "nearest", "minmax"], ["w4a8"], "two rows are called minmax w4a8"),
        ([], ["w4a8"], "nothing to compare"),
        (["minmax"], [], "nothing to compare"),
        (
            ["groups"],
            ["w4a8", "w6a8"],
            r"method groups at w6a8: weight_group = 32 with weight_bits = 6: expected 0, or 32",
        ),
    ],
)
def test_what_is_not_known_is_refused_with_what_is_close(words, bits, message):
    with pytest.raises(ComparisonError, match=message):
        entries(words, bits)


def test_a_value_that_a_recipe_does_not_take_and_a_file_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="weighting 'even': expected one of sensitivity"):
        entries(["q_arvd:weighting=even"], ["w4a8"])
    with pytest.raises(RecipeError, match=r"none\.toml"):
        entries([str(tmp_path / "none.toml")], ["w4a8"])


def test_a_recipe_that_encodes_the_cache_is_refused(tmp_path):
    file = tmp_path / "cache.toml"
    file.write_text('extends = "w4a8"\n[cache]\nwindow = 21\nspan = 2\nkeys = "int8"\n')
    with pytest.raises(ComparisonError, match=r"cache: its recipe keeps the cache .* leave out \[cache\]"):
        entries([str(file)], ["w4a8"])
