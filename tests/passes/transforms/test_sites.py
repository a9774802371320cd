import dataclasses

import pytest
import torch

from fxq.core.graph import arguments, linear_sites
from fxq.core.ir import get_tensor, plan_of
from fxq.passes import detect_outliers
from fxq.passes.transforms.sites import call, change_inputs, groups_of, layers_of, mark, outliers_of, replace_weight
from tests.passes.transforms.test_rotate import siblings
from tests.toys import rewritten, rows


@pytest.fixture
def graph():
    return rewritten(siblings(), [], [rows(3, 10, 96)])


def test_layers_have_all_their_calls_and_those_on_one_input_are_together(graph):
    layers = layers_of(graph.module)
    assert {name: len(layer.sites) for name, layer in layers.items()} == {"q": 1, "k": 1, "v": 2, "odd": 1}
    # v is called again on another input, so that it can share none.
    assert [[layer.name for layer in group] for group in groups_of(graph.module)] == [["q", "k"], ["v"], ["odd"]]


def test_every_input_is_changed_once_for_the_first_layer_that_reads_it(graph):
    made = []

    def change(before, x, layer):
        made.append(layer)
        return call(before, torch.ops.aten.neg.default, (x,), x.meta["val"].shape)

    layers = layers_of(graph.module)
    change_inputs([layers["v"], layers["q"]], change)
    assert made == ["q", "v"]  # v is called again behind
    reads = [(site.layer, arguments(site.node)["input"].target) for site in linear_sites(graph.module)]
    assert [layer for layer, target in reads if target == torch.ops.aten.neg.default] == ["q", "v", "v"]


def test_a_weight_is_replaced_in_the_graph_and_not_written(graph):
    layer = layers_of(graph.module)["v"]
    before = layer.weight(graph.module).clone()
    replace_weight(graph.module, layer, torch.zeros(17, 96))
    assert not get_tensor(graph.module, "v.weight").any() and torch.equal(siblings().v.weight, before)
    graph.module.recompile()
    assert torch.equal(graph.module(rows(3, 10, 96))[3], siblings().v.bias.expand(3, 10, 17))


def test_transforms_of_a_layer_are_noted_one_after_the_other_at_all_its_calls(graph):
    mark(layers_of(graph.module)["v"], "Rotate")
    mark(layers_of(graph.module)["v"], "Smooth", tuple(range(32)))
    plans = [plan_of(site.node) for site in linear_sites(graph.module) if site.layer == "v"]
    assert [plan.transform for plan in plans] == ["Rotate + Smooth"] * 2
    assert plans[0].outliers == tuple(range(32)) and plans[0].outlier_reason == ""
    mark(layers_of(graph.module)["v"], "", ())
    assert graph.plans["v"].transform == "Rotate + Smooth"
    assert graph.plans["v"].outlier_reason == "no channel above the threshold"


def test_outliers_are_those_of_the_stacked_weights_where_layers_had_the_same():
    one, other = rows(20, 96), rows(20, 96, seed=3)
    one[:, :16] *= 9
    other[:, 40:56] *= 9
    plans = list(rewritten(siblings(), [], [rows(5, 96)]).plans.values())[:2]
    both = tuple(detect_outliers(torch.cat((one, other))).indices.tolist())
    assert outliers_of([one, other], plans) == [both, both]
    apart = [plans[0], dataclasses.replace(plans[1], outliers=(1,))]
    assert outliers_of([one, other], apart) == [tuple(detect_outliers(w).indices.tolist()) for w in (one, other)]
    scheme = dataclasses.replace(plans[0].scheme, dual_scale=False)
    assert outliers_of([one], [dataclasses.replace(plans[0], scheme=scheme)]) == [()]
