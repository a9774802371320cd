"""The cache of a rollout, on made-up keys and values: what is kept, where it lies, what it costs."""

import dataclasses

import pytest
import torch

from fxq.cache.codecs import Exact, Klt, PerToken
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Layout
from fxq.cache.tokens import StaleError
from fxq.models.wan_rotary import WanRotary

LAYERS, BATCH, HEADS, DIM, CHUNK = 2, 2, 2, 12, 2
ROTARY = WanRotary(DIM, 2, 2)
LAYOUT = Layout(ROTARY.tokens, CHUNK)


def chunk(number):
    """Per layer keys before their rotation, and values, of one chunk."""
    random = torch.Generator().manual_seed(number)
    shape = (LAYERS, BATCH, CHUNK * LAYOUT.tokens, HEADS, DIM)
    return list(torch.randn(shape, generator=random)), list(torch.randn(shape, generator=random))


def filled(policy, chunks, cache=None, start=0):
    """A cache after some chunks, as a rollout drives it."""
    empty = [torch.zeros(BATCH, 0, HEADS, DIM)] * LAYERS
    cache = cache or Cache.empty(policy, LAYOUT, ROTARY, empty)
    for number in range(start, start + chunks):
        cache = cache.evict()
        keys, values = chunk(number)
        cache = cache.append([ROTARY(k, number * CHUNK) for k in keys], values).commit()
    return cache


