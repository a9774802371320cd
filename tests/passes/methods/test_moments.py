"""With moments of all rows a small sample makes the quadratic form of all rows, nearly."""

import dataclasses

import torch

from fxq.core.rows import RowSums
from fxq.passes.methods import Units
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.moments import strips
from fxq.passes.methods.quadratic import Quadratic
from fxq.passes.methods.ranges import RangeSearch
from tests.toys import problem, steps


def known(p, x, weights=None):
    sums = RowSums(x.shape[1], False, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    sums.add(x)
    return dataclasses.replace(p, moments=sums.moments(False))


def case(unit=1.0):
    whole, generator = problem(), torch.Generator().manual_seed(5)
    width = whole.weight.shape[1]
    spectrum = torch.linspace(0, -3, width).exp()
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = (torch.randn(6000, width, generator=generator) * spectrum) @ basis.T * unit
    ends = {"low": x.amin(0), "high": x.amax(0)}
    whole = dataclasses.replace(whole, rows=x, row_weights=torch.ones(len(x)), **ends)
    few = dataclasses.replace(whole, rows=whole.rows[:150], row_weights=whole.row_weights[:150])
    return whole, few, RangeSearch().apply(whole, None)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_the_form_is_that_of_all_rows():
    whole, few, start = case()
    powers = {"gram": 2, "target": 0, "mean": 1, "shift_of_float": 1}

    def form(p):
        found, unit = Quadratic.of(p, start), Units.of(p).inputs
        return {name: getattr(found, name) * unit**power for name, power in powers.items()}

    want, alone, found = form(whole), form(few), form(known(few, whole.rows))
    for name, most in {"gram": 0.05, "mean": 0.05, "shift_of_float": 0.05, "target": 0.9}.items():
        far, near = distance(alone[name], want[name]), distance(found[name], want[name])
        assert near < most * far, (name, near, far)


def test_integers_are_better_on_all_rows():
    whole, few, start = case()

    def error(p):
        update = CoordinateDescent().apply(p, GPTQ().apply(p, start))
        return float(
            Quadratic.of(whole, start).loss(update.weight * steps(p, update.weight_scale / Units.of(p).weights)).sum()
        )

    assert error(known(few, whole.rows)) < 0.9 * error(few)
    assert error(known(few, whole.rows)) < 1.1 * error(whole)


def test_nothing_depends_on_the_unit():
    for unit in (1e-12, 1e12):
        forms = []
        for factor in (1.0, unit):
            whole, few, start = case(factor)
            p = known(few, whole.rows)
            forms.append(GPTQ().apply(p, start).weight)
        assert (forms[0] != forms[1]).float().mean() < 0.01


def test_strips_cover_all_rows_once():
    assert [i for at in strips(2500) for i in range(at.start, at.stop)] == list(range(2500))
