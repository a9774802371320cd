"""The straight line: trace, plan, calibrate, rewrite, freeze."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxq.calibrate import Batch, CalibrationError, Collector, as_batch, calibrate
from fxq.config import Recipe, RecipeError
from fxq.ir import QuantGraph, set_facts
from fxq.passes import ApplyMethods, DetectOutliers, Freeze, LowerLinear, PlanLayers
from fxq.passes.share_inputs import ShareInputs, input_groups
from fxq.pipeline import Pass, run_passes
from fxq.progress import Progress
from fxq.recipes import get_recipe, recipe_to_json
from fxq.rollout import Rollout
from fxq.sensitivity import ChunkSensitivity, chunk_sensitivity, chunk_weights
from fxq.signature import batch_dynamic, guard_inputs, input_sizes
from fxq.trace import TraceError, trace

Model = nn.Module | fx.GraphModule | ExportedProgram
ForwardLoop = Callable[[Callable[..., Any]], None]


def quantize(
    model: Model,
    calib_loader: Iterable[Any] | Rollout | None = None,
    recipe: Recipe | str | pathlib.Path = "w4a8",
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    forward_loop: ForwardLoop | None = None,
    checkpoint_dir: str | pathlib.Path | None = None,
    sensitivity: Sequence[float] | Tensor | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """Quantize a model with calibration data.

    Args:
        model: nn.Module, GraphModule or ExportedProgram; never changed.
        calib_loader: any iterable (dict = kwargs, tuple or list = args, Tensor = one argument, :class:`fxq.Batch`), or
            a :class:`fxq.Rollout`, which knows chunks. Exactly one of it and ``forward_loop``.
        recipe: a preset (``"w8a8"``, ``"w4a8"``, ``"w4a6"``), a :class:`fxq.Recipe` or a recipe file.
        example_inputs: inputs to trace with, in a loader item's form; default: the rollout's example call or the first
            batch.
        dynamic_shapes: as for ``torch.export.export``; default: the rollout's, else the first dimension
            of every tensor may vary where the model allows it. The result refuses calls of other sizes.
        forward_loop: closure that calls the callable it is given as it would the model.
        checkpoint_dir: one file per finished layer; a killed run resumes there.
        sensitivity: chunk sensitivities measured before, [chunks], to skip measuring them again.
        progress: show progress bars on stderr.

    Returns:
        A new GraphModule, callable like the model, that stores int8 or packed int4 weights and computes on integers.

    Raises:
        fxq.RecipeError: recipe unknown, malformed, or matching nothing; weights with NaN.
        fxq.TraceError: the model cannot be captured or its graph differs from eager.
        fxq.CalibrationError: data missing, misshapen, not finite, or not reaching a planned layer.
    """
    chosen = get_recipe(recipe)
    if not chosen.methods:
        raise RecipeError(f"recipe {chosen.name!r} has no method; RangeSearch() or MinMax() is the least")
    if (calib_loader is None) == (forward_loop is None):
        raise CalibrationError("give exactly one of calib_loader and forward_loop: static scales are measured on data")
    # Methods learn by gradients and tensors must outlive the call, whatever mode the caller is in.
    with torch.inference_mode(False), torch.enable_grad(), Progress(progress) as bar:
        loader, example, shapes = _example(calib_loader, example_inputs, dynamic_shapes)
        with bar.step("trace"):
            graph = _trace(model, example, shapes)
        with bar.step("plan"):
            run_passes(graph, plan_passes(chosen))
        calibration_hash = calibrate_graph(graph, loader, chosen, forward_loop, bar)
        alpha = None if sensitivity is None else torch.as_tensor(sensitivity, dtype=torch.float64)
        alpha = weigh_chunks(graph, loader, chosen, alpha, bar)
        directory = None if checkpoint_dir is None else pathlib.Path(checkpoint_dir)
        with bar.step("reconstruct") as on_layer:
            run_passes(graph, (_methods(chosen, directory, lambda _, done, total: on_layer(done, total)),))
        with bar.step("rewrite"):
            run_passes(graph, (LowerLinear(), Freeze()))
    facts = None if alpha is None else alpha.tolist()
    return finish(graph, chosen, calibration_hash, facts, _never_called(model, graph))


def plan_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """The passes that bring a traced graph to PLANNED as the recipe wants it."""
    passes: tuple[Pass, ...] = (PlanLayers(recipe), DetectOutliers())
    return (*passes, ShareInputs()) if recipe.share_inputs else passes


def calibrate_graph(
    graph: QuantGraph,
    loader: Iterable[Any] | Rollout | None,
    recipe: Recipe,
    forward_loop: ForwardLoop | None,
    bar: Progress,
) -> str:
    """Collect statistics and move the graph to CALIBRATED; returns the calibration hash."""
    groups = input_groups(graph.module) if recipe.share_inputs else []
    leaders = {site.layer: first.layer for first, *others in groups for site in others}
    collector = Collector(recipe.rows_per_call, recipe.max_rows, recipe.seed, leaders)
    with bar.step("calibrate") as on_progress:
        digest = calibrate(graph, loader, forward_loop, collector, on_progress)
    return digest


def weigh_chunks(
    graph: QuantGraph,
    loader: Iterable[Any] | Rollout | None,
    recipe: Recipe,
    alpha: Tensor | None,
    bar: Progress,
) -> Tensor | None:
    """Set the graph's chunk weights, measuring sensitivity when the recipe needs it and the loader is a rollout.

    Other loaders name chunks by :class:`fxq.Batch`; without a measured sensitivity their chunks weigh the same.

    Raises:
        CalibrationError: when the given sensitivity is of another number of chunks.
    """
    if isinstance(loader, Rollout):
        chunks = max(loader.units(c, d) for c, d in loader.batches)
        if alpha is None and recipe.weighting not in ("uniform", "exponential"):
            with bar.step("sensitivity") as on_progress:
                alpha = measure(graph, loader, recipe, on_progress).alpha
    else:
        chunks = 1 + max((int(s.chunks.max()) for s in graph.statistics.values()), default=0)
    if alpha is not None and len(alpha) < chunks:
        raise CalibrationError(f"sensitivity has {len(alpha)} chunks, the calibration data {chunks}")
    if alpha is None and recipe.weighting != "exponential":
        graph.chunk_weights = torch.ones(chunks)
    else:
        graph.chunk_weights = chunk_weights(alpha, chunks, recipe.weighting)
    return alpha


def measure(
    graph: QuantGraph, rollout: Rollout, recipe: Recipe, on_progress: Callable[[int, int], None] | None = None
) -> ChunkSensitivity:
    """Sensitivity of a CALIBRATED graph under the recipe's first method (initialised, not reconstructed)."""
    fork = graph.fork()
    run_passes(fork, (_methods(recipe, None, None, first_only=True), LowerLinear()))
    return chunk_sensitivity(rollout, fork.module, graph.module, on_progress)