def wanted(frames, places):
    """Per layer keys of some frames, rotated to places, and values, from the definition."""
    all_keys = [torch.cat([chunk(n)[0][i] for n in range(max(frames) // CHUNK + 1)], 1) for i in range(LAYERS)]
    all_values = [torch.cat([chunk(n)[1][i] for n in range(max(frames) // CHUNK + 1)], 1) for i in range(LAYERS)]

    def frame(x, f):
        return x[:, f * LAYOUT.tokens : (f + 1) * LAYOUT.tokens]

    keys = [torch.cat([ROTARY(frame(k, f), at) for f, at in zip(frames, places, strict=True)], 1) for k in all_keys]
    return keys, [torch.cat([frame(v, f) for f in frames], 1) for v in all_values]


def assert_prefix(cache, frames, places, atol=0.0):
    for got, want in zip(cache.prefix(), wanted(frames, places), strict=True):
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=atol, rtol=0)


def test_a_growing_cache_holds_everything_and_hands_it_out_without_a_copy():
    cache = filled(CachePolicy(), 5)
    assert_prefix(cache, range(10), range(10))
    assert cache.prefix()[0][0].data_ptr() == cache.keys[0].exact.buffer.memory.data_ptr()
    assert cache.kept == 10


@pytest.mark.parametrize("sink", [0, 1, 2, 3])
@pytest.mark.parametrize("chunks", [2, 4, 9])
def test_a_window_keeps_the_sink_and_the_newest(sink, chunks):
    cache = filled(CachePolicy(window=6, sink=sink), chunks).evict()
    total, room = chunks * CHUNK, 6 - CHUNK
    frames = range(total) if total <= room else [*range(sink), *range(total - room + sink, total)]
    assert_prefix(cache, frames, frames)


@pytest.mark.parametrize("sink", [1, 2])
def test_relative_positions_bring_the_sink_along(sink):
    cache = filled(CachePolicy(window=6, sink=sink, positions="relative"), 9).evict()
    recent = range(18 - (6 - CHUNK) + sink, 18)
    frames, places = [*range(sink), *recent], [*range(recent[0] - sink, recent[0]), *recent]
    assert_prefix(cache, frames, places, atol=1e-5)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("sink", [0, 2])
def test_encoded_spans_stand_where_the_exact_tokens_stood(positions, sink):
    policy = CachePolicy(window=14, sink=sink, positions=positions)
    exact = filled(policy, 12).evict()
    packing = dataclasses.replace(policy, keys=Exact("float32"), values=Exact("float32"), span=2, recent=1)
    packed = filled(packing, 12).evict()
    assert packed.packed and packed.nbytes("packed")
    for got, want in zip(packed.prefix(), exact.prefix(), strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_each_span_is_encoded_once_when_it_is_old_enough(monkeypatch):
    seen = []
    original = PerToken.encode

    def encode(self, x, kind, memory, seed=0):
        seen.append((kind, seed, x.shape[1]))
        return original(self, x, kind, memory, seed)

    monkeypatch.setattr(PerToken, "encode", encode)
    codec = PerToken(8, 12, scale_dtype="bfloat16")
    cache = filled(CachePolicy(keys=codec, values=codec, span=2, recent=1), 6)
    assert sorted(seen) == sorted((kind, i, 16) for kind in ("keys", "values") for i in range(LAYERS) for _ in range(2))
    assert (cache.packed, len(cache.keys[0].records), len(cache.keys[0].exact)) == (8, 2, 16)


def test_a_span_goes_when_its_last_frame_leaves_the_window():
    codec = Exact("float32")
    cache = filled(CachePolicy(window=12, keys=codec, values=codec, span=2, recent=1), 20)
    assert len(cache.keys[0].records) <= 3
    frames = range(40 - 10, 40)
    assert_prefix(cache.evict(), frames, frames, atol=1e-5)


def test_only_the_chosen_layers_are_encoded():
    codec = PerToken(2, 12)
    cache = filled(CachePolicy(values=codec, span=2, layers=(1,)), 6)
    assert not cache.values[0].records and cache.values[1].records and not cache.keys[1].records


def test_bytes_are_those_of_the_stored_tensors():
    codec = Klt(1.0, rank=6)
    cache = filled(CachePolicy(keys=codec, values=codec, span=2, recent=1), 7)
    tensors = {
        id(t): t for line in (*cache.keys, *cache.values) for record in line.records for t in record.tensors.values()
    }
    assert cache.nbytes("packed") == sum(t.numel() * t.element_size() for t in tensors.values())
    exact = {id(line.exact.buffer.memory): line.exact.buffer.memory for line in (*cache.keys, *cache.values)}
    sinks = {id(line.sink.buffer.memory): line.sink.buffer.memory for line in (*cache.keys, *cache.values)}
    assert cache.nbytes("exact") == sum(t.numel() * t.element_size() for t in (exact | sinks).values())
    assert cache.nbytes() == cache.nbytes("exact") + cache.nbytes("packed")


def test_growing_and_sliding_copy_less_than_putting_together_each_time():
    token = BATCH * HEADS * DIM * 4 * 2 * LAYERS
    growing = filled(CachePolicy(), 30)
    assert growing.moved <= 3 * 30 * 8 * token  # put together each time: 30 * 29 / 2 * 8 tokens
    window = filled(CachePolicy(window=12, sink=2), 60)
    before = window.moved
    again = filled(CachePolicy(window=12, sink=2), 60, window, 60)
    assert (again.moved - before) / 60 <= 0.75 * 2 * 48 * token  # put together each time: out of and into the window


def test_forks_go_their_own_ways_and_a_forgotten_fork_is_an_error():
    policy = CachePolicy(window=6, sink=1)
    cache = filled(policy, 5)
    kept = cache.fork()
    on = filled(policy, 3, cache, 5)
    aside = filled(policy, 3, kept, 5)
    for got, want in zip(on.prefix(), aside.prefix(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    filled(policy, 3, on, 8)
    with pytest.raises(StaleError, match=r"rollout\.fork"):
        on.prefix()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 2, "sink": 1}, "window of 2 frames cannot hold 1 sink frames and a chunk of 2; .* at least 3"),
        ({"window": 8, "keys": PerToken(2, 12)}, "a window of at least 20, or a smaller span"),
        ({"positions": "relative"}, "needs a window"),
        ({"positions": "sideways"}, "expected 'absolute' or 'relative'"),
        ({"span": 0}, "span = 0"),
        ({"keys": PerToken(2, 12), "layers": (0, 7)}, r"cache layers \[7\]: the model has layers 0 to 1"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        filled(CachePolicy(**settings), 1)
