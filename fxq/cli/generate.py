"""The ``generate`` command."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated, Any

import torch
import typer
from torch import fx

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws, Rollout
from fxq.capture.trace import trace
from fxq.cli.cache_options import CacheOptions, ReportOption, tables_for, with_cache_options
from fxq.cli.common import JsonOption, SeedOption, emit_json
from fxq.cli.models import AdapterError
from fxq.core.pipeline import run_passes
from fxq.environment import environment
from fxq.export import load
from fxq.lab import SHAPE, frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.metrics.cache_run import run_cache
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import CHUNK, TINY_SAMPLER, load_tiny
from fxq.passes.with_cache import cache_passes, policy_of, with_cache
from fxq.report.cache import cache_to_json, write_cache_report
from fxq.report.video import VideoError, check_format, write_video
from fxq.runtime.messages import did_you_mean
from fxq.runtime.streams import stdout_console
from fxq.runtime.writable import writable_file


def _parse_prompt(text: str) -> torch.Tensor:
    words = text.split()
    indices = []
    for field, known in sprites.WORDS.items():
        hits = [known.index(word) for word in words if word in known]
        if len(hits) != 1:
            stray = [w for w in words if not any(w in k for k in sprites.WORDS.values())]
            hint = did_you_mean(stray[0], known, 0.6) if stray else ""
            hint = f"; for {stray[0]!r} {hint}" if hint else ""
            raise AdapterError(f"prompt {text!r} needs exactly one {field} of: {', '.join(known)}{hint}")
        indices.append(hits[0])
    return torch.tensor([indices])


@with_cache_options
def generate(
    out: Annotated[pathlib.Path, typer.Option(help="Video to write: .gif, .webp, .png or .mp4.")],
    kept: CacheOptions,
    prompt: Annotated[
        str | None,
        typer.Option(help="Words of the tiny model, e.g. 'ring red right slow black row1 column2'; random if absent."),
    ] = None,
    bundle: Annotated[pathlib.Path | None, typer.Option(help="Run this quantized bundle of the tiny model.")] = None,
    seed: SeedOption = 0,
    scale: Annotated[int, typer.Option(min=1, help="Enlargement of pixels.")] = 8,
    chunks: Annotated[int, typer.Option(min=1, help="Length of the video, 3 frames each.")] = SHAPE[0] // CHUNK,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a video with the shipped model, in full precision or from a bundle.

    --report makes it a second time, in full precision on exact caches, and compares chunk by chunk.
    """
    try:
        check_format(writable_file(out))
        if report is not None:
            writable_file(report)
    except VideoError as error:
        raise AdapterError(f"--out {error}") from None
    model = load_tiny()
    if prompt is None:
        rollout, conditions = tiny_rollout(model, 1, seed=seed, unseen=True)
    else:
        conditions = _parse_prompt(prompt)
        draws = Draws([seed], SHAPE)
        rollout = SelfForcingRollout(
            model, [({"prompt_embeds": sprites.prompt_embeds(conditions)}, draws)], TINY_SAMPLER
        )
    condition, draws = rollout.batches[0]
    batch = (condition, Draws(draws.seeds, (CHUNK * chunks, *SHAPE[1:])))
    module = None if bundle is None else load(bundle)
    rollout = SelfForcingRollout(model, [batch], TINY_SAMPLER)
    policy = None if module is None else policy_of(module)
    if policy is None:
        calibration = tiny_rollout(model, 4, seed=1, unseen=False)[0]
        policy = kept.policy(rollout, calibration, chunks)
        rollout.cache_tables = tables_for(policy, calibration)
        if policy.absorb is not None:
            module = _captured(rollout, policy) if module is None else with_cache(module, policy)
    elif kept.given:
        raise AdapterError(f"{bundle} has a cache of its own, by its recipe: leave out {kept.given}")
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    words, told = sprites.describe(conditions[0]), {}
    if report is None:
        video = generated(rollout, module)
    else:
        run, video = run_cache(rollout, module, lambda chunk: sprites.score(chunk, conditions).means())
        written = write_cache_report(
            run, report, f"Cache of {words}", shlex.join(["fxq", *sys.argv[1:]]), environment()
        )
        told = {"report": str(written), "cache": cache_to_json(run)}
    write_video(out, frames_of(video[0]), scale=scale)
    scores = sprites.score(video, conditions).means()
    if as_json:
        emit_json({"prompt": words, "out": str(out), "scores": scores} | told)
    else:
        stdout_console().print(f"{words}: {out}", highlight=False)
        if report is not None:
            stdout_console().print(f"cache: {report}", highlight=False)


def _captured(rollout: Rollout, policy: CachePolicy) -> fx.GraphModule:
    """The float model as a graph that keeps its cache so."""
    args, shapes = rollout.example_call()
    return run_passes(trace(rollout.denoiser, args, None, shapes), cache_passes(policy)).module


def generated(rollout: Rollout, module: Any) -> torch.Tensor:
    """Latents [B, F, C, H, W] of the rollout's first batch, by a module in the denoiser's place or by itself."""
    with rollout.using(module or rollout.denoiser):
        return rollout.rollout(*rollout.batches[0])
