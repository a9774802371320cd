"""Sizes from a policy are those of real caches, chunk after chunk."""

import dataclasses

import pytest
import torch

from fxq.cache.codecs import PRESETS, Klt, PerToken, Prq
from fxq.cache.policy import CachePolicy
from fxq.cache.sizes import cache_size
from fxq.cache.store import Cache, Layout
from fxq.models.wan_rotary import WanRotary

LAYERS, HEADS, WIDTH, CHUNK, TOKENS = 2, 2, 12, 2, 6
CODECS = Prq(1, 4, 2, 12), Klt(1.0)
POLICIES = {
    "exact": CachePolicy(),
    "window": CachePolicy(window=8, sink=2),
    "relative": CachePolicy(window=9, sink=3, positions="relative"),
    "packed": CachePolicy(keys=CODECS[0], values=CODECS[1], span=2),
    "packed, no recent": CachePolicy(keys=PerToken(8, 12), values=PerToken(4, 12), span=1, recent=0),
    "keys alone": CachePolicy(keys=CODECS[0], span=3),
    "one layer": CachePolicy(keys=CODECS[0], values=CODECS[0], span=2, layers=(1,)),
    "layer by layer": CachePolicy(keys=(CODECS[0], None), values=(None, CODECS[1]), span=2),
    "packed window": CachePolicy(window=12, sink=1, keys=CODECS[0], values=CODECS[0], span=2),
    "packed relative": CachePolicy(window=13, sink=3, positions="relative", keys=CODECS[1], values=CODECS[0], span=2),
}


def stored_bytes(cache):
    """Bytes of the tensors that a cache holds, no memory that waits for more."""
    lines = (*cache.keys, *cache.values)
    pieces = [line.exact.tensor for line in lines] + [line.sink.tensor for line in lines if line.sink is not None]
    return sum(piece.numel() * piece.element_size() for piece in (*pieces, *cache.origins))


@pytest.mark.parametrize("name", POLICIES)
def test_sizes_are_those_of_a_cache_after_every_chunk(name):
    policy = POLICIES[name]
    empty = torch.zeros(1, 0, HEADS, WIDTH)
    cache = Cache.empty(policy, Layout(TOKENS, CHUNK), WanRotary(WIDTH, 2, 3), [empty] * LAYERS)
    for chunk in range(25):
        cache = cache.evict()
        new = [torch.randn(1, CHUNK * TOKENS, HEADS, WIDTH) for _ in range(2 * LAYERS)]
        cache = cache.append(new[:LAYERS], new[LAYERS:]).commit()
        size = cache_size(policy, CHUNK, TOKENS, LAYERS, HEADS, WIDTH, (chunk + 1) * CHUNK, width=4)
        assert size.packed == cache.nbytes("packed")
        assert size.exact == stored_bytes(cache)
    assert size.total == size.exact + size.packed


def test_self_forcing_has_the_published_bytes():
    """48.2 GiB after 180 frames in bf16 and 6.97 times less in a span of 24 (arXiv 2602.02958)."""
    wan = {"chunk": 3, "tokens": 1560, "layers": 30, "heads": 12, "head_dim": 128}
    exact = cache_size(CachePolicy(), frames=180, **wan).total
    assert exact / 2**30 == pytest.approx(48.2, abs=0.05)
    policy = CachePolicy(keys=PRESETS["qvg"], values=PRESETS["qvg"], span=8, recent=0)
    packed = cache_size(policy, frames=168, **wan)
    assert packed.exact == 0
    assert cache_size(CachePolicy(), frames=168, **wan).total / packed.packed == pytest.approx(6.97, abs=0.01)


def test_a_policy_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="window of 6 frames"):
        cache_size(dataclasses.replace(POLICIES["packed"], window=6), 2, 6, 2, 2, 12, 4)
