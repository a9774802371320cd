"""Every transformer of diffusers that can be captured is quantized as it is; the others say why not, with the line."""

import functools

import pytest
import torch
from torch.utils import _pytree as pytree

import fxq
from fxq.capture.trace import TraceError, trace
from fxq.metrics.outputs import output_sqnr
from fxq.numerics import POISON_LEAST
from fxq.passes.methods.ranges import MinMax
from tests.diffusers.cases import linears
from tests.diffusers.configs import CAPTURED, QUICK, REFUSED, SAVED, SLOW
from tests.toys import recipe

pytest.importorskip("diffusers")


@functools.cache
def quantized(case):
    """(model, its quantized form) after calibration on two batches."""
    model = case.build()
    return model, fxq.quantize(model, [case.batch(1), case.batch(2)], recipe(methods=(MinMax(),)), progress=False)


def params(cases):
    def tier(name):
        return () if name in QUICK else pytest.mark.slow if name in SLOW else pytest.mark.sweep

    return [pytest.param(case, id=case.name, marks=tier(case.name)) for case in cases]


@pytest.mark.parametrize("case", params(CAPTURED))
def test_every_linear_is_quantized_or_kept_with_a_reason(case):
    model, q = quantized(case)
    summary = fxq.summary(q)
    listed = {row.layer for row in summary.rows}
    names = {}
    for name, linear in linears(model).items():
        names.setdefault(id(linear), []).append(name)
    assert [n for n in names.values() if not listed.intersection(n)] == []
    wide = {id(linear) for linear in linears(model).values() if linear.in_features >= POISON_LEAST}
    assert 2 * len(summary.quantized) > len(wide), "narrow ones keep floats where scales are static"
    assert all(row.reason for row in summary.kept)
    stored = q.state_dict()
    assert {stored[f"{row.layer}.weight"].dtype for row in summary.quantized} == {torch.int8}
    assert not [p for p, _ in q.named_parameters() if p.removesuffix(".weight") in {r.layer for r in summary.quantized}]


@pytest.mark.parametrize("case", params(CAPTURED))
def test_the_output_is_that_of_the_model_but_for_rounding(case):
    model, q = quantized(case)
    held_out = case.batch(9)
    assert all(bool(t.isfinite().all()) for t in pytree.tree_leaves(q(**held_out)) if isinstance(t, torch.Tensor))
    assert case.sqnr <= output_sqnr(model, q, [held_out]) < 80


@pytest.mark.parametrize("case", params([c for c in CAPTURED if c.name in SAVED]))
def test_a_loaded_bundle_computes_the_same_bits(case, tmp_path):
    _, q = quantized(case)
    loaded = fxq.load(fxq.save(q, tmp_path / "bundle"))
    want, got = pytree.tree_leaves(q(**case.batch(9))), pytree.tree_leaves(loaded(**case.batch(9)))
    assert len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.sweep
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in REFUSED])
def test_a_model_that_cannot_be_captured_is_refused_with_the_line(case):
    with pytest.raises(TraceError, match=case.refused):
        trace(case.build(), (), case.batch(1))


def test_the_cases_are_named_once_and_the_named_ones_exist():
    names = [case.name for case in (*CAPTURED, *REFUSED)]
    assert len(names) == len(set(names)) >= 60
    assert {*QUICK, *SLOW, *SAVED} <= set(names)
