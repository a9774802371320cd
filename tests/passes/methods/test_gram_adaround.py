import dataclasses

import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.gram_adaround import GramAdaRound
from fxq.passes.methods.ranges import RangeSearch
from tests.toys import form_loss as loss
from tests.toys import problem


@pytest.mark.parametrize(("bits", "outliers"), [(4, 0), (4, 32), (8, 32)])
def test_the_error_of_every_output_falls(bits, outliers):
    p = problem(bits=bits, outliers=outliers, count=400)
    nearest = RangeSearch().apply(p, None)
    learned = GramAdaRound().apply(p, nearest)
    assert bool((loss(p, learned) <= loss(p, nearest) * (1 + 1e-5)).all())
    assert float(loss(p, learned).sum()) < 0.8 * float(loss(p, nearest).sum())
    assert output_sqnr(p, learned) > output_sqnr(p, nearest)


def test_weights_go_to_one_of_the_two_integers_beside_them_and_scales_stay():
    p = problem(count=400)
    nearest = RangeSearch().apply(p, None)
    learned = GramAdaRound().apply(p, nearest)
    scaled = (p.weight / nearest.weight_scale[0][:, None]).clamp(-8, 7)
    assert float((learned.weight - scaled).abs().max()) < 1 + 1e-4
    assert not torch.equal(learned.weight, nearest.weight)
    assert torch.equal(learned.weight_scale, nearest.weight_scale)


def test_all_rows_say_more_than_as_many_iterations_on_drawn_ones():
    p = problem(count=4000)
    nearest = RangeSearch().apply(p, None)
    drawn = AdaRound(iterations=300, rows=64).apply(p, nearest)
    whole = GramAdaRound(iterations=300).apply(p, nearest)
    assert float(loss(p, whole).sum()) < float(loss(p, drawn).sum())


def test_nothing_is_random():
    p = problem(count=400)
    nearest = RangeSearch().apply(p, None)
    first, again = (GramAdaRound(100).apply(dataclasses.replace(p, seed=seed), nearest) for seed in (1, 2))
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize(("settings", "said"), [({"iterations": 0}, "iterations = 0"), ({"rate": 2.0}, "rate = 2.0")])
def test_settings_are_checked(settings, said):
    with pytest.raises(RecipeError, match=said):
        GramAdaRound(**settings)
