"""What a rollout keeps of its past: how much of it, at which positions, and in which form."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fxq.cache.absorb import Absorb
from fxq.cache.codecs.codec import Codec, Kind

Positions = Literal["absolute", "relative"]

Codecs = Codec | tuple[Codec | None, ...] | None
"""One codec for every layer, one for each, or none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """What is kept, and how.

    Args:
        window: attention span in frames, the chunk that is made included; -1: everything so far.
        sink: frames from the start that are never evicted and stay exact.
        positions: of cached keys. ``absolute``: where a frame is in the video. ``relative``: sink frames move along, so
            that they lie right before the window; no distance is then larger than the window, however long the video.
        keys: how keys are stored once they are ``recent`` chunks old, in every layer or layer by layer; None: as they
            are.
        values: as ``keys``, for values.
        span: chunks that are encoded together, once.
        recent: newest chunks that always stay exact.
        layers: those whose cache is encoded; None: all.
        absorb: layers that forget all but sink and new chunk after a warm-up; None: none does.

    Raises:
        ValueError: when the settings exclude each other, with what would do.
    """

    window: int = -1
    sink: int = 0
    positions: Positions = "absolute"
    keys: Codecs = None
    values: Codecs = None
    span: int = 8
    recent: int = 1
    layers: tuple[int, ...] | None = None
    absorb: Absorb | None = None

    def __post_init__(self) -> None:
        if self.positions not in ("absolute", "relative"):
            raise ValueError(f"positions = {self.positions!r}: expected 'absolute' or 'relative'")
        if self.window < -1 or self.sink < 0 or self.span < 1 or self.recent < 0:
            raise ValueError(
                f"window = {self.window}, sink = {self.sink}, span = {self.span}, recent = {self.recent}: expected "
                "frames or -1, frames, 1 or more chunks, chunks"
            )
        if self.positions == "relative" and self.window == -1:
            raise ValueError("positions = 'relative' needs a window: set it to the frames the model was trained on")
        if self.positions == "relative" and (fixed := [c.name for c in self._codecs if c is not None and c.rotated]):
            raise ValueError(
                f"positions = 'relative' moves keys, and codec {fixed[0]} stores them rotated: use absolute "
                "positions, or codec int8"
            )

    def codec(self, kind: Kind, layer: int) -> Codec | None:
        """How a layer's keys or values are stored; None: as they are."""
        chosen = self.keys if kind == "keys" else self.values
        if self.layers is not None and layer not in self.layers:
            return None
        return chosen[layer] if isinstance(chosen, tuple) else chosen

    @property
    def _codecs(self) -> tuple[Codec | None, ...]:
        chosen = (self.keys, self.values)
        return tuple(c for codecs in chosen for c in (codecs if isinstance(codecs, tuple) else (codecs,)))

    @property
    def integers(self) -> bool:
        """Whether attention in 8 bits multiplies everything that is encoded as it lies."""
        return self.packs and all(codec is not None and codec.integers for codec in self._codecs)

    @property
    def packs(self) -> bool:
        """Whether anything is encoded."""
        return self.keys is not None or self.values is not None

    @property
    def needs_tables(self) -> bool:
        """Whether a codec works with what calibration found."""
        return any(codec is not None and codec.needs_tables for codec in self._codecs)

    @property
    def exact(self) -> CachePolicy:
        """What is kept, without codecs and absorbed layers."""
        return dataclasses.replace(self, keys=None, values=None, absorb=None)

    def check_layers(self, layers: int) -> None:
        """Refuse what a model of so many layers cannot follow.

        Raises:
            ValueError: naming the setting and what would do.
        """
        if wrong := [i for i in self.layers or () if not 0 <= i < layers]:
            raise ValueError(f"cache layers {wrong}: the model has layers 0 to {layers - 1}")
        for name, chosen in (("keys", self.keys), ("values", self.values)):
            if isinstance(chosen, tuple) and len(chosen) != layers:
                raise ValueError(f"{name} names {len(chosen)} codecs: expected one, or {layers}, one for each layer")

    def check(self, chunk: int) -> None:
        """Refuse what chunks of ``chunk`` frames cannot follow.

        Raises:
            ValueError: naming the setting and what would do.
        """
        if self.absorb is not None:
            self.absorb.check(self.sink, chunk)
            if self.absorb.tokens and self.packs:
                raise ValueError(
                    "tokens that stand for a history do not go with codecs: set keys and values to None, or tokens to 0"
                )
        if self.window == -1:
            return
        if self.window < self.sink + chunk:
            raise ValueError(
                f"window of {self.window} frames cannot hold {self.sink} sink frames and a chunk of {chunk}; use -1 or "
                f"at least {self.sink + chunk}"
            )
        if self.absorb is not None and self.window < self.sink + 2 * chunk:
            raise ValueError(
                f"window of {self.window} frames holds {self.sink} sink frames and the new chunk alone, so there is no "
                f"history to absorb; use a window of at least {self.sink + 2 * chunk}, or absorb=None"
            )
        least = self.sink + (self.span + self.recent + 1) * chunk
        if self.packs and self.window < least:
            raise ValueError(
                f"window of {self.window} frames never has {self.span} old chunks of {chunk} frames to encode beside "
                f"{self.sink} sink frames, {self.recent} recent chunks and the new one; use a window of at least "
                f"{least}, or a smaller span"
            )
