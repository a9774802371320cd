"""What every codec keeps: shapes, stored bytes, determinism, independence of its batch; and what each is good for."""

import contextlib
import dataclasses
import math

import pytest
import torch

from fxq.cache.codecs import (
    CODECS,
    PRESETS,
    Exact,
    Float8,
    Int8Attention,
    Kivi,
    Klt,
    LowRank,
    PerChannel,
    PerToken,
    Prq,
    QuaRot,
    packing,
    rtn,
)
from fxq.cache.codecs.codec import Codec
from fxq.cache.codecs.record import Record, Shape
from fxq.cache.spans import Spans
from tests.features import demand

SHAPE = Shape(3, 32, 64)
CASES: list[Codec] = [
    Exact(),
    Exact("float32"),
    PerToken(2, 16),
    PerToken(4, 32, asymmetric=True),
    PerToken(8, 32, scale_dtype="bfloat16"),
    PerChannel(2, 16),
    PerChannel(4),
    Kivi(group=16),
    QuaRot(2),
    QuaRot(4, asymmetric=False),
    Float8(),
    Int8Attention(),
    LowRank(3),
    Prq(1, 16, block=32, iterations=4),
    Prq(3, 8, 4, 16, asymmetric=True, iterations=3),
    Klt(1.0),
    Klt(0.5, rank=8),
    Klt(2.5, joint=True),
]


def spans(batch=2, count=1, seed=0):
    """Tokens with a large mean, channels of very different sizes and few directions, as keys have."""
    random = torch.Generator().manual_seed(seed)
    shape = (batch, count * SHAPE.span, SHAPE.heads, 6)
    directions = torch.randn(SHAPE.heads, 6, SHAPE.head_dim, generator=torch.Generator().manual_seed(1))
    low = torch.einsum("bthr,hrd->bthd", torch.randn(shape, generator=random), directions)
    noise = 0.1 * torch.randn(*shape[:3], SHAPE.head_dim, generator=random)
    return low + noise + 8 * directions[0, 0]


def decibels(x, y):
    noise = float((x - y).double().square().sum())
    return math.inf if not noise else 10 * math.log10(float(x.double().square().sum()) / noise)


def test_every_codec_is_a_case_here():
    assert {type(codec) for codec in CASES} == set(CODECS.values())
    assert all(type(codec) in CODECS.values() for codec in PRESETS.values())


def chance(seed):
    def numbers(name, shape):
        own = torch.Generator().manual_seed(seed + len(name))
        return torch.rand(shape, generator=own, dtype=torch.float64)

    return numbers


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("codec", CASES, ids=repr)
class TestEvery:
    def test_stored_tensors_of_chance_decode_to_numbers_about_one(self, codec, kind):
        made = codec.seeded(SHAPE, kind, 2, 3, chance(0))
        record = Record(codec.fields(SHAPE, kind), made, SHAPE)
        x = codec.decode(record, kind)
        assert (record.batch, record.spans) == (2, 3) and 0.25 < float(x.std()) < 4
        assert not x.equal(codec.decode(Record(record.fields, codec.seeded(SHAPE, kind, 2, 3, chance(1)), SHAPE), kind))

    def test_tokens_come_back_in_shape_and_about_right(self, codec, kind):
        x = spans()
        record, _ = codec.encode(x, kind, {})
        back = codec.decode(record, kind)
        assert back.shape == x.shape and back.dtype == torch.float32
        assert decibels(x, back) > 4

    def test_every_stored_byte_is_counted(self, codec, kind):
        record, _ = codec.encode(spans(), kind, {})
        total = sum(t.numel() * t.element_size() for t in record.tensors.values())
        assert record.nbytes == total
        assert 8 * total / (2 * SHAPE.elements) == pytest.approx(codec.bits_per_element(SHAPE, kind), abs=1e-12)

    def test_a_video_is_stored_alike_whatever_stands_beside_it_and_whenever(self, codec, kind):
        x, other = spans(1), spans(2, seed=5)
        alone, memory = codec.encode(x, kind, {})
        torch.manual_seed(99)
        before = torch.get_rng_state()
        among, memories = codec.encode(torch.cat((other, x)), kind, {})
        assert torch.equal(torch.get_rng_state(), before)
        for name, tensor in alone.tensors.items():
            assert torch.equal(among.tensors[name][2:].view(torch.uint8), tensor.view(torch.uint8)), name
        assert all(torch.equal(memories[name][2:], tensor) for name, tensor in memory.items())

    def test_spans_decode_together_as_alone(self, codec, kind):
        x = spans(2, 2)
        first, memory = codec.encode(x[:, : SHAPE.span], kind, {})
        second, _ = codec.encode(x[:, SHAPE.span :], kind, memory)
        if codec.name == "klt":
            assert second.tensors["basis"] is first.tensors["basis"]  # once a video
        alone = torch.cat([codec.decode(record, kind) for record in (first, second)], dim=1)
        if codec.name != "klt":  # its planes are padded to bytes span by span
            assert torch.allclose(codec.decode(Spans.of(first).appended(second).record, kind), alone, atol=1e-5)
        assert decibels(x, alone) > 4

    def test_what_is_not_finite_is_refused(self, codec, kind):
        x = spans()
        x[1, 3, 0, 5] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            codec.encode(x, kind, {})


