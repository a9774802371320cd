import dataclasses
from typing import ClassVar

import pytest
import torch

from fxq.capture.trace import trace
from fxq.core.graph import linear_sites
from fxq.core.ir import Stage, clear_plan
from fxq.core.pipeline import Analysis, PassError, Rewrite, run_passes
from fxq.core.verify import RuleError
from fxq.passes import ApplyMethods, DetectOutliers, Freeze, LowerLinear, PlanLayers
from tests.core.test_verify import at
from tests.toys import QUICK, recipe, rows, toy


@dataclasses.dataclass(frozen=True)
class Sneaky(Analysis):
    """Says it only looks."""

    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.TRACED

    def run(self, graph):
        graph.module.graph.erase_node(next(n for n in graph.module.graph.nodes if not n.users and n.op != "output"))
        return 1


@dataclasses.dataclass(frozen=True)
class Forgetful(Rewrite):
    """Loses a note."""

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.LOWERED

    def run(self, graph):
        for site in linear_sites(graph.module):
            clear_plan(site.node)
        return 1


@dataclasses.dataclass(frozen=True)
class Disorderly(Rewrite):
    """Puts a node before its argument."""

    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, graph):
        nodes = graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        nodes[0].prepend(nodes[1])
        return 1


@dataclasses.dataclass(frozen=True)
class Idle(Analysis):
    """Does nothing."""

    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.TRACED

    def run(self, graph):
        return 0


def test_an_analysis_that_changes_the_graph_is_an_error():
    graph = trace(toy(), (rows(3, 96),))
    graph.module.graph.call_function(torch.ops.aten.neg.default, (next(iter(graph.module.graph.nodes)),))
    output = next(iter(reversed(graph.module.graph.nodes)))
    assert output.op == "call_function"
    output.meta.clear()
    with pytest.raises(PassError, match="Sneaky is an Analysis but changed the graph"):
        run_passes(graph, (Sneaky(),))


def test_a_broken_rule_is_blamed_on_the_pass_that_broke_it():
    with pytest.raises(RuleError, match="after Forgetful: every linear is decided"):
        run_passes(at(Stage.PLANNED), (Idle(), Forgetful(), Idle()))


def test_a_fault_from_outside_is_not_blamed_on_the_next_pass():
    graph = at(Stage.PLANNED)
    Forgetful().run(graph)
    with pytest.raises(RuleError, match="before Idle: every linear is decided"):
        run_passes(graph, (Idle(),))


def test_a_malformed_graph_is_blamed_on_the_rewrite():
    with pytest.raises(PassError, match="Disorderly left a malformed graph"):
        run_passes(trace(toy(), (rows(3, 96),)), (Disorderly(),))


@pytest.mark.parametrize(
    ("stage", "step", "message"),
    [
        (Stage.TRACED, DetectOutliers(), "DetectOutliers needs a PLANNED graph, this one is TRACED; run the passes"),
        (Stage.PLANNED, ApplyMethods(QUICK), "ApplyMethods needs a CALIBRATED graph, this one is PLANNED"),
        (Stage.PLANNED, LowerLinear(), "LowerLinear needs a CALIBRATED graph"),
        (Stage.CALIBRATED, Freeze(), "Freeze needs a LOWERED graph"),
        (Stage.LOWERED, LowerLinear(), "LowerLinear gives a LOWERED graph, this one is LOWERED already"),
        (Stage.FROZEN, Freeze(), "Freeze gives a FROZEN graph, this one is FROZEN already"),
    ],
)
def test_a_pass_at_the_wrong_stage_is_an_error(stage, step, message):
    with pytest.raises(PassError, match=message):
        run_passes(at(stage), (step,))


def test_the_log_has_every_pass_with_what_it_touched():
    graph, names = trace(toy(), (rows(3, 96),)), []
    run_passes(graph, (PlanLayers(recipe()), DetectOutliers()), names.append)
    assert names == [name for name, _, _ in graph.log] == ["PlanLayers", "DetectOutliers"]
    assert [touched for _, touched, _ in graph.log] == [2, 1]
    assert graph.stage == Stage.PLANNED
