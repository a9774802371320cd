"""What the commands of :mod:`fxq.cli.quantize` work on: a model by its options, with its calibration data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import shlex
import sys
from typing import Annotated, Any

import typer
from torch import fx, nn

from fxq import plugins
from fxq.calibration.calibrate import Batch
from fxq.calibration.record import Recording
from fxq.calibration.rollout import Rollout
from fxq.cli.options.common import expanding
from fxq.cli.options.models import (
    AdapterError,
    ModelFiles,
    found_weights,
    make_rollout,
    parse_device,
    parse_dtype,
    parse_settings,
)
from fxq.core.config import Recipe
from fxq.environment import environment
from fxq.job import uses_data
from fxq.metrics.cache_run import run_cache
from fxq.metrics.outputs import output_sqnr
from fxq.models.diffusers_folder import load_folder
from fxq.models.families import SHIPPED_MODELS
from fxq.models.self_forcing import SelfForcingRollout
from fxq.passes.with_cache import policy_of
from fxq.planning.drive import Drive, drive_batches, drive_rollout
from fxq.planning.job import estimate_job
from fxq.report.cache import write_cache_report
from fxq.runtime.messages import first_line
from fxq.runtime.streams import stderr_console


def _model_files(
    checkpoint: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Weights of a published model: .pt, .safetensors, a folder, or org/name[@revision][:pattern] of the "
            "hub."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompt embeddings: .safetensors, .npz or package.module:function; or words, a .txt."),
    ] = None,
    text_encoder: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder of the text encoder, or of a Wan pipeline, for prompts in words."),
    ] = None,
    lora: Annotated[
        pathlib.Path | None, typer.Option(help="LoRA file to merge into the weights, or of the hub as --checkpoint.")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA, if its file does not say.")] = None,
    config: Annotated[pathlib.Path | None, typer.Option(help="JSON file of settings, such as config.json.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: one setting of the model or its loop.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Latent frames of a video.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Latent rows of a frame.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Latent columns of a frame.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Videos driven at once; the model's by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the file's by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs: cuda where there is one, or cpu.")] = None,
    fixed_size: Annotated[
        bool, typer.Option("--fixed-size", help="Capture for this height and width only; AOTInductor needs that.")
    ] = False,
) -> ModelFiles:
    return ModelFiles(
        checkpoint=checkpoint,
        prompts=prompts,
        text_encoder=text_encoder,
        lora=lora,
        lora_alpha=lora_alpha,
        config=config,
        settings=parse_settings(settings or ()),
        frames=frames,
        height=height,
        width=width,
        batch=batch,
        dtype=dtype,
        device=device,
        fixed_size=fixed_size,
    )


with_model_files = expanding("files", _model_files)
"""The command with the options of a model's files in the place of its parameter ``files``."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, what it is calibrated on, what it is captured with, calls to compare its outputs on, and its loop.

    ``prompted`` says whether the loop has prompts, so that it can be run.
    """

    model: nn.Module
    loader: Rollout | Recording | None
    example: Batch
    shapes: Any
    checks: tuple[Batch, ...] = ()
    rollout: Rollout | None = None
    prompted: bool = False

    def metrics(self, quantized: fx.GraphModule) -> dict[str, float]:
        """What a quantized module's outputs are worth on the calls to compare on; JSON values by name."""
        if not self.checks:
            return {}
        decibels = output_sqnr(self.model, quantized, self.checks)
        return {"output_sqnr_db": round(decibels, 2)} if math.isfinite(decibels) else {}

    def driven_for(self, recipe: Recipe) -> Source:
        """With the loop as calibration data where a recipe needs some.

        Raises:
            AdapterError: when there are no prompts.
        """
        if self.loader is not None or self.rollout is None or not uses_data(recipe):
            return self
        if not self.prompted:
            raise AdapterError("the codecs of the cache learn from calibration videos: pass --prompts")
        return dataclasses.replace(self, loader=self.rollout)

    def drive(self) -> Drive | None:
        """What calibration will cost, None without data."""
        if isinstance(self.loader, Rollout):
            return drive_rollout(self.loader)
        if self.loader is None:
            return None
        return drive_batches(self.model, self.example.args, self.example.kwargs, len(self.loader))


