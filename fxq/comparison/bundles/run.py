"""The comparison of bundles from a model's loop to results: what a killed run has made is not made again."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxq.calibration.rollout import Draws
from fxq.comparison.bundles.contestant import (
    FULL_PRECISION,
    BundleFolder,
    Contestant,
    bundle_folders,
    contestant_of,
    folder_name,
    make_room,
)
from fxq.comparison.bundles.judge import Clips, Verdict, judge
from fxq.comparison.bundles.memory import kind_of
from fxq.comparison.bundles.metrics import KeptFrames, Metric
from fxq.comparison.bundles.results import BundleResults, BundleRow, Cost
from fxq.comparison.bundles.runs import Run, make, save, saved
from fxq.comparison.methods import ComparisonError
from fxq.environment import environment
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.video.decoding import VideoDecoder
from fxq.runtime.progress import Progress

_VIDEOS = "videos"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model bound to the videos that everyone makes.

    Attributes:
        name: of the model.
        identity: what tells the model from others, JSON values by name; prompts and noise are told apart by what
            they are.
        rollout: its loop; each batch is one video.
        prompts: of the videos, in words where there are any.
        decoder: opens the decoder of its latents on a device; None: latents are compared, and there are no videos.
        frames_per_second: of its videos.
        suffix: of video files.
        settings: shown in the report, JSON values by name.
    """

    name: str
    identity: Mapping[str, object]
    rollout: SelfForcingRollout
    prompts: tuple[str, ...]
    decoder: Callable[[torch.device], VideoDecoder] | None
    frames_per_second: float
    suffix: str
    settings: Mapping[str, object] = field(default_factory=dict)


def compare_bundles(
    stage: Stage,
    bundles: Sequence[pathlib.Path],
    folder: pathlib.Path,
    command: str,
    metrics: Sequence[Metric] = (),
    progress: bool = True,
) -> BundleResults:
    """Make every video in full precision and by every bundle, one after the other, and compare them.

    Args:
        stage: model and videos.
        bundles: of :func:`fxq.quantize`, of this model.
        folder: of the report; latents, times and memory are kept in ``runs`` there, videos are written beside.
        command: how it was called, for the results.
        metrics: further ones, on frames.
        progress: show progress bars on stderr.

    Raises:
        BundleError, ComparisonError: when a bundle cannot be used, or is of another model.
        ComparisonError: when the decoder is of other latents, or metrics have no frames to look at.
        OSError: when the folder cannot be written.
    """
    found = bundle_folders(bundles)
    device = stage.rollout.model.patch_embedding.weight.device
    _check_decoder(stage, metrics)
    with Progress(progress) as bar:
        full = _made(stage, FULL_PRECISION, "", folder, bar, lambda: Contestant(name=FULL_PRECISION), None)
        latents = [run.free for run in full]
        made, who = [], []
        for bundle in found:
            contestant, runs = _bundle_runs(stage, bundle, folder, bar, latents)
            who.append(contestant)
            made.append(runs)
        decoder = None if stage.decoder is None else stage.decoder(device)
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(KeptFrames(folder)) if metrics else None
            judged = _judged(stage, found, full, made, decoder, folder, kept, bar)
            measured = _measured(kept, [FULL_PRECISION, *(bundle.name for bundle in found)], metrics, bar)
    rows = tuple(
        BundleRow(
            name=bundle.name,
            bits=bits,
            size_ratio=ratio,
            forced=np.stack([video.bundles[bundle.name].forced for video in judged]),
            free=np.stack([video.bundles[bundle.name].free for video in judged]),
            ssim=np.array([video.bundles[bundle.name].ssim for video in judged]),
            cost=_cost(runs),
            metrics=measured[bundle.name],
        )
        for bundle, (bits, ratio), runs in zip(found, who, made, strict=True)
    )
    counts = f"{len(stage.prompts)} video{'s' * (len(stage.prompts) != 1)}"
    return BundleResults(
        title=f"{stage.name}: {len(rows)} bundle{'s' * (len(rows) != 1)} beside full precision, {counts}",
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        environment=environment(),
        settings=dict(stage.settings),
        space="latents" if decoder is None else "pixels",
        memory=kind_of(device),
        prompts=stage.prompts,
        full=_cost(full),
        full_metrics=measured[FULL_PRECISION],
        rows=rows,
        clips=tuple(f"{_VIDEOS}/{video.clip}" for video in judged if video.clip),
        frames_per_second=stage.frames_per_second,
        decoding=None if decoder is None else float(np.median([video.decoding for video in judged])),
    )


