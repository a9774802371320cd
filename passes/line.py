"""The passes of one quantization as one tuple, a user's own in their places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxq.core.config import Recipe
from fxq.core.ir import Stage
from fxq.core.pipeline import Pass, PassError
from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.choose_widths import ChooseWidths
from fxq.passes.detect_outliers import DetectOutliers
from fxq.passes.freeze import Freeze
from fxq.passes.lower_linear import LowerLinear
from fxq.passes.plan_layers import PlanLayers
from fxq.passes.share_inputs import ShareInputs


def line(recipe: Recipe, methods: ApplyMethods | ChooseWidths, own: Sequence[Pass] = ()) -> tuple[Pass, ...]:
    """Every pass from a TRACED graph to a FROZEN one, in the order they run.

    Calibration is no pass, since it needs data: it comes before the first pass that needs a CALIBRATED graph.

    Args:
        recipe: what the layers are planned with.
        methods: the pass that chooses integers, or widths and integers.
        own: a user's passes. Each stands behind the last shipped pass that gives the stage it needs, those of one stage
            in the order given.

    Raises:
        PassError: naming a pass that has no place, see :func:`check_own`.
    """
    check_own(own)
    for transform in recipe.transforms:
        _check_instance(transform)
    share = (ShareInputs(),) if recipe.share_inputs else ()
    transforms = [step for step in recipe.transforms if isinstance(step, Pass)]
    early = [other for other in transforms if other.needs < Stage.CALIBRATED]
    late = [other for other in transforms if other.needs >= Stage.CALIBRATED]
    finding = (*early, DetectOutliers(), *share)
    shipped: tuple[Pass, ...] = (PlanLayers(recipe), *finding, *late, methods, LowerLinear(), Freeze())
    places = [max((i for i, s in enumerate(shipped, 1) if s.gives == step.needs), default=0) for step in own]
    passes = [step for step, place in zip(own, places, strict=True) if place == 0]
    for i, step in enumerate(shipped, 1):
        passes += [step, *(mine for mine, place in zip(own, places, strict=True) if place == i)]
    return tuple(passes)


def check_own(passes: Iterable[Pass]) -> None:
    """Refuse what cannot stand in the line of a quantization.

    Raises:
        PassError: naming what is no instance of a pass, and a pass that takes the graph from one stage to another: the
            shipped passes do that.
    """
    for step in passes:
        _check_instance(step)
        if step.needs != step.gives:
            raise PassError(
                f"{step.name} takes a graph from {step.needs.name} to {step.gives.name}, as the shipped passes do: a "
                f"pass for quantize() gives the stage it needs{_fusion_hint(step)}"
            )
        if step.needs > Stage.FROZEN:
            raise PassError(f"{step.name} needs a {step.needs.name} graph, which quantize() never has; {_HINT}")


_HINT = "give it to fxq.optimize(module, passes=(*FUSIONS, ...))"


def _fusion_hint(step: Pass) -> str:
    return f"; {_HINT}" if step.gives > Stage.FROZEN else ""


def check_fusions(passes: Iterable[Pass]) -> None:
    """Refuse what cannot run on a frozen graph before its weights are laid out.

    Raises:
        PassError: naming what is no instance of a pass, and a pass for another stage.
    """
    for step in passes:
        _check_instance(step)
        if not (Stage.FROZEN <= step.needs <= Stage.FUSED and step.gives <= Stage.FUSED):
            raise PassError(
                f"{step.name} takes a graph from {step.needs.name} to {step.gives.name}: optimize() runs passes that "
                "need a FROZEN or FUSED graph and give a FUSED one"
            )


def _check_instance(step: object) -> None:
    if isinstance(step, type) and issubclass(step, Pass):
        raise PassError(f"{step.__name__} is a class: pass an instance, {step.__name__}()")
    if not isinstance(step, Pass):
        raise PassError(f"{step!r} is no pass: expected an instance of fxq.passes.Analysis or fxq.passes.Rewrite")
    if not all(isinstance(getattr(step, name, None), Stage) for name in ("needs", "gives")):
        raise PassError(f"{step.name} does not say which stage it needs and gives: needs and gives are Stages")
