import dataclasses
import math

import pytest
import torch
from torch import nn

import fxq
from fxq.core.config import RecipeError
from fxq.core.graph import linear_sites
from fxq.core.ir import get_tensor
from fxq.core.method import LayerStatistics
from fxq.passes import Balance, Smooth
from fxq.passes.transforms.balance import rank_correlation, salience
from tests.passes.transforms.test_rotate import siblings, spiky
from tests.toys import recipe, rewritten


def statistics(x, chunks):
    return LayerStatistics(low=x.amin(0), high=x.amax(0), rows=x, chunks=torch.tensor(chunks), seen=len(x))


def test_rank_correlation_is_spearmans():
    a, b = torch.tensor([[1.0, 2, 3, 4], [40, 3, 2, 1], [1, 1, 1, 1], [1, 3, 2, 9]]), torch.tensor([5.0, 6, 7, 80])
    assert rank_correlation(a, b).tolist() == pytest.approx([1, -1, 0, 0.8])
    tied = rank_correlation(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4]))
    assert float(tied) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # mean ranks 0, 1.5, 1.5, 3


def test_a_chunk_whose_large_channels_meet_large_columns_counts_less():
    columns = torch.tensor([1.0, 2, 4, 8])
    meets, misses = torch.tensor([[1.0, 2, 3, 4], [-0.5, 1, 1, -2]]), torch.tensor([[8.0, -6, 4, 2]])
    got = salience(statistics(torch.cat((meets, misses)), [0, 0, 3]), columns)
    e = math.exp(-2)  # of rho 1 against -1
    want = (e * torch.tensor([1.0, 2, 3, 4]) + torch.tensor([8.0, 6, 4, 2])) / (1 + e)
    torch.testing.assert_close(got, want.double())
    alone = salience(statistics(misses, [2]), columns)
    torch.testing.assert_close(alone, misses[0].abs().double())


def test_channels_become_as_large_as_columns_and_the_float_graph_computes_the_same():
    model, x = siblings(), spiky(3, 30, 96)
    graph = rewritten(model, [Balance()], [x], bits=4, input_bits=6)
    for want, got in zip(model(x), graph.module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    inputs = {site.layer: site.node.args[0] for site in linear_sites(graph.module)}
    assert inputs["q"] is inputs["k"] and inputs["q"].target == torch.ops.aten.mul.Tensor
    known = graph.statistics["q"]
    tops = torch.maximum(-known.low, known.high)
    columns = torch.stack([get_tensor(graph.module, f"{n}.weight").abs().amax(0) for n in "qk"]).amax(0)
    ratio = tops / columns
    torch.testing.assert_close(ratio, ratio.mean().expand(96), rtol=1e-4, atol=0)
    assert graph.plans["q"].transform == "Balance"


def test_few_rows_and_layers_that_may_not_learn_are_left_as_they_are():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(96, 64)).eval()
    for data, scheme in ((spiky(7, 96), {}), (spiky(100, 96), {"reconstruct": False})):
        graph = rewritten(model, [Balance()], [data], bits=4, **scheme)
        assert graph.plans["0"].transform == "" and torch.equal(get_tensor(graph.module, "0.weight"), model[0].weight)


def test_one_recipe_scales_inputs_once():
    with pytest.raises(
        RecipeError, match=r"transforms Smooth and Balance: their tensors would take each other.s place; name one"
    ):
        dataclasses.replace(recipe(4), transforms=(Smooth(), Balance()))
    data = fxq.recipes.recipe_to_json(recipe(4)) | {"transforms": [{"transform": "Balance"}]}
    assert fxq.recipes.recipe_from_json(data).transforms == (Balance(),)
