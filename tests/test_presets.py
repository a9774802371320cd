import pytest

from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.presets import PRESETS, minmax
from fxq.recipes import get_recipe

LAYERS = (
    "time_embedding.0",
    "time_projection.1",
    "text_embedding.0",
    "condition_embedder.time_embedder.linear_1",
    "blocks.0.self_attn.q",
    "blocks.0.cross_attn.k",
    "blocks.1.proj_out",
    "proj_out",
    "head.head",
)
WRAPPERS = (
    "model.",
    "module.",
    "_orig_mod.",
    "generator.model.",
    "base_model.model.",
    "transformer.",
    "0.",
    "models.1.",
)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a6"])
def test_a_preset_has_the_bits_of_its_name(name):
    recipe = get_recipe(name.upper())
    assert recipe is PRESETS[name]
    assert recipe.rule_for("blocks.3.ffn.0").scheme.label.lower() == name
    assert recipe.rule_for("blocks.3.ffn.0").scheme.reconstruct
    assert not recipe.rule_for("blocks.3.cross_attn.k").scheme.reconstruct
    published = get_recipe(f"q_arvd-{name}")
    assert published.rule_for("blocks.3.ffn.0").scheme == recipe.rule_for("blocks.3.ffn.0").scheme
    assert not published.rule_for("blocks.3.cross_attn.k").scheme.reconstruct
    assert published.methods == (RangeSearch(), AdaRound()) and published.weighting == "sensitivity"
    for kept in ("head.head", "time_embedding.0", "time_projection.1", "proj_out"):
        assert recipe.rule_for(kept).scheme is None and recipe.rule_for(kept).reason


@pytest.mark.parametrize(("name", "bits"), [("w8a8-dynamic", 8), ("w4a8-dynamic", 4)])
def test_a_dynamic_preset_needs_no_data(name, bits):
    recipe = get_recipe(name)
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    assert {(s.weight_bits, s.input_bits, s.per_token) for s in schemes} == {(bits, 8, True)}
    assert recipe.methods == (RangeSearch(),) and recipe.weighting == "uniform"
    assert {s.detail for s in schemes} == {f"W{bits}A8 per token"} and {s.label for s in schemes} == {f"W{bits}A8"}


@pytest.mark.parametrize(("name", "label"), [("w8a8-token", "W8A8"), ("w4a8-token", "W4A8"), ("w4a6-token", "W4A6")])
def test_a_token_preset_measures_zero_points_too(name, label):
    recipe = get_recipe(name)
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    assert {s.detail for s in schemes} == {f"{label} per token, asymmetric"} and {s.label for s in schemes} == {label}
    static = PRESETS[name.removesuffix("-token")]
    assert (recipe.methods, recipe.weighting) == (static.methods, static.weighting)


def test_minmax_keeps_layers_and_bits_and_drops_the_rest():
    recipe = minmax(PRESETS["w4a6"])
    assert recipe.methods == (MinMax(),) and recipe.weighting == "uniform" and recipe.name == "w4a6-minmax"
    for before, after in zip(PRESETS["w4a6"].rules, recipe.rules, strict=True):
        assert (before.pattern, before.scheme is None) == (after.pattern, after.scheme is None)
        if after.scheme is not None:
            assert not after.scheme.dual_scale and after.scheme.label == before.scheme.label


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_decides_the_same_in_a_wrapper(name, prefix):
    bare = PRESETS[name].decide(LAYERS)
    assert sum(rule.scheme is None for rule in bare.values()) == 5
    assert bare["blocks.1.proj_out"].scheme.dual_scale == ("single" not in name and "fp8" not in name)
    assert not bare["text_embedding.0"].scheme.dual_scale
    wrapped = PRESETS[name].decide(prefix + layer for layer in LAYERS)
    assert {layer: wrapped[prefix + layer] for layer in LAYERS} == bare
