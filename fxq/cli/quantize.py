"""Commands that quantize a model or look at what that would do."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fxq.capture.trace import trace
from fxq.cli.options.cache_options import CacheOptions, ReportOption, with_cache_options
from fxq.cli.options.common import JsonOption, QuietOption, SeedOption, bundle_folder, emit_json
from fxq.cli.options.models import AdapterError, ModelFiles, make_rollout
from fxq.cli.options.source import (
    Source,
    announce,
    cache_report,
    diffusers_source,
    rollout_source,
    with_model_files,
)
from fxq.core.config import Recipe, RecipeError, Scheme, with_budget
from fxq.core.facts import Facts
from fxq.core.graph import linear_sites
from fxq.core.ir import planned
from fxq.core.method import AttentionScheme, LearningMethod
from fxq.core.summary import summary
from fxq.export import load, save
from fxq.export.bundle import check_bundle_place
from fxq.export.hub.client import is_repository
from fxq.job import Job
from fxq.passes import detect_outliers
from fxq.passes.choose_widths import FACT
from fxq.presets import with_iterations
from fxq.quantize import measure_sensitivity
from fxq.quantize import quantize as quantize_model
from fxq.recipes import get_recipe, plain_recipe, recipe_to_toml
from fxq.report.data import PUBLISHED_SENSITIVITY
from fxq.runtime.progress import Progress
from fxq.runtime.streams import emit, stderr_console, stdout_console
from fxq.runtime.tables import Justify, Sheet
from fxq.runtime.workers import launched
from fxq.runtime.writable import whole_file, writable_file

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="'tiny', a published family, 'diffusers', a plug-in's name, or package.module:function returning a "
        "fxq.Rollout.",
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", "-r", help="Preset (see fxq recipe list) or recipe file."),
]
VideosOption = Annotated[int, typer.Option("--videos", "-n", min=1, help="Videos to drive.")]
IterationsOption = Annotated[
    int | None, typer.Option(min=1, help="Reconstruction iterations; the recipe's by default.")
]


CheckpointOption = Annotated[
    pathlib.Path | None,
    typer.Option(help="One file per finished layer: a killed run resumes there, and memory stays small."),
]
CallsOption = Annotated[
    pathlib.Path | None, typer.Option(help="Recorded calls to calibrate on, for --model diffusers.")
]
WeightBitsOption = Annotated[
    float | None,
    typer.Option(min=0, help="Mixed precision: mean bits per quantized weight, as 5, with the least predicted error."),
]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget", min=0, help="Mixed precision: bytes of all linears, as a part of their bytes in bf16."),
]
TimeOption = Annotated[
    float | None,
    typer.Option(
        "--time",
        min=0,
        help="Mixed precision: measured time of the linears' kernels here, as a part of that in the model's dtype.",
    ),
]
MaxErrorOption = Annotated[
    float | None, typer.Option(min=0, help="Mixed precision: the least bytes with at most this predicted error.")
]
AttentionOption = Annotated[
    str | None,
    typer.Option(help="'int8' or 'int8_fp8': attentions multiply in 8 bits where calibration shows that they can."),
]
SaveRecipeOption = Annotated[
    pathlib.Path | None,
    typer.Option(help="Write the result as a recipe file (.toml) with a rule per layer: the same without a search."),
]


def _recipe(name: str, iterations: int | None, attention: str | None = None, **limits: float | None) -> Recipe:
    recipe = get_recipe(name)
    if attention is not None:
        recipe = dataclasses.replace(recipe, attention=AttentionScheme(scheme=attention))
    if any(limit is not None for limit in limits.values()):
        recipe = with_budget(recipe, **limits)
    if iterations is None:
        return recipe
    if not any(isinstance(method, LearningMethod) for method in recipe.methods):
        told = f"--iterations has no effect: no method of recipe {recipe.name!r} learns step by step"
        stderr_console().print(told, markup=False, soft_wrap=True)
    return with_iterations(recipe, iterations)


def _with_cache(kept: CacheOptions, source: Source, recipe: Recipe) -> tuple[Source, Recipe]:
    """The recipe with the cache that was asked for, and the source with data where its codecs learn from some."""
    if not kept.given:
        return source, recipe
    assert source.rollout is not None
    policy = kept.policy(source.rollout, source.rollout if source.prompted else None)
    recipe = dataclasses.replace(recipe, cache=policy)
    return source.driven_for(recipe), recipe


def _check_report(report: pathlib.Path, source: Source, recipe: Recipe) -> None:
    if recipe.cache is None or not source.prompted:
        missing = "a cache: pass --kv or --absorb" if recipe.cache is None else "videos to make: pass --prompts"
        raise AdapterError(f"--report {report} is about a cache and needs {missing}")


@with_model_files
@with_cache_options
def quantize(
    out: Annotated[pathlib.Path, typer.Option(help="Bundle folder to write.")],
    files: ModelFiles,
    kept: CacheOptions,
    model: ModelOption = "tiny",
    recipe: RecipeOption = "w4a8",
    videos: VideosOption = 16,
    seed: SeedOption = 1,
    iterations: IterationsOption = None,
    checkpoint_dir: CheckpointOption = None,
    calls: CallsOption = None,
    bits_per_weight: WeightBitsOption = None,
    budget: BudgetOption = None,
    time: TimeOption = None,
    max_error: MaxErrorOption = None,
    attention: AttentionOption = None,
    save_recipe: SaveRecipeOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a model and write a bundle. Under torchrun the ranks share the work.

    --model diffusers takes a folder of save_pretrained as --checkpoint and what fxq.record saw as --calls.
    Recipes that scale inputs per token need no data: without --prompts the model is not run for calibration.
    --bits-per-weight, --budget, --time or --max-error choose the bits of each layer; what is chosen from is among the
    facts of --json. --kv, --absorb and what goes with them replace the recipe's [cache]: the bundle's graph then takes
    keys and values as they are stored. --report then makes the first batch of prompts twice, by the bundle and in full
    precision on exact caches, and compares chunk by chunk.
    """
    limits = {"bits_per_weight": bits_per_weight, "ratio": budget, "time": time, "max_error": max_error}
    chosen = _recipe(recipe, iterations, attention, **limits)
    if kept.given and model == "diffusers":
        raise AdapterError(f"{kept.given}: models of diffusers keep no fxq cache, leave out these options")
    if save_recipe is not None and save_recipe.suffix.lower() != ".toml":
        raise RecipeError(f"--save-recipe {save_recipe}: a recipe file ends in .toml")
    with launched() as workers:
        check_bundle_place(out)
        for file in (save_recipe, report):
            if file is not None:
                writable_file(file)
        if model == "diffusers":
            source = diffusers_source(files, calls, chosen)
        else:
            source, chosen = _with_cache(kept, rollout_source(model, files, calls, chosen, videos, seed), chosen)
        if report is not None:
            _check_report(report, source, chosen)
        if workers.first:
            announce(source, chosen, checkpoint_dir, out, quiet)
        module = quantize_model(
            source.model,
            source.loader,
            chosen,
            example_inputs=source.example,
            dynamic_shapes=source.shapes,
            checkpoint_dir=checkpoint_dir,
            group=workers.group,
            progress=workers.first and not quiet,
        )
        metrics = source.metrics(module) if workers.first else {}
        if workers.first:
            save(module, out, metrics=metrics)
            if report is not None:
                cache_report(source, module, report, f"Cache of {model}, {chosen.name}")
            if save_recipe is not None:
                with whole_file(save_recipe) as part:
                    part.write_text(recipe_to_toml(plain_recipe(module)), encoding="utf-8")
    if not workers.first:
        return
    if as_json:
        emit_json(json.loads(summary(module).to_json()) | metrics)
        return
    stdout_console().print(summary(module))
    _show_widths(Facts.of(module).others.get(FACT))
    for decibels in metrics.values():
        stdout_console().print(f"output SQNR: {decibels} dB on {len(source.checks)} recorded calls", highlight=False)
    stdout_console().print(f"bundle: {out}", markup=False, highlight=False, soft_wrap=True)


