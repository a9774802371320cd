import dataclasses
import json

import pytest
import torch

import fxq
from fxq.core.config import Budget, Recipe, RecipeError, Rule, Scheme
from fxq.core.rows import Weighting
from fxq.presets import PRESETS
from fxq.recipes import recipe_from_json, recipe_to_json
from tests.toys import QUICK, recipe

NAMES = ("blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.10.ffn.0", "head.head")


def made(*rules, **options):
    return Recipe(name="r", rules=rules, methods=QUICK, **options)


@pytest.mark.parametrize(
    "rules",
    [
        (("blocks.0.ffn.0", 8), ("blocks.0.*", 7), ("re:blocks.*", 6)),
        (("re:blocks.*", 6), ("blocks.0.*", 7), ("blocks.0.ffn.0", 8)),
        (("blocks.0.*", 7), ("blocks.0.ffn.0", 8), ("re:blocks.*", 6)),
    ],
)
def test_exact_names_win_over_globs_and_globs_over_regular_expressions(rules):
    recipe = made(*(Rule(p, Scheme(input_bits=b)) for p, b in rules))
    bits = [rule and rule.scheme.input_bits for rule in map(recipe.rule_for, NAMES)]
    assert bits == [8, 7, 6, 6, None]


def test_the_rule_for_the_rest_decides_last():
    rules = (Rule("*", Scheme()), Rule(r"re:.*\.ffn\.0", None), Rule("blocks.10.*", Scheme(input_bits=6)))
    recipe = made(*rules)
    found = [recipe.rule_for(name) for name in NAMES]
    assert [rules.index(rule) for rule in found] == [1, 0, 1, 2, 0]


def test_of_two_rules_of_a_kind_the_first_decides():
    recipe = made(Rule("*ffn.0", None, "first"), Rule("blocks.*", Scheme()))
    assert recipe.rule_for("blocks.0.ffn.0").reason == "first"
    assert recipe.rule_for("blocks.0.ffn.2").scheme == Scheme()


def test_a_regular_expression_matches_the_whole_name():
    rule = Rule(r"re:blocks\.1", Scheme())
    assert rule.matches("blocks.1") and not rule.matches("blocks.10") and not rule.matches("a.blocks.1")


def test_globs_are_case_sensitive_and_exact_names_are_not_globs():
    assert Rule("blocks.[01].*", None).matches("blocks.1.ffn.0")
    assert not Rule("Blocks.*", None).matches("blocks.1.ffn.0")
    assert not Rule("blocks.1", None).matches("blocks.1.ffn.0")


def test_a_pattern_that_matches_nothing_is_refused_with_close_names():
    recipe = made(Rule("blocks.0.ffn.1", Scheme()), Rule("*", Scheme()))
    with pytest.raises(RecipeError, match=r"'r': pattern 'blocks.0.ffn.1' matches no layer; close names: blocks.0.ffn"):
        recipe.check_patterns(NAMES)


def test_a_pattern_like_no_name_is_refused_with_the_number_of_linears():
    with pytest.raises(RecipeError, match="pattern 'zzz' matches no layer; the model has 5 linears"):
        made(Rule("zzz", None)).check_patterns(NAMES)


def test_an_optional_pattern_may_match_nothing():
    made(Rule("zzz", None, optional=True), Rule("*", Scheme())).check_patterns(NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 3}, "weight_bits = 3: expected 4..8"),
        ({"weight_bits": 16}, "weight_bits = 16: expected 4..8"),
        ({"input_bits": 1}, r"input_bits = 1: expected 2..8"),
        ({"input_bits": 9}, r"input_bits = 9: expected 2..8"),
        ({"align": 16}, "align = 16: expected a positive multiple of 32"),
        ({"align": 0}, "align = 0: expected a positive multiple of 32"),
        ({"weight_bits": 8.0}, "weight_bits = 8.0: expected an integer"),
        ({"weight_bits": "4"}, "weight_bits = '4': expected an integer"),
        ({"weight_bits": 4, "weight_group": 32.0}, "weight_group = 32.0: expected an integer"),
        ({"weight_group": False}, "weight_group = False: expected an integer"),
        ({"input_bits": 8.0}, "input_bits = 8.0: expected an integer"),
        ({"align": 32.0}, "align = 32.0: expected an integer"),
    ],
)
def test_a_scheme_refuses_what_no_kernel_runs(options, message):
    with pytest.raises(RecipeError, match=message):
        Scheme(**options)


