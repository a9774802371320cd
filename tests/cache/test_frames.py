import dataclasses

import pytest

from fxq.cache.codecs import Klt
from fxq.cache.frames import Frames, frames_after
from fxq.cache.policy import CachePolicy

PACKED = {"keys": Klt(), "values": Klt()}


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [
        (CachePolicy(), 3),
        (CachePolicy(window=11, sink=2), 3),
        (CachePolicy(span=4, recent=2, **PACKED), 3),
        (CachePolicy(window=30, sink=3, span=3, **PACKED), 3),
        (CachePolicy(window=17, sink=1, span=2, recent=0, **PACKED), 2),
    ],
)
def test_a_long_video_is_counted_as_chunk_after_chunk(policy, chunk):
    found = Frames(first=policy.sink)
    for chunks in range(1, 200):
        found = found.evicted(policy, chunk)
        found = dataclasses.replace(found, frames=found.frames + chunk).committed(policy, chunk)
        told = frames_after(policy, chunk, chunks * chunk)
        assert (told.frames, told.first, told.packed) == (found.frames, found.first, found.packed), chunks
        assert not found.packed or told.first_packed == found.first_packed


def test_a_span_is_encoded_when_it_is_old_enough_and_goes_as_a_whole():
    policy = CachePolicy(window=12, sink=0, span=2, recent=1, **PACKED)
    assert frames_after(policy, 2, 4).packed == 0
    assert frames_after(policy, 2, 6) == Frames(6, 0, 0, 4)
    before, after = frames_after(policy, 2, 14), frames_after(policy, 2, 16)
    assert (before.first, before.first_packed) == (2, 0) and (after.first, after.first_packed) == (4, 4)
