import dataclasses

import pytest
import torch

import fxq
from fxq import kernels
from fxq.bench import floats, ours
from fxq.bench.cases import LinearShape
from fxq.bench.problems import linear_problem
from fxq.core.ir import get_tensor

SHAPE = LinearShape(33, 512, 70, 96)


@pytest.fixture(scope="module")
def problem():
    return linear_problem(SHAPE, "cpu")


@pytest.fixture(scope="module")
def frozen(problem):
    args = problem.args(torch.float32)
    return fxq.quantize(problem.module, [args], ours.speed_recipe(dual_scale=True), progress=False)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("dual_scale", "outliers"), [(True, 32), (False, 0)])
def test_dual_scale_means_that_the_planted_channels_have_their_own_scale(problem, dual_scale, outliers, per_token):
    recipe = ours.speed_recipe(dual_scale, per_token)
    built = ours.build(problem.model(torch.bfloat16), problem.args(torch.bfloat16), recipe, "cpu")
    assert ("quantize_per_token" in built.facts["operators"]) == per_token
    assert built.refusal == ""
    assert built.facts["outliers"]["blocks.0.0"] == outliers
    assert sum(op["nodes"] for op in built.facts["operators"].values()) >= 2
    assert built.facts["largest_error"].keys() == built.facts["operators"].keys()
    assert built.kernel.startswith(built.facts["layers"]["blocks.0.0"])


def test_operators_that_agree_with_their_references_are_not_refused(problem, frozen):
    refusal, worst = ours.compare_operators(frozen, *problem.args(torch.float32))
    assert refusal == ""
    assert worst["quantize_act"] == 0.0
    assert worst["dual_scale_linear"] <= kernels.dual_scale_linear.max_error


@pytest.mark.parametrize("name", ["quantize_act", "dual_scale_linear"])
def test_an_operator_that_left_its_bound_is_refused_by_name(problem, frozen, monkeypatch, name):
    right = getattr(kernels, name)

    def wrong(a):
        result = right.compute(a)
        return result.clone().add_(1) if result.dtype == torch.int8 else result * 1.1

    planted = tuple(dataclasses.replace(op, compute=wrong) if op is right else op for op in kernels.OPS)
    monkeypatch.setattr(ours.kernels, "OPS", planted)
    refusal, _ = ours.compare_operators(frozen, *problem.args(torch.float32))
    assert f"fxq::{name} at " in refusal
    assert "differs from its reference" in refusal


def test_a_single_integer_that_differs_is_an_error_above_zero():
    expected = torch.tensor([[-128, 3]], dtype=torch.int8)
    assert ours.relative_error(expected, expected) == 0.0
    assert ours.relative_error(expected, expected + torch.tensor([[0, 1]], dtype=torch.int8)) == pytest.approx(1 / 128)
    assert ours.relative_error(expected[:0], expected[:0]) == 0.0


def test_the_measured_module_stores_integers(frozen):
    assert get_tensor(frozen, "blocks.0.0.weight").dtype == torch.int8


@pytest.mark.parametrize("missing", [True, False])
def test_models_are_bfloat16_where_the_cpu_multiplies_it(missing, monkeypatch):
    monkeypatch.setattr(floats, "no_bfloat16", lambda: "not on this CPU" if missing else "")
    assert floats.own_dtype("cpu") == (torch.float32 if missing else torch.bfloat16)
    assert floats.own_dtype("cuda:0") == torch.bfloat16


def test_weights_of_four_bits_are_a_recipe_too(problem):
    built = ours.build(problem.module, problem.args(torch.float32), ours.speed_recipe(True, weight_bits=4), "cpu")
    assert built.refusal == "" and built.facts["outliers"]["blocks.0.0"] == 32
