"""The command line: thin commands over the library. Exit codes: 0 done, 1 refused with a reason, 2 wrong usage."""

from __future__ import annotations

import difflib
import json
import pathlib
import shlex
import sys
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from fxq import cli_export, cli_plan
from fxq.adapters import AdapterError, ModelFiles, make_rollout, parse_settings
from fxq.bench.command import bench
from fxq.calibrate import CalibrationError
from fxq.config import Recipe, RecipeError
from fxq.demo import DemoSettings, run_demo
from fxq.export import BundleError, load, read_manifest, save
from fxq.graph import linear_sites
from fxq.ir import planned
from fxq.lab import SHAPE, frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.models.checkpoints import CheckpointError
from fxq.models.prompts import PromptError
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import TINY_SAMPLER, load_tiny
from fxq.passes import LoweringError, detect_outliers
from fxq.pipeline import PassError, run_passes
from fxq.quantize import measure_sensitivity, plan_passes
from fxq.quantize import quantize as quantize_model
from fxq.recipes import get_recipe, with_iterations
from fxq.report.data import PUBLISHED_SENSITIVITY
from fxq.report.html import write_report
from fxq.report.tables import ablation_table, comparison_lines, main_table, report_to_json
from fxq.report.video import write_video
from fxq.rollout import Draws, Rollout
from fxq.summary import summary
from fxq.trace import TraceError, trace
from fxq.verify import RuleError

