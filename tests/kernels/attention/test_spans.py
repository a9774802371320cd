"""Spans of what is stored: which tokens they hold, and that they are read one by one."""

import torch

from fxq.cache.codecs import PerToken
from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.spans import Part, decoded, parts, rotated, tokens_held
from fxq.kernels.rope.op import rms_norm_rope
from tests.kernels.attention.encoded.test_packed import DIM, HEADS, SPAN, case


def test_evicted_tokens_are_missing_from_the_first_span_alone():
    a = AttentionPacked(*case(PerToken(4, 16), None, gone=5)[0])
    assert tokens_held(a, "keys") == 3 * SPAN and tokens_held(a, "values") == 3 * SPAN - 5
    first = SPAN - 5
    assert list(parts(a)) == [
        Part(0, 0, first, 5),
        Part(1, first, first + SPAN, 0),
        Part(2, first + SPAN, first + 2 * SPAN, 0),
    ]


def test_the_parts_are_the_decoded_cache():
    codec = PerToken(4, 16)
    arguments, ((keys, *_), (values, *_)) = case(codec, codec, gone=5)
    a = AttentionPacked(*arguments)
    assert torch.equal(torch.cat([decoded(a, "values", part) for part in parts(a)], 1), values)
    assert torch.allclose(torch.cat([rotated(a, part) for part in parts(a)], 1), keys, atol=1e-6)


def test_keys_are_stored_before_their_rotation():
    a = AttentionPacked(*case(PerToken(4, 16), None)[0])
    part = next(parts(a))
    plain = decoded(a, "keys", part).flatten(2)
    assert plain.shape[1:] == (SPAN, HEADS * DIM)
    turned = rms_norm_rope.reference(plain, None, 0.0, a.cos[:SPAN], a.sin[:SPAN], HEADS)
    assert torch.equal(rotated(a, part), turned) and not torch.equal(turned.flatten(2), plain)
