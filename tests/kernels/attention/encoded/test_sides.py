"""Native kernels decode what codecs store, integers to the bit, for attention; on every instruction set."""

import functools

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from fxq.cache.codecs import Exact, Float8, Kivi, Klt, LowRank, PerChannel, PerToken, Prq, QuaRot
from fxq.cache.named import codecs_text
from fxq.cache.spans import Spans
from fxq.kernels import attention_packed, native
from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.encoded.packed import attention_packed_cpu
from fxq.kernels.attention.encoded.sides import Reader
from fxq.kernels.attention.spans import coefficients, decoded, parts, rotated
from fxq.kernels.native import build, unpack
from tests.features import library_for, needs

pytestmark = needs("native")

B, HEADS = 2, 3
BLOCKS = [
    PerToken(8, 4, scale_dtype="bfloat16"),
    PerToken(4, 12, asymmetric=True),
    PerToken(2, 2),
    PerChannel(4),
    PerChannel(2, 1, asymmetric=False),
    Kivi(2, 0, 4),
    Prq(2, 5, block=4),
    Prq(3, 9, bits=4, block=12, asymmetric=True),
]
NUMBERS = [Exact("float32"), Exact("bfloat16"), Exact("float16"), Float8()]
PLANES = [
    Klt(1.0),
    Klt(2.0, rank=13),
    Klt(1.0, joint=True, rank=20),
    Klt(1.3, fit="model"),
    Klt(1.0, joint=True, fit="model", rank=20),
]


@pytest.fixture(params=[build.AVX512, build.AVX2], ids=lambda found: found.kernel)
def kernels(request, monkeypatch):
    """The native kernels for one instruction set, whether or not they are the ones that this CPU gets."""
    library = library_for(request.param)
    monkeypatch.setattr(native, "library", lambda: (library, ""))
    monkeypatch.setattr(native, "instruction_set", lambda: request.param)
    return request.param


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(codec, kind, size, span):
    """Tensors of two spans in memory that has grown, as a rollout keeps them."""
    x = normal(B, 2 * span, HEADS, size, seed=len(kind)) * torch.linspace(2, 0.2, size) + 1
    memory, records = codec.learned(x[0]), []
    for part in x.split(span, 1):
        record, memory = codec.encode(part, kind, memory)
        records.append(record)
    whole = functools.reduce(Spans.appended, records[1:], Spans.of(records[0])).record
    return [whole.tensors[field.name] for field in whole.fields]


