"""From a frozen graph to the fastest one for a device: merge, fold, fuse, and lay out weights for its kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph
from fxq.core.pipeline import Pass, PassError, run_passes
from fxq.core.signature import guard_inputs
from fxq.passes import FUSIONS, FloatWhereFaster, LayOutWeights
from fxq.passes.line import check_fusions
from fxq.runtime.ambient import own_tensors
from fxq.runtime.exclusive import exclusive


@exclusive
@own_tensors()
def optimize(
    module: fx.GraphModule, passes: Sequence[Pass] = FUSIONS, *, floats_where_faster: bool = False
) -> fx.GraphModule:
    """Merge, fuse and bind a quantized module to the fastest kernels of the device it lies on.

    The result computes the same function in fewer passes over memory and is for running, not for saving: keep the
    module it came from for :func:`fxq.save`. Float tensors are shared with it.

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`, not changed.
        passes: the fusions to run, in order, before weights are laid out; ``(*fxq.passes.FUSIONS, Mine())`` adds one.
        floats_where_faster: measure every layer beside its float linear, and compute in model dtype what is faster so
            (:class:`~fxq.passes.FloatWhereFaster`, before ``passes``). Then the result is not quite the same function:
            inputs of such layers are not rounded.

    Returns:
        A new GraphModule; :func:`fxq.summary` of it says per layer what was fused, the kernel that runs, and why not
        where something was left.

    Raises:
        ValueError: when the module was not made by fxq.
        fxq.core.pipeline.PassError: when the module is the result of this function already, a pass is none or breaks
            its promise, or floats are asked for where they are faster in one rank's part of a model.
        fxq.core.verify.RuleError: when a rule is broken after a pass; the message names both.
    """
    check_fusions(passes)
    facts = Facts.of(module)
    if facts.optimized:
        raise PassError("this module is optimized already; optimize the module it was made from")
    if floats_where_faster:
        if facts.parallel is not None:
            raise PassError(
                "floats_where_faster: this module is one rank's part of a model, and ranks would choose differently; "
                "leave it out"
            )
        passes = (FloatWhereFaster(), *passes)
    graph = QuantGraph.of(module).fork()
    before = graph.plans
    for step in (*passes, LayOutWeights()):
        run_passes(graph, (step,))
        if lost := sorted(set(before) - set(graph.plans)):
            raise PassError(f"{step.name} lost the plans of {', '.join(lost[:4])}")
    facts.after(graph).attach(graph.module)
    return guard_inputs(graph.module)
