"""The outline that golden files hold sees what a change of the graph would be."""

import dataclasses

import pytest
import torch

import fxq
from fxq.core.graph import arguments, set_arguments
from fxq.core.ir import Stage, plan_of, set_plan
from tests.core.test_verify import at
from tests.graphs import golden, outline
from tests.toys import recipe, rows, toy


@pytest.mark.parametrize(
    "stage", [Stage.TRACED, Stage.PLANNED, Stage.LOWERED, Stage.FROZEN], ids=lambda stage: stage.name.lower()
)
def test_the_graph_reads_as_the_golden_file(stage):
    golden(f"toy_w4_{stage.name.lower()}", outline(at(stage).module))


def swap(nodes, name):
    """Exchange an argument of two calls."""
    first, second = (arguments(node)[name] for node in nodes)
    assert first != second
    set_arguments(nodes[0], **{name: second})
    set_arguments(nodes[1], **{name: first})


def share(nodes, name):
    """The second call takes an argument of the first."""
    set_arguments(nodes[1], **{name: arguments(nodes[0])[name]})


def scale_for_offset(calls):
    product = calls["fxq.dual_scale_linear.default"][0]
    set_arguments(product, offset=arguments(product)["weight_scale"])


def other_way_round(calls):
    (add,) = calls["aten.add.Tensor"]
    add.args = add.args[::-1]


def kept_for_another_reason(calls):
    (head,) = calls["aten.linear.default"]
    set_plan(head, dataclasses.replace(plan_of(head), reason="none"))


def of_a_node(calls):
    (gelu,) = calls["aten.gelu.default"]
    gelu.args = (next(iter(gelu.graph.nodes)),)


def of_a_result(calls):
    (gelu,) = calls["aten.gelu.default"]
    gelu.meta["val"] = gelu.meta["val"].to(torch.float16)


CHANGES = {
    "split of two quantizes": lambda calls: swap(calls["fxq.quantize_act.default"], "split"),
    "split of two products": lambda calls: swap(calls["fxq.dual_scale_linear.default"], "split"),
    "bits": lambda calls: set_arguments(calls["fxq.dual_scale_linear.default"][1], bits=8),
    "layer of a tensor": lambda calls: share(calls["fxq.dual_scale_linear.default"], "weight_scale"),
    "input": lambda calls: share(calls["fxq.dual_scale_linear.default"], "q"),
    "permutation": lambda calls: set_arguments(calls["fxq.quantize_act.default"][0], perm=None),
    "tensor of an argument": scale_for_offset,
    "order of inputs": other_way_round,
    "reason": kept_for_another_reason,
    "input of a float node": of_a_node,
    "dtype": of_a_result,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_outline_shows_a_change_of(change):
    module = fxq.quantize(toy(hidden=128), [rows(9, 96)], recipe(4), progress=False)
    before, calls = outline(module), {}
    for node in module.graph.nodes:
        calls.setdefault(str(node.target), []).append(node)
    CHANGES[change](calls)
    assert outline(module) != before


def test_a_text_that_differs_from_its_golden_file_is_refused(monkeypatch):
    monkeypatch.delenv("FXQ_GOLDEN_REWRITE", raising=False)
    text = outline(at(Stage.FROZEN).module)
    golden("toy_w4_frozen", text)
    with pytest.raises(AssertionError, match="FXQ_GOLDEN_REWRITE=1 pytest rewrites it"):
        golden("toy_w4_frozen", text.replace("split=64", "split=65", 1))


def test_only_the_modules_asked_for_are_shown():
    lines = outline(at(Stage.TRACED).module, "head").splitlines()
    assert lines == ["head: linear_3(add, bias) -> float32[40, 7]"]
