"""The command line: thin commands over the library. Exit codes: 0 done, 1 refused with a reason, 2 wrong usage.

Nothing here measures or decides, and nothing below imports it.
"""

from __future__ import annotations

import difflib
import json
import pathlib
import shlex
import sys
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fxq.calibration.collect import CalibrationError
from fxq.calibration.record import RecordError
from fxq.calibration.rollout import Draws, Rollout
from fxq.capture.trace import TraceError
from fxq.cli import bench
from fxq.cli import export as cli_export
from fxq.cli import plan as cli_plan
from fxq.cli import quantize as cli_quantize
from fxq.cli import recipe as cli_recipe
from fxq.cli.models import AdapterError
from fxq.cli.quantize import JsonOption, QuietOption, SeedOption
from fxq.core.config import RecipeError
from fxq.core.pipeline import PassError
from fxq.core.verify import RuleError
from fxq.demo.run import DemoSettings, run_demo
from fxq.export import BundleError, ExportError, load, save
from fxq.export.bundle import check_bundle_place
from fxq.lab import SHAPE, frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.models.checkpoints import CheckpointError
from fxq.models.prompts import PromptError
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import TINY_SAMPLER, load_tiny
from fxq.passes import LoweringError
from fxq.plugins import PluginError
from fxq.report.html import write_report
from fxq.report.tables import ablation_table, comparison_lines, main_table, report_to_json
from fxq.report.video import FORMATS, write_video
from fxq.runtime.streams import emit, finish_output, stderr_console, stdout_console
from fxq.runtime.workers import WorkerError
from fxq.runtime.writable import writable_file

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
    ExportError,
    LoweringError,
    OSError,
    PassError,
    PluginError,
    PromptError,
    RecipeError,
    RecordError,
    RuleError,
    TraceError,
    WorkerError,
)


def main() -> None:
    """Entry point: refusals become one line on stderr and exit code 1."""
    code: Any = 0
    try:
        app()
    except SystemExit as error:
        code = error.code
    except BrokenPipeError:
        code = 1
    except _REFUSALS as error:
        console = stderr_console()
        console.print(f"[bold red]refused[/]: {type(error).__name__}: ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        code = 1
    sys.exit(code if finish_output() else 1)


def _console() -> Console:
    """stdout; as wide as tables need where it is not a terminal."""
    return stdout_console()


def _emit(data: Any) -> None:
    emit(json.dumps(data, indent=1))


app.command()(bench.bench)
app.command()(cli_quantize.quantize)
app.command()(cli_quantize.inspect)
app.command()(cli_quantize.sensitivity)
app.command()(cli_export.export)
app.command()(cli_export.verify)
app.command()(cli_plan.plan)
app.command()(cli_plan.doctor)
app.add_typer(cli_recipe.app, name="recipe")


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
    writable_file(out / "report.html")
    for bits in settings.bits:
        check_bundle_place(out / bits)
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
    if writable_file(out).suffix.lower() not in FORMATS:
        raise AdapterError(f"--out {out}: videos are written as {', '.join(FORMATS)}; choose such a name")
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
    write_video(out, frames_of(video[0]), scale=scale)
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
