"""The ``generate`` command."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, fx

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws, Rollout
from fxq.capture.trace import trace
from fxq.cli.options.cache_options import CacheOptions, ReportOption, tables_for, with_cache_options
from fxq.cli.options.common import JsonOption, SeedOption, bundle_folder, emit_json
from fxq.cli.options.models import AdapterError, ModelFiles, family_rollout, parse_device
from fxq.cli.options.source import with_model_files
from fxq.cli.options.videos import VideoFiles, with_video_files
from fxq.cli.quantize import ModelOption
from fxq.core.pipeline import run_passes
from fxq.core.summary import summary
from fxq.environment import environment
from fxq.export import load
from fxq.lab import SHAPE, frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.metrics.cache_run import run_cache
from fxq.models.families import FAMILIES
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import TINY_SAMPLER, load_tiny
from fxq.models.video.decoding import VideoDecoder
from fxq.models.video.stream import chunks_of
from fxq.optimize import optimize
from fxq.passes.measured.float_where_faster import PLACE
from fxq.passes.with_cache import cache_passes, policy_of, with_cache
from fxq.report.cache import cache_to_json, write_cache_report
from fxq.report.video import Frames, VideoError, check_format, video_writer
from fxq.runtime.cuda_graphs.replay import CudaGraphs
from fxq.runtime.progress import Progress
from fxq.runtime.streams import stderr_console, stdout_console
from fxq.runtime.writable import whole_file, writable_file

_LATENTS = ".safetensors"


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is to be made: ``rollout`` of one video, its prompt's ``words``; ``conditions`` for the shipped scorer."""

    rollout: SelfForcingRollout
    words: str
    conditions: Tensor | None = None


