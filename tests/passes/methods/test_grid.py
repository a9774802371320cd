"""Grids of weights: scales, and multipliers of groups."""

import dataclasses

import pytest
import torch

from fxq.core.method import RecipeError, Scheme, refuse_format
from fxq.passes.methods import Units
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.gram_adaround import GramAdaRound
from fxq.passes.methods.grid import LARGEST, Grid, expanded, group_steps, grouped, multipliers
from fxq.passes.methods.quadratic import Quadratic
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.passes.methods.refit import RefitScales
from fxq.passes.methods.signround import SignRound
from tests.toys import problem

METHODS = (GPTQ(), CoordinateDescent(), RefitScales(), SignRound(iterations=20), GramAdaRound(iterations=20))


def uneven(**changes):
    """A problem whose weights are of another size in every 32 channels."""
    p = problem(bits=4, count=300, weight_group=32, **{"outliers": 32, "width": 256} | changes)
    sizes = torch.linspace(0.3, 2.0, p.weight.shape[1] // 32).repeat_interleave(32)
    return dataclasses.replace(p, weight=p.weight * sizes[torch.randperm(len(sizes), generator=torch.manual_seed(1))])


def loss(p, update):
    """The quadratic form of what an update's integers and scales stand for."""
    grid = Grid(update.weight_scale / Units.of(p).weights, p.split)
    return Quadratic.of(p, update).loss(update.weight * grid.steps(p.weight.shape[1]))


def wrong(p, update):
    """Squared error of the weights."""
    grid = Grid(update.weight_scale, p.split)
    return float((update.weight * grid.steps(p.weight.shape[1]) - p.weight).square().sum())


def test_steps_are_scales_times_multipliers():
    multiplier = torch.tensor([[1, 15, 2], [3, 4, 5]], dtype=torch.int8)
    grid = Grid(torch.tensor([[0.5, 2.0], [0.25, 1.0]]), 64, multiplier)
    steps = grid.steps(96)
    assert steps.shape == (2, 96)
    assert steps[:, [0, 31, 32, 63, 64, 95]].tolist() == [[0.5, 0.5, 7.5, 7.5, 0.5, 0.5], [6, 6, 8, 8, 5, 5]]
    channels = torch.tensor([64, 0, 33])
    assert torch.equal(grid.of_channels(channels), steps[:, channels].T)
    assert torch.equal(grid.steps(96, slice(1, 2)), steps[1:])
    assert torch.equal(grid.of_outputs(torch.tensor([1])).steps(96), steps[1:])
    ones = torch.ones(2, 96)
    assert torch.equal(grid.multiplied(ones) * Grid(grid.scale, 64).steps(96), steps)
    assert torch.equal(Grid(grid.scale, 64).multiplied(ones), ones)


def test_a_grid_is_near_the_steps_that_are_wanted():
    p = problem(outputs=3, width=128, outliers=32)
    wanted = torch.tensor([[1.0, 0.5, 0.1, 3.0], [2.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    grid = grouped(p, wanted)
    got = grid.steps(128)[:, ::32]
    assert float(((got - wanted).abs() * (wanted > 0)).max()) <= 2.0 / LARGEST / 2 + 1e-6
    assert int(grid.multiplier.min()) >= 1 and int(grid.multiplier.max()) == LARGEST
    assert bool((grid.scale > 0).all())


def test_the_largest_common_factor_of_a_block_is_its_multiplier():
    codes = torch.zeros(1, 160, dtype=torch.int8)
    codes[0, :32] = torch.arange(-8, 8).repeat(2) * 15
    codes[0, 32:64] = torch.arange(-8, 8).repeat(2) * 7
    codes[0, 64:96] = torch.tensor([-8, 7]).repeat(16)
    codes[0, 96:128] = torch.tensor([100, 99]).repeat(16)
    assert multipliers(codes).tolist() == [[15, 7, 1, 1, LARGEST]]
    assert group_steps(Scheme(weight_bits=4), codes) is None
    steps = group_steps(Scheme(weight_bits=4, weight_group=32), codes)
    assert torch.equal(steps, expanded(multipliers(codes)))


@pytest.mark.parametrize("first", [MinMax(), RangeSearch()], ids=lambda m: type(m).__name__)
def test_groups_round_nearer_than_one_scale(first):
    p = uneven(outliers=0)
    plain = dataclasses.replace(p, scheme=dataclasses.replace(p.scheme, weight_group=0))
    update, other = first.apply(p, None), first.apply(plain, None)
    assert other.multiplier is None and update.multiplier.shape == (len(p.weight), p.weight.shape[1] // 32)
    assert wrong(p, update) < 0.7 * wrong(plain, other)


def test_a_block_of_zeros_spoils_no_other():
    p = uneven()
    p.weight[:, 32:64] = 0
    p.weight[3] = 0
    update = RangeSearch().apply(p, None)
    assert not update.weight[:, 32:64].any() and not update.weight[3].any()
    assert wrong(p, update) < 0.02 * float(p.weight.square().sum())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_methods_lower_the_error_and_keep_the_multipliers(method):
    p = uneven()
    before = RangeSearch().apply(p, None)
    after = method.apply(p, before)
    assert torch.equal(after.multiplier, before.multiplier)
    old, new = loss(p, before), loss(p, after)
    assert bool((new <= old * (1 + 1e-5)).all()) and float(new.sum()) < 0.95 * float(old.sum())
    codes = after.weight / expanded(after.multiplier)
    assert torch.equal(codes, codes.round()) and int(codes.min()) >= -8 and int(codes.max()) <= 7


def test_every_integer_is_within_a_step_of_its_weight():
    p = uneven()
    update = RangeSearch().apply(p, None)
    for method in (GPTQ(), CoordinateDescent()):
        update = method.apply(p, update)
    step = Grid(update.weight_scale, p.split, update.multiplier).steps(p.weight.shape[1])
    wanted = p.weight / step
    inside = (wanted > -8) & (wanted < 7)
    assert float(((update.weight / expanded(update.multiplier) - wanted).abs() * inside).max()) < 1 + 1e-4


def test_a_method_that_knows_no_groups_is_refused_by_name():
    scheme = Scheme(weight_bits=4, weight_group=32)
    with pytest.raises(RecipeError, match=r"x: AdaRound chooses integers of one scale.*weight_group is 32"):
        refuse_format("x", scheme, (RangeSearch(), AdaRound()))
    refuse_format("x", scheme, (RangeSearch(), GPTQ(), CoordinateDescent(), RefitScales()))


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (8, 32), (5, 32)])
def test_other_groups_are_refused(bits, group):
    with pytest.raises(RecipeError, match=rf"weight_group = {group} with weight_bits = {bits}: expected 0, or 32"):
        Scheme(weight_bits=bits, weight_group=group)
