"""``fxq compare --bundles``: finished bundles of a model beside full precision."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated

import typer

from fxq.calibration.rollout import Condition, Draws, Rollout
from fxq.cli.options.common import emit_json, expanding
from fxq.cli.options.models import AdapterError, ModelFiles, family_prompts, find_family, make_rollout, parse_device
from fxq.cli.options.videos import VideoFiles
from fxq.comparison.bundles.metrics import find_metrics
from fxq.comparison.bundles.page import PAGE, write
from fxq.comparison.bundles.run import Stage, compare_bundles
from fxq.comparison.bundles.tables import lacking, sentences, terminal_table, to_json
from fxq.comparison.subject import with_chunks
from fxq.lab import SHAPE, tiny_rollout
from fxq.metrics import sprites
from fxq.models.families import FAMILIES
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import TINY_SAMPLER, load_tiny
from fxq.models.video.text_encoder import is_words, read_texts
from fxq.report.video import VideoError, check_format
from fxq.runtime.streams import stdout_console
from fxq.runtime.tables import Uncut
from fxq.runtime.writable import writable_file

_VIDEOS = 4
"""Where the prompts have no number of their own."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """Bundles to show in the place of methods, and further metrics of their videos."""

    bundles: tuple[pathlib.Path, ...] = ()
    metrics: tuple[str, ...] = ()


def _options(
    bundles: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="Finished bundles in the place of methods, beside full precision: --bundles A B C."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="With --bundles: a further metric, a plug-in's name or NAME=package.module:function."),
    ] = None,
) -> Finished:
    return Finished(tuple(bundles or ()), tuple(metric or ()))


with_bundles = expanding("finished", _options)
"""The command with these options in the place of its parameter ``finished``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Showing:
    """What is shown: ``bundles`` of ``model``, on ``videos`` prompts with each of ``seeds``, ``chunks`` long."""

    bundles: Sequence[pathlib.Path]
    model: str
    files: ModelFiles
    video: VideoFiles
    seeds: Sequence[int]
    videos: int | None
    chunks: int | None
    metrics: Sequence[str]


