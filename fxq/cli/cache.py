"""The command that compares ways to store a model's keys and values; :mod:`fxq.cli` registers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from fxq.cache.choose import KINDS, Choice, choose, components, rivals
from fxq.cache.codecs.codec import Kind
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_to_json
from fxq.cli.options.cache_options import exact_caches
from fxq.cli.options.common import JsonOption, QuietOption, SeedOption, emit_json
from fxq.cli.options.models import AdapterError, ModelFiles, make_rollout
from fxq.cli.options.source import with_model_files
from fxq.cli.quantize import VideosOption
from fxq.models.self_forcing import SelfForcingRollout
from fxq.runtime.progress import Progress
from fxq.runtime.streams import stdout_console


@with_model_files
def cache(
    model: Annotated[str, typer.Argument(help="A model name as for --model of fxq quantize.")],
    files: ModelFiles,
    bits: Annotated[float, typer.Option(min=0.01, help="Stored bits per number, mean over layers.")] = 3.0,
    span: Annotated[int, typer.Option(min=1, help="Chunks that are encoded together.")] = 2,
    chunks: Annotated[
        int, typer.Option(min=1, help="Length of the videos meant, over which what is stored once is spread.")
    ] = 28,
    videos: VideosOption = 4,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare codecs of the key-value cache on a model's own rollouts, and choose one per layer within --bits."""
    rollout = make_rollout(model, videos, seed, files)
    if not isinstance(rollout, SelfForcingRollout):
        raise AdapterError(f"model {model!r} is driven by {type(rollout).__name__}, which has no fxq cache to look at")
    policy = dataclasses.replace(rollout.sampler.cache, span=span)
    with Progress(not quiet) as bar, bar.step("exact caches"):
        caches = exact_caches(rollout, span)
    config = rollout.model.config
    candidates = rivals(config.head_dim, span * caches[0].layout.chunk * caches[0].layout.tokens)
    with Progress(not quiet) as bar, bar.step("codecs"):
        try:
            chosen, choices = choose(candidates, caches, bits, policy, chunks)
        except ValueError as error:
            raise AdapterError(f"model {model!r}: {error}") from None
    spectrum = {
        kind: [components(caches[0].exact(kind, layer)) for layer in range(config.num_layers)] for kind in KINDS
    }
    if as_json:
        emit_json(_json(chosen, choices, spectrum))
        return
    console = stdout_console()
    console.print(_codecs(choices))
    console.print(_layers(choices, spectrum, config.head_dim))
    for name, reason in {name: reason for choice in choices for name, reason in choice.unfit.items()}.items():
        console.print(f"not tried: {name}: {reason}", markup=False, highlight=False)


def _codecs(choices: Sequence[Choice]) -> Table:
    table = Table(title="codecs on this model's caches, mean over layers")
    table.add_column("codec")
    for name in ("bits", "keys dB", "values dB", "chosen for"):
        table.add_column(name, justify="right")
    names = dict.fromkeys(trial.codec for choice in choices for trial in choice.trials)
    for name in names:
        of = {kind: [t for c in choices if c.kind == kind for t in c.trials if t.codec == name] for kind in KINDS}
        cells = [f"{np.mean([t.bits for kind in KINDS for t in of[kind]]):.2f}"]
        cells += [f"{np.mean([t.sqnr for t in of[kind]]):.1f}" for kind in KINDS]
        count = sum(choice.chosen.codec == name for choice in choices)
        table.add_row(Text(name), *cells, str(count or "-"))
    return table


def _layers(choices: Sequence[Choice], spectrum: Mapping[Kind, list[float]], head_dim: int) -> Table:
    mean = np.mean([choice.chosen.bits for choice in choices])
    table = Table(title=f"chosen, {mean:.2f} bits in the mean; components of {head_dim} that hold 99 % of a head")
    for name in ("layer", "cache", "components", "codec", "why"):
        table.add_column(name, justify="right" if name == "components" else "left")
    for choice in choices:
        held = f"{spectrum[choice.kind][choice.layer]:.1f}"
        table.add_row(str(choice.layer), choice.kind, held, Text(choice.chosen.codec), Text(choice.reason))
    return table


def _json(policy: CachePolicy, choices: Sequence[Choice], spectrum: Mapping[Kind, list[float]]) -> dict[str, object]:
    return {
        "policy": policy_to_json(policy),
        "components_of_99_percent": spectrum,
        "layers": [dataclasses.asdict(choice) for choice in choices],
    }
