"""What all transforms have in common: recipes, bundles, exports, and the routes that refuse them."""

import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.calibration.collect import CalibrationError
from fxq.core.config import Budget, RecipeError
from fxq.core.ir import LayerPlan, QuantGraph, Stage
from fxq.core.products import TRANSFORM_TENSORS
from fxq.export.diffusers_folder import save_diffusers
from fxq.export.files import BundleError
from fxq.export.interop.layers import InteropError, read_model
from fxq.integrations.swap import ApplyError
from fxq.parallel.groups import Place
from fxq.parallel.plan import ParallelError, ShardPlan
from fxq.parallel.shard_graph import ShardGraph
from fxq.passes import LowRank, PassError, PlanLayers, Rotate, Smooth
from fxq.presets import PRESETS
from fxq.recipes import TRANSFORMS, load_recipe, recipe_from_json, recipe_to_json, recipe_to_toml
from tests.passes.transforms.test_rotate import spiky
from tests.toys import recipe, relative_error, rows, toy

ALL = (Rotate(32), Smooth(), LowRank(4))
DATA = [spiky(4, 10, 96, seed=seed) for seed in (1, 2)]


def with_transforms(transforms=ALL, **scheme):
    return dataclasses.replace(recipe(4, 6, **scheme), transforms=transforms)


@pytest.fixture(scope="module")
def made():
    return fxq.quantize(toy(), DATA, with_transforms(), progress=False)


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory):
    return fxq.save(made, tmp_path_factory.mktemp("transforms") / "bundle")


def test_a_bundle_gives_back_the_same_module_and_is_verified(made, bundle):
    loaded = fxq.load(bundle)
    assert torch.equal(loaded(DATA[0]), made(DATA[0])) and fxq.verify_bundle(bundle).ok
    rows_of = {row.layer: row.transform for row in fxq.summary(loaded).rows}
    assert rows_of["blocks.0.up"].startswith("Rotate") and rows_of["blocks.0.up"].endswith("LowRank")
    assert rows_of["head"] == "" and not fxq.summary(loaded).others
    assert torch.equal(loaded.get_buffer("head.weight"), toy().head.weight)


def test_the_optimized_module_computes_the_same_with_the_branch_in_an_epilogue(made):
    fast = fxq.optimize(made)
    assert relative_error(made, fast, DATA[0]) < 1e-6
    assert "residual in its epilogue" in fxq.summary(fast).rows[0].remarks
    assert {"blocks.0.up.rotation", "blocks.0.up.low_rank_up"} <= {name for name, _ in fast.named_buffers()}