def test_stages_and_bits_each_lower_the_error():
    x = spans()

    def quality(**settings):
        codec = dataclasses.replace(Prq(1, 16, block=32, iterations=6), **settings)
        return decibels(x, codec.decode(codec.encode(x, "keys", {})[0], "keys"))

    assert quality() < quality(stages=2) < quality(stages=4)
    assert quality() < quality(bits=4)


def test_centroids_of_the_span_before_serve_the_next():
    random = torch.Generator().manual_seed(3)
    places = 20 * torch.randn(12, 3, 32, generator=random)
    chosen = torch.randint(0, 12, (128,), generator=random)
    x = (places[chosen] + torch.randn(128, 3, 32, generator=random)).unsqueeze(0)
    codec = Prq(1, 12, block=32, iterations=20, warm_iterations=1)
    _, memory = codec.encode(x[:, :64], "keys", {})
    rest = x[:, 64:]

    def quality(codec, memory):
        return decibels(rest, codec.decode(codec.encode(rest, "keys", memory)[0], "keys"))

    assert quality(codec, memory) > quality(dataclasses.replace(codec, iterations=1), {})
    assert quality(codec, memory) >= quality(codec, {}) - 0.5


def test_a_basis_beats_rounding_at_a_fraction_of_its_bits():
    x = spans()
    klt, rtn = Klt(1.0), PerToken(2, 16, asymmetric=True)
    assert decibels(x, klt.decode(klt.encode(x, "keys", {})[0], "keys")) > 6 + decibels(
        x, rtn.decode(rtn.encode(x, "keys", {})[0], "keys")
    )


def test_a_calibrated_basis_costs_a_video_nothing():
    x = spans()
    codec = Klt(1.0, fit="model")
    memory = codec.fitted(spans(4, seed=0).flatten(0, 1))
    record, _ = codec.encode(x, "keys", memory)
    assert record.nbytes == 2 * codec.planes(SHAPE) * SHAPE.span // 8
    assert decibels(x, codec.decode(record, "keys")) > 15
    with pytest.raises(ValueError, match="has no basis"):
        codec.encode(x, "keys", {})


@pytest.mark.parametrize(
    ("preset", "span", "ratio"), [("qvg", 37_440, 6.97), ("qvg_pro", 37_440, 5.02), ("qvg_int4", 37_440, 3.72)]
)
def test_presets_compress_as_published_at_their_span(preset, span, ratio):
    """arXiv 2602.02958 and its repository: 12 heads of 128 channels, 24 frames of 1560 tokens."""
    codec, shape = PRESETS[preset], Shape(12, 128, span)
    assert 16 / codec.bits_per_element(shape, "keys") == pytest.approx(ratio, abs=0.02)
    formula = codec.bits + 8 / codec.block + codec.stages * (8 / 128 + 256 * 16 / span)
    assert codec.bits_per_element(shape, "values") == pytest.approx(formula, abs=1e-9)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (PerToken(2, 48), "not whole blocks"),
        (PerChannel(2, 48), "not whole groups of 48"),
        (Prq(centroids=128), "128 centroids for spans of 64 tokens"),
        (LowRank(40), "a head has 32 channels"),
        (Klt(8.0, rank=4), "raise rank"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_would(codec, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(spans(), "keys", {})


def test_heads_without_a_hadamard_matrix_are_refused():
    with pytest.raises(ValueError, match="power of two"):
        QuaRot(block=4).fields(Shape(2, 12, 8), "keys")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Klt(0), "more than 0"),
        (lambda: Klt(1, rank=-1), "rank = -1"),
        (lambda: Klt(1, fit="once"), "expected 'video' or 'model'"),
        (lambda: Prq(stages=0), "stages = 0"),
        (lambda: Prq(bits=3), "stored are 2, 4 or 8"),
        (lambda: PerChannel(group=-1), "group = -1"),
        (lambda: LowRank(0), "rank = 0"),
    ],
)
def test_impossible_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("codec", [PerToken(2, 16), PerToken(4, 32, True), Prq(1, 16, 4, 16), QuaRot(2)], ids=repr)
def test_on_a_gpu_the_kernel_packs_what_was_measured(codec, monkeypatch):
    want, _ = codec.encode(spans(1), "values", {})
    taken = []

    def pack_blocks(x, scale, zero, bits):
        taken.append(bits)
        codes = x.unflatten(-1, (-1, codec.block)) - (0 if zero is None else zero.float().unsqueeze(-1))
        most = codec.grid.offset
        low, high = (-most, most) if zero is None else (0, 2**bits - 1)
        codes = (codes / scale.float().unsqueeze(-1)).round().clamp(low, high) + most
        return packing.pack(codes.flatten(-2), bits)

    monkeypatch.setattr(rtn, "packs_in", lambda device: "triton")
    monkeypatch.setattr(rtn, "pack_blocks", pack_blocks)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    got, _ = codec.encode(spans(1), "values", {})
    assert taken == [codec.bits]
    assert all(torch.equal(got.tensors[n].view(torch.uint8), t.view(torch.uint8)) for n, t in want.tensors.items())


