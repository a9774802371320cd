"""One video in one or two panels, made a chunk at a time when asked for the next."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from fxq.comparison.bundles.contestant import Contestant
from fxq.lab import frames_of
from fxq.metrics.latents import psnr
from fxq.models.self_forcing import SelfForcingRollout, SelfForcingState
from fxq.models.video.decoding import VideoStream
from fxq.play.stage import Stage
from fxq.report.video import Frames

MAX_CHUNKS = 400
"""Length of a video that keeps going."""
MAX_SEED = 2**31
MAX_PROMPT = 2000
KEPT_FRAMES = 2000
"""Newest frames of a panel that are kept for the file."""


class AskedError(ValueError):
    """What a page asked for and does not get."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A chunk in one panel.

    Attributes:
        frames: uint8 [T, H, W, 3].
        seconds: to make and decode it.
        cache_bytes: of keys and values after it.
        decibels: PSNR of its latents to full precision beside it; None where that does not run, infinite if equal.
    """

    frames: Frames
    seconds: float
    cache_bytes: int
    decibels: float | None


@dataclasses.dataclass
class _Panel:
    contestant: Contestant
    loop: SelfForcingRollout
    state: SelfForcingState
    stream: VideoStream
    frames: list[Frames] = dataclasses.field(default_factory=list)


class Show:
    """A video from one seed in each panel's model.

    Args:
        stage: the model and the choices.
        names: of one or two contestants, by panel.
        prompt: what to show.
        seed: of the noise, the same in all panels.
        chunks: length; 0: until nobody asks for more, ``MAX_CHUNKS`` at most.

    Raises:
        AskedError: when a name, the prompt, the seed or the length cannot be.
    """

    def __init__(self, stage: Stage, names: Sequence[str], prompt: str, seed: int, chunks: int) -> None:
        if not 1 <= len(names) <= 2 or any(name not in stage.contestants for name in names):
            raise AskedError(f"models {list(names)}: expected one or two of {', '.join(stage.contestants)}")
        if not 0 <= seed < MAX_SEED or not 0 <= chunks <= MAX_CHUNKS:
            raise AskedError(f"seed {seed} and {chunks} chunks: expected 0 to {MAX_SEED - 1} and 0 to {MAX_CHUNKS}")
        self.stage, self.chunks, self.done = stage, chunks or MAX_CHUNKS, 0
        condition, draws = encoded(stage, prompt), stage.draws(seed, self.chunks)
        self.panels = []
        for name in names:
            contestant = stage.contestants[name]
            loop = stage.loop(contestant, self.chunks)
            with loop.using(contestant.module or loop.denoiser):
                state = loop.begin(condition, draws)
            self.panels.append(_Panel(contestant, loop, state, stage.decoder.begin()))

    @property
    def ended(self) -> bool:
        """Whether all chunks were made."""
        return self.done >= self.chunks

    def ask(self, prompt: str) -> None:
        """Show something else from the next chunk on; what was made stays in the cache.

        Raises:
            AskedError: when the prompt cannot be read; the old one goes on.
        """
        condition = encoded(self.stage, prompt)
        for panel in self.panels:
            with panel.loop.using(panel.contestant.module or panel.loop.denoiser):
                fresh = panel.loop.begin(condition, panel.state.draws)
            panel.state = dataclasses.replace(
                panel.state, condition=condition, cross_k=fresh.cross_k, cross_v=fresh.cross_v, calls=0
            )

    def next_chunk(self) -> list[Shown]:
        """The next chunk of every panel, in order.

        Raises:
            AskedError: when the video is at its end.
        """
        if self.ended:
            raise AskedError(f"the video has {self.chunks} chunks and is at its end")
        made = [self._advance(panel) for panel in self.panels]
        exact = [part[0] for panel, part in zip(self.panels, made, strict=True) if panel.contestant.module is None]
        reference = exact[0] if exact else None
        shown = []
        for panel, (latents, frames, seconds) in zip(self.panels, made, strict=True):
            distance = None
            if reference is not None and panel.contestant.module is not None:
                equal = torch.equal(latents, reference)
                distance = math.inf if equal else float(psnr(latents, reference)[0])
            shown.append(Shown(frames, seconds, panel.state.cache.nbytes(), distance))
        self.done += 1
        return shown

    def _advance(self, panel: _Panel) -> tuple[torch.Tensor, Frames, float]:
        """Latents, frames and seconds of the next chunk of a panel."""
        started, before = time.perf_counter(), panel.state.latents.shape[1]
        with torch.no_grad(), panel.loop.using(panel.contestant.module or panel.loop.denoiser):
            panel.state = panel.loop.advance(panel.state)
        latents = panel.state.latents[:, before:].float().cpu()
        frames = frames_of(panel.stream.decode(latents)[0])
        seconds = time.perf_counter() - started
        panel.frames.append(frames)
        while sum(map(len, panel.frames)) - len(panel.frames[0]) >= KEPT_FRAMES:
            del panel.frames[0]
        return latents, frames, seconds

    def film(self) -> Frames:
        """All kept frames, panels side by side, uint8 [T, H, W, 3].

        Raises:
            AskedError: before the first chunk.
        """
        if not self.done:
            raise AskedError("there is no frame yet")
        return np.concatenate([np.concatenate(panel.frames) for panel in self.panels], axis=2)


def encoded(stage: Stage, prompt: str) -> dict[str, torch.Tensor]:
    """The condition of a prompt.

    Raises:
        AskedError: when it cannot be read.
    """
    if len(prompt) > MAX_PROMPT:
        raise AskedError(f"a prompt has at most {MAX_PROMPT} characters, this one {len(prompt)}")
    try:
        return dict(stage.encode(prompt))
    except ValueError as error:
        raise AskedError(str(error)) from error
