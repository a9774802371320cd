"""Attention to an encoded cache equals attention to the decoded one, and decodes one span at a time."""

import functools

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.live_bytes import LiveBytes
from fxq.cache.codecs import Exact, Float8, Kivi, Klt, LowRank, PerChannel, PerToken, Prq, QuaRot
from fxq.cache.named import codecs_text
from fxq.cache.spans import Spans
from fxq.kernels import attention, attention_packed
from fxq.models.causal_wan import apply_rope
from tests.features import demand

B, HEADS, DIM, SPAN = 2, 3, 32, 24
CODECS = [
    Exact("float32"),
    PerToken(2, 16),
    PerChannel(4),
    Kivi(2, 0, 16),
    QuaRot(2, 16),
    Float8(),
    LowRank(2, 2, 16),
    Prq(2, 4, block=16),
    Klt(1.0),
    Klt(1.0, joint=True, rank=20),
]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(codec, x, kind):
    """Tensors of a codec, and their numbers [B, T, heads, head_dim]."""
    memory, records = {}, []
    for part in x.split(SPAN, 1):
        record, memory = codec.encode(part, kind, memory)
        records.append(record)
    whole = functools.reduce(Spans.appended, records[1:], Spans.of(records[0])).record
    return [whole.tensors[field.name] for field in whole.fields], codec.decode(whole, kind)


def case(keys, values, spans=3, gone=0, rows=10, dtype=torch.float32):
    """Arguments of the operator, and the dense keys and values that they stand for."""
    tokens = spans * SPAN - gone
    angle = normal(tokens, DIM // 2, seed=9)
    cos, sin = angle.cos(), angle.sin()
    new = [[normal(B, n, HEADS, DIM, seed=s + n, dtype=dtype) for n in (4, 0, rows)] for s in (20, 30)]
    packed, dense = [], []
    for kind, codec, seed in (("keys", keys, 1), ("values", values, 2)):
        x = normal(B, spans * SPAN, HEADS, DIM, seed=seed)
        if codec is None:
            x = x[:, gone:].to(dtype)
            packed.append([x])
        else:
            tensors, x = stored(codec, x, kind)
            packed.append(tensors)
            x = x[:, gone:].to(dtype)
            x = apply_rope(x, cos, sin) if kind == "keys" else x
        dense.append(x)
    q = normal(B, rows, HEADS, DIM, seed=5, dtype=dtype)
    return (q, *new, *packed, cos, sin, codecs_text(keys, values), SPAN), [
        [d, *n] for d, n in zip(dense, new, strict=True)
    ]


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("gone", [0, 5])
def test_it_equals_attention_to_the_decoded_cache(codec, gone):
    arguments, (keys, values) = case(codec, codec, gone=gone)
    got, want = attention_packed(*arguments), attention(arguments[0], keys, values)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("keys", "values"), [(None, Klt(1.0)), (PerToken(4, 16), None), (Kivi(4, 0, 16), Prq(1, 4, block=16))]
)
def test_keys_and_values_may_differ_in_codec(keys, values):
    arguments, dense = case(keys, values)
    assert torch.allclose(attention_packed(*arguments), attention(arguments[0], *dense), atol=1e-5)


def test_half_precision_is_read_as_the_dense_cache_is():
    arguments, dense = case(Klt(2.0), Klt(2.0), dtype=torch.bfloat16)
    got, want = attention_packed(*arguments), attention.reference(arguments[0], *dense)
    assert got.dtype == torch.bfloat16
    assert float((got - want).abs().max() / want.abs().max()) < 2**-6


def test_no_span_is_attention_to_the_exact_pieces():
    (q, k, v, pk, pv, cos, sin, text, span), _ = case(Klt(1.0), PerToken(2, 16), spans=1)
    fields = [
        [t[:, :0] if n == "planes" else t for n, t in zip(("planes", "mean"), pk, strict=False)],
        [t[:, :0] for t in pv],
    ]
    none = [*fields[0], *pk[2:]]
    got = attention_packed(q, k, v, none, fields[1], cos[:0], sin[:0], text, span)
    assert torch.allclose(got, attention(q, k, v), atol=1e-6)


REFUSED = {
    "another codec": (7, codecs_text(Klt(2.0), Klt(2.0)), r"packed_k\.planes is torch.uint8"),
    "no codec": (7, '{"keys":null,"values":null}', "use fxq::attention"),
    "an unknown one": (7, '{"keys":{"codec":"zip"},"values":null}', "unknown codec 'zip'"),
    "a setting out of range": (7, '{"keys":{"codec":"klt","bits":1e9},"values":null}', "bits"),
    "a huge setting": (
        7,
        '{"keys":{"codec":"prq","stages":99999999,"centroids":4,"block":16},"values":null}',
        "packed_k are 5 tensors: the codec stores codes, scale",
    ),
    "no JSON": (7, "{", "the settings of the codecs"),
    "another span": (8, 23, r"packed_k\.planes|spans of 23"),
    "a span of nothing": (8, 0, "spans of 0 tokens"),
    "an endless span": (8, 2**40, "spans of 1099511627776"),
    "too few tables": (5, normal(2, DIM // 2), "sin is|cos has 2"),
    "a tensor too few": (3, [], "packed_k are 0 tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_it_is_read(name):
    arguments, _ = case(Klt(1.0), Klt(1.0))
    place, value, message = REFUSED[name]
    changed = [*arguments[:place], value, *arguments[place + 1 :]]
    with pytest.raises(ValueError, match=message):
        attention_packed(*changed)


def test_tables_of_no_token_do_not_hide_the_spans_that_are_there():
    (*tensors, cos, sin, text, span), _ = case(Klt(1.0), Klt(1.0))
    with pytest.raises(ValueError, match=r"packed_k are \d spans of 24 tokens, cos has 0: expected so many"):
        attention_packed(*tensors, cos[:0], sin[:0], text, span)


@pytest.mark.parametrize("codec", [Klt(1.0), Prq(1, 16, block=16), Kivi(2, 0, 16)], ids=lambda c: c.name)
def test_one_span_at_a_time_is_dense(codec):
    def measured(spans):
        arguments, _ = case(codec, codec, spans=spans, rows=4)
        with LiveBytes() as sizes:
            attention_packed.reference(*arguments)
        return sizes

    few, many = measured(2), measured(12)
    span = 4 * B * SPAN * HEADS * DIM
    assert many.largest <= 2 * span  # KLT unpacks its planes, some bits more than it has channels
    assert many.peak <= 1.05 * few.peak


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_a_gpu_agrees_with_the_reference(codec, dtype):
    demand("gpu")
    arguments, _ = case(codec, codec, gone=5, dtype=dtype)
    moved = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, arguments)
    got, want = attention_packed(*moved).cpu(), attention_packed.reference(*arguments)
    allowed = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}[dtype]
    assert float((got - want).abs().max() / want.abs().max()) <= allowed