def _show_widths(found: Any) -> None:
    """A line on the choice of widths, where there was one."""
    if found is not None:
        size, bits = f"{found['bytes']:,} bytes ({found['ratio']:.4f}x of bf16)", f"{found['bits_per_weight']:.3f}"
        narrow, wide = found["frontier"][0], found["frontier"][-1]
        time = f", {found['time']:.3f}x of the time in model dtype" if "time" in found else ""
        stdout_console().print(
            f"{bits} bits per weight, {size}{time}, predicted error {found['error']:.4g}; narrowest {narrow[0]:,} "
            f"bytes with {narrow[1]:.4g}, least error {wide[1]:.4g} with {wide[0]:,} bytes",
            highlight=False,
        )


@with_model_files
def inspect(
    target: Annotated[
        str, typer.Argument(help="A bundle folder, org/name[@revision] of the hub, or a model name as for --model.")
    ],
    files: ModelFiles,
    recipe: RecipeOption = "w4a8",
    as_json: JsonOption = False,
) -> None:
    """Show a bundle's layers, or what a recipe would do to a model: plan, outliers, thresholds. Needs no data."""
    if pathlib.Path(target).exists() or is_repository(target.partition("@")[0]):
        _inspect_bundle(bundle_folder(pathlib.Path(target)), as_json)
        return
    rows = _planned_rows(target, files, recipe)
    if as_json:
        emit_json(rows)
        return
    right = ("shape", "above", "outliers", "median", "threshold", "largest")
    columns: dict[str, Justify] = {"layer": "left", "bits": "left", **dict.fromkeys(right, "right")}
    sheet = Sheet(f"{target} under {recipe}", columns, "note")
    for row in rows:
        numbers = [f"{row[k]:.3f}" if k in row else "-" for k in ("median", "threshold", "largest")]
        shape = "x".join(map(str, row["shape"]))
        above = str(row.get("above_threshold", "-"))
        style = None if row["bits"] != "-" else "dim"
        cells = (row["layer"], row["bits"], shape, above, str(row["outliers"]), *numbers)
        sheet.add(*cells, note=row["reason"], style=style)
    stdout_console().print(sheet)


