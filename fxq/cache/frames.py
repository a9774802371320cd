"""Which frames a cache keeps and which of them are encoded: counting, without a tensor."""

from __future__ import annotations

import dataclasses

from fxq.cache.policy import CachePolicy


@dataclasses.dataclass(frozen=True)
class Frames:
    """Which frames a cache keeps, and how.

    ``frames`` have come in, of which the sink's and those from ``first`` on are kept; ``packed`` frames from
    ``first_packed`` on are encoded, a span goes when its last frame goes.
    """

    frames: int = 0
    first: int = 0
    first_packed: int = 0
    packed: int = 0

    def evicted(self, policy: CachePolicy, chunk: int) -> Frames:
        """Without the oldest frames that the window has no room for beside the next chunk."""
        kept = min(policy.sink, self.frames) + max(0, self.frames - self.first)
        excess = 0 if policy.window == -1 else kept + chunk - policy.window
        if excess <= 0:
            return self
        first, span = self.first + excess, policy.span * chunk
        gone = max(0, min(first - self.first_packed, self.packed) // span) * span
        return Frames(self.frames, first, self.first_packed + gone, self.packed - gone)

    def committed(self, policy: CachePolicy, chunk: int) -> Frames:
        """With every whole span encoded that has grown old enough."""
        if not policy.packs:
            return self
        begin = self.first_packed + self.packed if self.packed else self.first
        span = policy.span * chunk
        new = max(0, self.frames - policy.recent * chunk - begin) // span * span
        return Frames(self.frames, self.first, begin - self.packed, self.packed + new) if new else self


def frames_after(policy: CachePolicy, chunk: int, frames: int) -> Frames:
    """What a cache keeps of a video of so many frames, written in chunks of ``chunk``."""
    chunks = -(-frames // chunk)
    if policy.window == -1:
        return Frames(chunks * chunk, policy.sink, policy.sink).committed(policy, chunk)
    # A window that is full does the same thing again with every span.
    full = policy.window // chunk + 2 * policy.span + policy.recent
    again = max(0, (chunks - full) // policy.span) * policy.span
    found = Frames(first=policy.sink)
    for _ in range(chunks - again):
        found = found.evicted(policy, chunk)
        found = dataclasses.replace(found, frames=found.frames + chunk).committed(policy, chunk)
    moved = again * chunk
    return Frames(found.frames + moved, found.first + moved, found.first_packed + moved, found.packed)
