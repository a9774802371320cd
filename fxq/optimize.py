"""From a frozen graph to the fastest one for a device: merge, fold, fuse, and lay out weights for its kernels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from torch import fx

from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph
from fxq.core.pipeline import Pass, PassError, run_passes
from fxq.core.signature import guard_inputs
from fxq.passes import FUSIONS, ExactWhereFaster, FloatWhereFaster, LayOutWeights
from fxq.passes.line import check_fusions
from fxq.passes.measured.float_where_faster import PLACE
from fxq.runtime.ambient import own_tensors
from fxq.runtime.exclusive import exclusive

SWITCH = "FXQ_FLOATS_WHERE_FASTER"
"""Environment variable: ``0`` measures nothing where :func:`optimize` is not told."""
MEASURED: tuple[Pass, ...] = (FloatWhereFaster(), ExactWhereFaster())
"""What follows the times of kernels; before the fusions, which need to know what is left in integers."""
WORTH = 1e-4
"""Seconds that a call of a layer or attention must save to be in floats where nobody asked for it."""
UNASKED: tuple[Pass, ...] = (FloatWhereFaster(least=WORTH), ExactWhereFaster(least=WORTH))
_RANKS = "this module is one rank's part of a model, and ranks would choose differently"


@exclusive
@own_tensors()
def optimize(
    module: fx.GraphModule, passes: Sequence[Pass] = FUSIONS, *, floats_where_faster: bool | None = None
) -> fx.GraphModule:
    """Merge, fuse and bind a quantized module to the fastest kernels of the device it lies on.

    The result is for running, not for saving: keep the module it came from for :func:`fxq.save`. Float tensors are
    shared with it. On a CPU a layer or an attention in 8 bits that is slower than floats runs in floats, which
    :func:`fxq.summary` tells with both times; everything else is the same function in fewer passes over memory.

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`, not changed.
        passes: the fusions to run, in order, before weights are laid out; ``(*fxq.passes.FUSIONS, Mine())`` adds one.
        floats_where_faster: measure every layer beside its float linear, and every attention in 8 bits beside the exact
            one, and run in model dtype what is faster so (:class:`~fxq.passes.FloatWhereFaster`,
            :class:`~fxq.passes.ExactWhereFaster`, before ``passes``). What was measured once is kept, so a machine
            chooses the same each time; another one may not. False: the same function everywhere, for what is compared
            bit for bit. None: on a CPU, where a call of it saves more than a tenth of a millisecond, unless the
            environment says ``FXQ_FLOATS_WHERE_FASTER=0``, the module is one rank's part or ``passes`` have such a
            pass.

    Returns:
        A new GraphModule; :func:`fxq.summary` of it says per layer what was fused, the kernel that runs, and why not
        where something was left.

    Raises:
        ValueError: when the module was not made by fxq.
        fxq.core.pipeline.PassError: when the module is the result of this function already, a pass is none or breaks
            its promise, floats are asked for where they are faster in one rank's part of a model, or the environment
            says what is none of 0 and 1.
        fxq.core.verify.RuleError: when a rule is broken after a pass; the message names both.
    """
    check_fusions(passes)
    facts = Facts.of(module)
    if facts.optimized:
        raise PassError("this module is optimized already; optimize the module it was made from")
    if floats_where_faster and facts.parallel is not None:
        raise PassError(f"floats_where_faster: {_RANKS}; leave it out")
    graph = QuantGraph.of(module).fork()
    measured = MEASURED if floats_where_faster else ()
    if floats_where_faster is None and _measures(graph, facts, passes):
        measured = UNASKED
    before = graph.plans
    for step in (*measured, *passes, LayOutWeights()):
        run_passes(graph, (step,))
        if lost := sorted(set(before) - set(graph.plans)):
            raise PassError(f"{step.name} lost the plans of {', '.join(lost[:4])}")
    facts = dataclasses.replace(facts, others={**facts.others, **graph.found})
    facts.after(graph).attach(graph.module)
    return guard_inputs(graph.module)


def _measures(graph: QuantGraph, facts: Facts, passes: Sequence[Pass]) -> bool:
    """Whether times of kernels are asked for where nobody said so; notes why not where ranks cannot be."""
    tensors = (*graph.module.parameters(), *graph.module.buffers())
    if any(isinstance(step, type(own)) for step in passes for own in MEASURED):
        return False
    if not all(tensor.is_cpu for tensor in tensors):
        return False
    if (chosen := os.environ.get(SWITCH, "").strip()) not in ("", "0", "1"):
        raise PassError(f"{SWITCH}={chosen!r}: expected 0, which measures nothing, or 1, as where it is unset")
    if chosen == "0":
        return False
    if facts.parallel is not None:
        graph.note(PLACE, f"none was measured beside its integers: {_RANKS}")
        return False
    return True
