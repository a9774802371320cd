import dataclasses

import pytest
import torch

from fxq.capture.trace import trace
from fxq.core.config import Scheme
from fxq.core.graph import linear_sites
from fxq.core.ir import (
    QuantGraph,
    Stage,
    clear_plan,
    drop_tensor,
    get_tensor,
    inherit_meta,
    plan_of,
    planned,
    put_tensor,
    set_plan,
)
from fxq.core.pipeline import run_passes
from fxq.core.rows import Weighting
from fxq.core.verify import RULES, RuleError, check
from fxq.passes import FUSIONS, ApplyMethods, DetectOutliers, Freeze, LowerLinear, PlanLayers
from fxq.quantize import quantize
from tests.calibration.test_calibrate import collected
from tests.toys import QUICK, recipe, rows, toy

UP = "blocks.0.up"


def at(stage, bits=4):
    """A toy graph at a stage."""
    chosen = recipe(bits)
    graph = trace(toy(), (rows(40, 96),))
    steps = {Stage.PLANNED: (PlanLayers(chosen), DetectOutliers())}
    if stage >= Stage.PLANNED:
        run_passes(graph, steps[Stage.PLANNED])
    if stage >= Stage.CALIBRATED:
        collected(graph, [rows(40, 96)])
        run_passes(graph, (ApplyMethods(QUICK, Weighting.UNIFORM),))
    if stage >= Stage.LOWERED:
        run_passes(graph, (LowerLinear(),))
    if stage >= Stage.FROZEN:
        run_passes(graph, (Freeze(),))
    if stage >= Stage.FUSED:
        run_passes(graph, FUSIONS)
    return graph


def edit(graph, layer=UP, **changes):
    for node in planned(graph.module)[layer][1]:
        set_plan(node, dataclasses.replace(plan_of(node), **changes))


def put(graph, name, tensor):
    put_tensor(graph.module, name, tensor)


def forget(graph):
    for site in linear_sites(graph.module):
        clear_plan(site.node)


def overwrite(graph):
    site = next(iter(linear_sites(graph.module)))
    with graph.module.graph.inserting_after(site.node):
        graph.module.graph.call_function(torch.ops.aten.mul_.Scalar, (site.node.args[0], 2))


def undecide(graph):
    edit(graph, scheme=None, reason="")


def disagree(graph):
    for site in list(linear_sites(graph.module))[:2]:
        plan = dataclasses.replace(plan_of(site.node), layer="shared")
        set_plan(site.node, plan)


def unsee(graph):
    del graph.statistics[UP], graph.updates[UP]


def unlower(graph):
    site = next(iter(linear_sites(graph.module)))
    set_plan(site.node, dataclasses.replace(plan_of(site.node), scheme=Scheme()))


def gemm(graph):
    return planned(graph.module)[UP][1][0]


def scale_of(graph, name="weight_scale"):
    return get_tensor(graph.module, f"{UP}.{name}")


BROKEN = {
    "no plan": (Stage.PLANNED, forget, r"every linear is decided: blocks.0.up: no plan"),
    "undecided": (Stage.PLANNED, undecide, r"every linear is decided: blocks.0.up: neither scheme nor reason"),
    "sites": (Stage.PLANNED, disagree, r"call sites of one weight agree: shared: its call sites carry different plans"),
    "unseen": (Stage.CALIBRATED, unsee, r"every planned layer was seen: blocks.0.up: planned, but calibration has no"),
    "written": (Stage.TRACED, overwrite, r"nothing is read around a write: mul_\w* writes to what linear at .* reads"),
    "left": (Stage.LOWERED, unlower, r"no planned linear is left: head: planned as W8A8 but still a float linear"),
    "shape": (
        Stage.LOWERED,
        lambda g: put(g, f"{UP}.weight_int", torch.zeros(64, 95, dtype=torch.int8)),
        r"integer tensors fit their plan: blocks.0.up: weight \(64, 95\), expected \(64, 96\)",
    ),
    "dtype": (
        Stage.LOWERED,
        lambda g: put(g, f"{UP}.weight_int", torch.zeros(64, 96)),
        r"blocks.0.up: weight dtype torch.float32",
    ),
    "groups": (
        Stage.LOWERED,
        lambda g: put(g, f"{UP}.weight_scale", scale_of(g)[:1].clone()),
        r"blocks.0.up: scales \(1, 64\) and \(2,\), expected 2 groups",
    ),
    "nan": (
        Stage.LOWERED,
        lambda g: put(g, f"{UP}.offset", torch.full((64,), torch.nan)),
        r"blocks.0.up: a scale or offset is not finite",
    ),
    "split": (Stage.LOWERED, lambda g: gemm(g).update_arg(5, 32), r"blocks.0.up: split 32, the plan says 64"),
    "operand": (
        Stage.LOWERED,
        lambda g: gemm(g).update_arg(2, None),
        r"blocks.0.up: dual_scale_linear\w* does not read stored tensors",
    ),
    "elsewhere": (
        Stage.LOWERED,
        lambda g: set_plan(gemm(g).args[0], plan_of(gemm(g))),
        r"blocks.0.up: the plan lies on fxq.quantize_act.default",
    ),
    "unused": (
        Stage.FROZEN,
        lambda g: put(g, f"{UP}.old", torch.ones(2)),
        r"no unused tensor is left: blocks.0.up.old: stored but never read",
    ),
    "unpacked": (
        Stage.FROZEN,
        lambda g: (put(g, f"{UP}.weight", torch.zeros(64, 96, dtype=torch.int8)), gemm(g).update_arg(6, 8)),
        r"four bit weights are packed: blocks.0.up: 4-bit weights in 8-bit storage",
    ),
    "unfit": (
        Stage.FUSED,
        lambda g: gemm(g).update_arg(6, 9),
        r"operators fit their arguments: dual_scale_linear\w*: bits = 9: expected 2..8",
    ),
    "valueless": (
        Stage.FUSED,
        lambda g: inherit_meta(gemm(g).args[0], gemm(g), None),
        r"operators fit their arguments: dual_scale_linear\w*: no value is recorded for \w+",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_told_with_the_moment_and_the_layer(case):
    stage, damage, message = BROKEN[case]
    graph = at(stage)
    check(graph, "before the damage")
    damage(graph)
    with pytest.raises(RuleError, match=rf"(?m)^after the damage: .*{message}"):
        check(graph, "after the damage")


def test_every_rule_has_a_case():
    told = " ".join(message for _, _, message in BROKEN.values()) + " integer tensors fit their plan"
    assert [rule.name for rule in RULES if rule.name not in told] == []


def test_every_violation_is_listed():
    graph = at(Stage.PLANNED)
    forget(graph)
    with pytest.raises(RuleError) as caught:
        check(graph, "now")
    assert str(caught.value).count("no plan") == 3


def test_rules_of_later_stages_do_not_hold_yet():
    check(QuantGraph(at(Stage.TRACED).module, Stage.TRACED), "early")
    graph = at(Stage.PLANNED)
    with pytest.raises(RuleError, match="still a float linear"):
        check(QuantGraph(graph.module, Stage.LOWERED), "late")


def test_a_quantized_module_keeps_every_rule():
    check(QuantGraph(quantize(toy(), [rows(40, 96)], recipe(4)), Stage.FROZEN), "now")


def test_a_missing_tensor_is_named():
    graph = at(Stage.FROZEN)
    drop_tensor(graph.module, f"{UP}.offset")
    with pytest.raises(RuleError, match=r"blocks.0.up: a tensor is missing: .*offset"):
        check(graph, "now")
