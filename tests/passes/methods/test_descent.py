import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import Units
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.quadratic import BLOCK, Quadratic, bounds, steps
from fxq.passes.methods.ranges import RangeSearch
from tests.toys import problem


def loss(p, update):
    return Quadratic.of(p, update).loss(update.weight * steps(p, update.weight_scale / Units.of(p).weights))


@pytest.mark.parametrize(("width", "outliers"), [(96, 32), (BLOCK + 32, 0)])
def test_at_its_end_no_single_integer_can_be_changed_for_the_better(width, outliers):
    p = problem(outputs=5, width=width, count=3 * width, outliers=outliers)
    update = CoordinateDescent(sweeps=100).apply(p, RangeSearch().apply(p, None))
    form, step = Quadratic.of(p, update), steps(p, update.weight_scale / Units.of(p).weights)
    best = form.loss(update.weight * step)
    low, high = bounds(form.weight, step, 4)
    for change in (-1, 1):
        for k in range(width):
            other = update.weight.float().clone()
            other[:, k] = (other[:, k] + change).clamp(low[:, k], high[:, k])
            assert bool((form.loss(other * step) >= best * (1 - 1e-4)).all())


def test_it_refines_any_integers():
    p = problem(outputs=40, count=400)
    nearest = RangeSearch().apply(p, None)
    alone, after = CoordinateDescent().apply(p, nearest), CoordinateDescent().apply(p, GPTQ().apply(p, nearest))
    assert float(loss(p, after).sum()) < float(loss(p, GPTQ().apply(p, nearest)).sum())
    assert float(loss(p, alone).sum()) < float(loss(p, nearest).sum())


def test_more_sweeps_are_never_worse():
    p = problem(outputs=40, count=400)
    nearest = RangeSearch().apply(p, None)
    losses = [loss(p, CoordinateDescent(sweeps).apply(p, nearest)) for sweeps in (1, 2, 5, 20)]
    for more, fewer in zip(losses[1:], losses, strict=False):
        assert bool((more <= fewer * (1 + 1e-5)).all())


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="sweeps = 0"):
        CoordinateDescent(0)


def test_the_given_update_stays_as_it_is():
    p = problem()
    nearest = RangeSearch().apply(p, None)
    before = nearest.weight.clone()
    CoordinateDescent().apply(p, nearest)
    assert torch.equal(nearest.weight, before)