def sensitivity(rollout: Rollout, recipe: Recipe | str | pathlib.Path = "w4a8", *, progress: bool = False) -> Tensor:
    """Chunk-wise sensitivity of a rollout's denoiser under a recipe, float64 [chunks] with sum 1.

    ``alpha[i]`` is the share of the whole video's error when only chunk i is quantized (arXiv 2605.21072).

    Args:
        rollout: prompts and noise; they serve as calibration data as well.
        recipe: preset, recipe or file; its first method initialises the integers, nothing is reconstructed.
        progress: show progress bars on stderr.

    Raises:
        As :func:`quantize`.
    """
    return measure_sensitivity(rollout, recipe, progress=progress).alpha


def measure_sensitivity(
    rollout: Rollout, recipe: Recipe | str | pathlib.Path = "w4a8", *, progress: bool = False
) -> ChunkSensitivity:
    """As :func:`sensitivity`, with the per-video errors behind it."""
    chosen = get_recipe(recipe)
    with Progress(progress) as bar:
        args, shapes = rollout.example_call()
        with bar.step("trace"):
            graph = trace(rollout.denoiser, args, None, shapes)
        run_passes(graph, plan_passes(chosen))
        calibrate_graph(graph, rollout, chosen, None, bar)
        with bar.step("sensitivity") as on_progress:
            return measure(graph, rollout, chosen, on_progress)


def _methods(
    recipe: Recipe,
    directory: pathlib.Path | None,
    on_layer: Callable[[str, int, int], None] | None,
    first_only: bool = False,
) -> ApplyMethods:
    methods = recipe.methods[:1] if first_only else recipe.methods
    return ApplyMethods(methods, recipe.weighting, recipe.seed, directory, on_layer, recipe.share_inputs)


def _trace(model: Model, example: Batch, dynamic_shapes: Any) -> QuantGraph:
    args, kwargs = example.args, dict(example.kwargs)
    if dynamic_shapes is None and (default := batch_dynamic(args, kwargs)) is not None:
        # Some models refuse a dynamic batch; the static capture then refuses other batches when it is called.
        with contextlib.suppress(TraceError):
            return trace(model, args, kwargs, default)
    return trace(model, args, kwargs, dynamic_shapes)


def _example(
    loader: Iterable[Any] | Rollout | None, example_inputs: Any, dynamic_shapes: Any
) -> tuple[Iterable[Any] | Rollout | None, Batch, Any]:
    """The loader (its first batch put back), the inputs to trace with, and dynamic shapes."""
    if example_inputs is not None:
        return loader, as_batch(example_inputs), dynamic_shapes
    if isinstance(loader, Rollout):
        args, shapes = loader.example_call()
        return loader, Batch(args), dynamic_shapes if dynamic_shapes is not None else shapes
    if loader is None:
        raise CalibrationError("forward_loop shows no inputs before tracing: pass example_inputs")
    if not isinstance(loader, Iterable):
        raise CalibrationError(f"calib_loader is {type(loader).__name__}, expected an iterable of batches or a Rollout")
    iterator = iter(loader)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError("the calibration loader yielded no batch; static scales need at least one") from None
    return _PutBack(first, iterator, operator.length_hint(loader)), as_batch(first), dynamic_shapes


@dataclasses.dataclass(frozen=True)
class _PutBack(Iterable[Any]):
    """A loader whose first batch was looked at: it is iterated once, so one-shot loaders lose nothing."""

    first: Any
    rest: Iterator[Any]
    length: int

    def __iter__(self) -> Iterator[Any]:
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
    facts: dict[str, Any] = {
        "recipe": recipe_to_json(recipe),
        "calibration_hash": calibration_hash,
        "sensitivity": alpha,
        "chunk_weights": graph.chunk_weights.tolist(),
        "never_called": never_called,
        "inputs": input_sizes(graph.module),
        "passes": [[name, touched] for name, touched, _ in graph.log],
        "environment": environment(),
    }
    set_facts(graph.module, facts)
    return guard_inputs(graph.module, facts["inputs"])


def environment() -> dict[str, str]:
    """Versions and machine, as stored in manifests and result files."""
    import fxq

    return {
        "fxq": fxq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
