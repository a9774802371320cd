import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import Units
from fxq.passes.methods.grid import Grid
from fxq.passes.methods.quadratic import Quadratic, Solution
from fxq.passes.methods.ranges import MinMax
from fxq.passes.methods.refit import RefitScales, fitted_scales
from tests.toys import problem, steps


@pytest.mark.parametrize("outliers", [0, 32])
def test_no_other_scale_fits_the_integers_better(outliers):
    p = problem(outputs=20, count=400, outliers=outliers)
    update = MinMax().apply(p, None)
    form = Quadratic.of(p, update)
    solution = Solution(update.weight.float(), Grid(update.weight_scale / Units.of(p).weights, p.split))
    scale = fitted_scales(p, form, solution)
    best = form.loss(solution.integers * steps(p, scale))
    changed = (scale != solution.grid.scale).all(0)
    assert float(changed.float().mean()) > 0.5
    for group in range(len(scale)):
        for factor in (0.98, 1.02):
            other = scale.clone()
            other[group] *= factor
            assert bool((form.loss(solution.integers * steps(p, other)) >= best)[changed].all())


def test_outputs_of_zeros_keep_their_scale():
    p = problem(outputs=6, count=200)
    p.weight[2] = 0
    update = MinMax().apply(p, None)
    after = RefitScales().apply(p, update)
    assert float(after.weight_scale[0, 2]) == 1 and not torch.any(after.weight[2])


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="rounds = 0"):
        RefitScales(rounds=0)
