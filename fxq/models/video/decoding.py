"""What a decoder of latents is: it makes streams, and a stream turns chunks of latents into frames as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class VideoStream(ABC):
    """One batch of videos on its way from latents to frames, chunk by chunk, with what the decoder keeps of the past.

    The frames of all chunks are those of the whole video decoded in one piece.
    """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The frames that the next latents give.

        Args:
            latents: [B, F, C, H, W], as the denoiser makes them, of any dtype and on any device.

        Returns:
            float32 [B, T, 3, rows, columns] in -1..1 on the CPU.
        """

    @abstractmethod
    def fork(self) -> VideoStream:
        """An independent continuation from here on."""


class VideoDecoder(ABC):
    """A decoder of latents with ``channels``."""

    channels: int

    @abstractmethod
    def begin(self) -> VideoStream:
        """A stream at the first latent of a video."""


class PixelDecoder(VideoDecoder):
    """For models that make RGB frames in -1..1 themselves, such as the shipped one."""

    channels = 3

    def begin(self) -> VideoStream:
        """A stream that clamps, and remembers nothing."""
        return _PixelStream()


class _PixelStream(VideoStream):
    def decode(self, latents: Tensor) -> Tensor:
        return latents.to("cpu", torch.float32).clamp(-1, 1)

    def fork(self) -> VideoStream:
        return self