def test_a_label_names_the_bits():
    assert Scheme(weight_bits=4, input_bits=6).label == "W4A6"


def test_a_recipe_refuses_a_bad_regular_expression():
    with pytest.raises(RecipeError, match=r"pattern 're:blocks\.\(' is not a regular expression"):
        made(Rule("re:blocks.(", None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "sensitive"}, "weighting 'sensitive': expected one of sensitivity, uniform"),
        ({"rows_per_call": 0}, "rows_per_call = 0: expected at least 1"),
        ({"max_rows": -5}, "max_rows = -5: expected at least 1"),
        ({"all_rows": True, "weighting": "sensitivity"}, "all_rows with weighting 'sensitivity', which weighs chunks"),
    ],
)
def test_a_recipe_refuses_settings_without_meaning(options, message):
    with pytest.raises(RecipeError, match=message):
        made(Rule("*", Scheme()), **options)


class NotADataclass:
    def apply(self, problem, update):
        return update


@pytest.mark.parametrize("method", [fxq.passes.methods.ranges.RangeSearch, NotADataclass(), Scheme(), "RangeSearch"])
def test_a_recipe_refuses_methods_that_could_not_be_stored_or_run(method):
    with pytest.raises(RecipeError, match="expected an instance of a dataclass with apply"):
        Recipe(name="r", rules=(), methods=(method,))


def test_a_rule_needs_a_scheme_object():
    with pytest.raises(RecipeError, match="scheme is dict, expected Scheme or None"):
        made(Rule("*", {"weight_bits": 8}))


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().seed = 1


WRAPPERS = (
    "model.",
    "generator.model.",
    "module.",
    "base_model.model.",
    "transformer._orig_mod.",
    "a.module._orig_mod.",
)


@pytest.mark.parametrize("prefix", ["", *WRAPPERS])
def test_a_wrapped_rule_holds_inside_wrappers_and_not_inside_blocks(prefix):
    rule = Rule("head*", None, wrapped=True)
    for name in ("head", "head.head", "header"):
        assert rule.matches(prefix + name)
    for name in ("blocks.0.head", "ahead", "blocks.1.attn.head.0"):
        assert not rule.matches(prefix + name)


def test_other_rules_start_at_the_root():
    for pattern in ("head*", "head.head", r"re:head\..*"):
        assert Rule(pattern, None).matches("head.head") and not Rule(pattern, None).matches("model.head.head")
        assert Rule(pattern, None, wrapped=True).matches("model.head.head")


@pytest.mark.parametrize("tool", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_a_tool_puts_between_names_is_seen_through(tool):
    name = f"{tool}.blocks.0.{tool}.ffn.0"
    for pattern in ("blocks.0.ffn.0", "blocks.?.ffn.*", r"re:blocks\.\d\.ffn\.0", f"blocks.0.{tool}.ffn.0"):
        assert Rule(pattern, None).matches(name), pattern


KEPT = (Rule("head*", None, "head", wrapped=True), Rule("*time_embed*", None, "time"), Rule("*", Scheme()))
BARE = ("time_embed.0", "blocks.0.q", "blocks.0.head", "blocks.1.q", "head.0")


@pytest.mark.parametrize(
    "layers",
    [
        [f"0.{name}" for name in BARE],
        [f"models.0.{name}" for name in BARE[1:]],
        [f"models.{i}.{name}" for i in (0, 1) for name in BARE],
        [*(f"0.{name}" for name in BARE), "1"],
        ["decoder.0.q", *(f"models.1.{name}" for name in BARE)],
    ],
    ids=["sequential", "one of a list", "two of a list", "beside a linear", "beside blocks"],
)
def test_a_number_in_front_is_seen_through_where_a_model_lies_under_it(layers):
    kept = {name for name, rule in made(*KEPT).decide(layers).items() if rule.scheme is None}
    assert kept == {name for name in layers if name.endswith(("time_embed.0", "head.0"))}


def test_a_number_in_front_of_one_of_many_blocks_is_not():
    layers = ["blocks.0.head", "blocks.0.q", "blocks.1.head", "blocks.1.q"]
    assert all(rule.scheme is not None for rule in made(*KEPT).decide(layers).values())
    assert all(rule.scheme is not None for rule in made(*KEPT).decide(layers[:2]).values())


def test_a_pattern_that_matches_inside_a_wrapper_only_is_refused_with_what_to_write():
    recipe = made(Rule("head*", None), Rule("*", Scheme()))
    with pytest.raises(RecipeError, match=r"'head\*' matches no layer; .* with wrapped = true it matches model\.head"):
        recipe.check_patterns(["model.blocks.0.q", "model.head.head"])


@pytest.mark.parametrize(
    ("weighting", "want"),
    [
        ("uniform", [1, 1, 1]),
        ("exponential", [12 / 7, 6 / 7, 3 / 7]),
        ("sensitivity", [1.8, 0.9, 0.3]),
        ("reversed", [0.3, 0.9, 1.8]),
        ("single_scale_only", [1.8, 0.9, 0.3]),
    ],
)
def test_chunk_weights_have_mean_one(weighting, want):
    weights = Weighting(weighting).of_chunks(torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), 3)
    assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(want)
    assert float(weights.mean()) == pytest.approx(1)


