import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import Units
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.grid import Grid
from fxq.passes.methods.quadratic import BLOCK, Quadratic, Solution, bounds
from fxq.passes.methods.ranges import RangeSearch
from tests.toys import problem, steps


def published(gram, target, step, limits, damping):
    """GPTQ as its paper has it: one channel at a time, errors spread by the inverse's Cholesky factor; float64."""
    order = gram.diagonal().argsort(stable=True).flip(0)
    g = gram.double()[order][:, order]
    g = g + damping * gram.double().diagonal().mean() * torch.eye(len(g), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(g), upper=True)
    w, s = target.double()[:, order].clone(), step.double()[:, order]
    low, high = (limit.double()[:, order] for limit in limits)
    found = torch.empty_like(w)
    for k in range(len(g)):
        found[:, k] = (w[:, k] / s[:, k]).round().clamp(low[:, k], high[:, k])
        error = (w[:, k] - found[:, k] * s[:, k]) / upper[k, k]
        w[:, k:] -= error[:, None] * upper[k, k:]
    result = torch.empty_like(found)
    result[:, order] = found
    return result


@pytest.mark.parametrize(("width", "outliers"), [(96, 0), (96, 32), (BLOCK + 64, 0), (2 * BLOCK, 64)])
def test_the_integers_are_those_of_the_published_algorithm(width, outliers):
    p = problem(outputs=24, width=width, count=3 * width, outliers=outliers)
    update = RangeSearch().apply(p, None)
    form = Quadratic.of(p, update)
    start = Solution(update.weight.float(), Grid(update.weight_scale / Units.of(p).weights, p.split))
    got = GPTQ(damping=0.01).solve(p, form, start).integers
    step = steps(p, start.grid.scale)
    want = published(form.gram, form.target, step, bounds(form.weight, step, 4), 0.01)
    # A tie in one channel changes those behind it in that output: almost all outputs have none.
    assert float((got.double() == want).all(1).float().mean()) > 0.9


def test_order_by_energy_is_a_choice():
    p = problem(count=300)
    update = RangeSearch().apply(p, None)
    assert not torch.equal(GPTQ().apply(p, update).weight, GPTQ(act_order=False).apply(p, update).weight)


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="damping = -1"):
        GPTQ(damping=-1)
