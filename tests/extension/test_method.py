"""A method from outside the package: GPTQ (arXiv 2210.17323) in one file, named in recipe files."""

import json

import pytest
import torch

import fxq
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.ranges import MinMax
from fxq.recipes import load_recipe
from tests.toys import problem

SOURCE = '''
"""GPTQ: round one input channel after the other and let the others make up for the error."""

import dataclasses

import torch

from fxq.numerics import integer_range


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Integers for the scales of the method before it; ``damping`` of the Hessian's diagonal."""

    damping: float = 0.01

    def apply(self, problem, update):
        if update is None:
            raise ValueError("Gptq rounds for given scales: put MinMax or RangeSearch before it")
        low, high = integer_range(problem.scheme.weight_bits)
        weight, integers = problem.weight.double().clone(), torch.zeros_like(update.weight)
        scale = torch.empty_like(weight)
        for part, scales in zip(problem.groups, update.weight_scale, strict=True):
            scale[:, part] = scales.double()[:, None]
        inverse = self.inverse(problem)
        for k in range(weight.shape[1]):
            q = (weight[:, k] / scale[:, k]).round().clamp(low, high)
            integers[:, k] = q.to(torch.int8)
            error = (weight[:, k] - q * scale[:, k]) / inverse[k, k]
            weight[:, k:] -= error[:, None] * inverse[k, k:]
        return dataclasses.replace(update, weight=integers)

    def inverse(self, problem):
        """Upper Cholesky factor [K, K] of the inverse Hessian of the output error."""
        x = problem.rows.double()
        hessian = (x * problem.row_weights.double()[:, None]).T @ x
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean())
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
'''
RECIPE = """
name = "gptq"
weighting = "uniform"

[[rules]]
pattern = "*"
scheme = { weight_bits = 4 }

[[methods]]
method = "MinMax"

[[methods]]
method = "Gptq"
damping = 0.02
"""


@pytest.fixture
def recipe(outside, tmp_path):
    outside.install("gptq_for_fxq", SOURCE, methods={"Gptq": "Gptq"})
    (tmp_path / "gptq.toml").write_text(RECIPE)
    return tmp_path / "gptq.toml"


@pytest.mark.parametrize("outliers", [0, 32])
def test_it_has_a_smaller_output_error_and_a_larger_weight_error_than_min_max(recipe, outliers):
    first, gptq = load_recipe(recipe).methods
    assert gptq.damping == 0.02
    layer = problem(outliers=outliers)
    nearest = first.apply(layer, None)
    learned = gptq.apply(layer, nearest)
    assert output_sqnr(layer, learned) > output_sqnr(layer, nearest) + 3

    def weight_error(update):
        back = fxq.numerics.dequantize_weight(update.weight, update.weight_scale, layer.split)
        return float((back - layer.weight).square().sum())

    assert weight_error(learned) > weight_error(nearest)


def test_a_model_quantized_with_it_is_closer_to_the_float_model(recipe, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)).eval()
    mix = torch.randn(24, 96)
    data = [torch.randn(100, 24) @ mix / 5 for _ in range(3)]
    held_out = torch.randn(200, 24) @ mix / 5

    def decibels(module):
        want, got = model(held_out), module(held_out)
        return float(10 * (want.square().sum() / (want - got).square().sum()).log10())

    quantized = fxq.quantize(model, data, recipe, progress=False)
    plain = fxq.Recipe(name="plain", rules=load_recipe(recipe).rules, methods=(MinMax(),), weighting="uniform")
    with torch.no_grad():
        assert decibels(quantized) > decibels(fxq.quantize(model, data, plain, progress=False)) + 1
    manifest = json.loads((fxq.save(quantized, tmp_path / "bundle") / "manifest.json").read_text())
    assert manifest["facts"]["recipe"]["methods"][1] == {"method": "Gptq", "damping": 0.02}
