"""A pass from outside the package: layers that quantize badly stay in model dtype."""

import importlib

import pytest
import torch

import fxq
from fxq.core.verify import RuleError
from tests.toys import recipe, relative_error, rows, toy

SOURCE = '''
"""Keep layers whose output is noisier than asked."""

import dataclasses
from typing import ClassVar

from fxq.passes import Analysis, QuantGraph, Stage, planned, set_plan


@dataclasses.dataclass(frozen=True)
class KeepNoisy(Analysis):
    """Layers whose output SQNR is below ``least_db`` stay in model dtype."""

    least_db: float
    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED

    def run(self, graph: QuantGraph) -> int:
        kept = 0
        for plan, nodes in planned(graph.module).values():
            if plan.scheme is not None and plan.output_sqnr < self.least_db:
                reason = f"{plan.output_sqnr:.1f} dB, at least {self.least_db:.1f} asked"
                for node in nodes:
                    set_plan(node, dataclasses.replace(plan, scheme=None, outliers=(), reason=reason))
                kept += 1
        return kept


@dataclasses.dataclass(frozen=True)
class Silent(KeepNoisy):
    """Keeps layers without saying why."""

    def run(self, graph: QuantGraph) -> int:
        for plan, nodes in planned(graph.module).values():
            for node in nodes:
                set_plan(node, dataclasses.replace(plan, scheme=None, outliers=(), reason=""))
        return 1
'''


@pytest.fixture
def module(outside):
    outside.install("keep_noisy", SOURCE)
    return importlib.import_module("keep_noisy")


def test_noisy_layers_stay_in_model_dtype_and_the_error_falls(module, tmp_path):
    model, data = toy(blocks=2), [rows(60, 96)]
    coarse = fxq.quantize(model, data, recipe(4), progress=False)
    decibels = {row.layer: row.output_sqnr for row in fxq.summary(coarse).quantized}
    limit = sorted(decibels.values())[1] + 0.01
    careful = fxq.quantize(model, data, recipe(4), passes=(module.KeepNoisy(limit),), progress=False)
    summary = fxq.summary(careful)
    assert {row.layer for row in summary.quantized} == {name for name, db in decibels.items() if db >= limit}
    kept = {row.layer: row.reason for row in summary.kept}
    assert all(kept[name] == f"{db:.1f} dB, at least {limit:.1f} asked" for name, db in decibels.items() if db < limit)
    assert ["KeepNoisy", 2] in summary.facts["passes"]
    assert relative_error(model, careful, rows(40, 96, seed=9)) < relative_error(model, coarse, rows(40, 96, seed=9))
    loaded = fxq.load(fxq.save(careful, tmp_path / "bundle"))
    assert torch.equal(loaded(data[0]), careful(data[0]))


def test_a_rule_that_it_breaks_is_told_with_its_name(module):
    with pytest.raises(RuleError, match=r"after Silent: every linear is decided: .*: neither scheme nor reason"):
        fxq.quantize(toy(), [rows(8, 96)], recipe(), passes=(module.Silent(0.0),), progress=False)
