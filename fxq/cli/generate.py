"""The ``generate`` command."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import torch
import typer

from fxq.cache.choose import choose, rivals
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws, Rollout
from fxq.cli.cache import exact_caches
from fxq.cli.common import JsonOption, SeedOption, emit_json
from fxq.cli.models import AdapterError
from fxq.export import load
from fxq.lab import SHAPE, frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import CHUNK, TINY, TINY_SAMPLER, load_tiny
from fxq.passes.with_cache import policy_of
from fxq.report.video import FORMATS, write_video
from fxq.runtime.messages import did_you_mean
from fxq.runtime.streams import stdout_console
from fxq.runtime.writable import writable_file

TOKENS = CHUNK * (SHAPE[2] // TINY.patch_size[1]) * (SHAPE[3] // TINY.patch_size[2])
"""Tokens of a chunk."""


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
    chunks: Annotated[int, typer.Option(min=1, help="Length of the video, 3 frames each.")] = SHAPE[0] // CHUNK,
    kv: Annotated[
        str | None,
        typer.Option(help="Store old keys and values so: klt1, qvg, kivi2, int8, ...; `fxq cache` lists them."),
    ] = None,
    kv_bits: Annotated[
        float | None, typer.Option(min=0.01, help="With --kv auto: stored bits per number; a codec for each layer.")
    ] = None,
    span: Annotated[int, typer.Option(min=1, help="Chunks that are encoded together.")] = 2,
    positions: Annotated[
        Literal["absolute", "relative"], typer.Option(help="Of cached keys; relative ones suit any length.")
    ] = "absolute",
    window: Annotated[int, typer.Option(min=-1, help="Attention span in frames; -1: all of the video.")] = -1,
    sink: Annotated[int, typer.Option(min=0, help="First frames that are never evicted.")] = 0,
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
    condition, draws = rollout.batches[0]
    batch = (condition, Draws(draws.seeds, (CHUNK * chunks, *SHAPE[1:])))
    module = None if bundle is None else load(bundle)
    own = None if module is None else policy_of(module)
    if own is not None and (kv, window, sink, positions) != (None, -1, 0, "absolute"):
        raise AdapterError(
            f"{bundle} has a cache of its own, by its recipe: leave out --kv, --window, --sink, --positions"
        )
    try:
        policy = CachePolicy(window=window, sink=sink, positions=positions, span=span)
        sampler = dataclasses.replace(rollout.sampler, cache=own or _policy(policy, kv, kv_bits, chunks))
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"the cache cannot be so: {error}") from error
    rollout = SelfForcingRollout(model, [batch], sampler)
    video = generated(rollout, module)
    write_video(out, frames_of(video[0]), scale=scale)
    scores = sprites.score(video, conditions).means()
    words = sprites.describe(conditions[0])
    if as_json:
        emit_json({"prompt": words, "out": str(out), "scores": scores})
    else:
        stdout_console().print(f"{words}: {out}", highlight=False)


def _policy(policy: CachePolicy, kv: str | None, bits: float | None, chunks: int) -> CachePolicy:
    """The policy with the codecs that were asked for."""
    if bits is not None and kv != "auto":
        raise AdapterError("--kv-bits is the budget of --kv auto; other codecs have their bits in their names")
    if kv is None:
        return policy
    known = rivals(TINY.head_dim, policy.span * TOKENS)
    if kv == "auto":
        calibration, _ = tiny_rollout(load_tiny(), 4, seed=1, unseen=False)
        chosen, _ = choose(known, exact_caches(calibration, policy.span), bits or 3.0, policy, max(chunks, policy.span))
        return chosen
    if kv not in known:
        raise AdapterError(f"--kv {kv}: {did_you_mean(kv, known) or 'unknown'} There are auto, {', '.join(known)}")
    return dataclasses.replace(policy, keys=known[kv], values=known[kv])


def generated(rollout: Rollout, module: Any) -> torch.Tensor:
    """Latents [B, F, C, H, W] of the rollout's first batch, by a module in the denoiser's place or by itself."""
    with rollout.using(module or rollout.denoiser):
        return rollout.rollout(*rollout.batches[0])
