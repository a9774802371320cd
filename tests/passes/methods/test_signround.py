import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.passes.methods.signround import SignRound
from tests.toys import form_loss as loss
from tests.toys import problem


@pytest.mark.parametrize(("bits", "outliers"), [(4, 0), (4, 32), (8, 32)])
def test_the_error_of_every_output_falls(bits, outliers):
    p = problem(bits=bits, outliers=outliers, count=400)
    nearest = RangeSearch().apply(p, None)
    learned = SignRound().apply(p, nearest)
    assert bool((loss(p, learned) <= loss(p, nearest) * (1 + 1e-5)).all())
    assert float(loss(p, learned).sum()) < 0.8 * float(loss(p, nearest).sum())
    assert output_sqnr(p, learned) > output_sqnr(p, nearest)


def test_clipping_is_learned_from_the_absolute_maximum():
    p = problem(count=400)
    start = MinMax().apply(p, None)
    learned = SignRound().apply(p, start)
    ratio = learned.weight_scale / start.weight_scale
    assert 0.5 <= float(ratio.min()) < 0.95 and float(ratio.max()) <= 1.25


def test_the_result_is_one_of_integers_next_to_the_scaled_weight():
    p = problem(count=400)
    learned = SignRound().apply(p, RangeSearch().apply(p, None))
    scaled = (p.weight / learned.weight_scale[0][:, None]).clamp(-8, 7)
    assert float((learned.weight - scaled).abs().max()) <= 1 + 1e-4


def test_more_iterations_are_better_and_the_result_is_reproducible():
    p = problem(count=400)
    nearest = RangeSearch().apply(p, None)
    few, many, again = (SignRound(iterations=count).apply(p, nearest) for count in (5, 400, 400))
    assert float(loss(p, many).sum()) < float(loss(p, few).sum())
    assert torch.equal(many.weight, again.weight) and torch.equal(many.weight_scale, again.weight_scale)


@pytest.mark.parametrize(("settings", "said"), [({"iterations": 0}, "iterations = 0"), ({"rate": 2.0}, "rate = 2.0")])
def test_settings_are_checked(settings, said):
    with pytest.raises(RecipeError, match=said):
        SignRound(**settings)