def test_an_exported_program_computes_the_same(bundle, tmp_path):
    loaded = fxq.load(bundle)
    program = fxq.load_program(fxq.export_program(loaded, tmp_path / "program.pt2"))
    assert torch.equal(program(DATA[0]), loaded(DATA[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_of_transforms_have_the_dtype_of_the_model(dtype):
    model, data = toy().to(dtype), [x.to(dtype) for x in DATA]
    module = fxq.quantize(model, data, with_transforms(), progress=False)
    own = {name: t.dtype for name, t in module.named_buffers() if name.rpartition(".")[2] in TRANSFORM_TENSORS}
    assert len(own) >= 6 and set(own.values()) == {dtype} and module(data[0]).dtype == dtype
    assert relative_error(model, module, data[0]) < 0.15


@pytest.mark.parametrize("transform", ALL, ids=lambda step: step.name)
def test_every_route_that_takes_layers_out_of_the_graph_refuses_by_name(transform, tmp_path):
    model = toy()
    made = fxq.quantize(model, DATA, dataclasses.replace(recipe(), transforms=(transform,)), progress=False)
    told = rf"of 2 the graph changes .*\(blocks.0.up: {transform.name}, .*run the bundle's own graph \(fxq.load\)"
    for route in (fxq.apply, fxq.bind):
        with pytest.raises(ApplyError, match=told):
            route(model, made)
    with pytest.raises(InteropError, match=f"another tool's format takes .*{told}"):
        read_model(fxq.save(made, tmp_path / "bundle"))
    model.to_json_string = lambda: "{}"
    with pytest.raises(BundleError, match=f"a diffusers folder takes .*{told}"):
        save_diffusers(made, model, tmp_path / "folder")
    split = ShardGraph(ShardPlan(()), Place("group", 0, 2), None)
    with pytest.raises(ParallelError, match=f"a split over ranks takes .*{told}"):
        split.run(QuantGraph.of(made))


def test_without_transforms_neither_recipes_nor_plans_say_anything_of_them():
    plain = [preset for preset in PRESETS.values() if preset.name != "w8a8-single-convrot"]
    assert len(plain) == len(PRESETS) - 1 and all("transforms" not in recipe_to_json(preset) for preset in plain)
    assert "transform" not in LayerPlan(layer="a", in_features=3, out_features=5).to_json()
    assert recipe_from_json(recipe_to_json(PRESETS["w4a8"])).transforms == ()


def test_recipes_with_transforms_are_read_back_from_json_and_toml(tmp_path):
    chosen = with_transforms((Rotate(16), Smooth((0.5,), 100), LowRank(3)))
    assert recipe_from_json(recipe_to_json(chosen)) == chosen
    (tmp_path / "a.toml").write_text(recipe_to_toml(chosen))
    assert load_recipe(tmp_path / "a.toml") == chosen
    assert {name for cls in TRANSFORMS.values() for name in cls.stores} == set(TRANSFORM_TENSORS)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"transform": "Rotat"}], r"transforms\[0\]: unknown transform 'Rotat'; did you mean 'Rotate'"),
        ([{"transform": "Rotate", "blok": 4}], r"transforms\[0\]: unknown key 'blok'; did you mean 'block'"),
        ([{}], r"transforms\[0\]: unknown transform None"),
        ([{"transform": "LowRank", "rank": "many"}], r"transforms\[0\].rank"),
        ([{"transform": "LowRank"}] * 2, "transform LowRank is named twice"),
        ([{"transform": "Smooth"}, {"transform": "Rotate"}], "Rotate runs before calibration: name it before Smooth"),
    ],
)
def test_transforms_that_are_not_right_are_refused(entries, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json({"extends": "w4a8", "transforms": entries})


def test_what_is_no_transform_and_a_budget_beside_them_are_refused():
    for wrong in (Rotate, 3, PlanLayers(recipe())):
        with pytest.raises(RecipeError, match=r"expected an instance, as Rotate\(\)"):
            with_transforms((wrong,))
    with pytest.raises(RecipeError, match="transforms with a budget"):
        dataclasses.replace(with_transforms(), budget=Budget(bits_per_weight=5))


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Has what a transform has, and is no pass."""

    needs = Stage.PLANNED
    learns = False
    stores = ()

    def run(self, graph):
        return 0


def test_a_transform_that_is_no_pass_is_refused_before_any_work():
    with pytest.raises(PassError, match="is no pass"):
        fxq.quantize(toy(), DATA, with_transforms((Foreign(),)), progress=False)


def test_a_transform_that_learns_needs_data():
    chosen = with_transforms((Smooth(),), per_token=True)
    with pytest.raises(CalibrationError, match="has the transform Smooth, whose scales follow from data"):
        fxq.quantize(toy(), None, chosen, example_inputs=rows(5, 96), progress=False)
    rotated = fxq.quantize(
        toy(), None, dataclasses.replace(chosen, transforms=(Rotate(),)), example_inputs=rows(5, 96), progress=False
    )
    assert fxq.summary(rotated).rows[0].transform == "Rotate"


def test_a_checkpoint_of_another_graph_is_not_taken(tmp_path):
    plain = fxq.quantize(toy(), DATA, recipe(4, 6), checkpoint_dir=tmp_path, progress=False)
    turned = fxq.quantize(toy(), DATA, with_transforms(), checkpoint_dir=tmp_path, progress=False)
    again = fxq.quantize(toy(), DATA, with_transforms(), checkpoint_dir=tmp_path, progress=False)
    assert torch.equal(turned(DATA[0]), again(DATA[0])) and not torch.equal(turned(DATA[0]), plain(DATA[0]))
    assert relative_error(toy(), turned, DATA[0]) < 0.2


def test_a_model_without_layers_for_a_transform_stays_as_it_is():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(17, 5)).eval(), [rows(20, 17)]
    made = [
        fxq.quantize(model, data, dataclasses.replace(recipe(), transforms=t), progress=False) for t in ((), ALL[::2])
    ]
    assert torch.equal(made[0](data[0]), made[1](data[0]))
    assert fxq.summary(made[1]).rows[0].quantized and fxq.summary(made[1]).rows[0].transform == ""