def _inspect_bundle(path: pathlib.Path, as_json: bool) -> None:
    module = load(path)
    result, facts = summary(module), Facts.of(module)
    if as_json:
        emit(result.to_json())
        return
    stdout_console().print(result)
    data = facts.calibration_hash[:16] or "none, input scales are measured at run time"
    stdout_console().print(f"recipe {facts.recipe['name']}, calibration {data}", highlight=False, markup=False)
    if facts.sensitivity:
        shown = " ".join(f"{a:.3f}" for a in facts.sensitivity)
        stdout_console().print(f"chunk sensitivity {shown}", highlight=False)


def _bits(scheme: Scheme, recipe: Recipe) -> str:
    """What the bits of a planned layer may be: "W4|8A8" under a budget."""
    if recipe.budget is None:
        return scheme.detail
    return scheme.detail.replace(f"W{scheme.weight_bits}", f"W{'|'.join(map(str, recipe.budget.widths))}", 1)


def _planned_rows(target: str, files: ModelFiles, recipe: str) -> list[dict[str, Any]]:
    """What a recipe would do to each linear, as JSON."""
    rollout = make_rollout(target, 2, 0, files, driven=False)
    args, shapes = rollout.example_call()
    graph = trace(rollout.denoiser, args, None, shapes)
    chosen = get_recipe(recipe)
    Job(chosen, Progress(False)).plan(graph)
    weights = {s.layer: s.weight(graph.module) for s in linear_sites(graph.module) if s.weight_name is not None}
    rows = []
    for layer, (plan, _) in planned(graph.module).items():
        scheme = plan.scheme
        row: dict[str, object] = {
            "layer": layer,
            "bits": _bits(scheme, chosen) if scheme else "-",
            "shape": [plan.out_features, plan.in_features],
            "outliers": len(plan.outliers),
            "reason": plan.reason or plan.outlier_reason,
        }
        if scheme is not None:
            found = detect_outliers(weights[layer], scheme.tau, scheme.alpha, scheme.align)
            row |= {
                "channels": list(plan.outliers),
                "above_threshold": found.raw_count,
                "median": found.median,
                "threshold": found.threshold,
                "largest": float(found.norms.max()),
            }
        rows.append(row)
    return rows


@with_model_files
def sensitivity(
    files: ModelFiles,
    model: ModelOption = "tiny",
    recipe: RecipeOption = "w4a8",
    videos: VideosOption = 16,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how much an error in each chunk costs the whole video. Under torchrun the ranks share the videos."""
    with launched() as workers:
        rollout = make_rollout(model, videos, seed, files)
        progress = workers.first and not quiet
        result = measure_sensitivity(rollout, recipe, group=workers.group, progress=progress)
    if not workers.first:
        return
    alpha = result.alpha.tolist()
    if as_json:
        emit_json({"alpha": alpha, "mse": result.mse.tolist(), "videos": len(result.mse), "recipe": recipe})
        return
    table = Table(title=Text(f"chunk sensitivity of {model} under {recipe}, {len(result.mse)} videos", "table.title"))
    table.add_column("chunk", justify="right")
    table.add_column("alpha", justify="right")
    table.add_column("Self-Forcing W4A8, published", justify="right")
    table.add_column("")
    for i, a in enumerate(alpha):
        published = f"{PUBLISHED_SENSITIVITY[i]:.4f}" if len(alpha) == len(PUBLISHED_SENSITIVITY) else "-"
        table.add_row(str(i + 1), f"{a:.4f}", published, "#" * round(60 * a))
    stdout_console().print(table)
