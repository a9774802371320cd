"""What runs in a panel: a model in full precision or a bundle of it, and how its latents become pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Condition, Draws
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.models.video.decoding import VideoDecoder

FLOAT = "full precision"


class PromptTextError(ValueError):
    """A prompt that the model cannot be asked."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What all panels share.

    Attributes:
        model: name of the model, as shown.
        rollout: of the model in full precision; its batches give the size of the frames.
        decoder: latents to frames.
        encode: prompt to condition; raises :class:`PromptTextError`.
        example: a prompt that works.
        pace: frames a second.
        scale: by how much frames are enlarged.
    """

    model: str
    rollout: SelfForcingRollout
    decoder: VideoDecoder
    encode: Callable[[str], Condition]
    example: str
    pace: float
    scale: int

    def draws(self, seed: int, chunks: int) -> Draws:
        """Noise of a video of so many chunks."""
        frames, channels, rows, columns = self.rollout.batches[0][1].shape
        del frames
        return Draws([seed], (self.rollout.sampler.frames_per_chunk * chunks, channels, rows, columns))


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One choice of a panel.

    Attributes:
        name: as shown: no path.
        module: runs in the denoiser's place; None: the model itself.
        policy: of the cache, where the module needs one of its own; None: that of the stage.
    """

    name: str
    module: fx.GraphModule | None = None
    policy: CachePolicy | None = None

    def rollout(self, stage: Stage, policy: CachePolicy) -> SelfForcingRollout:
        """A loop of its own for one video, with the cache of its module, or ``policy``."""
        sampler: SamplerConfig = dataclasses.replace(stage.rollout.sampler, cache=self.policy or policy)
        return SelfForcingRollout(stage.rollout.model, stage.rollout.batches, sampler)

    def weight_bytes(self, stage: Stage) -> int:
        """Bytes of the weights that run."""
        return bytes_of(self.module or stage.rollout.model)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each storage once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def decibels(video: Tensor, reference: Tensor) -> float:
    """PSNR of frames in -1..1 to a reference, in dB; infinite for equal ones."""
    error = float((video - reference).double().square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(4.0 / error)))
