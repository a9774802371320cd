"""Attention that multiplies stored integers: bit for bit that of the floats they were made of, piece by piece."""

import pytest
import torch

from fxq.cache.codecs import Int8Attention, PerToken
from fxq.cache.codecs.record import Record, Shape
from fxq.cache.named import codecs_from_text, codecs_text
from fxq.cache.settings import CacheSettingsError
from fxq.kernels import attention, attention_int8, attention_packed, native
from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.encoded import packed
from fxq.kernels.attention.encoded.packed import attention_packed_cpu, stored_spans
from fxq.kernels.native import build
from fxq.kernels.native.coded import Coded
from tests.features import library_for, needs

CODEC = Int8Attention()
TEXT = codecs_text(CODEC, CODEC, integers=True)


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(span, spans, rows=21, exact=(5, 0, 33), heads=3, size=48, dtype=torch.float32, gone=0, text=TEXT):
    """Arguments of the operator, and the pieces of keys and of values that the integers were made of."""
    shape = Shape(heads, size, span)
    channel = 1 + normal(heads, size, seed=3).abs()
    pieces, packed = [], []
    for kind, seed in (("keys", 10), ("values", 20)):
        whole = [normal(2, span, heads, size, seed=seed + i, dtype=dtype) * channel.to(dtype) + 2 for i in range(spans)]
        records = [CODEC.encode(x, kind, {})[0] for x in whole]
        fields = CODEC.fields(shape, kind)
        empty = [torch.zeros(field.size(2, 0, span), dtype=field.dtype) for field in fields]
        packed.append(
            [torch.cat([e, *(r.tensors[f.name] for r in records)], 1) for e, f in zip(empty, fields, strict=True)]
        )
        pieces.append([*(normal(2, n, heads, size, seed=seed + 5 + n, dtype=dtype) for n in exact), *whole])
    q = normal(2, rows, heads, size, seed=1, dtype=dtype)
    table = torch.zeros(span * spans - gone, size // 2)
    given = [each[: len(exact)] for each in pieces]
    return AttentionPacked(q, *given, *packed, table, table, text, span), pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("span", "spans", "sizes"),
    [
        (24, 3, {}),
        (256, 1, {"size": 64}),
        (601, 2, {"size": 80, "heads": 1, "rows": 70}),
        (40, 0, {}),
        (7, 1, {"rows": 1}),
    ],
)
def test_it_is_attention_in_8_bits_to_pieces_that_are_the_spans(span, spans, sizes, dtype):
    a, (keys, values) = case(span, spans, dtype=dtype, **sizes)
    assert torch.equal(attention_packed.reference(*a), attention_int8.reference(a.q, keys, values))
    got = attention_packed(*a)
    assert got.dtype == dtype and torch.equal(got, attention_int8(a.q, keys, values))


def test_nothing_is_made_dense_and_nothing_quantized_again(monkeypatch):
    a, _ = case(40, 2)
    monkeypatch.setattr(Int8Attention, "decode", None)
    asked = []
    real = packed.key_mean
    monkeypatch.setattr(packed, "key_mean", lambda k: asked.append(k.shape[1]) or real(k))
    attention_packed_cpu(a)
    assert asked in ([5, 0, 33], []), "means of exact pieces alone"


@pytest.mark.parametrize("gone", [1, 255, 256, 300, 519])
def test_evicted_tokens_of_the_first_span_do_not_count(gone):
    a, (keys, values) = case(520, 2, exact=(3,), gone=gone)
    got = attention_packed(*a)
    assert torch.allclose(got, attention_packed.reference(*a), atol=3e-5)
    keys[1], values[1] = keys[1][:, gone:], values[1][:, gone:]
    want = attention(a.q, keys, values)
    assert float((got - want).norm() / want.norm()) < 0.03


def test_memory_that_grows_is_read_where_it_lies():
    a, (keys, values) = case(40, 2)

    def roomy(x):
        room = torch.full((x.shape[0], 3 * x.shape[1], *x.shape[2:]), 99).to(x.dtype)
        room[:, : x.shape[1]] = x
        return room[:, : x.shape[1]]

    roomy_k, roomy_v = ([roomy(x) for x in tensors] for tensors in (a.packed_k, a.packed_v))
    got = attention_packed(*a._replace(packed_k=roomy_k, packed_v=roomy_v))
    assert torch.equal(got, attention_int8(a.q, keys, values))
    span = next(stored_spans(a._replace(packed_k=roomy_k, packed_v=roomy_v)))
    lies = Coded(span.key_codes, span.key_scale, span.value_codes, span.value_scale, 0)
    assert lies.rows_as_they_lie().k.data_ptr() == span.key_codes.data_ptr()
    turned = lies._replace(k=lies.k.transpose(1, 2).contiguous().transpose(1, 2)).rows_as_they_lie()
    assert turned.k[:1].is_contiguous() and torch.equal(turned.k, lies.k)


@needs("native")
@pytest.mark.parametrize("target", build.SETS, ids=lambda found: found.kernel)
def test_every_instruction_set_multiplies_them_alike(target, monkeypatch):
    library = library_for(target)
    monkeypatch.setattr(native, "library", lambda: (library, ""))
    monkeypatch.setattr(native, "instruction_set", lambda: target)
    for sizes in ({"span": 601, "spans": 2, "rows": 70, "size": 80}, {"span": 24, "spans": 3, "size": 36}):
        for dtype in (torch.float32, torch.bfloat16):
            a, (keys, values) = case(dtype=dtype, **sizes)
            assert torch.equal(attention_packed(*a), attention_int8(a.q, keys, values))


def test_what_is_not_finite_shows():
    a, _ = case(24, 2)
    for name, at in (("packed_k", 1), ("packed_v", 1)):
        tensors = [t.clone() for t in getattr(a, name)]
        tensors[at].view(-1)[0] = torch.nan
        for made in (attention_packed, attention_packed.reference):
            assert made(*a._replace(**{name: tensors})).isnan().any()
    q = a.q.clone()
    q[0, 3, 1, 2] = torch.inf
    got = attention_packed(*a._replace(q=q))
    assert got[0, 3].isnan().any() and not got[0, 4].isnan().any() and not got[1].isnan().any()


def test_exact_attention_reads_the_numbers_they_stand_for():
    a, _ = case(24, 3, text=codecs_text(CODEC, CODEC))
    dense = []
    for kind, name, given in (("keys", "packed_k", a.k), ("values", "packed_v", a.v)):
        fields = CODEC.fields(Shape(3, 48, 24), kind)
        named = {field.name: t for field, t in zip(fields, getattr(a, name), strict=True)}
        dense.append([*given, CODEC.decode(Record(fields, named, Shape(3, 48, 24)), kind)])
    want = attention(a.q, *dense)
    for made in (attention_packed, attention_packed.reference):
        assert float((made(*a) - want).abs().max() / want.abs().max()) < 1e-5
    assert not torch.equal(attention_packed(*a), attention_packed(*a._replace(codec=TEXT)))


def test_other_codecs_have_no_integers_to_multiply():
    with pytest.raises(CacheSettingsError, match="multiplies what int8_attention stores of both keys and values"):
        codecs_from_text(codecs_text(CODEC, PerToken(8), integers=True))


def test_without_native_kernels_the_reference_runs(monkeypatch):
    a, _ = case(24, 2)
    monkeypatch.setattr(native, "ready", lambda: False)
    assert torch.equal(attention_packed_cpu(a), attention_packed.reference(*a))
