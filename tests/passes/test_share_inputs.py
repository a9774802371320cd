import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.calibration.collect import Collector
from fxq.capture.trace import trace
from fxq.core.ir import QuantGraph, Stage, get_tensor
from fxq.core.pipeline import run_passes
from fxq.core.rows import Weighting
from fxq.job import Job
from fxq.passes import detect_outliers
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.methods.ranges import MinMax
from fxq.passes.share_inputs import ShareInputs, input_groups
from fxq.recipes import load_recipe, recipe_from_json, recipe_to_json
from fxq.runtime.progress import Progress
from tests.toys import LEARN, recipe, rows, wan_rollout

LAYERS = ("blocks.0.q", "blocks.0.k", "blocks.0.v")


class Siblings(nn.Module):
    """Linears on one input with different outlier channels; ``how`` changes one of them."""

    def __init__(self, how="", width=96):
        super().__init__()
        self.how = how
        block = {name: nn.Linear(width, outputs) for name, outputs in (("q", 64), ("k", 32), ("v", 7))}
        self.blocks = nn.ModuleList([nn.ModuleDict(block), nn.ModuleDict({"k": nn.Linear(width, 9)})])
        with torch.no_grad():
            for start, name in enumerate("qkv"):
                block[name].weight[:, start : start + 4] *= 9

    def forward(self, x):
        q, k, v = (self.blocks[0][name] for name in "qkv")
        y = x + 1
        outputs = [q(y), k(y), v(x if self.how == "another node" else y)]
        if self.how == "two calls":
            outputs.append(v(torch.tanh(x)))
        if self.how == "another block":
            outputs.append(self.blocks[1]["k"](y))
        return tuple(outputs)


def model(how="", **options):
    torch.manual_seed(1)
    return Siblings(how, **options).eval()


def planned(how="", share=True, width=96, rules=(), **scheme):
    chosen = recipe(8, **scheme)
    chosen = dataclasses.replace(chosen, rules=(*rules, *chosen.rules), share_inputs=share)
    graph = trace(model(how, width=width), (rows(20, width),))
    Job(chosen, Progress(False)).plan(graph)
    return graph


def test_layers_on_one_input_get_the_outliers_of_their_stacked_weights():
    graph, m = planned(), model()
    stacked = torch.cat([m.get_submodule(layer).weight for layer in LAYERS])
    want = tuple(detect_outliers(stacked).indices.tolist())
    assert {plan.outliers for plan in graph.plans.values()} == {want} and set(range(6)) <= set(want)
    assert graph.plans["blocks.0.k"].outlier_reason == "shared with blocks.0.q, blocks.0.v"
    assert graph.log[-1][:2] == ("ShareInputs", 3)


def test_a_recipe_that_does_not_share_leaves_every_layer_its_own():
    graph = planned(share=False)
    assert [name for name, _, _ in graph.log] == ["PlanLayers", "DetectOutliers"]
    assert len({plan.outliers for plan in graph.plans.values()}) == 3


@pytest.mark.parametrize("how", ["another node", "two calls", "another block"])
def test_a_layer_that_sees_other_values_or_lies_in_another_block_is_left_alone(how):
    graph, alone = planned(how), planned(how, share=False)
    (group,) = input_groups(graph.module)
    together = {site.layer for site in group}
    assert together == ({*LAYERS} if how == "another block" else {"blocks.0.q", "blocks.0.k"})
    for layer, plan in graph.plans.items():
        assert (plan == alone.plans[layer]) == (layer not in together)


def test_layers_of_different_schemes_do_not_share():
    rule = fxq.Rule("*.k", fxq.Scheme(weight_bits=4))
    plans = planned(rules=(rule,)).plans
    assert plans["blocks.0.k"].outlier_reason == ""
    assert plans["blocks.0.q"].outlier_reason == "shared with blocks.0.v"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dual_scale": False}, "dual scale is off in the recipe"),
        ({"width": 100}, "in_features 100 is not a multiple of 32"),
        ({"tau": 1000.0, "alpha": 1000.0}, "no channel above the threshold, shared with blocks.0.q, blocks.0.v"),
        ({"width": 32}, "half of 32 channels is less than one block of 32, shared with blocks.0.q, blocks.0.v"),
    ],
)
def test_layers_without_outliers_say_why(options, reason):
    plan = planned(**options).plans["blocks.0.k"]
    assert (plan.outliers, plan.outlier_reason) == ((), reason)