@functools.cache
def call(keys, values, size=36, span=23, gone=5, dtype=torch.float32, rows=7):
    """Arguments of attention to two spans, the first of which lost ``gone`` tokens, and to exact pieces."""
    tokens = 2 * span - gone
    angle = normal(tokens, size // 2, seed=9)
    pieces = [[normal(B, n, HEADS, size, seed=s + n).to(dtype) for n in (4, 0, rows)] for s in (20, 30)]
    packed = [
        normal(B, tokens, HEADS, size, seed=s).to(dtype) if codec is None else stored(codec, kind, size, span)
        for s, (kind, codec) in enumerate((("keys", keys), ("values", values)))
    ]
    packed = [x if isinstance(x, list) else [x] for x in packed]
    q = normal(B, HEADS, rows, size, seed=5).transpose(1, 2).to(dtype)
    return AttentionPacked(q, *pieces, *packed, angle.cos(), angle.sin(), codecs_text(keys, values), span)


@pytest.mark.parametrize("size", [36, 48], ids=["rests", "whole vectors"])
@pytest.mark.parametrize("codec", [*BLOCKS, *NUMBERS], ids=str)
def test_numbers_are_those_of_the_codec_to_the_bit(codec, size, kernels):
    a = call(codec, codec, size)
    reader = Reader(a, "values")
    for part in parts(a):
        assert torch.equal(reader.dense(part), decoded(a, "values", part))


@pytest.mark.parametrize("codec", PLANES, ids=str)
def test_coefficients_are_those_of_the_codec_to_the_bit(codec, kernels):
    a = call(codec, codec)
    reader = Reader(a, "values", short=True)
    for part in parts(a):
        assert torch.equal(reader.dense(part), coefficients(a, part).x)


@pytest.mark.parametrize("codec", [*PLANES, Klt(8.0), Klt(1.0, joint=True)], ids=str)
@pytest.mark.parametrize("size", [36, 48], ids=["rests", "whole vectors"])
def test_planes_are_decoded_with_their_basis(codec, size, kernels):
    a = call(codec, codec, size)
    reader = Reader(a, "values")
    for part in parts(a):
        want = decoded(a, "values", part)
        assert float((reader.dense(part) - want).abs().max() / want.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_are_rotated_as_in_a_dense_cache(dtype, kernels):
    a = call(PerToken(4, 4), None, dtype=dtype)
    reader = Reader(a, "keys")
    for part in parts(a):
        got, want = reader.dense(part), rotated(a, part)
        assert got.dtype == want.dtype == dtype
        assert float((got - want).abs().max()) <= (2**-7 if dtype == torch.bfloat16 else 1e-6) * float(want.abs().max())


PAIRS = [
    *((codec, codec) for codec in (PLANES[0], PLANES[2], PLANES[3], BLOCKS[0], BLOCKS[6], Float8(), QuaRot(2, 4))),
    (None, Klt(1.0)),
    (PerToken(4, 4), None),
    (Kivi(4, 0, 4), LowRank(2, 2, 4)),
    (Klt(1.0), Klt(1.0, joint=True)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("keys", "values"), PAIRS, ids=str)
def test_attention_equals_that_to_what_is_decoded(keys, values, dtype, kernels):
    a = call(keys, values, 16 if QuaRot(2, 4) in (keys, values) else 36, dtype=dtype)
    dense = [[*pieces] for pieces in (a.k, a.v)]
    for part in parts(a):
        dense[0].append(rotated(a, part))
        dense[1].append(decoded(a, "values", part))
    k, v = (torch.cat(pieces, 1).double() for pieces in dense)
    weights = (torch.einsum("bshd,blhd->bhsl", a.q.double(), k) / a.q.shape[3] ** 0.5).softmax(-1)
    want = torch.einsum("bhsl,blhd->bshd", weights, v).flatten(2)
    got = attention_packed_cpu(a)
    allowed = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert got.dtype == dtype and float((got - want).abs().max() / want.abs().max()) < allowed


def test_many_blocks_of_keys_and_queries_are_read(kernels):
    a = call(Klt(1.0), Klt(1.0), 72, 531, 13, torch.bfloat16, 200)
    want = attention_packed.reference(*a).float()
    assert float((attention_packed_cpu(a).float() - want).abs().max() / want.abs().max()) < 2**-6


def test_no_exact_key_and_no_query(kernels):
    a = call(Klt(1.0), PerToken(4, 4), dtype=torch.bfloat16)
    a = a._replace(k=[a.k[1]], v=[a.v[1]])
    want = attention_packed.reference(*a).float()
    assert float((attention_packed_cpu(a).float() - want).abs().max() / want.abs().max()) < 2**-6
    assert attention_packed_cpu(a._replace(q=a.q[:, :0])).shape == (B, 0, HEADS * 36)


def test_threads_do_not_change_the_result(kernels):
    a, before = call(Klt(1.0), Prq(2, 5, block=12), 72, 531, 13, torch.float32, 30), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([Reader(a, kind).dense(part) for kind in ("keys", "values") for part in parts(a)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("span", [1, 23, 64])
@pytest.mark.parametrize("codec", [Klt(1.0), Klt(0.7, joint=True), Klt(4.0)], ids=str)
def test_planes_are_those_of_torch_to_the_bit(codec, span, kernels, monkeypatch):
    x, found = normal(B, 50, HEADS, 36, seed=1), []
    memory = {name: torch.stack([t, t]) for name, t in codec.fitted(x[0]).items()}
    for ready in (True, False):
        monkeypatch.setattr(native, "ready", lambda ready=ready: ready)
        found.append(codec.encode(x[:, :span] * 2, "values", memory)[0].tensors["planes"])
    assert torch.equal(*found)


def test_widths_that_do_not_fit_the_planes_are_refused(kernels):
    a = call(Klt(1.0), Klt(1.0))
    wide = torch.zeros_like(a.packed_v[4])
    wide[:, 0, 0] = 108
    for width, message in ((a.packed_v[4] + 1, r"sum to \[216, 216\] with"), (wide, r"with 108 at most: expected 108")):
        with pytest.raises(ValueError, match=message):
            attention_packed(*a._replace(packed_v=[*a.packed_v[:4], width]))


def test_names_of_centroids_that_there_are_not_stay_inside(kernels):
    a = call(Prq(1, 5, block=4), Prq(1, 5, block=4))
    ids = torch.full_like(a.packed_v[2], 255)
    a = a._replace(packed_v=[*a.packed_v[:2], ids, a.packed_v[3]])
    for part in parts(a):
        assert torch.equal(Reader(a, "values").dense(part), decoded(a, "values", part))


@pytest.mark.parametrize("codec", [Klt(1.0), Prq(1, 16, block=16), PerToken(8, 16)], ids=str)
def test_nothing_of_a_span_is_dense_in_bfloat16(codec, kernels):
    a = call(codec, codec, 32, 500, 0, torch.bfloat16, 4)
    with LiveBytes() as sizes, torch.inference_mode():
        attention_packed(*a)
    assert sizes.largest < 2 * B * 500 * HEADS * 32 / 2


def test_reports_name_what_decodes(monkeypatch):
    assert attention_packed.used("cpu") == (native.name() if native.attends() else f"{native.name()} unpack")
    monkeypatch.setattr(native, "attends", lambda: False)
    assert attention_packed.used("cpu") == f"{native.name()} unpack"
    monkeypatch.setattr(native, "ready", lambda: False)
    assert attention_packed.used("cpu") == "reference"


def test_a_side_holds_the_tensors_that_its_fields_point_to():
    x = normal(1, 4, 2, 6, seed=1)
    made = unpack.side(2, 6, kind=unpack.ROWS, x=x, x_batch=48, x_row=12, x_head=6)
    assert made.tensors[0] is x and made.fields.x == x.data_ptr() and made.fields.basis is None
    assert torch.equal(unpack.unpack(made, 1, 4, torch.float32), x)
