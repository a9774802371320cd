"""The ``play`` command."""

from __future__ import annotations

import dataclasses
import pathlib
import socket
import webbrowser
from collections.abc import Callable
from typing import Annotated

import typer

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Condition
from fxq.cli.options.common import bundle_folder
from fxq.cli.options.models import AdapterError, ModelFiles, family_prompts, family_rollout, find_family, parse_device
from fxq.cli.options.source import with_model_files
from fxq.cli.options.videos import VideoFiles, with_video_files
from fxq.cli.quantize import ModelOption
from fxq.comparison.bundles.contestant import FULL_PRECISION, Contestant, bundle_folders, contestant_of
from fxq.lab import tiny_rollout
from fxq.metrics import sprites
from fxq.models.prompts import PromptError
from fxq.models.tiny import load_tiny
from fxq.play.stage import Stage
from fxq.runtime.streams import stdout_console

EXAMPLE = "ring red right slow black row1 column2"
WORDS = "A red ball rolls over the grass."
LOCAL = ("127.0.0.1", "localhost", "::1")


@with_model_files
@with_video_files
def play(
    files: ModelFiles,
    video: VideoFiles,
    bundles: Annotated[
        list[pathlib.Path] | None, typer.Argument(help="Bundles to choose from: folders, or org/name of the hub.")
    ] = None,
    model: ModelOption = "tiny",
    host: Annotated[str, typer.Option(help="Address to listen on; others than this opens it to a network.")] = LOCAL[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: one that is free.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Watch a model stream in a browser on this machine, beside a bundle of it from the same noise."""
    try:
        import uvicorn

        from fxq.play.server import Player
    except ImportError as error:
        raise AdapterError(f"fxq play needs {error.name}: pip install 'fxq[play]'") from None
    stage = make_stage(model, files, video, [bundle_folder(bundle) for bundle in bundles or []])
    names = [host] if host in LOCAL else ["*"]
    config = uvicorn.Config(Player(stage).app([*names, "localhost"]), host=host, port=port, log_level="warning")
    with config.bind_socket() as listening:
        address = f"http://{'localhost' if host in LOCAL else host}:{listening.getsockname()[1]}"

        class Server(uvicorn.Server):
            """One that says where it is once it answers."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                stdout_console().print(f"{address}  (Ctrl-C ends it)", highlight=False)
                if browser:
                    webbrowser.open(address)

        Server(config).run(sockets=[listening])


def make_stage(model: str, files: ModelFiles, video: VideoFiles, bundles: list[pathlib.Path]) -> Stage:
    """A model with its bundles, ready to be played.

    Raises:
        AdapterError: when the model is unknown, or makes latents that nothing decodes.
        BundleError, ComparisonError: when a bundle cannot be read, or is of another model.
    """
    files = video.filled_in(model, files)
    device = parse_device(files.device)
    if model == "tiny":
        rollout = tiny_rollout(load_tiny().to(device), 1, seed=0, unseen=True)[0]
    elif not video.has_decoder(model):
        raise AdapterError(f"model {model!r} makes latents: show them with --vae or --pipeline")
    else:
        rollout = family_rollout(model, 1, 0, dataclasses.replace(files, batch=1))
    contestants = {FULL_PRECISION: Contestant(name=FULL_PRECISION)}
    for folder in bundle_folders(bundles):
        contestants[folder.name] = contestant_of(folder, rollout)
    endless = CachePolicy(window=21, sink=3, positions="relative") if model == "tiny" else None
    return Stage(
        model=model,
        rollout=rollout,
        contestants=contestants,
        decoder=video.decoder(model, device),
        encode=_sprites if model == "tiny" else _published(model, files),
        example=EXAMPLE if model == "tiny" else "0" if files.text_encoder is None else WORDS,
        pace=video.pace(model),
        scale=16 if model == "tiny" else 1,
        endless=endless,
    )


def _sprites(prompt: str) -> Condition:
    return {"prompt_embeds": sprites.prompt_embeds(sprites.parse(prompt))}


def _published(model: str, files: ModelFiles) -> Callable[[str], Condition]:
    """Prompts of a published model: words for its text encoder, or the number of an embedding in a file."""
    family = find_family(model, files)
    if files.text_encoder is None:
        prompts = family_prompts(family, files, 1, 0)

        def numbered(prompt: str) -> Condition:
            if not prompt.strip().isdigit() or int(prompt) >= len(prompts):
                raise PromptError(
                    f"prompt {prompt!r}: there is no text encoder (--text-encoder), so give the number of a prompt of "
                    f"{files.prompts}, 0 to {len(prompts) - 1}"
                )
            return {"prompt_embeds": prompts.batch([int(prompt)], family.config.text_len)}

        return numbered

    def in_words(prompt: str) -> Condition:
        if not prompt.strip():
            raise PromptError("the prompt is empty: say what to show")
        found = family_prompts(family, dataclasses.replace(files, texts=(prompt,), prompts=None), 1, 0)
        return {"prompt_embeds": found.batch([0], family.config.text_len)}

    return in_words
