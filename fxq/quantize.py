"""The straight line: trace, plan, calibrate, rewrite, freeze."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import operator
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.calibration.calibrate import NO_BATCH, Batch, usable
from fxq.calibration.collect import CalibrationError
from fxq.calibration.rollout import Rollout
from fxq.calibration.sensitivity import ChunkSensitivity
from fxq.capture.trace import TraceError, plain_model, trace
from fxq.core.config import Recipe, RecipeError
from fxq.core.facts import Facts, has_facts
from fxq.core.ir import LayerPlan, QuantGraph
from fxq.core.pipeline import Pass
from fxq.core.signature import batch_dynamic, call_rules, guard_inputs, rules_of
from fxq.environment import environment
from fxq.export.graph.graph_json import GraphFormatError
from fxq.export.graph.savable import check_savable
from fxq.job import ForwardLoop, Job, measuring, needs_data, uses_data
from fxq.parallel.handshake import compare_plans, shake_hands
from fxq.passes.line import check_own
from fxq.passes.with_cache import check_cache, with_cache
from fxq.recipes import get_recipe, recipe_to_json
from fxq.runtime.ambient import without_autocast
from fxq.runtime.progress import Progress
from fxq.runtime.streams import warn
from fxq.runtime.workers import Workers
from fxq.runtime.writable import writable_folder

Model = nn.Module | fx.GraphModule | ExportedProgram


def quantize(
    model: Model,
    calib_loader: Iterable[object] | Rollout | None = None,
    recipe: Recipe | str | pathlib.Path = "w4a8",
    *,
    example_inputs: object = None,
    dynamic_shapes: object = None,
    forward_loop: ForwardLoop | None = None,
    checkpoint_dir: str | pathlib.Path | None = None,
    sensitivity: Sequence[float] | Tensor | None = None,
    passes: Sequence[Pass] = (),
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """Quantize a model: trace, plan, calibrate, choose integers, rewrite, freeze.

    Args:
        model: nn.Module, GraphModule or ExportedProgram; never changed.
        calib_loader: any iterable (dict = kwargs, tuple or list = args, Tensor = one argument, :class:`fxq.Batch`), or
            a :class:`fxq.Rollout`, which knows chunks. Exactly one of it and ``forward_loop``; neither is needed by a
            recipe whose inputs are all scaled per token, such as ``"w8a8-dynamic"``.
        recipe: a preset (``"w8a8"``, ``"w4a8"``, ``"w4a6"``, ``"w8a8-dynamic"``, ``"w4a8-token"``, ...), a
            :class:`fxq.Recipe` or a recipe file.
        example_inputs: inputs to trace with, in a loader item's form; default: the rollout's example call or the first
            batch.
        dynamic_shapes: as for ``torch.export.export``; default: the rollout's, else the first dimension
            of every tensor may vary where the model allows it. The result refuses calls of other sizes.
        forward_loop: closure that calls the callable it is given as it would the model.
        checkpoint_dir: one file per finished layer; a killed run resumes there, and what is large lies there instead of
            in memory. The result's weights are mapped from these files: keep them while it is in use.
        sensitivity: chunk sensitivities measured before, [chunks], to skip measuring them again.
        passes: your own, each of which gives the stage it needs: it runs behind the last shipped pass that gives this
            stage (see :func:`fxq.passes.line.line`), under the same rules.
        group: ranks that share the work; each must make the same call, and each gets the same result. Batches and
            layers are divided among them.
        progress: show progress bars on stderr.

    Returns:
        A new GraphModule, callable like the model, that stores int8 or packed int4 weights and computes on integers.

    Raises:
        fxq.RecipeError: recipe unknown, malformed, or matching nothing; a budget that cannot be met; weights or
            biases with NaN; a model that is quantized already.
        fxq.TraceError: the model cannot be captured or its graph differs from eager.
        fxq.CalibrationError: data missing, misshapen, not finite, not reaching a planned layer, or no rollout.
        fxq.runtime.workers.WorkerError: a rank of the group is gone, failed, or makes another call.
        fxq.passes.PassError: a pass has no place in the line or breaks its promise, or the model has no such cache.
        fxq.core.verify.RuleError: a rule is broken after a pass; the message names both.
        OSError: checkpoint_dir cannot be written.
    """
    # Methods learn by gradients, tensors must outlive the call and products be exact, whatever mode the caller is in.
    with Workers.of(group).watched() as workers, _learning(), Progress(progress) as bar:
        model = plain_model(model) if isinstance(model, nn.Module) else model
        _refuse_quantized(model)
        chosen = get_recipe(recipe)
        if not chosen.methods:
            raise RecipeError(f"recipe {chosen.name!r} has no method; RangeSearch() or MinMax() is the least")
        _check_sources(chosen, calib_loader, forward_loop)
        check_own(passes)
        loader, example, shapes = _example(calib_loader, example_inputs, dynamic_shapes)
        folder = None if checkpoint_dir is None else writable_folder(checkpoint_dir)
        shake_hands(workers, chosen, model, calib_loader, example if example_inputs is None else None, passes)
        job = Job(chosen, bar, workers, folder, passes=tuple(passes))
        with bar.step("trace"):
            graph = _trace(model, example, shapes)
        with bar.step("plan"):
            job.plan(graph)
        if chosen.cache is not None:
            check_cache(graph, chosen.cache)
        compare_plans(workers, graph.plans)
        _warn_of_nothing(graph, chosen)
        data = job.calibrate(graph, loader, forward_loop)
        alpha = None if sensitivity is None else torch.as_tensor(sensitivity, dtype=torch.float64)
        alpha = job.weigh_chunks(graph, loader, alpha, data)
        job.choose_integers(graph)
        with bar.step("rewrite"):
            job.rewrite(graph)
        tables = None if chosen.cache is None else job.cache_tables(graph, loader, chosen.cache, data)
    module = finish(graph, chosen, data, None if alpha is None else alpha.tolist(), _never_called(model, graph))
    return module if chosen.cache is None else with_cache(module, chosen.cache, tables)


def sensitivity(rollout: Rollout, recipe: Recipe | str | pathlib.Path = "w4a8", *, progress: bool = False) -> Tensor:
    """Chunk-wise sensitivity of a rollout's denoiser under a recipe, float64 [chunks] with sum 1.

    ``alpha[i]`` is the share of the whole video's error when only chunk i is quantized (arXiv 2605.21072).

    Args:
        rollout: prompts and noise; they serve as calibration data as well.
        recipe: preset, recipe or file; its first method initialises the integers, nothing is reconstructed.
        progress: show progress bars on stderr.

    It raises what :func:`quantize` does.
    """
    return measure_sensitivity(rollout, recipe, progress=progress).alpha


def measure_sensitivity(
    rollout: Rollout,
    recipe: Recipe | str | pathlib.Path = "w4a8",
    *,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> ChunkSensitivity:
    """As :func:`sensitivity`, with the per-video errors behind it; the ranks of ``group`` divide the batches."""
    chosen = get_recipe(recipe)
    with Workers.of(group).watched() as workers, _learning(), Progress(progress) as bar:
        shake_hands(workers, chosen, rollout.denoiser, rollout, None)
        job = Job(chosen, bar, workers)
        args, shapes = rollout.example_call()
        with bar.step("trace"):
            graph = trace(rollout.denoiser, args, None, shapes)
        job.plan(graph)
        data = job.calibrate(graph, rollout)
        return job.measure(graph, rollout, data)


def _refuse_quantized(model: Model) -> None:
    """Refuse what fxq made before, as a whole or as a part, at once."""
    if isinstance(model, ExportedProgram):
        return  # its graph is looked at when it is planned
    for name, module in model.named_modules():
        if has_facts(module) or isinstance(getattr(module, "plan", None), LayerPlan):
            what = f"its part {name}" if name else "the model"
            raise RecipeError(f"{what} is quantized already; quantize the float model that it was made from")


@contextlib.contextmanager
def _learning() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


def _check_sources(
    recipe: Recipe, calib_loader: Iterable[object] | Rollout | None, forward_loop: ForwardLoop | None
) -> None:
    if calib_loader is not None and forward_loop is not None:
        raise CalibrationError("give exactly one of calib_loader and forward_loop")
    if recipe.cache is not None and recipe.cache.needs_tables and not isinstance(calib_loader, Rollout):
        raise CalibrationError(
            f"recipe {recipe.name!r} stores its cache by codecs with fit = 'model', which learn from rollouts: give a "
            "fxq.Rollout as calib_loader, or take fit = 'video'"
        )
    if calib_loader is None and forward_loop is None and recipe.budget is not None:
        raise CalibrationError(
            f"give exactly one of calib_loader and forward_loop: recipe {recipe.name!r} has a budget, and errors of "
            "layers are measured on data"
        )
    if calib_loader is None and forward_loop is None and recipe.attention is not None:
        raise CalibrationError(
            f"give exactly one of calib_loader and forward_loop: recipe {recipe.name!r} has attention = "
            f"{recipe.attention.scheme!r}, and which attentions it is for is measured on data"
        )
    if calib_loader is None and forward_loop is None and (static := needs_data(recipe)):
        raise CalibrationError(
            f"give exactly one of calib_loader and forward_loop: recipe {recipe.name!r} has static input scales "
            f"(rule {static!r}), which are measured on data. Schemes with per_token, as in 'w8a8-dynamic', need none"
        )
    if calib_loader is None and forward_loop is None and (transform := measuring(recipe)):
        raise CalibrationError(
            f"give exactly one of calib_loader and forward_loop: recipe {recipe.name!r} has the transform {transform}, "
            "whose scales follow from data"
        )
    if calib_loader is None and forward_loop is None:
        _warn_of_no_data(recipe)


def _warn_of_no_data(recipe: Recipe) -> None:
    """Say so when methods have nothing to learn from."""
    if uses_data(recipe):
        warn(
            f"recipe {recipe.name!r} has methods that learn from calibration data, and there are none: weights go to "
            "the nearest integers",
            stacklevel=4,
        )


def _warn_of_nothing(graph: QuantGraph, recipe: Recipe) -> None:
    """Say so when every linear stays in model dtype, with the reasons."""
    if graph.quantized_plans:
        return
    reasons = collections.Counter(plan.reason for plan in graph.plans.values()).most_common(3)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "the model has none"
    warn(f"recipe {recipe.name!r} quantizes no linear of {len(graph.plans)}: {told}", stacklevel=3)


def _trace(model: Model, example: Batch, dynamic_shapes: object) -> QuantGraph:
    args, kwargs = example.args, dict(example.kwargs)
    if dynamic_shapes is None and (default := batch_dynamic(args, kwargs)) is not None:
        # Some models refuse a dynamic batch; the static capture then refuses other batches when it is called.
        if (larger := _larger(args, kwargs)) is not None:
            with contextlib.suppress(TraceError):
                return _trace_savable(model, args, kwargs, default, larger)
        with contextlib.suppress(TraceError):
            return _trace_savable(model, args, kwargs, default)
    return _trace_savable(model, args, kwargs, dynamic_shapes)


def _trace_savable(
    model: Model,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    dynamic_shapes: object,
    captured_with: tuple[tuple[object, ...], dict[str, object]] | None = None,
) -> QuantGraph:
    """The captured graph, which can be saved once it is quantized."""
    graph = trace(model, args, kwargs, dynamic_shapes, captured_with=captured_with)
    try:
        check_savable(graph.module)
    except GraphFormatError as error:
        raise TraceError(
            f"what is quantized could not be saved: {error}. Compute it outside the model or by operators of torch on "
            "tensors, or pass dynamic_shapes that fix the sizes it works on"
        ) from error
    return graph


def _larger(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Inputs whose first sizes are 2 where they are 0 or 1, which a capture takes for constants; None if none is."""

    def small(value: object) -> TypeGuard[Tensor]:
        return type(value) is Tensor and value.layout == torch.strided and value.ndim > 0 and value.shape[0] < 2

    def enlarged(value: object) -> object:
        return value.new_empty((2, *value.shape[1:])) if small(value) else value

    if not any(small(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
        return None
    larger: tuple[tuple[object, ...], dict[str, object]] = pytree.tree_map(enlarged, (args, kwargs))
    return larger


def _example(
    loader: Iterable[object] | Rollout | None, example_inputs: object, dynamic_shapes: object
) -> tuple[Iterable[object] | Rollout | None, Batch, object]:
    """The loader (its first batch put back), the inputs to trace with, and dynamic shapes."""
    if example_inputs is not None:
        return loader, usable(example_inputs, 0), dynamic_shapes
    if isinstance(loader, Rollout):
        args, shapes = loader.example_call()
        return loader, usable(args, 0), dynamic_shapes if dynamic_shapes is not None else shapes
    if loader is None:
        raise CalibrationError("without a calib_loader no inputs are known before tracing: pass example_inputs")
    if not isinstance(loader, Iterable):
        raise CalibrationError(f"calib_loader is {type(loader).__name__}, expected an iterable of batches or a Rollout")
    iterator = iter(loader)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(NO_BATCH) from None
    return _PutBack(first, iterator, operator.length_hint(loader)), usable(first, 0), dynamic_shapes


@dataclasses.dataclass(frozen=True)
class _PutBack(Iterable[object]):
    """A loader whose first batch was looked at: it is iterated once, so one-shot loaders lose nothing."""

    first: object
    rest: Iterator[object]
    length: int

    def __iter__(self) -> Iterator[object]:
        yield self.first
        yield from self.rest

    def __length_hint__(self) -> int:
        return self.length


def _never_called(model: Model, graph: QuantGraph) -> list[str]:
    if not isinstance(model, nn.Module):
        return []
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    known = {f"{layer}.weight" for layer in graph.plans} | set(graph.plans)
    called = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in known}
    return [name for name, m in modules.items() if id(m.weight) not in called]


def finish(
    graph: QuantGraph, recipe: Recipe, calibration_hash: str, alpha: list[float] | None, never_called: list[str]
) -> fx.GraphModule:
    """Attach the facts that summaries and manifests show to a FROZEN graph's module and return it."""
    rules = rules_of(graph.module) or call_rules(graph.module)
    facts = Facts(
        recipe=recipe_to_json(recipe),
        calibration_hash=calibration_hash,
        inputs=rules.sizes,
        dtypes=rules.dtypes,
        conditions=rules.conditions,
        passes=(),
        environment=environment(),
        sensitivity=alpha,
        chunk_weights=graph.chunk_weights.tolist(),
        never_called=never_called,
        others=graph.found,
    )
    facts.after(graph).attach(graph.module)
    return guard_inputs(graph.module)