@with_model_files
@with_cache_options
@with_video_files
def generate(
    out: Annotated[pathlib.Path, typer.Option(help="Video: .mp4, .webp, .gif or .png; or .safetensors for latents.")],
    files: ModelFiles,
    kept: CacheOptions,
    video: VideoFiles,
    model: ModelOption = "tiny",
    prompt: Annotated[
        str | None,
        typer.Option(help="What to show, in words; of tiny e.g. 'ring red right slow black row1 column2'."),
    ] = None,
    bundle: Annotated[
        pathlib.Path | None, typer.Option(help="Run this quantized bundle: a folder, or org/name of the hub.")
    ] = None,
    floats_where_faster: Annotated[
        bool,
        typer.Option("--floats-where-faster", help="Measure the bundle's layers; floats where integers are slower."),
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay calls from CUDA graphs, on a GPU.")
    ] = False,
    seed: SeedOption = 0,
    scale: Annotated[
        int | None, typer.Option(min=1, help="Enlargement of pixels; 1, or 8 of the shipped model.")
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Length of the video; the model's own by default.")] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a video with the shipped model or a published one, in full precision or from a bundle.

    Frames are decoded and written chunk by chunk. --report makes the video a second time, in full precision on exact
    caches, and compares chunk by chunk.
    """
    latents_only = out.suffix.lower() == _LATENTS
    try:
        writable_file(out) if latents_only else check_format(writable_file(out))
        if report is not None:
            writable_file(report)
    except VideoError as error:
        raise AdapterError(f"--out {error}; or {_LATENTS} for latents") from None
    files = video.filled_in(model, files)
    device = parse_device(files.device)
    if cuda_graphs:
        _check_graphs(device, report)
    if not latents_only and model != "tiny" and not video.has_decoder(model):
        raise AdapterError(
            f"model {model!r} makes latents: show them with --vae, the folder of its VAE or of a Wan pipeline, or "
            f"write them to a {_LATENTS}"
        )
    decoder = None if latents_only else video.decoder(model, device)
    subject = _tiny(prompt, seed, files) if model == "tiny" else _published(model, files, prompt, seed)
    rollout = _of_length(subject.rollout, chunks)
    if decoder is not None and decoder.channels != (wanted := rollout.model.config.out_dim):
        raise AdapterError(f"the decoder takes latents of {decoder.channels} channels, model {model!r} makes {wanted}")
    module, told = _running(rollout, bundle, kept, model), dict[str, object]()
    if bundle is not None and module is not None:
        module = _fast(module, floats_where_faster)
    elif floats_where_faster:
        raise AdapterError("--floats-where-faster measures the layers of a bundle: give --bundle, or leave it out")
    if report is None:
        chunks_made = _shown(rollout, CudaGraphs(module or rollout.denoiser) if cuda_graphs else module)
    else:
        latents, told = _reported(rollout, module, subject, report)
        chunks_made = iter(latents.split(rollout.sampler.frames_per_chunk, dim=1))
    if decoder is None:
        latents = torch.cat(list(chunks_made), 1)
        with whole_file(out) as part:
            save_file({"latents": latents[0].contiguous()}, part, metadata={"prompt": subject.words})
    else:
        with video_writer(out, video.pace(model), scale or (8 if model == "tiny" else 1)) as write:
            latents = _written(chunks_made, decoder, write)
    told = {"prompt": subject.words, "out": str(out), "latent_frames": latents.shape[1]} | told
    if subject.conditions is not None:
        told["scores"] = sprites.score(latents, subject.conditions).means()
    if as_json:
        emit_json(told)
    else:
        stdout_console().print(f"{subject.words}: {out}", markup=False, highlight=False, soft_wrap=True)
        if report is not None:
            stdout_console().print(f"cache: {report}", markup=False, highlight=False, soft_wrap=True)


def _check_graphs(device: torch.device, report: pathlib.Path | None) -> None:
    if device.type != "cuda":
        raise AdapterError(f"--cuda-graphs replays calls on a GPU, and the model runs on {device}: leave it out")
    if report is not None:
        raise AdapterError(
            "--cuda-graphs: --report measures calls one by one, without graphs; leave out one of the two"
        )


def _tiny(prompt: str | None, seed: int, files: ModelFiles) -> _Subject:
    if dataclasses.replace(files, device=None) != ModelFiles():
        raise AdapterError(f"model 'tiny' takes no files; a checkpoint needs one of: {', '.join(FAMILIES)}")
    model = load_tiny().to(parse_device(files.device))
    if prompt is None:
        rollout, conditions = tiny_rollout(model, 1, seed=seed, unseen=True)
    else:
        conditions = sprites.parse(prompt)
        batch = ({"prompt_embeds": sprites.prompt_embeds(conditions)}, Draws([seed], SHAPE))
        rollout = SelfForcingRollout(model, [batch], TINY_SAMPLER)
    return _Subject(rollout, sprites.describe(conditions[0]), conditions)


def _published(model: str, files: ModelFiles, prompt: str | None, seed: int) -> _Subject:
    if model not in FAMILIES:
        raise AdapterError(f"model {model!r}: expected 'tiny' or one of {', '.join(FAMILIES)}")
    if prompt is not None:
        files = dataclasses.replace(files, texts=(prompt,), prompts=None)
    rollout = family_rollout(model, 1, seed, dataclasses.replace(files, batch=1))
    return _Subject(rollout, prompt or f"first prompt of {files.prompts}")


def _reported(
    rollout: SelfForcingRollout, module: fx.GraphModule | None, subject: _Subject, report: pathlib.Path
) -> tuple[Tensor, dict[str, object]]:
    """All latents, and what was written of their cache."""
    conditions = subject.conditions
    score = None if conditions is None else (lambda chunk: sprites.score(chunk, conditions).means())
    run, latents = run_cache(rollout, module, score)
    command = shlex.join(["fxq", *sys.argv[1:]])
    written = write_cache_report(run, report, f"Cache of {subject.words}", command, environment())
    return latents.cpu(), {"report": str(written), "cache": cache_to_json(run)}


def _shown(rollout: SelfForcingRollout, module: Callable[..., object] | None) -> Iterator[Tensor]:
    """Latents of each chunk on the CPU as they are made, with a bar on a terminal."""
    condition, draws = rollout.batches[0]
    with Progress() as bar, bar.step("chunks") as on_progress:
        for done, latents in enumerate(chunks_of(rollout, condition, draws, module)):
            yield latents.cpu()
            on_progress(done + 1, rollout.units(condition, draws))


def _written(chunks: Iterable[Tensor], decoder: VideoDecoder, write: Callable[[Frames], None]) -> Tensor:
    """Decode and write each chunk; all latents [1, F, C, H, W]."""
    stream, parts = decoder.begin(), []
    for latents in chunks:
        write(frames_of(stream.decode(latents)[0]))
        parts.append(latents)
    return torch.cat(parts, 1)


def _of_length(rollout: SelfForcingRollout, chunks: int | None) -> SelfForcingRollout:
    if chunks is None:
        return rollout
    condition, draws = rollout.batches[0]
    _, channels, rows, columns = draws.shape
    frames = rollout.sampler.frames_per_chunk * chunks
    longer = (condition, Draws(draws.seeds, (frames, channels, rows, columns)))
    return SelfForcingRollout(rollout.model, [longer], rollout.sampler, any_size=rollout.any_size)


def _running(
    rollout: SelfForcingRollout, bundle: pathlib.Path | None, kept: CacheOptions, model: str
) -> fx.GraphModule | None:
    """What runs in the denoiser's place, if anything does; the rollout gets the cache policy that it needs."""
    device = rollout.model.patch_embedding.weight.device
    module = None if bundle is None else load(bundle_folder(bundle), device)
    policy = None if module is None else policy_of(module)
    if policy is None:
        calibration = tiny_rollout(rollout.model, 4, seed=1, unseen=False)[0] if model == "tiny" else None
        policy = kept.policy(rollout, calibration, rollout.units(*rollout.batches[0]))
        if calibration is not None:
            rollout.cache_tables = tables_for(policy, calibration)
        elif policy.needs_tables:
            raise AdapterError(
                f"{kept.given}: the codec learns from calibration videos, which a bundle holds: fxq quantize with --kv"
            )
        if policy.absorb is not None:
            module = _captured(rollout, policy) if module is None else with_cache(module, policy)
    elif kept.given:
        raise AdapterError(f"{bundle} has a cache of its own, by its recipe: leave out {kept.given}")
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    return module


def _fast(module: fx.GraphModule, floats_where_faster: bool) -> fx.GraphModule:
    """The module optimized, alike on every machine unless asked otherwise; on standard error what runs in floats."""
    fast = optimize(module, floats_where_faster=floats_where_faster)
    for text in summary(fast).notes.get(PLACE, ()):
        line = f"{PLACE}, faster so on this CPU: {text}"
        stderr_console().print(line, markup=False, highlight=False, soft_wrap=True)
    return fast


def _captured(rollout: Rollout, policy: CachePolicy) -> fx.GraphModule:
    """The float model as a graph that keeps its cache so."""
    args, shapes = rollout.example_call()
    return run_passes(trace(rollout.denoiser, args, None, shapes), cache_passes(policy)).module


def generated(rollout: Rollout, module: Any) -> Tensor:
    """Latents [B, F, C, H, W] of the rollout's first batch, by a module in the denoiser's place or by itself."""
    with rollout.using(module or rollout.denoiser):
        return rollout.rollout(*rollout.batches[0])
