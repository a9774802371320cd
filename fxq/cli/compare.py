"""The ``compare`` command."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated

import typer
from torch import Tensor

from fxq.calibration.rollout import Rollout
from fxq.cli.compare_bundles import Finished, Showing, identity_of, show, with_bundles
from fxq.cli.options.common import JsonOption, QuietOption, emit_json, expanding
from fxq.cli.options.models import AdapterError, ModelFiles, family_rollout, make_rollout, other_videos, parse_device
from fxq.cli.options.source import with_model_files
from fxq.cli.options.videos import VideoFiles, with_video_files
from fxq.cli.quantize import IterationsOption, ModelOption
from fxq.comparison.measure import Extent
from fxq.comparison.methods import METHODS, ComparisonError
from fxq.comparison.page import write
from fxq.comparison.run import Plan, run
from fxq.comparison.subject import Subject, tiny_subject
from fxq.comparison.tables import reliability_table, sentences, terminal_table, to_json
from fxq.models.families import FAMILIES
from fxq.models.self_forcing import SelfForcingRollout
from fxq.runtime.streams import stdout_console
from fxq.runtime.tables import Uncut
from fxq.runtime.writable import writable_file

_WHOLE, _QUICK = Extent(videos=64, calibration_videos=16), Extent(videos=12, calibration_videos=4)
_QUICK_ITERATIONS = 25
_BITS = "w8a8,w4a8,w4a6"


@dataclasses.dataclass(frozen=True)
class _ByMethods:
    """What the comparison of methods takes beside them; None where nothing was said."""

    bits: str | None = None
    calibration_videos: int | None = None
    iterations: int | None = None
    base: str | None = None
    quick: bool = False

    @property
    def given(self) -> str:
        """The options that were given, as on the command line."""
        names = (field.name for field in dataclasses.fields(self))
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, False))

    def plan(self, methods: list[str], seeds: str | None, videos: int | None, chunks: int | None) -> Plan:
        """What is compared."""
        usual = _QUICK if self.quick else _WHOLE
        return Plan(
            methods=methods,
            bits=[word for word in (self.bits or _BITS).split(",") if word],
            seeds=_numbers(seeds or ("1" if self.quick else "1,2")),
            base=self.base,
            iterations=self.iterations or (_QUICK_ITERATIONS if self.quick else None),
            extent=Extent(
                videos=videos or usual.videos,
                calibration_videos=self.calibration_videos or usual.calibration_videos,
                chunks=chunks,
            ),
        )


def _by_methods(
    bits: Annotated[
        str | None, typer.Option(help=f"Widths; {_BITS} by default; presets and recipe files have their own.")
    ] = None,
    calibration_videos: Annotated[
        int | None, typer.Option(min=1, help="Videos of a seed to calibrate on; 16, or 4 with --quick.")
    ] = None,
    iterations: IterationsOption = None,
    base: Annotated[str | None, typer.Option(help="The method that others are compared with; the first.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, few videos and iterations: for a first look.")
    ] = False,
) -> _ByMethods:
    return _ByMethods(bits, calibration_videos, iterations, base, quick)


@with_model_files
@with_video_files
@expanding("by", _by_methods)
@with_bundles
def compare(
    files: ModelFiles,
    video: VideoFiles,
    by: _ByMethods,
    finished: Finished,
    methods: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(METHODS)}; presets; recipe files. METHOD:weighting=uniform is a variant."),
    ] = None,
    model: ModelOption = "tiny",
    seeds: Annotated[
        str | None, typer.Option(help="Calibration seeds; 1,2 by default, 1 with --quick; with --bundles of noise.")
    ] = None,
    videos: Annotated[
        int | None,
        typer.Option(
            "--videos",
            "-n",
            min=1,
            help="Videos of a seed to measure on; 64, or 12 with --quick; with --bundles one for each prompt.",
        ),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Length of the videos to measure on; the model's own by default.")
    ] = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for finished rows, tables, pictures or videos, and the page.")
    ] = pathlib.Path("out/compare"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize one model by several methods at several widths and measure all of them side by side.

    With --bundles what is quantized already is put beside full precision on video. A killed run goes on where it was,
    and an --out folder can be given more methods, widths and seeds, or bundles.
    """
    command = shlex.join(["fxq", *sys.argv[1:]])
    if finished.bundles:
        if by.given:
            raise AdapterError(f"{by.given}: bundles are quantized already, leave this out")
        showing = Showing(
            bundles=(*finished.bundles, *map(pathlib.Path, methods or ())),
            model=model,
            files=files,
            video=video,
            seeds=_numbers(seeds or "1"),
            videos=videos,
            chunks=chunks,
            metrics=finished.metrics,
        )
        show(showing, out, command, as_json, quiet)
        return
    if not methods:
        raise typer.BadParameter("name methods to quantize by, or finished bundles with --bundles")
    if given := ", ".join(filter(None, ("--metric" * bool(finished.metrics), video.given))):
        raise AdapterError(f"{given}: methods are compared on latents; frames are for --bundles")
    if videos == 1:
        raise ComparisonError("--videos 1: an interval needs two videos at least")
    plan = by.plan(methods, seeds, videos, chunks)
    plan.base_among(plan.entries())
    writable_file(out / "compare.html")
    results = run(plan, _subject(model, files, plan.extent), out, command, not quiet)
    written = write(results, out)
    if as_json:
        emit_json(to_json(results))
        return
    console = stdout_console()
    console.print(Uncut(terminal_table(results)))
    console.print(reliability_table(results))
    for width, text in sentences(results).items():
        console.print(f"{width}: {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {written[0]}   all files: {out}", markup=False, highlight=False, soft_wrap=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ComparisonError(f"seeds {text!r}: expected numbers such as 1,2,3") from None


def _subject(model: str, files: ModelFiles, extent: Extent) -> Subject:
    """The model by the options of ``fxq quantize``.

    Raises:
        AdapterError, CheckpointError, PluginError, PromptError: as :func:`fxq.cli.options.models.make_rollout`.
    """
    if model == "diffusers":
        raise AdapterError("model 'diffusers' is calibrated on recorded calls and makes no videos to compare")
    if model == "tiny":
        make_rollout(model, 1, 0, files)
        return tiny_subject(files.batch or 64, parse_device(files.device))
    loaded: list[SelfForcingRollout] = []

    def rollouts(videos: int, seed: int, unseen: bool) -> tuple[Rollout, Tensor | None]:
        if model not in FAMILIES:
            return make_rollout(model, videos, seed, files), None
        if not loaded:
            loaded.append(family_rollout(model, 1, seed, files))
        first = extent.calibration_videos if unseen else 0
        return other_videos(loaded[0], model, files, videos, seed, first), None

    return Subject(name=model, identity={"model": model} | identity_of(files), rollouts=rollouts)