@pytest.mark.parametrize("bits", [4, 8])
def test_shared_layers_end_with_one_scale_and_merge(bits):
    chosen, x = recipe(bits, methods=LEARN), rows(2, 40, 96)
    module = fxq.quantize(model(), [x], chosen, progress=False)
    for name in ("input_scale", "input_zero_point", "perm"):
        first, *others = (get_tensor(module, f"{layer}.{name}") for layer in LAYERS)
        assert all(torch.equal(first, other) for other in others)
    graph = run_passes(QuantGraph(module, Stage.FROZEN).fork(), (MergeLinears(),))
    assert [str(n.target) for n in graph.module.graph.nodes].count("fxq.dual_scale_linear.default") == 1
    assert all(map(torch.equal, module(x), graph.module(x)))
    alone = fxq.quantize(model(), [x], dataclasses.replace(chosen, share_inputs=False), progress=False)
    assert len({get_tensor(alone, f"{layer}.input_scale")[0].item() for layer in LAYERS}) > 1


def test_layers_without_a_group_are_what_they_are_without_sharing():
    rollout = wan_rollout(seeds=(1,))
    chosen = recipe(4, methods=LEARN)
    shared, alone = (
        fxq.quantize(rollout.denoiser, rollout, dataclasses.replace(chosen, share_inputs=on), progress=False)
        for on in (True, False)
    )
    grouped = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.k", "cross_attn.v")
    others = [name for name, _ in alone.named_buffers() if not any(f"{layer}." in name for layer in grouped)]
    assert len(others) > 30
    assert all(torch.equal(get_tensor(shared, name), get_tensor(alone, name)) for name in others)


@pytest.mark.parametrize(("per_call", "most"), [(4, 1000), (9, 10), (100, 7)])
def test_statistics_are_stored_once_for_layers_of_one_input(per_call, most):
    alone, shared = Collector(per_call, most, 0), Collector(per_call, most, 0, {"b": "a"})
    for collector in (alone, shared):
        for seed, count in enumerate((0, 3, 17, 40, 5)):
            for layer, width in (("a", 8), ("b", 8), ("c", 5)):
                collector.chunk = seed
                collector.add(layer, rows(count, width, seed=seed if layer < "c" else 99))
    alone, shared = alone.finish(), shared.finish()
    assert shared["b"] is shared["a"] and sorted(shared) == sorted(alone)
    assert len(alone["a"].rows) <= most
    for layer in "abc":
        for name in ("low", "high", "rows", "chunks"):
            assert torch.equal(getattr(shared[layer], name), getattr(alone[layer], name))


@pytest.fixture
def noted():
    """Problems that Noting solved, as (layer, shape of the weight)."""
    NOTED.clear()
    return NOTED


NOTED: list[tuple[str, tuple[int, ...]]] = []


@dataclasses.dataclass(frozen=True)
class Noting:
    """MinMax that notes the problems it solves."""

    def apply(self, problem, update):
        NOTED.append((problem.layer, tuple(problem.weight.shape)))
        return MinMax().apply(problem, update)


def test_a_group_is_one_problem_and_one_checkpoint(tmp_path, noted):
    x, chosen = rows(20, 96), recipe(8, methods=(Noting(),))
    first = fxq.quantize(model(), [x], chosen, checkpoint_dir=tmp_path, progress=False)
    assert noted == [("blocks.0.q with 2 more", (103, 96))]
    again = fxq.quantize(model(), [x], chosen, checkpoint_dir=tmp_path, progress=False)
    assert len(noted) == len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))


def test_outliers_that_differ_keep_layers_apart(noted):
    graph, x = planned(share=False), rows(20, 96) + 1
    sample = fxq.core.method.LayerStatistics(
        low=x.amin(0), high=x.amax(0), rows=x, chunks=torch.zeros(20).long(), seen=20
    )
    graph.adopt(dict.fromkeys(graph.plans, sample))
    run_passes(graph, (fxq.passes.ApplyMethods((Noting(),), Weighting.UNIFORM, share_inputs=True),))
    assert [layer for layer, _ in noted] == list(LAYERS)


def test_a_recipe_file_says_whether_inputs_are_shared(tmp_path):
    data = recipe_to_json(fxq.presets.PRESETS["w4a8"])
    assert data["share_inputs"] is True
    del data["share_inputs"]
    assert recipe_from_json(data).share_inputs
    assert not recipe_from_json({**data, "share_inputs": False}).share_inputs
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nshare_inputs = false\nrules = []\nmethods = []\n')
    assert load_recipe(file).share_inputs is False


def test_sharing_is_an_analysis_of_a_planned_graph():
    graph = trace(model(), (rows(20, 96),))
    with pytest.raises(fxq.core.pipeline.PassError, match="ShareInputs needs a PLANNED graph"):
        run_passes(graph, (ShareInputs(),))