def show(showing: Showing, out: pathlib.Path, command: str, as_json: bool, quiet: bool) -> None:
    """Compare, write the report and print its table.

    Raises:
        AdapterError, BundleError, CheckpointError, ComparisonError, PluginError, PromptError: when it cannot be.
    """
    writable_file(out / PAGE)
    metrics = find_metrics(showing.metrics)
    results = compare_bundles(_stage(showing), showing.bundles, out, command, metrics, not quiet)
    written = write(results, out)
    if as_json:
        emit_json(to_json(results))
        return
    console = stdout_console()
    console.print(Uncut(terminal_table(results)))
    for name, text in sentences(results).items():
        console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)
    if absent := lacking(results):
        console.print(absent, markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {written[0]}   all files: {out}", markup=False, highlight=False, soft_wrap=True)


def _stage(showing: Showing) -> Stage:
    model, video = showing.model, showing.video
    files = video.filled_in(model, showing.files)
    rollout, prompts = _tiny(showing, files) if model == "tiny" else _others(showing, files)
    batches = [
        (condition, _draws(1000 * seed + i, draws))
        for seed in showing.seeds
        for i, (condition, draws) in enumerate(rollout.batches)
    ]
    staged = _with_batches(rollout, batches)
    if showing.chunks is not None:
        staged = with_chunks(staged, showing.chunks)
    pace = video.pace(model)
    decoder = functools.partial(video.decoder, model) if video.has_decoder(model) else None
    of_model = dataclasses.replace(files, prompts=None, texts=None, text_encoder=None, batch=None)
    said = {"model": model} | identity_of(files) | {"seeds": list(showing.seeds), "chunks": showing.chunks}
    return Stage(
        name=model,
        identity={"model": model} | identity_of(of_model),
        rollout=staged,
        prompts=tuple(prompts) * len(showing.seeds),
        decoder=decoder,
        frames_per_second=pace,
        suffix=_suffix(),
        settings={key: value for key, value in said.items() if value is not None},
    )


def _suffix() -> str:
    """MP4 where it can be written, else WebP."""
    try:
        check_format(pathlib.Path("video.mp4"))
    except VideoError:
        return ".webp"
    return ".mp4"


def _tiny(showing: Showing, files: ModelFiles) -> tuple[SelfForcingRollout, list[str]]:
    """The shipped model on prompts of a text file, or on random ones that it was not trained on."""
    if dataclasses.replace(files, device=None, prompts=None) != ModelFiles():
        raise AdapterError(f"model 'tiny' takes --prompts with words and --device; others are: {', '.join(FAMILIES)}")
    model = load_tiny().to(parse_device(files.device))
    if files.prompts is None:
        rollout, conditions = tiny_rollout(model, showing.videos or _VIDEOS, seed=101, unseen=True, batch=1)
        return rollout, [sprites.describe(condition) for condition in conditions]
    if not is_words(files.prompts):
        raise AdapterError(f"--prompts {files.prompts}: model 'tiny' takes a .txt with a prompt a line")
    texts = read_texts(files.prompts)
    texts = texts[: showing.videos or len(texts)]
    asked = [sprites.parse(text) for text in texts]
    batches = [({"prompt_embeds": sprites.prompt_embeds(c)}, Draws([i], SHAPE)) for i, c in enumerate(asked)]
    return SelfForcingRollout(model, batches, TINY_SAMPLER), [sprites.describe(c[0]) for c in asked]


def _others(showing: Showing, files: ModelFiles) -> tuple[SelfForcingRollout, list[str]]:
    """A published model on its prompts, or whatever rollout a name leads to, a video a batch."""
    model, seed = showing.model, showing.seeds[0]
    if model not in FAMILIES:
        rollout = make_rollout(model, showing.videos or _VIDEOS, seed, files)
        return _one_by_one(rollout, model)
    if files.checkpoint is None or (files.prompts is None and files.texts is None):
        make_rollout(model, 1, seed, files)
    prompts = family_prompts(find_family(model, files), files, showing.videos or _VIDEOS, seed)
    videos = showing.videos or len(prompts)
    rollout, _ = _one_by_one(make_rollout(model, videos, seed, dataclasses.replace(files, batch=1)), model)
    return rollout, [prompts.names[i % len(prompts)] for i in range(videos)]


def _one_by_one(rollout: Rollout, model: str) -> tuple[SelfForcingRollout, list[str]]:
    if not isinstance(rollout, SelfForcingRollout):
        raise AdapterError(
            f"model {model!r} is a {type(rollout).__name__}: bundles are shown of rollouts on a cache of fxq alone"
        )
    batches = []
    for condition, draws in rollout.batches:
        for i, seed in enumerate(draws.seeds):
            one = {name: tensor[i : i + 1] for name, tensor in condition.items()}
            batches.append((one, _draws(seed, draws)))
    return _with_batches(rollout, batches), [f"video {i + 1}" for i in range(len(batches))]


def _draws(seed: int, like: Draws) -> Draws:
    frames, channels, rows, columns = like.shape
    return Draws([seed], (frames, channels, rows, columns))


def _with_batches(rollout: SelfForcingRollout, batches: Sequence[tuple[Condition, Draws]]) -> SelfForcingRollout:
    return SelfForcingRollout(
        rollout.model,
        batches,
        rollout.sampler,
        any_size=rollout.any_size,
        cache_tables=rollout.cache_tables,
        absorb_priors=rollout.absorb_priors,
    )


def identity_of(files: ModelFiles) -> dict[str, object]:
    """The options that are given; of a file its name and size."""
    given: dict[str, object] = {}
    for name, value in dataclasses.asdict(files).items():
        if isinstance(value, pathlib.Path) or (name == "prompts" and value is not None):
            path = pathlib.Path(value)
            size = f", {os.path.getsize(path)} bytes" if path.is_file() else ""
            given[name] = f"{path}{size}"
        elif value not in (None, False, {}):
            given[name] = value
    return given | {"device": str(parse_device(files.device))}
