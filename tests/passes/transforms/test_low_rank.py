import copy
import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.core.config import RecipeError
from fxq.core.ir import get_tensor, planned
from fxq.core.layer import LayerTensors
from fxq.core.products import low_rank_branch
from fxq.passes import LowRank, Smooth
from fxq.passes.transforms.low_rank import largest_directions
from tests.passes.transforms.test_rotate import siblings, spiky
from tests.toys import recipe, relative_error, rewritten, rows


def steep():
    """A linear most of whose weight lies in a few directions."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(96, 64)).eval()
    with torch.no_grad():
        model[0].weight += rows(64, 4) @ rows(4, 96, seed=5) / 4
    return model


@pytest.mark.parametrize("unit", [1.0, 2.0**-100, 2.0**100])
def test_the_factors_are_those_of_the_nearest_matrix_whatever_the_unit(unit):
    weight = rows(40, 96) * unit
    down, up = largest_directions(weight, 5)
    torch.testing.assert_close(down.T @ down, torch.eye(5), rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(weight.double() / unit)
    best = float(values[5:].square().sum())
    found = float(((weight - (down @ up).T).double() / unit).square().sum())
    assert best < found < 1.005 * best
    one = largest_directions(weight / unit, 5)
    assert torch.equal(one[0], down) and torch.equal(one[1] * unit, up)


def test_the_float_graph_computes_the_same_at_every_call_of_a_layer():
    model, x = siblings(), rows(3, 10, 96)
    before = copy.deepcopy(model.state_dict())
    graph = rewritten(model, [LowRank(4)], [x])
    for want, got in zip(model(x), graph.module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert {plan.layer: plan.transform for plan in graph.plans.values()} == {
        "q": "LowRank",
        "k": "LowRank",
        "v": "LowRank",
        "odd": "",  # 4 (17 + 5) numbers are more than 17 x 5
    }
    assert get_tensor(graph.module, "v.low_rank_down").shape == (96, 4)
    assert len(graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)) == 4
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_weight_is_stored_more_closely_at_equal_bits_and_so_is_the_output():
    model, x, chosen = steep(), rows(200, 96), recipe(4, 8)
    weights, errors = [], []
    for transforms in ((), (LowRank(4),)):
        module = fxq.quantize(model, [x], dataclasses.replace(chosen, transforms=transforms), progress=False)
        plan = planned(module)["0"][0]
        stored, branch = LayerTensors.of(module, plan).float_weight(), low_rank_branch(module, plan)
        weights.append(float((stored + (0 if branch is None else branch) - model[0].weight.detach()).norm()))
        errors.append(relative_error(model, module, x))
    assert weights[1] < 0.6 * weights[0] and errors[1] < 0.6 * errors[0]
    # The signal of the SQNR is the whole output, not that of what is left of the weight.
    told = fxq.summary(module).rows[0].output_sqnr
    assert told == pytest.approx(-20 * torch.tensor(errors[1]).log10().item(), abs=0.3)


def test_a_summary_counts_the_branch_and_lists_no_other_product():
    rows_of = []
    for transforms in ((), (LowRank(4),)):
        chosen = dataclasses.replace(recipe(4, 8), transforms=transforms)
        found = fxq.summary(fxq.quantize(steep(), [rows(20, 96)], chosen, progress=False))
        assert not found.others and len(found.rows) == 1
        rows_of.append(found.rows[0])
    assert rows_of[1].bytes - rows_of[0].bytes == 4 * 4 * (96 + 64) and rows_of[1].transform == "LowRank"


def test_outlier_channels_are_those_of_what_is_left_of_the_weight():
    model, x = steep(), rows(100, 96)
    with torch.no_grad():
        model[0].weight[:, 3:35:4] += 2 * rows(64, 1)
    graph = rewritten(model, [LowRank(8)], [x], bits=4)
    left = fxq.detect_outliers(get_tensor(graph.module, "0.weight"))
    assert graph.plans["0"].outliers == tuple(left.indices.tolist()) == ()
    assert len(rewritten(model, [], [x], bits=4).plans["0"].outliers) == 32


def test_behind_smoothing_the_smoothed_weight_is_split():
    model, x = steep(), spiky(200, 96)
    graph = rewritten(model, [Smooth(), LowRank(4)], [x], bits=4, input_bits=6)
    torch.testing.assert_close(graph.module(x), model(x), rtol=1e-5, atol=1e-4)
    smoothed = model[0].weight / get_tensor(graph.module, "0.smoothing")
    down, up = largest_directions(smoothed, 4)
    torch.testing.assert_close(down @ up, low_rank_branch(graph.module, graph.plans["0"]).T, rtol=1e-3, atol=1e-4)
    assert graph.plans["0"].transform == "Smooth + LowRank"


def test_no_data_are_needed():
    chosen = dataclasses.replace(recipe(4, 8, per_token=True), transforms=(LowRank(4),))
    module = fxq.quantize(steep(), None, chosen, example_inputs=rows(5, 96), progress=False)
    assert fxq.summary(module).rows[0].transform == "LowRank"


def test_a_rank_below_one_is_refused():
    with pytest.raises(RecipeError, match="LowRank: rank = 0, expected at least 1"):
        LowRank(0)