app = typer.Typer(
    help="Quantize autoregressive video diffusion models: real int8 and int4, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_REFUSALS = (
    AdapterError,
    BundleError,
    CalibrationError,
    CheckpointError,
    FileNotFoundError,
    LoweringError,
    PassError,
    PromptError,
    RecipeError,
    RuleError,
    TraceError,
)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="'tiny', a published family, or package.module:function returning a fxq.Rollout."
    ),
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Preset (w8a8, w4a8, w4a6) or recipe file.")]
VideosOption = Annotated[int, typer.Option("--videos", "-n", min=1, help="Videos to drive.")]
SeedOption = Annotated[int, typer.Option(help="Seed of prompts and noise.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
IterationsOption = Annotated[
    int | None, typer.Option(min=1, help="Reconstruction iterations; the recipe's by default.")
]


def main() -> None:
    """Entry point: refusals become one line on stderr and exit code 1."""
    try:
        app()
    except _REFUSALS as error:
        Console(stderr=True).print(f"[bold red]refused[/]: {type(error).__name__}: ", end="", highlight=False)
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _console() -> Console:
    """stdout; as wide as tables need where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _emit(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _recipe(name: str, iterations: int | None) -> Recipe:
    recipe = get_recipe(name)
    return recipe if iterations is None else with_iterations(recipe, iterations)


app.command()(bench)
app.command()(cli_export.export)
app.command()(cli_export.verify)
app.command()(cli_plan.plan)
app.command()(cli_plan.doctor)


@app.command()
def demo(
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for report.html, report.json and the bundles.")
    ] = pathlib.Path("out/demo"),
    videos: Annotated[int, typer.Option(min=8, help="Unseen videos to evaluate on.")] = 64,
    calibration_videos: Annotated[int, typer.Option(min=1, help="Videos to calibrate on.")] = 16,
    iterations: Annotated[int, typer.Option(min=1, help="Reconstruction iterations a layer.")] = 500,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize the shipped model at W8A8, W4A8 and W4A6 with MinMax and Q-ARVD and measure everything."""
    settings = DemoSettings(
        calibration_videos=calibration_videos, evaluation_videos=videos, iterations=iterations, seed=seed
    )
    command = shlex.join(["fxq", *sys.argv[1:]])
    report, modules = run_demo(settings, command, progress=not quiet)
    page = write_report(report, out / "report.html")
    data = report_to_json(report)
    (out / "report.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    for bits, module in modules.items():
        save(module, out / bits)
    if as_json:
        _emit(data)
        return
    console = _console()
    console.print(main_table(report))
    console.print(ablation_table(report))
    for line in comparison_lines(report):
        console.print(line)
    console.print(f"report: {page}   bundles: {', '.join(str(out / bits) for bits in modules)}", highlight=False)


@app.command()
def quantize(
    out: Annotated[pathlib.Path, typer.Option(help="Bundle folder to write.")],
    model: ModelOption = "tiny",
    recipe: RecipeOption = "w4a8",
    videos: VideosOption = 16,
    seed: SeedOption = 1,
    iterations: IterationsOption = None,
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="Weights of a published model: .pt, .safetensors or a folder.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt embeddings: .safetensors, .npz or package.module:function.")
    ] = None,
    lora: Annotated[pathlib.Path | None, typer.Option(help="LoRA file to merge into the weights.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA, if its file does not say.")] = None,
    config: Annotated[pathlib.Path | None, typer.Option(help="JSON file of settings, such as config.json.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: one setting of the model or its loop.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Latent frames of a video.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Latent rows of a frame.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Latent columns of a frame.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos driven at once.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the file's by default.")] = None,
    checkpoint_dir: Annotated[
        pathlib.Path | None, typer.Option(help="One file per finished layer; a killed run resumes there.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Calibrate and quantize a model and write a bundle."""
    files = ModelFiles(
        checkpoint=checkpoint,
        prompts=prompts,
        lora=lora,
        lora_alpha=lora_alpha,
        config=config,
        settings=parse_settings(settings or ()),
        frames=frames,
        height=height,
        width=width,
        batch=batch,
        dtype=dtype,
    )
    rollout = make_rollout(model, videos, seed, files)
    chosen = _recipe(recipe, iterations)
    module = quantize_model(rollout.denoiser, rollout, chosen, checkpoint_dir=checkpoint_dir, progress=not quiet)
    save(module, out)
    result = summary(module)
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        _console().print(result)
        _console().print(f"bundle: {out}", highlight=False)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A bundle folder, or a model name as for --model.")],
    recipe: RecipeOption = "w4a8",
    as_json: JsonOption = False,
) -> None:
    """Show a bundle's layers, or what a recipe would do to a model: plan, outliers, thresholds. Needs no data."""
    path = pathlib.Path(target)
    if path.exists():
        manifest, result = read_manifest(path), summary(load(path))
        if as_json:
            sys.stdout.write(result.to_json() + "\n")
            return
        facts = manifest.facts
        _console().print(result)
        alpha = facts.get("sensitivity")
        _console().print(
            f"recipe {facts['recipe']['name']}, calibration {facts['calibration_hash'][:16]}", highlight=False
        )
        if alpha:
            _console().print("chunk sensitivity " + " ".join(f"{a:.3f}" for a in alpha), highlight=False)
        return
    rollout = make_rollout(target, 2, 0)
    args, shapes = rollout.example_call()
    graph = trace(rollout.denoiser, args, None, shapes)
    run_passes(graph, plan_passes(get_recipe(recipe)))
    weights = {s.layer: s.weight(graph.module) for s in linear_sites(graph.module) if s.weight_name is not None}
    rows = []
    for layer, (plan, _) in planned(graph.module).items():
        scheme = plan.scheme
        row: dict[str, Any] = {
            "layer": layer,
            "bits": scheme.label if scheme else "-",
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
    if as_json:
        _emit(rows)
        return
    table = Table(title=f"{target} under {recipe}")
    for name in ("layer", "bits", "shape", "above", "outliers", "median", "threshold", "largest", "note"):
        justify: Literal["left", "right"] = "left" if name in ("layer", "bits", "note") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "note")
    for row in rows:
        numbers = [f"{row[k]:.3f}" if k in row else "-" for k in ("median", "threshold", "largest")]
        shape = "x".join(map(str, row["shape"]))
        above = str(row.get("above_threshold", "-"))
        style = None if row["bits"] != "-" else "dim"
        table.add_row(
            row["layer"], row["bits"], shape, above, str(row["outliers"]), *numbers, row["reason"], style=style
        )
    _console().print(table)


@app.command()
def sensitivity(
    model: ModelOption = "tiny",
    recipe: RecipeOption = "w4a8",
    videos: VideosOption = 16,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how much an error in each chunk costs the whole video."""
    result = measure_sensitivity(make_rollout(model, videos, seed), recipe, progress=not quiet)
    alpha = result.alpha.tolist()
    if as_json:
        _emit({"alpha": alpha, "mse": result.mse.tolist(), "videos": len(result.mse), "recipe": recipe})
        return
    table = Table(title=f"chunk sensitivity of {model} under {recipe}, {len(result.mse)} videos")
    table.add_column("chunk", justify="right")
    table.add_column("alpha", justify="right")
    table.add_column("Self-Forcing W4A8, published", justify="right")
    table.add_column("")
    for i, a in enumerate(alpha):
        published = f"{PUBLISHED_SENSITIVITY[i]:.4f}" if len(alpha) == len(PUBLISHED_SENSITIVITY) else "-"
        table.add_row(str(i), f"{a:.4f}", published, "#" * round(60 * a))
    _console().print(table)


def _parse_prompt(text: str) -> torch.Tensor:
    words = text.split()
    indices = []
    for field, known in sprites.WORDS.items():
        hits = [known.index(word) for word in words if word in known]
        if len(hits) != 1:
            stray = [w for w in words if not any(w in k for k in sprites.WORDS.values())]
            close = difflib.get_close_matches(stray[0], known, n=1) if stray else []
            hint = f" (did you mean {close[0]!r} for {stray[0]!r}?)" if close else ""
            raise AdapterError(f"prompt {text!r} needs exactly one {field} of: {', '.join(known)}{hint}")
        indices.append(hits[0])
    return torch.tensor([indices])


@app.command()
def generate(
    out: Annotated[pathlib.Path, typer.Option(help="Video to write: .gif, .webp or .png.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="Words of the tiny model, e.g. 'ring red right slow black row1 column2'; random if absent."),
    ] = None,
    bundle: Annotated[pathlib.Path | None, typer.Option(help="Run this quantized bundle of the tiny model.")] = None,
    seed: SeedOption = 0,
    scale: Annotated[int, typer.Option(min=1, help="Enlargement of pixels.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Generate a video with the shipped model, in full precision or from a bundle."""
    model = load_tiny()
    if prompt is None:
        rollout, conditions = tiny_rollout(model, 1, seed=seed, unseen=True)
    else:
        conditions = _parse_prompt(prompt)
        draws = Draws([seed], SHAPE)
        rollout = SelfForcingRollout(
            model, [({"prompt_embeds": sprites.prompt_embeds(conditions)}, draws)], TINY_SAMPLER
        )
    video = _generate(rollout, None if bundle is None else load(bundle))
    try:
        write_video(out, frames_of(video[0]), scale=scale)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    scores = sprites.score(video, conditions).means()
    words = sprites.describe(conditions[0])
    if as_json:
        _emit({"prompt": words, "out": str(out), "scores": scores})
    else:
        _console().print(f"{words}: {out}", highlight=False)


def _generate(rollout: Rollout, module: Any) -> torch.Tensor:
    with rollout.using(module or rollout.denoiser):
        return rollout.rollout(*rollout.batches[0])


if __name__ == "__main__":
    main()