@pytest.mark.parametrize("codec", [PerToken(2, 16), PerToken(4, 4, True), PerToken(8, 32), QuaRot(2)], ids=repr)
def test_torch_packs_what_native_kernels_pack(codec, monkeypatch):
    demand("native")
    x = spans()
    x[0, 3, 1], x[0, 4, 1, 1:] = 0, 0
    assert rtn.packs_in("cpu") == "native"
    found = [codec.encode(x, "keys", {})[0]]
    monkeypatch.setattr(rtn.native, "ready", lambda: False)
    assert rtn.packs_in("cpu") == "torch"
    found.append(codec.encode(x, "keys", {})[0])
    for name, tensor in found[0].tensors.items():
        assert torch.equal(tensor.view(torch.uint8), found[1].tensors[name].view(torch.uint8)), name


def test_centroids_move_by_some_tokens_at_first_and_serve_all():
    x = spans()
    codec = Prq(2, 4, block=32, iterations=6, sample=5)
    every = codec.decode(dataclasses.replace(codec, sample=0).encode(x, "keys", {})[0], "keys")
    record, memory = codec.encode(x, "keys", {})
    assert abs(decibels(x, codec.decode(record, "keys")) - decibels(x, every)) < 1
    again, _ = codec.encode(x, "keys", {})
    assert torch.equal(again.tensors["ids"], record.tensors["ids"])
    enough, whole = (dataclasses.replace(codec, sample=n).encode(x, "keys", memory)[0] for n in (16, 0))
    assert torch.equal(enough.tensors["ids"], whole.tensors["ids"])
    with pytest.raises(ValueError, match="sample = -1"):
        dataclasses.replace(codec, sample=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("codec", [case for case in CASES if isinstance(case, PerToken | Prq)], ids=repr)
def test_a_gpu_encodes_as_well_as_a_cpu_and_twice_the_same(codec, kind):
    demand("gpu")
    x = spans()
    want = codec.decode(codec.encode(x, kind, {})[0], kind)
    first, second = (codec.encode(x.cuda(), kind, {})[0] for _ in range(2))
    assert all(torch.equal(t.view(torch.uint8), first.tensors[n].view(torch.uint8)) for n, t in second.tensors.items())
    assert decibels(x, codec.decode(first, kind).cpu()) >= decibels(x, want) - 0.2


@pytest.mark.parametrize("codec", [Klt(0.5), Klt(1.0, fit="model"), Klt(0.3, joint=True, rank=30)], ids=str)
def test_coefficients_times_their_basis_are_the_numbers(codec):
    x = spans(count=2)
    memory, records = codec.learned(x[0]), []
    for part in x.split(SHAPE.span, 1):
        record, memory = codec.encode(part, "values", memory)
        records.append(Spans.of(record))
    record = records[0].appended(records[1].record).record
    few, want = codec.coefficients(record, "values"), codec.decode(record, "values")
    assert few.x.shape[-1] < 32 and few.x.shape[:3] == want.shape[:3]
    own = [t.double().expand(2, *t.shape[1:]) for t in few[1:]]
    got = torch.einsum("bthr,bhdr->bthd", few.x.double(), own[0]) + own[1].unsqueeze(1)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6


def test_more_coefficients_than_channels_are_no_short_form():
    codec = Klt(1.0, joint=True)
    record, _ = codec.encode(torch.randn(1, 64, 3, 32, generator=torch.Generator().manual_seed(0)), "values", {})
    assert codec.coefficients(record, "values") is None
    assert Exact().coefficients(record, "values") is None


def test_more_bits_than_the_coefficients_hold_are_refused_before_they_are_spent():
    x = torch.randn(23, 3, 36, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"1\.0 bits do not fit 12 coefficients of 8 bits; raise rank"):
        Klt(1.0, joint=True, rank=12, fit="model").learned(x)