def test_measured_weightings_need_a_measurement():
    with pytest.raises(ValueError, match="weighting 'reversed' needs measured sensitivities"):
        Weighting.REVERSED.of_chunks(None, 3)


def test_those_that_need_no_measurement_take_none():
    free = [weighting for weighting in Weighting if not weighting.needs_sensitivity]
    assert free == [Weighting.UNIFORM, Weighting.EXPONENTIAL, Weighting.GRADIENT]
    assert all(float(weighting.of_chunks(None, 4).mean()) == pytest.approx(1) for weighting in free)


@pytest.mark.parametrize("weighting", Weighting)
def test_one_of_them_weighs_by_layer(weighting):
    weights = torch.tensor([1.5, 0.5])
    assert torch.equal(weighting.in_layer(weights, 0), weights)
    spared = weighting is Weighting.SINGLE_SCALE_ONLY
    assert weighting.in_layer(weights, 32).tolist() == ([1, 1] if spared else [1.5, 0.5])


@pytest.mark.parametrize("weighting", Weighting)
def test_a_recipe_states_it_as_text(weighting):
    made = recipe(weighting=weighting)
    data = json.loads(json.dumps(recipe_to_json(made)))
    assert data["weighting"] == weighting.value and made == recipe(weighting=weighting.value)
    assert recipe_from_json(data).chunk_weighting is weighting


def test_the_published_presets_measure_sensitivities():
    measured = {name for name, made in PRESETS.items() if made.chunk_weighting.needs_sensitivity}
    assert measured == {"q_arvd-w8a8", "q_arvd-w4a8", "q_arvd-w4a6"}
    assert Recipe(name="r", rules=(), methods=()).chunk_weighting is Weighting.SENSITIVITY


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "budget: expected one of bits_per_weight, ratio, time, max_error, got none"),
        ({"ratio": 0.3, "bits_per_weight": 5}, "got bits_per_weight, ratio"),
        ({"ratio": -0.1}, r"ratio = -0\.1: expected a finite number, not negative"),
        ({"max_error": float("nan")}, "max_error = nan: expected a finite number"),
        ({"max_error": float("inf")}, "max_error = inf: expected a finite number"),
        ({"ratio": 1, "widths": (4,)}, r"widths = \[4\]: expected two or more of 4..8, 16"),
        ({"ratio": 1, "widths": (3, 8)}, r"widths = \[3, 8\]"),
        ({"ratio": 1, "widths": (4, 4, 8)}, r"widths = \[4, 4, 8\]"),
    ],
)
def test_an_impossible_budget_is_refused(limits, message):
    with pytest.raises(RecipeError, match=message):
        Budget(**limits)


def test_a_budget_knows_its_limit_and_its_widest_integers():
    assert Budget(max_error=0).limit == ("max_error", 0)
    assert Budget(ratio=0.3, widths=(4, 16)).widest == 4 and Budget(ratio=0.3, widths=(4, 8, 16)).widest == 8


def test_layers_are_planned_at_the_widest_integers_of_a_budget():
    rules = (Rule("head", None, "kept"), Rule("*", Scheme(weight_bits=4)))
    assert made(*rules).planned_rules == rules
    assert made(*rules, budget=Budget(ratio=0.3)).planned_rules == (rules[0], Rule("*", Scheme(weight_bits=8)))


def test_what_is_no_budget_is_refused():
    with pytest.raises(RecipeError, match="budget is float, expected Budget or None"):
        made(budget=5.0)
