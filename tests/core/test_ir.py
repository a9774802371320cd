import dataclasses
import json

import pytest
import torch

from fxq.capture.trace import trace
from fxq.core.config import Scheme
from fxq.core.graph import graph_text, linear_sites
from fxq.core.ir import (
    LAYER_TENSORS,
    LayerPlan,
    Stage,
    clear_plan,
    get_tensor,
    plan_of,
    planned,
    put_tensor,
    set_plan,
    stored_names,
)
from tests.core.test_verify import at
from tests.toys import rows, toy

PLAN = LayerPlan(layer="blocks.0.up", in_features=96, out_features=64, scheme=Scheme(weight_bits=4), outliers=(3, 7))


@pytest.mark.parametrize("plan", [PLAN, LayerPlan(layer="a", in_features=5, out_features=3, reason="why not")])
def test_a_plan_survives_json(plan):
    assert LayerPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_of_before_per_token_is_read_and_written_as_it_was():
    data = PLAN.to_json()
    assert "per_token" not in data["scheme"] and LayerPlan.from_json(data) == PLAN
    measured = dataclasses.replace(PLAN, scheme=Scheme(per_token=True))
    assert measured.to_json()["scheme"]["per_token"] is True and LayerPlan.from_json(measured.to_json()) == measured
    assert "asymmetric" not in measured.to_json()["scheme"]
    ranges = dataclasses.replace(PLAN, scheme=Scheme(per_token=True, asymmetric=True))
    assert ranges.to_json()["scheme"]["asymmetric"] is True and LayerPlan.from_json(ranges.to_json()) == ranges


@pytest.mark.parametrize(
    ("per_token", "outliers", "missing"),
    [
        (False, (3, 7), set()),
        (False, (), {"perm"}),
        (True, (3, 7), {"input_scale", "input_zero_point"}),
        (True, (), {"input_scale", "input_zero_point", "perm"}),
    ],
)
def test_what_a_layer_stores_follows_from_its_plan(per_token, outliers, missing):
    plan = dataclasses.replace(PLAN, scheme=Scheme(per_token=per_token), outliers=outliers)
    assert set(LAYER_TENSORS) - set(stored_names(plan)) == missing


@pytest.mark.parametrize("change", [{"color": 1}, {"scheme": {"bits": 4}}])
def test_a_plan_with_unknown_fields_is_refused(change):
    with pytest.raises(TypeError, match="unexpected keyword"):
        LayerPlan.from_json(PLAN.to_json() | change)


def test_a_layer_that_is_kept_has_no_scheme_to_give():
    assert PLAN.quantization is PLAN.scheme
    with pytest.raises(ValueError, match="layer a is kept in model dtype: why not"):
        _ = LayerPlan(layer="a", in_features=5, out_features=3, reason="why not").quantization


def test_the_split_counts_normal_channels():
    assert PLAN.split == 94


def test_plans_are_written_read_replaced_and_removed():
    graph = trace(toy(), (rows(3, 96),))
    node = next(linear_sites(graph.module)).node
    assert plan_of(node) is None
    set_plan(node, PLAN)
    assert plan_of(node) == PLAN and planned(graph.module) == {"blocks.0.up": (PLAN, [node])}
    clear_plan(node)
    assert plan_of(node) is None and not planned(graph.module)


def test_a_fork_is_rewritten_on_its_own_and_shares_tensors():
    graph = trace(toy(), (rows(3, 96),))
    before = graph_text(graph.module)
    fork = graph.fork()
    node = next(linear_sites(fork.module)).node
    set_plan(node, PLAN)
    put_tensor(fork.module, "blocks.0.up.extra", torch.ones(1))
    fork.module.graph.erase_node(next(iter(reversed(fork.module.graph.nodes))))
    assert graph_text(graph.module) == before
    assert not hasattr(graph.module.get_submodule("blocks.0.up"), "extra")
    assert get_tensor(graph.module, "head.weight") is get_tensor(fork.module, "head.weight")


def test_a_remark_needs_a_planned_layer_and_a_note_does_not():
    graph = trace(toy(), (rows(3, 96),))
    set_plan(next(linear_sites(graph.module)).node, PLAN)
    graph.remark("blocks.0.up", "in one pass")
    graph.note("blocks.0.up", "twice")
    graph.note("blocks.0", "of the block")
    with pytest.raises(ValueError, match=r"'blocks.0.q_k_v' is no planned layer.*'joint'"):
        graph.remark("blocks.0.q_k_v", "joint")
    assert graph.remarks == {"blocks.0.up": ["in one pass", "twice"]} and graph.notes == {"blocks.0": ["of the block"]}
    fork = graph.fork()
    fork.note("blocks.0", "of the fork")
    assert graph.notes == {"blocks.0": ["of the block"]} and len(fork.notes["blocks.0"]) == 2


def test_put_tensor_makes_the_path_and_replaces_tensors_on_it():
    root = torch.nn.Module()
    put_tensor(root, "w", torch.nn.Parameter(torch.ones(2)))
    put_tensor(root, "w.weight", torch.zeros(3))
    put_tensor(root, "w.weight", torch.zeros(4))
    assert dict(root.named_parameters()) == {}
    assert get_tensor(root, "w.weight").shape == (4,)


def test_what_is_not_a_tensor_is_named():
    with pytest.raises(TypeError, match="blocks is a ModuleList, expected a tensor"):
        get_tensor(toy(), "blocks")


def test_plans_are_replaced_not_shared_between_graphs():
    graph = at(Stage.PLANNED)
    fork = graph.fork()
    node = next(linear_sites(fork.module)).node
    set_plan(node, dataclasses.replace(plan_of(node), reason="changed"))
    assert next(iter(graph.plans.values())).reason == ""
