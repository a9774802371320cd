"""A form says all that a kernel needs: the numbers that follow from it alone are those of the codec's ``decode``."""

import numpy as np
import pytest
import torch

from fxq.cache.codecs import CODECS, Exact, Float8, Kivi, Klt, PerChannel, PerToken, Prq
from fxq.cache.codecs.record import Record, Shape
from fxq.kernels.attention.forms import Blocks, Numbers, Planes
from tests.kernels.attention.encoded.test_packed import DIM, HEADS, SPAN, B, normal, stored

CASES = [
    Exact("bfloat16"),
    Float8(),
    PerToken(2, 16),
    PerToken(4, 8, asymmetric=True),
    PerToken(8, 32, scale_dtype="bfloat16"),
    PerChannel(2, 8),
    PerChannel(4, asymmetric=False),
    Kivi(2, 12, 16),
    Prq(1, 16, block=16),
    Prq(3, 3, 4, 8, asymmetric=True),
    Klt(1.0),
    Klt(1.0, joint=True, rank=20),
]


def bits_of(packed, bits, count):
    """Codes [..., count] of bytes, the first in the lowest bits."""
    every = np.unpackbits(packed, axis=-1, bitorder="little")
    codes = every[..., : every.shape[-1] // bits * bits].reshape(*every.shape[:-1], -1, bits)
    return (codes * 2 ** np.arange(bits)).sum(-1)[..., :count]


def spread(scale, form, tokens):
    """[B, rows, heads, columns] for each token and channel."""
    scale = scale.reshape(B, tokens // form.tokens, HEADS, DIM // form.channels)
    return scale.repeat(form.tokens, 1).repeat(form.channels, 3)


def numbers(form, tensors):
    """float [B, T, heads, head_dim], by the words of the form's docstring."""
    found = {n: (t if t.dtype == torch.uint8 else t.float()).numpy() for n, t in tensors.items()}
    if isinstance(form, Numbers):
        scale = found.get("scale")
        return found["x"] if scale is None else found["x"] * scale.repeat(form.tokens, 1)[..., None]
    if isinstance(form, Planes):
        return planes(form, found)
    x = bits_of(found["codes"], form.bits, DIM) - form.offset
    x = x * spread(found["scale"], form, x.shape[1])
    x = x + spread(found["zero"], form, x.shape[1]) if "zero" in found else x
    if form.stages:
        names = bits_of(found["ids"], form.id_bits, HEADS * form.stages).reshape(*x.shape[:3], form.stages)
    for b, t, h, s in np.ndindex(*x.shape[:3], form.stages):
        x[b, t, h] += found["centroids"][b, t // SPAN, s, h, names[b, t, h, s]]
    return x


def planes(form, found):
    """As :func:`numbers`, of one span after the other."""
    spans = []
    for span in range(found["planes"].shape[1]):
        rows = []
        for b in range(B):
            own = {n: t if form.shared else t[b] for n, t in found.items() if n != "planes"}
            left = list(bits_of(found["planes"][b, span], 1, SPAN))
            values = np.zeros((SPAN, *own["width"].shape))
            for g, r in np.ndindex(*own["width"].shape):
                width = int(own["width"][g, r])
                code = sum(left.pop(0).astype(float) * 2**i for i in range(width))
                values[:, g, r] = (code + 0.5 - 2.0 ** (width - 1)) * own["step"][g, r] if width else 0
            rows.append(np.einsum("tgr,gwr->tgw", values, own["basis"]) + own["mean"])
        spans.append(np.stack(rows).reshape(B, SPAN, HEADS, DIM))
    return np.concatenate(spans, 1)


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("codec", CASES, ids=repr)
def test_the_form_gives_the_numbers_of_the_codec(codec, kind):
    tensors, dense = stored(codec, normal(B, 2 * SPAN, HEADS, DIM), kind)
    shape = Shape(HEADS, DIM, SPAN)
    named = Record(
        codec.fields(shape, kind), dict(zip([f.name for f in codec.fields(shape, kind)], tensors, strict=True)), shape
    )
    form = codec.form(shape, kind)
    assert isinstance(form, Numbers | Blocks | Planes)
    assert np.allclose(numbers(form, named.tensors), dense.numpy(), atol=1e-5)


def test_codecs_without_a_form_are_known():
    shape = Shape(HEADS, DIM, SPAN)
    silent = {name for name, codec in CODECS.items() if codec().form(shape, "keys") is None}
    assert silent == {"quarot", "low_rank", "int8_attention"}
