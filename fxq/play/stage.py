"""What all panels of a page share: the model, how prompts are read, and how latents become pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Condition, Draws
from fxq.comparison.bundles.contestant import Contestant
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.video.decoding import VideoDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A model with those that run in its place.

    Attributes:
        model: its name, as shown.
        rollout: of the model in full precision; its draws give the size of frames, its sampler the usual cache.
        contestants: by the names that a panel chooses from, full precision first.
        decoder: latents to frames.
        encode: a prompt to the condition of one video; ``ValueError`` says what is wrong with it.
        example: a prompt that works.
        pace: frames a second.
        scale: enlargement of pixels in files.
        endless: the cache of videos without an end, where the usual one would not hold.
    """

    model: str
    rollout: SelfForcingRollout
    contestants: Mapping[str, Contestant]
    decoder: VideoDecoder
    encode: Callable[[str], Condition]
    example: str
    pace: float
    scale: int = 1
    endless: CachePolicy | None = None

    @property
    def chunks(self) -> int:
        """Chunks of the model's usual video."""
        return self.rollout.units(*self.rollout.batches[0])

    def draws(self, seed: int, chunks: int) -> Draws:
        """Noise of a video of so many chunks."""
        _, channels, rows, columns = self.rollout.batches[0][1].shape
        return Draws([seed], (self.rollout.sampler.frames_per_chunk * chunks, channels, rows, columns))

    def loop(self, contestant: Contestant, chunks: int) -> SelfForcingRollout:
        """A rollout of its own for one panel, with the cache that its module or the video's length asks for."""
        usual = self.rollout.sampler.cache
        policy = contestant.policy or (self.endless if self.endless and chunks > self.chunks else usual)
        sampler = dataclasses.replace(self.rollout.sampler, cache=policy)
        return SelfForcingRollout(self.rollout.model, self.rollout.batches, sampler)

    def weight_bytes(self, contestant: Contestant) -> int:
        """Bytes of the weights that run, each piece of memory once."""
        module = contestant.module if isinstance(contestant.module, nn.Module) else self.rollout.model
        tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
