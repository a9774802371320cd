"""What a packed graph gets of a cache, against the dense prefix."""

import pytest
import torch

from fxq.cache.codecs import Klt, PerToken
from fxq.cache.named import codecs_text
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Layout
from fxq.kernels import attention, attention_packed
from fxq.models.wan_rotary import WanRotary
from fxq.passes.match.cache_inputs import Packing, packed_inputs

LAYERS, BATCH, HEADS, DIM, CHUNK = 2, 2, 2, 12, 2
ROTARY = WanRotary(DIM, 2, 2)
LAYOUT = Layout(ROTARY.tokens, CHUNK)
KLT, TOKEN = Klt(1.0), PerToken(8, 12, scale_dtype="bfloat16")


def filled(policy, chunks):
    cache = Cache.empty(policy, LAYOUT, ROTARY, [torch.zeros(BATCH, 0, HEADS, DIM)] * LAYERS)
    for number in range(chunks):
        random = torch.Generator().manual_seed(number)
        shape = (LAYERS, BATCH, CHUNK * LAYOUT.tokens, HEADS, DIM)
        keys, values = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
        cache = cache.evict().append([ROTARY(k, number * CHUNK) for k in keys], list(values)).commit()
    return cache


POLICIES = {
    "both": CachePolicy(keys=KLT, values=KLT, span=2),
    "keys": CachePolicy(keys=KLT, span=1),
    "values": CachePolicy(values=TOKEN, span=1, sink=2),
    "differing": CachePolicy(keys=(KLT, TOKEN), values=TOKEN, span=1),
    "some layers": CachePolicy(keys=TOKEN, values=KLT, span=1, layers=(1,)),
    "window": CachePolicy(window=11, sink=1, keys=TOKEN, values=KLT, span=2),
    "relative": CachePolicy(window=12, sink=3, positions="relative", keys=KLT, values=TOKEN, span=2),
    "relative values": CachePolicy(window=12, sink=3, positions="relative", values=TOKEN, span=2),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("chunks", [0, 1, 3, 4, 8, 11])
def test_attention_to_it_is_attention_to_the_prefix(name, chunks):
    policy = POLICIES[name]
    cache = filled(policy, chunks).evict()
    found, prefix = packed_inputs(cache), cache.prefix()
    new = torch.randn(2, BATCH, 5, HEADS, DIM, generator=torch.Generator().manual_seed(99))
    for i in range(LAYERS):
        keys, values = found.keys[i], found.values[i]
        if policy.codec("keys", i) is None and policy.codec("values", i) is None:
            assert torch.equal(keys, prefix[0][i]) and torch.equal(values, prefix[1][i])
            continue
        pieces = [[x["sink"], x["recent"], n] for x, n in zip((keys, values), new, strict=True)]
        stored = [list(x["packed"].values()) for x in (keys, values)]
        text = codecs_text(policy.codec("keys", i), policy.codec("values", i))
        span = policy.span * CHUNK * LAYOUT.tokens
        got = attention_packed(new[0], *pieces, *stored, found.cos, found.sin, text, span)
        want = attention(new[0], [prefix[0][i], new[0]], [prefix[1][i], new[1]])
        assert torch.allclose(got, want, atol=1e-5)


def test_stored_tensors_are_handed_out_without_a_copy():
    cache = filled(POLICIES["both"], 9)
    found = packed_inputs(cache)
    planes = cache.keys[0].spans.grown["planes"].buffer.memory
    assert found.keys[0]["packed"]["planes"].untyped_storage().data_ptr() == planes.untyped_storage().data_ptr()
    assert found.keys[0]["recent"].untyped_storage().data_ptr() == cache.keys[0].exact.buffer.memory.data_ptr()


def test_bytes_of_the_inputs_are_those_of_the_cache():
    cache = filled(POLICIES["both"], 9)
    found = packed_inputs(cache)
    packed = [t for x in (*found.keys, *found.values) for t in x["packed"].values()]
    assert sum(t.numel() * t.element_size() for t in packed) == cache.nbytes("packed")


def test_a_fork_keeps_its_inputs():
    cache = filled(POLICIES["window"], 8)
    kept = cache.fork()
    before = [t.clone() for x in packed_inputs(kept).keys for t in x["packed"].values()]
    random = torch.randn(2, LAYERS, BATCH, CHUNK * LAYOUT.tokens, HEADS, DIM)
    for _ in range(4):
        cache = cache.evict().append(list(random[0]), list(random[1])).commit()
    after = [t for x in packed_inputs(kept).keys for t in x["packed"].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_packing_of_a_policy_leaves_out_exact_layers():
    packing = Packing.for_cache(POLICIES["some layers"], LAYERS, 8)
    assert packing == Packing((codecs_text(TOKEN, KLT),), (8,))
    assert Packing.of(torch.nn.Linear(2, 2)) is None
