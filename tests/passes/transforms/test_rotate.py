import copy
import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.core.config import RecipeError, Rule
from fxq.core.graph import linear_sites
from fxq.core.ir import get_tensor
from fxq.passes import Rotate
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.transforms.rotate import block_of_width, rotated, rotation
from tests.toys import recipe, relative_error, rewritten, rows


class Siblings(nn.Module):
    """Three linears on one input, one of which is called again on another, and one of an odd width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, n) for n in (64, 33, 17))
        self.odd = nn.Linear(17, 5)

    def forward(self, x):
        y = torch.tanh(x)
        return self.q(y), self.k(y), self.odd(self.v(y)), self.v(x)


def siblings():
    torch.manual_seed(1)
    return Siblings().eval()


def spiky(*shape, seed=2):
    """Inputs with a few channels of large values."""
    x = rows(*shape, seed=seed)
    x[..., 5::24] *= 25
    return x


@pytest.mark.parametrize("size", [2, 64])
def test_a_rotation_is_orthonormal_and_does_not_gather_the_mean(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert float((torch.ones(size, dtype=torch.float64) @ matrix).abs().max()) < 0.8 * size**0.5 + (size == 2)


@pytest.mark.parametrize(("width", "most", "block"), [(96, 64, 32), (5120, 64, 64), (5120, 4, 4), (7, 64, 1)])
def test_a_block_is_the_largest_power_of_two_that_divides_the_width(width, most, block):
    assert block_of_width(width, most) == block


def test_the_weight_makes_up_for_the_rounding_of_the_matrix():
    matrix, weight, x = rotation(32).bfloat16(), rows(5, 96), rows(9, 96)
    turned = (x.unflatten(1, (3, 32)) @ matrix.float()).flatten(1)
    torch.testing.assert_close(turned @ rotated(weight, matrix).T, x @ weight.T, rtol=1e-5, atol=1e-5)
    assert abs(float(matrix[0].float().square().sum()) - 1) > 1e-4


def test_the_float_graph_computes_the_same_and_layers_on_one_input_read_one_rotation():
    model, x = siblings(), rows(3, 10, 96)
    before = copy.deepcopy(model.state_dict())
    graph = rewritten(model, [Rotate()], [x])
    for want, got in zip(model(x), graph.module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    inputs = [site.node.args[0] for site in linear_sites(graph.module)]
    assert len(inputs) == 5 and len(set(inputs)) == 3  # q, k and v; odd; the other call of v
    assert {plan.layer: plan.transform for plan in graph.plans.values()} == {
        "q": "Rotate",
        "k": "Rotate",
        "v": "Rotate",
        "odd": "",
    }
    assert get_tensor(graph.module, "q.rotation").shape == (32, 32) and not hasattr(graph.module.k, "rotation")
    assert not torch.equal(get_tensor(graph.module, "q.weight"), model.q.weight)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_example_values_are_those_of_a_run():
    graph = rewritten(siblings(), [Rotate()], [rows(3, 10, 96)])
    for node in graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default):
        assert node.meta["val"].shape[1:] == (10, 3, 32) and node.meta["val"].dtype == torch.float32
    flat = graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.flatten.using_ints)
    assert {tuple(node.meta["val"].shape[1:]) for node in flat} == {(10, 96)}


@pytest.mark.parametrize(
    ("bits", "per_token", "most"), [((4, 6), False, 0.9), ((8, 8), False, 0.5), ((8, 8), True, 0.5)]
)
def test_outlier_channels_of_inputs_cost_less_behind_a_rotation(bits, per_token, most):
    torch.manual_seed(1)
    model, data = nn.Sequential(nn.Linear(96, 64)).eval(), [spiky(300, 96)]
    plain = recipe(*bits, methods=(RangeSearch(),), per_token=per_token, dual_scale=False)
    errors = []
    for transforms in ((), (Rotate(),)):
        module = fxq.quantize(model, data, dataclasses.replace(plain, transforms=transforms), progress=False)
        errors.append(relative_error(model, module, spiky(100, 96, seed=3)))
    assert errors[1] < most * errors[0]


def test_a_layer_that_a_rule_keeps_is_not_touched():
    model, x = siblings(), rows(10, 96)
    chosen = dataclasses.replace(recipe(8), rules=(Rule("v", None, "kept"), Rule("*", recipe(8).rules[-1].scheme)))
    module = fxq.quantize(model, [x], dataclasses.replace(chosen, transforms=(Rotate(),)), progress=False)
    assert torch.equal(module(x)[3], model(x)[3]) and torch.equal(get_tensor(module, "v.weight"), model.v.weight)
    assert not torch.equal(module(x)[0], model(x)[0])


class Named(nn.Module):
    """A bare parameter as a weight, and a linear that has a tensor of the name that a rotation would have."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(rows(32, 64))
        self.taken = nn.Linear(32, 4)
        self.taken.register_buffer("rotation", torch.ones(4))

    def forward(self, x):
        return self.taken(nn.functional.linear(x, self.w1)) * self.taken.rotation


def test_bare_parameters_are_rotated_and_tensors_of_the_model_keep_their_names():
    model, x = Named().eval(), rows(10, 64)
    graph = rewritten(model, [Rotate()], [x])
    torch.testing.assert_close(graph.module(x), model(x), rtol=1e-5, atol=1e-4)
    plans = graph.plans
    assert plans["w1"].transform == "Rotate"
    assert plans["taken"].reason == "the model has a tensor of its own named taken.rotation"


@pytest.mark.parametrize("block", [1, 48, 2048])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(RecipeError, match=f"Rotate: block = {block}, expected a power of two from 2 to 1024"):
        Rotate(block)