def rollout_source(
    name: str, files: ModelFiles, calls: pathlib.Path | None, recipe: Recipe, videos: int, seed: int
) -> Source:
    """The shipped model, a published one, or a user's rollout.

    Raises:
        AdapterError, CheckpointError, PromptError: as :func:`fxq.cli.options.models.make_rollout`; or calls are given.
    """
    if calls is not None:
        raise AdapterError(f"model {name!r} is driven by its own rollout: --calls is for --model diffusers")
    driven = uses_data(recipe) or files.prompts is not None
    rollout = make_rollout(name, videos, seed, files, driven=driven)
    args, shapes = rollout.example_call()
    loader, prompted = rollout if driven else None, driven or files.checkpoint is None
    return Source(rollout.denoiser, loader, Batch(args), shapes, rollout=rollout, prompted=prompted)


def diffusers_source(files: ModelFiles, calls: pathlib.Path | None, recipe: Recipe) -> Source:
    """A folder of diffusers with recorded calls.

    Raises:
        AdapterError: when one of them is missing, or other files are given.
        PluginError: when a plug-in has the name "diffusers" too.
        CheckpointError, RecordError: when one of them cannot be read.
    """
    plugins.find(plugins.MODELS, "diffusers", SHIPPED_MODELS)
    folder, dtype, device = files.checkpoint, files.dtype, files.device
    if folder is None or calls is None:
        calls_wanted = "recorded calls" if uses_data(recipe) else "one recorded call, to capture the graph"
        missing = "a folder of save_pretrained (--checkpoint)" if folder is None else f"{calls_wanted} (--calls)"
        raise AdapterError(f"model 'diffusers' needs {missing}; see docs/diffusers.md")
    if dataclasses.replace(files, checkpoint=None, dtype=None, device=None) != ModelFiles():
        raise AdapterError("model 'diffusers' takes --checkpoint, --calls, --dtype and --device, and no other file")
    place = found_weights(folder)
    place = place.parent if place != folder and place.is_file() else place
    model = load_folder(place, None if dtype is None else parse_dtype(dtype)).to(parse_device(device))
    recording = Recording.load(calls).to(parse_device(device))
    first = tuple(itertools.islice(recording, 2))
    return Source(model, recording if uses_data(recipe) else None, first[0], None, first)


def announce(source: Source, recipe: Recipe, folder: pathlib.Path | None, out: pathlib.Path, quiet: bool) -> None:
    """Say on stderr what the job will need, before it starts.

    Raises:
        OSError: when a disk has less room than that.
    """
    missing = 0
    try:
        estimate = estimate_job(
            source.model,
            recipe,
            source.drive(),
            example=drive_batches(source.model, source.example.args, source.example.kwargs, 1),
            measures_sensitivity=isinstance(source.loader, Rollout),
            folder=folder,
            out=out,
        )
        lines, missing = estimate.lines(), -estimate.disk_free
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        lines = [f"no estimate: the model does not run on shapes alone ({first_line(error)})"]
    for line in [] if quiet else lines:
        stderr_console().print(line, markup=False, soft_wrap=True)
    if missing > 0:
        raise OSError(
            f"the disk of {out} has {missing / 1e9:.2f} GB less room than the job needs; free some of it, or choose "
            "another place with --out"
        )


def cache_report(source: Source, module: fx.GraphModule, path: pathlib.Path, title: str) -> None:
    """Write the page on the cache of a quantized module's rollouts, of the loop's first batch.

    Raises:
        AdapterError: for a loop without an fxq cache.
    """
    rollout, policy = source.rollout, policy_of(module)
    if not isinstance(rollout, SelfForcingRollout) or policy is None:
        raise AdapterError(f"--report {path}: {type(rollout).__name__} has no fxq cache, leave it out")
    sampler = rollout.sampler
    rollout.sampler = dataclasses.replace(sampler, cache=policy)
    try:
        run, _ = run_cache(rollout, module)
    finally:
        rollout.sampler = sampler
    write_cache_report(run, path, title, shlex.join(["fxq", *sys.argv[1:]]), environment())
