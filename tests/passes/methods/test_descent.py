import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import Units, descent
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.quadratic import BLOCK, Quadratic, bounds
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.methods.refit import RefitScales
from tests.toys import problem, steps


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


@pytest.mark.parametrize("settings", [{"_MANY": 1}, {"_FEW": 0.0}, {"_FEW": 2.0}, {"_FEWEST": 1, "_FEW": 2.0}], ids=str)
def test_picking_out_what_changes_changes_nothing(settings, monkeypatch):
    p = problem(outputs=200, width=2 * BLOCK, count=400, outliers=32)
    before = RangeSearch().apply(p, None)
    want = RefitScales().apply(p, before)
    for name, value in settings.items():
        monkeypatch.setattr(descent, name, value)
    got = RefitScales().apply(p, before)
    assert float((got.weight != want.weight).float().mean()) < 1e-3  # sums of few rows may be in another order
    torch.testing.assert_close(loss(p, got), loss(p, want), rtol=1e-3, atol=0)


def test_sweeps_go_on_with_the_outputs_that_changed(monkeypatch):
    p = problem(outputs=60, width=96, count=400)
    nearest = RangeSearch().apply(p, None)
    seen, sweep = [], descent._sweep

    def watched(state, slope, gram, *, last):
        seen.append((len(slope), last))
        return sweep(state, slope, gram, last=last)

    monkeypatch.setattr(descent, "_sweep", watched)
    whole = CoordinateDescent(100).apply(p, nearest)
    counts = [count for count, _ in seen]
    assert counts[0] == 60 and counts == sorted(counts, reverse=True) and counts[-1] < 60 and not seen[-1][1]
    pieces = nearest
    for _ in counts:
        pieces = CoordinateDescent(1).apply(p, pieces)
    assert seen[-1][1] and float((pieces.weight != whole.weight).float().mean()) < 0.01


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="sweeps = 0"):
        CoordinateDescent(0)


def test_the_given_update_stays_as_it_is():
    p = problem()
    nearest = RangeSearch().apply(p, None)
    before = nearest.weight.clone()
    CoordinateDescent().apply(p, nearest)
    assert torch.equal(nearest.weight, before)
