"""What is to be planned: a model's shape and how its rollout is driven."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from dataclasses import dataclass
from typing import Any

from fxq.models.causal_wan import CausalWanConfig
from fxq.models.families import FAMILIES, Family
from fxq.planning.gpus import PlanningError
from fxq.runtime.messages import did_you_mean
from fxq.runtime.reading import ReadError, read_json

TEMPORAL_STRIDE = 4  # video frames per latent frame of the Wan VAE
SPATIAL_STRIDE = 8
ROTARY_FRAMES = 1024  # rows of the official table of rotary positions


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and its rollout.

    ``latent`` (height, width) of a latent frame, ``steps`` denoising calls of a chunk and ``context_calls`` further
    ones that write the cache, ``window`` attention span in latent frames (-1: everything so far) of which ``sink`` are
    never evicted, ``fps`` of the video.

    Raises:
        PlanningError: when the sizes do not fit each other.
    """

    name: str
    config: CausalWanConfig
    latent: tuple[int, int] = (60, 104)
    frames_per_chunk: int = 3
    steps: int = 4
    context_calls: int = 1
    window: int = -1
    sink: int = 0
    fps: int = 16

    def __post_init__(self) -> None:
        for size, patch in zip(self.latent, self.config.patch_size[1:], strict=True):
            if size < patch or size % patch:
                raise PlanningError(f"{self.name}: latent size {self.latent} is no multiple of patch {patch}")
        for name in ("frames_per_chunk", "steps", "fps"):
            if getattr(self, name) < 1:
                raise PlanningError(f"{self.name}: {name} = {getattr(self, name)}, expected at least 1")
        least = self.sink + self.frames_per_chunk
        if self.window != -1 and self.window < least:
            raise PlanningError(
                f"{self.name}: a window of {self.window} frames cannot hold {self.sink} sink frames and a chunk of "
                f"{self.frames_per_chunk}; use -1 or at least {least}"
            )

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame."""
        _, rows, columns = self.config.patch_size
        return (self.latent[0] // rows) * (self.latent[1] // columns)

    @property
    def chunk_tokens(self) -> int:
        """Rows of every linear of a block in one call."""
        return self.frames_per_chunk * self.tokens_per_frame

    @property
    def calls(self) -> int:
        """Denoiser calls per chunk."""
        return self.steps + self.context_calls

    @property
    def chunk_seconds(self) -> float:
        """Seconds of video in a chunk."""
        return self.frames_per_chunk * TEMPORAL_STRIDE / self.fps

    def frames(self, minutes: float) -> int:
        """Latent frames of so many minutes of video, in whole chunks."""
        chunks = math.ceil(round(minutes * 60 / self.chunk_seconds, 9))
        return max(1, chunks) * self.frames_per_chunk

    def kept_frames(self, frames: int, window: int) -> int:
        """Frames in the cache after ``frames``; ``window`` -1 keeps all."""
        return frames if window == -1 else min(frames, window)


def of_family(family: Family) -> Workload:
    """The workload of a published model, with the sizes and the loop of :data:`~fxq.models.families.FAMILIES`."""
    loop = family.sampler
    return Workload(
        name=family.name,
        config=family.config,
        latent=family.latent[1:],
        frames_per_chunk=loop.frames_per_chunk,
        steps=len(loop.steps),
        window=loop.cache.window,
        sink=loop.cache.sink,
    )


WORKLOADS = tuple(of_family(FAMILIES[name]) for name in ("self-forcing", "causal-forcing", "longlive", "krea-14b"))
"""Window and steps are those of the published inference code; krea-14b re-encodes frames in its context call."""

_SETTINGS = {"local_attn_size": "window", "sink_size": "sink", "num_frame_per_block": "frames_per_chunk"}
_REQUIRED = ("dim", "ffn_dim", "num_heads", "num_layers")


def find_workload(model: str) -> Workload:
    """The workload of a name, or of the path of a causal Wan ``config.json``.

    Raises:
        PlanningError: when there is no such model, with the closest name, or the file has not what is needed.
    """
    for workload in WORKLOADS:
        if workload.name == model.lower():
            return workload
    path = pathlib.Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return read_workload(path)
    names = [workload.name for workload in WORKLOADS]
    close = did_you_mean(model.lower(), names)
    hint = f"; {close}" if close else "."
    raise PlanningError(
        f"unknown model {model!r}{hint} There are: {', '.join(names)}, or the path of a causal Wan config.json"
    )


def read_workload(path: pathlib.Path) -> Workload:
    """A workload from the official ``config.json`` of a causal Wan model; keys about anything else are ignored.

    Raises:
        PlanningError: when the file cannot be read, lacks a size or has one that does not fit.
    """
    try:
        data = read_json(path)
    except (OSError, ReadError) as error:
        raise PlanningError(f"{path} cannot be read as a model's config.json: {error}") from error
    if not isinstance(data, dict):
        raise PlanningError(f"{path} is not a model's config.json: expected a JSON object")
    if missing := [key for key in _REQUIRED if not isinstance(data.get(key), int)]:
        raise PlanningError(
            f"{path} has no {', '.join(missing)}: expected the official config.json of a causal Wan model, with "
            f"{', '.join(_REQUIRED)} as integers"
        )
    known = {field.name for field in dataclasses.fields(CausalWanConfig)}
    settings: dict[str, Any] = {_SETTINGS[key]: value for key, value in data.items() if key in _SETTINGS}
    try:
        config = CausalWanConfig(**{key: value for key, value in data.items() if key in known})
        return Workload(name=path.parent.name or path.stem, config=config, **settings)
    except (TypeError, ValueError) as error:
        raise PlanningError(f"{path}: {error}") from None
