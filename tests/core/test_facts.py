import dataclasses
import json

import pytest
import torch

import fxq
from fxq.core.facts import Facts, has_facts
from fxq.core.ir import QuantGraph, Stage
from tests.toys import recipe, rows, toy

DATA = {
    "recipe": {"name": "r", "rules": []},
    "calibration_hash": "ab",
    "sensitivity": None,
    "chunk_weights": [1.0],
    "never_called": ["spare"],
    "inputs": [[None, 96]],
    "dtypes": ["float32"],
    "conditions": [],
    "passes": [["PlanLayers", 3]],
    "environment": {"torch": "2"},
}


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [rows(40, 96)], recipe(), progress=False)


def test_json_form_keeps_every_fact_and_the_order():
    more = DATA | {"parallel": {"rank": 0, "size": 2}, "site": "of another writer"}
    for data in (DATA, more):
        facts = Facts.from_json(data)
        assert json.dumps(facts.to_json()) == json.dumps(data)
        assert facts.stage is Stage.FROZEN and not facts.optimized
    assert facts.others == {"site": "of another writer"} and facts.parallel == {"rank": 0, "size": 2}


def test_facts_of_an_optimized_module_tell_what_was_done():
    data = DATA | {"remarks": {"a": ["fused"]}, "notes": {}}
    facts = Facts.from_json(data)
    assert facts.optimized and facts.stage is Stage.BOUND and facts.remarks == {"a": ["fused"]}
    assert json.dumps(facts.to_json()) == json.dumps(data)


@pytest.mark.parametrize("name", ["dtypes", "conditions", "chunk_weights"])
def test_what_older_bundles_do_not_state_stays_unstated(name):
    data = {key: value for key, value in DATA.items() if key != name}
    facts = Facts.from_json(data)
    assert getattr(facts, name) is None and name not in facts.to_json()
    assert facts.call_rules(["x"]).sizes == DATA["inputs"]


def test_rules_of_other_inputs_are_refused():
    with pytest.raises(ValueError, match="the graph has 2"):
        Facts.from_json(DATA).call_rules(["x", "y"])


def test_a_module_carries_its_facts_and_its_stage(quantized):
    facts = Facts.of(quantized)
    assert facts.recipe["name"] == "w8a8" and facts.stage is Stage.FROZEN and not facts.remarks
    assert [name for name, _ in facts.passes][-1] == "Freeze"
    assert facts.to_json() == fxq.summary(quantized).facts
    optimized = fxq.optimize(quantized)
    after = Facts.of(optimized)
    assert after.optimized and after.passes[: len(facts.passes)] == facts.passes and after.remarks
    assert Facts.of(quantized) is facts
    assert QuantGraph.of(quantized).stage is Stage.FROZEN and QuantGraph.of(optimized).stage is Stage.BOUND
    assert QuantGraph.of(quantized).fork().module.meta == quantized.meta


def test_a_module_of_someone_else_has_none(quantized):
    other = torch.fx.symbolic_trace(toy())
    assert has_facts(quantized) and not has_facts(other) and not has_facts(toy())
    assert QuantGraph.of(other).stage is Stage.TRACED
    with pytest.raises(ValueError, match=r"this Toy was not made by fxq\.quantize or fxq\.load"):
        Facts.of(other)


def test_facts_cannot_be_changed_in_place():
    facts = Facts.from_json(DATA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts.stage = Stage.BOUND
