"""What a pass is, and the one loop that runs passes with rules before and after each."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from fxq.calls.captured import catch_up
from fxq.core.ir import QuantGraph, Stage
from fxq.core.method import RecipeError
from fxq.core.verify import check
from fxq.runtime.ambient import own_tensors
from fxq.runtime.exclusive import one_at_a_time


class PassError(RuntimeError):
    """A pass that ran at the wrong stage or broke its own promise."""


class Pass(ABC):
    """A step on a graph. Subclasses are frozen dataclasses whose fields are their options."""

    needs: ClassVar[Stage]
    gives: ClassVar[Stage]

    @property
    def name(self) -> str:
        """Class name, for logs and messages."""
        return type(self).__name__

    @abstractmethod
    def run(self, graph: QuantGraph) -> int:
        """Do the step; returns the number of nodes (or layers) touched."""


class Analysis(Pass):
    """Writes notes, statistics or updates; the graph's structure stays."""


class Rewrite(Pass):
    """Changes the graph's structure; notes of nodes that stay are kept.

    A ``repeatable`` rewrite may run on a graph that is at the stage it gives: fusions do, in any order. So may one that
    gives the stage it needs. One of ``any_stage`` may run from the stage it needs on, and leaves the graph at its own.
    """

    repeatable: ClassVar[bool] = False
    any_stage: ClassVar[bool] = False


class Fusion(Rewrite):
    """A rewrite of a frozen graph that may run in any order with the others, and again."""

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.FUSED
    repeatable: ClassVar[bool] = True


@runtime_checkable
class Transform(Protocol):
    """Rewrites the float graph into an equivalent one that is quantized better; a dataclass of its options.

    A pass (:class:`~fxq.core.pipeline.Rewrite`) that gives the stage it needs: PLANNED where it needs no data, else
    CALIBRATED. ``learns`` says whether it follows from calibration data, ``stores`` names the tensors that it may
    register under a layer.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    needs: ClassVar[Any]
    learns: ClassVar[bool]
    stores: ClassVar[tuple[str, ...]]

    def run(self, graph: Any) -> int:
        """Rewrite the graph; returns the number of layers that it changed."""
        ...


def check_transforms(transforms: Sequence[object], budget: object) -> None:
    """Refuse what is no transform, two of a kind, and an order in which they do not run.

    Raises:
        RecipeError: telling what is expected.
    """
    seen: list[Transform] = []
    for value in transforms:
        if not isinstance(value, Transform) or isinstance(value, type):
            raise RecipeError(f"transform {value!r}: expected an instance, as Rotate()")
        name = type(value).__name__
        if any(type(other) is type(value) for other in seen):
            raise RecipeError(f"transform {name} is named twice: its tensors would take each other's place")
        if meets := [type(other).__name__ for other in seen if {*other.stores} & {*value.stores}]:
            raise RecipeError(
                f"transforms {meets[0]} and {name}: their tensors would take each other's place; name one"
            )
        if seen and value.needs < seen[-1].needs:
            raise RecipeError(f"transform {name} runs before calibration: name it before {type(seen[-1]).__name__}")
        seen.append(value)
    if seen and budget is not None:
        raise RecipeError(
            "transforms with a budget: it would not count what they store, nor could it undo them in a layer that it "
            "keeps in model dtype; give one of the two"
        )


def _given(step: Rewrite, stage: Stage) -> bool:
    """Whether a graph of this stage is past a rewrite."""
    return stage >= step.gives + (step.repeatable or step.gives == step.needs)


def _structure(graph: QuantGraph) -> str:
    return "\n".join(str(node.format_node()) for node in graph.module.graph.nodes)


@own_tensors()
def run_passes(graph: QuantGraph, passes: Iterable[Pass], on_pass: Callable[[str], None] | None = None) -> QuantGraph:
    """Run passes in order, in place.

    Args:
        graph: the graph.
        passes: the passes.
        on_pass: told each pass's name before it runs.

    Returns:
        The same graph, at the stage the last pass gives.

    Raises:
        PassError: when a pass does not fit the graph's stage, an Analysis changed the structure, or a Rewrite broke the
            graph.
        fxq.core.verify.RuleError: when a rule is broken before or after a pass; the message says which and when.
    """
    catch_up(graph.module)
    for step in passes:
        if graph.stage < step.needs:
            raise PassError(
                f"{step.name} needs a {step.needs.name} graph, this one is {graph.stage.name}; run the passes before it"
            )
        if isinstance(step, Rewrite) and not step.any_stage and _given(step, graph.stage):
            raise PassError(f"{step.name} gives a {step.gives.name} graph, this one is {graph.stage.name} already")
        if on_pass is not None:
            on_pass(step.name)
        check(graph, f"before {step.name}")
        before = _structure(graph) if isinstance(step, Analysis) else ""
        start = time.perf_counter()
        with one_at_a_time() if isinstance(step, Rewrite) else contextlib.nullcontext():
            touched = step.run(graph)
        seconds = time.perf_counter() - start
        if isinstance(step, Analysis) and _structure(graph) != before:
            raise PassError(f"{step.name} is an Analysis but changed the graph")
        if isinstance(step, Rewrite):
            try:
                graph.module.graph.lint()
            except RuntimeError as error:
                raise PassError(f"{step.name} left a malformed graph: {error}") from error
            with one_at_a_time():
                graph.module.recompile()
        graph.stage = max(graph.stage, step.gives)
        check(graph, f"after {step.name}")
        graph.log.append((step.name, touched, seconds))
    return graph
