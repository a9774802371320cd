import dataclasses
from typing import ClassVar

import pytest
import torch

import fxq
from fxq.core.verify import RuleError
from fxq.job import Job
from fxq.passes import FUSIONS, Analysis, DetectOutliers, PassError, Rewrite, Stage, planned, set_plan
from fxq.passes.line import line
from fxq.runtime.progress import Progress
from tests.toys import LEARN, recipe, rows, toy, wan_rollout

DATA = [rows(8, 96)]


def looking(stage):
    """A pass that looks at a graph of one stage and keeps what it saw."""

    @dataclasses.dataclass(frozen=True)
    class Look(Analysis):
        needs: ClassVar[Stage] = stage
        gives: ClassVar[Stage] = stage
        seen: list = dataclasses.field(default_factory=list)

        @property
        def name(self):
            return f"Look{stage.name}"

        def run(self, graph):
            self.seen.append((graph.stage, [name for name, _, _ in graph.log]))
            return 0

    return Look()


class Bad(Rewrite):
    """Forgets every plan."""

    needs = gives = Stage.PLANNED

    def run(self, graph):
        for _, nodes in planned(graph.module).values():
            for node in nodes:
                fxq.core.ir.clear_plan(node)
        return 1


@dataclasses.dataclass(frozen=True)
class Coarser(Analysis):
    """Layers of a name get another number of input bits."""

    layer: str
    bits: int
    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, graph):
        plan, nodes = planned(graph.module)[self.layer]
        for node in nodes:
            set_plan(node, dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, input_bits=self.bits)))
        return 1


def test_the_line_is_the_shipped_passes_in_the_order_of_their_stages():
    names = [step.name for step in Job(recipe(), Progress(False)).line()]
    assert names == ["PlanLayers", "DetectOutliers", "ShareInputs", "ApplyMethods", "LowerLinear", "Freeze"]
    stages = [step.needs for step in Job(recipe(), Progress(False)).line()]
    assert stages == sorted(stages)
    apart = dataclasses.replace(recipe(), share_inputs=False)
    assert "ShareInputs" not in [step.name for step in Job(apart, Progress(False)).line()]


def test_own_passes_run_behind_the_last_shipped_pass_that_gives_their_stage():
    stages = (Stage.FROZEN, Stage.LOWERED, Stage.CALIBRATED, Stage.PLANNED, Stage.TRACED)
    own = {stage: looking(stage) for stage in stages}
    q = fxq.quantize(toy(), DATA, recipe(), passes=tuple(own.values()), progress=False)
    planning = ["LookTRACED", "PlanLayers", "DetectOutliers", "ShareInputs", "LookPLANNED"]
    order = [*planning, "ApplyMethods", "LookCALIBRATED", "LowerLinear", "LookLOWERED", "Freeze", "LookFROZEN"]
    assert [name for name, _ in fxq.summary(q).facts["passes"]] == order
    for stage, step in own.items():
        ((seen, log),) = step.seen
        assert seen == stage and log == order[: len(log)]


def test_passes_of_one_stage_run_in_the_order_given():
    twice = [Coarser("blocks.0.up", 7), Coarser("blocks.0.up", 5)]
    for own, bits in ((twice, 5), (twice[::-1], 7)):
        q = fxq.quantize(toy(), DATA, recipe(), passes=own, progress=False)
        assert {row.layer: row.bits for row in fxq.summary(q).quantized}["blocks.0.up"] == f"W8A{bits}"


def test_sensitivity_is_measured_with_own_passes():
    look = looking(Stage.LOWERED)
    chosen = recipe(4, methods=LEARN[:1], weighting="sensitivity")
    rollout = wan_rollout()
    fxq.quantize(rollout.denoiser, rollout, chosen, passes=(look,), progress=False)
    assert len(look.seen) == 2, "one look at the graph that sensitivities are measured with"


def test_a_broken_rule_is_blamed_on_the_pass_by_name():
    with pytest.raises(RuleError, match=r"after Bad: every linear is decided: blocks\.0\.up: no plan"):
        fxq.quantize(toy(), DATA, recipe(), passes=(Bad(),), progress=False)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (DetectOutliers, r"DetectOutliers is a class: pass an instance, DetectOutliers\(\)"),
        (print, "is no pass: expected an instance of fxq.passes.Analysis or fxq.passes.Rewrite"),
        (FUSIONS[1], r"MergeLinears takes a graph from FROZEN to FUSED, .*; give it to fxq.optimize"),
        (line(recipe(), Job(recipe(), Progress(False)).methods())[-1], "Freeze takes a graph from LOWERED to FROZEN"),
        (looking(Stage.FUSED), r"LookFUSED needs a FUSED graph, which quantize\(\) never has; give it to fxq.optimize"),
    ],
    ids=["class", "function", "fusion", "between stages", "too late"],
)
def test_a_pass_without_a_place_is_refused_before_the_work(step, message):
    def loader():
        raise AssertionError("the data was looked at")
        yield

    with pytest.raises(PassError, match=message):
        fxq.quantize(toy(), loader(), recipe(), passes=(step,), progress=False)


def test_a_pass_that_names_no_stage_is_refused():
    class Vague(Analysis):
        def run(self, graph):
            return 0

    with pytest.raises(PassError, match="Vague does not say which stage it needs and gives"):
        line(recipe(), Job(recipe(), Progress(False)).methods(), (Vague(),))


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), DATA, recipe(), progress=False)


def test_optimize_runs_the_passes_it_is_given(quantized):
    look = looking(Stage.FUSED)
    fast = fxq.optimize(quantized, passes=(*FUSIONS, look))
    ran = [name for name, _ in fxq.summary(fast).facts["passes"]]
    assert ran[-len(FUSIONS) - 2 :] == [*(step.name for step in FUSIONS), "LookFUSED", "LayOutWeights"]
    assert torch.equal(fast(DATA[0]), fxq.optimize(quantized)(DATA[0]))
    bare = fxq.optimize(quantized, passes=())
    assert [name for name, _ in fxq.summary(bare).facts["passes"]][-2:] == ["Freeze", "LayOutWeights"]


class Loser(Rewrite):
    """A fusion that loses the plans."""

    needs, gives, repeatable = Stage.FROZEN, Stage.FUSED, True

    def run(self, graph):
        for plan, nodes in planned(graph.module).values():
            if plan.scheme is not None:
                fxq.core.ir.clear_plan(nodes[0])
        return 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Loser(), "Loser lost the plans of blocks.0.down, blocks.0.up"),
        (FUSIONS[0].__class__, "RealRope is a class"),
        (looking(Stage.PLANNED), r"LookPLANNED takes a graph from PLANNED to PLANNED: optimize\(\) runs passes that"),
    ],
    ids=["loses plans", "class", "stage"],
)
def test_what_optimize_cannot_run_is_refused_by_name(quantized, step, message):
    with pytest.raises(PassError, match=message):
        fxq.optimize(quantized, passes=(*FUSIONS, step))