def _check_decoder(stage: Stage, metrics: Sequence[Metric]) -> None:
    if stage.decoder is None:
        if metrics:
            names = ", ".join(metric.name for metric in metrics)
            raise ComparisonError(f"metrics {names} look at frames, and there is no decoder of latents: give --vae")
        return
    channels, wanted = stage.decoder(torch.device("cpu")).channels, stage.rollout.model.config.out_dim
    if channels != wanted:
        raise ComparisonError(f"the decoder takes latents of {channels} channels, the model makes {wanted}")


def _made(
    stage: Stage,
    name: str,
    digest: str,
    folder: pathlib.Path,
    bar: Progress,
    ready: Callable[[], Contestant],
    reference: Sequence[Tensor] | None,
) -> list[Run]:
    """Every video by one contestant, who is made ready only when one is missing."""
    contestant, runs = None, []
    with bar.step(name) as on_progress:
        for i, (condition, draws) in enumerate(stage.rollout.batches):
            on_progress(i, len(stage.prompts))
            known = reference[i] if reference is not None else None
            identity = _identity(stage, digest, condition["prompt_embeds"], draws, known)
            path = folder / "runs" / f"{folder_name(name)}-{i + 1}.safetensors"
            run = saved(path, identity)
            if run is None:
                contestant = contestant or ready()
                run = make(stage.rollout, condition, draws, contestant, known)
                save(path, run, identity)
            runs.append(run)
    return runs


def _bundle_runs(
    stage: Stage, bundle: BundleFolder, folder: pathlib.Path, bar: Progress, latents: Sequence[Tensor]
) -> tuple[tuple[str, float], list[Run]]:
    """Bits and size of a bundle, and its videos; it is loaded once and let go."""
    contestant = contestant_of(bundle, stage.rollout)
    make_room(contestant, stage.rollout.model)
    runs = _made(stage, bundle.name, bundle.digest, folder, bar, lambda: contestant, latents)
    return (contestant.bits, contestant.size_ratio), runs


def _identity(stage: Stage, digest: str, prompt: Tensor, draws: Draws, reference: Tensor | None) -> str:
    """What a run is of: model, prompt, noise, bundle, the latents it was forced to, versions and machine."""
    hashed = [
        hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for tensor in (prompt, reference)
        if tensor is not None
    ]
    loop = repr(stage.rollout.sampler)
    facts = [dict(stage.identity), loop, digest, draws.seeds, draws.shape, hashed, environment()]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _judged(
    stage: Stage,
    bundles: Sequence[BundleFolder],
    full: Sequence[Run],
    made: Sequence[Sequence[Run]],
    decoder: VideoDecoder | None,
    folder: pathlib.Path,
    kept: KeptFrames | None,
    bar: Progress,
) -> list[Verdict]:
    clips = Clips(
        folder=folder / _VIDEOS,
        suffix=stage.suffix,
        frames_per_second=stage.frames_per_second,
        keep=None if kept is None else kept.add,
    )
    judged = []
    with bar.step("videos side by side") as on_progress:
        for i, (prompt, reference) in enumerate(zip(stage.prompts, full, strict=True)):
            on_progress(i, len(full))
            if kept is not None:
                kept.begin(prompt)
            others = {bundle.name: runs[i] for bundle, runs in zip(bundles, made, strict=True)}
            size = stage.rollout.sampler.frames_per_chunk
            judged.append(judge(reference, others, size, decoder, clips, f"{i + 1:03}"))
    return judged


def _measured(
    kept: KeptFrames | None, versions: Sequence[str], metrics: Sequence[Metric], bar: Progress
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {version: {} for version in versions}
    for metric in metrics if kept is not None else ():
        with bar.step(metric.name) as on_progress:
            for i, version in enumerate(versions):
                on_progress(i, len(versions))
                assert kept is not None
                found[version][metric.name] = metric(kept.pairs(version, FULL_PRECISION), version)
    return found


def _cost(runs: Sequence[Run]) -> Cost:
    return Cost(seconds=np.array([run.seconds for run in runs]), peak=max(run.peak for run in runs))
