import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import fxq
from fxq.core.config import RecipeError
from fxq.core.graph import linear_sites
from fxq.core.ir import get_tensor
from fxq.core.pipeline import run_passes
from fxq.passes import Smooth
from fxq.passes.methods.ranges import RangeSearch
from fxq.runtime.workers import Workers
from tests.passes.transforms.test_rotate import siblings, spiky
from tests.toys import recipe, relative_error, rewritten, rows


def linear(scale=1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(96, 64, bias=False)).eval()
    with torch.no_grad():
        model[0].weight *= scale
    return model


def test_the_float_graph_computes_the_same_and_layers_on_one_input_read_one_product():
    model, x = siblings(), spiky(3, 30, 96)
    before = copy.deepcopy(model.state_dict())
    graph = rewritten(model, [Smooth()], [x], bits=4, input_bits=6)
    for want, got in zip(model(x), graph.module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    inputs = {site.layer: site.node.args[0] for site in linear_sites(graph.module)}
    assert inputs["q"] is inputs["k"] and inputs["q"].target == torch.ops.aten.mul.Tensor
    assert inputs["v"] is not inputs["q"]  # it is called on another input too
    assert get_tensor(graph.module, "q.smoothing").shape == (96,) and not hasattr(graph.module.k, "smoothing")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_statistics_are_those_of_the_smoothed_input():
    model, x = linear(), spiky(200, 96)
    graph = rewritten(model, [Smooth()], [x], bits=8, dual_scale=False)
    statistics, scale = graph.statistics["0"], get_tensor(graph.module, "0.smoothing")
    torch.testing.assert_close(statistics.high, (x * scale).amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.low, (x * scale).amin(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.multiplier, scale)


@pytest.mark.parametrize(
    ("bits", "per_token", "most"), [((4, 6), False, 0.9), ((8, 8), False, 0.5), ((8, 8), True, 0.5)]
)
def test_outlier_channels_of_inputs_cost_less_behind_smoothing(bits, per_token, most):
    model, data = linear(), [spiky(300, 96)]
    plain = recipe(*bits, methods=(RangeSearch(),), per_token=per_token, dual_scale=False)
    errors = []
    for transforms in ((), (Smooth(),)):
        module = fxq.quantize(model, data, dataclasses.replace(plain, transforms=transforms), progress=False)
        errors.append(relative_error(model, module, spiky(100, 96, seed=3)))
    assert errors[1] < most * errors[0]
    seen = relative_error(model, module, data[0])
    assert fxq.summary(module).rows[0].output_sqnr == pytest.approx(-20 * math.log10(seen), abs=0.1)


def test_weights_of_any_unit_get_the_same_integers():
    data, chosen = spiky(100, 96), dataclasses.replace(recipe(4, 6), transforms=(Smooth(),))
    one, other = (fxq.quantize(linear(unit), [data / unit], chosen, progress=False) for unit in (1.0, 2.0**-100))
    assert fxq.summary(one).rows[0].transform == "Smooth"
    assert torch.equal(get_tensor(one, "0.weight"), get_tensor(other, "0.weight"))
    assert torch.equal(get_tensor(one, "0.smoothing"), get_tensor(other, "0.smoothing"))


def test_a_layer_that_scales_do_not_help_or_with_few_rows_or_that_may_not_learn_is_left_as_it_is():
    model, even = linear(), torch.sign(rows(100, 96))
    with torch.no_grad():
        model[0].weight.sign_()
    for data, scheme in ((even, {}), (spiky(7, 96), {}), (spiky(100, 96), {"reconstruct": False})):
        graph = rewritten(model, [Smooth()], [data], bits=4, **scheme)
        assert graph.plans["0"].transform == "" and graph.log[-1][:2] == ("Smooth", 0)
        assert torch.equal(get_tensor(graph.module, "0.weight"), model[0].weight)
    assert rewritten(linear(), [Smooth()], [spiky(100, 96)], bits=8).plans["0"].transform == "Smooth"


def test_outlier_channels_are_those_of_the_smoothed_weight():
    model, x = linear(), rows(200, 96)
    with torch.no_grad():
        model[0].weight[:, 3:35:4] *= 9
    x[:, 3:35:4] /= 9
    graph = rewritten(model, [Smooth((0.5,))], [x], bits=4, input_bits=6)
    smoothed = get_tensor(graph.module, "0.weight")
    assert graph.plans["0"].outliers == tuple(fxq.detect_outliers(smoothed).indices.tolist())
    assert len(rewritten(model, [], [x], bits=4).plans["0"].outliers) == 32


@dataclasses.dataclass(frozen=True)
class Second(Workers):
    """Rank 1 of two, of which the other owns everything and shares what it is told to."""

    rank: int = 1
    shared: dict = dataclasses.field(default_factory=dict)

    def owners(self, costs):
        return [0] * len(costs)

    def share(self, tensors, owner):
        assert tensors is None and owner == 0
        return self.shared


def test_a_rank_takes_the_scales_that_another_chose():
    graph = rewritten(linear(), [], [spiky(100, 96)], bits=4)
    graph.workers = Second(shared={"multiplier": torch.full((96,), 0.5), "outliers.0": torch.arange(32)})
    run_passes(graph, (Smooth(),))
    assert torch.equal(get_tensor(graph.module, "0.smoothing"), torch.full((96,), 0.5))
    assert torch.equal(get_tensor(graph.module, "0.weight"), 2 * linear()[0].weight)
    assert graph.plans["0"].outliers == tuple(range(32))


def test_strengths_and_rows_out_of_range_are_refused():
    with pytest.raises(RecipeError, match=r"Smooth: alphas = \(1.5,\), expected at least one in 0..1"):
        Smooth((1.5,))
    with pytest.raises(RecipeError, match="Smooth: rows = 7, expected at least 8"):
        Smooth(rows=7)
