"""Options of what turns latents into videos, and of a whole pipeline's folder."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import torch
import typer

from fxq.cli.options.common import expanding
from fxq.cli.options.models import AdapterError, ModelFiles
from fxq.models.families import FAMILIES
from fxq.models.video.decoding import PixelDecoder, VideoDecoder
from fxq.models.video.vae import load_decoder

_PACE, _TINY_PACE = 16.0, 8.0
"""Frames a second of Wan's videos, and of the shipped model's."""


@dataclasses.dataclass(frozen=True)
class VideoFiles:
    """``vae``: folder or file of a decoder, ``pipeline``: folder of a pipeline, ``fps``: frames a second, if given."""

    vae: pathlib.Path | None = None
    pipeline: pathlib.Path | None = None
    fps: float | None = None

    @property
    def given(self) -> str:
        """The options that were given, as on the command line; empty where none was."""
        return ", ".join(f"--{f.name}" for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    def pace(self, model: str) -> float:
        """Frames a second of a model's videos."""
        return self.fps or (_TINY_PACE if model == "tiny" else _PACE)

    def filled_in(self, model: str, files: ModelFiles) -> ModelFiles:
        """``files`` with what the pipeline has of them: text encoder, and the transformer of a ``causal-wan``."""
        if self.pipeline is None:
            return files
        if model not in FAMILIES:
            raise AdapterError(f"model {model!r} is no part of a pipeline: leave out --pipeline")
        own = self.pipeline / "transformer" if model == "causal-wan" else None
        return dataclasses.replace(
            files, text_encoder=files.text_encoder or self.pipeline, checkpoint=files.checkpoint or own
        )

    def has_decoder(self, model: str) -> bool:
        """Whether the model's latents can be shown."""
        return model == "tiny" or self.vae is not None or self.pipeline is not None

    def decoder(self, model: str, device: torch.device) -> VideoDecoder:
        """The decoder on a device.

        Raises:
            AdapterError: when there is none, or the shipped model is given one.
            CheckpointError: when it cannot be read.
        """
        source = self.vae or self.pipeline
        if model == "tiny":
            if source is not None:
                raise AdapterError("model 'tiny' makes frames, not latents: leave out --vae and --pipeline")
            return PixelDecoder()
        if source is None:
            raise AdapterError(f"model {model!r} makes latents: --vae with its decoder's folder shows them")
        return load_decoder(source, device)


def _options(
    vae: Annotated[
        pathlib.Path | None, typer.Option(help="Folder of the VAE or of a Wan pipeline; or a TAEHV's file.")
    ] = None,
    pipeline: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder of a Wan pipeline of diffusers: its text encoder, its VAE, its transformer."),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=1, help="Frames a second; 16, or 8 of the shipped model.")] = None,
) -> VideoFiles:
    return VideoFiles(vae, pipeline, fps)


with_video_files = expanding("video", _options)
"""The command with these options in the place of its parameter ``video``."""
