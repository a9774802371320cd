"""The ``generate`` command."""

from __future__ import annotations

import pathlib
from typing import Annotated, Any

import torch
import typer

from fxq.calibration.rollout import Draws, Rollout
from fxq.cli.common import JsonOption, SeedOption, emit_json
from fxq.cli.models import AdapterError
from fxq.export import load
from fxq.lab import SHAPE, frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import TINY_SAMPLER, load_tiny
from fxq.report.video import FORMATS, write_video
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
        emit_json({"prompt": words, "out": str(out), "scores": scores})
    else:
        stdout_console().print(f"{words}: {out}", highlight=False)


def _generate(rollout: Rollout, module: Any) -> torch.Tensor:
    with rollout.using(module or rollout.denoiser):
        return rollout.rollout(*rollout.batches[0])
