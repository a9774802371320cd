"""Cases of the kernels that read an encoded cache, as :mod:`tests.kernels.interpreted`.

The interpreter multiplies bfloat16 as if its bits were integers: products are tried in float32 and float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxq.cache.codecs import Exact, Float8, Kivi, Klt, PerChannel, PerToken, Prq, QuaRot
from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.codecs.packing import pack
from fxq.cache.named import codecs_text
from fxq.cache.spans import Spans
from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention import triton as packed_triton
from fxq.kernels.attention import triton_pack, triton_planes
from fxq.kernels.attention.encoded.packed import attention_packed
from fxq.kernels.attention.triton_numbers import as_float32
from fxq.kernels.cluster import kmeans
from fxq.kernels.cluster import triton as cluster_triton
from fxq.kernels.jit import Pointer, constexpr, jit, tl

B, HEADS = 2, 3


def noise(*shape: int, seed: int) -> Tensor:
    """Float32 noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(codec: Codec, x: Tensor, kind: Kind, span: int) -> list[Tensor]:
    """What a codec stores of whole spans [B, T, heads, size], with more memory behind it, as a rollout keeps it."""
    memory, records = {}, []
    for part in x.split(span, 1):
        record, memory = codec.encode(part, kind, memory)
        records.append(record)
    whole = functools.reduce(Spans.appended, records[1:], Spans.of(records[0])).record
    return [whole.tensors[field.name] for field in whole.fields]


def arguments(
    keys: Codec | None,
    values: Codec | None,
    size: int = 32,
    span: int = 23,
    spans: int = 2,
    gone: int = 0,
    rows: int = 5,
    dtype: torch.dtype = torch.float32,
    exact: tuple[int, ...] = (4, 0, 5),
    integers: bool = False,
) -> AttentionPacked:
    """Of attention to encoded spans and exact pieces."""
    tokens = spans * span - gone
    angle = noise(tokens, size // 2, seed=9)
    pieces = [[noise(B, n, HEADS, size, seed=s + n).to(dtype) for n in exact] for s in (20, 30)]
    packed = []
    for kind, codec in (("keys", keys), ("values", values)):
        x = noise(B, spans * span, HEADS, size, seed=len(kind)) + 1
        packed.append([x[:, gone:].to(dtype)] if codec is None else encoded(codec, x, kind, span))
    q = noise(B, HEADS, rows, size, seed=5).transpose(1, 2).to(dtype)
    return AttentionPacked(q, *pieces, *packed, angle.cos(), angle.sin(), codecs_text(keys, values, integers), span)


def attention(*codecs: Codec | None, allowed: float = 2e-6, **form: object) -> None:
    """Attention as in the reference; torch fills what it does not write with NaN."""
    a = arguments(*codecs, **form)
    got, want = packed_triton.attend(a), attention_packed.compute(a)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert error <= allowed, f"{error}, all written: {bool(got.isfinite().all())}"


def one_launch_reads_all_spans(codec: Codec, launches: int) -> None:
    """The pieces take a launch each; encoded spans one for all where the kernel reads what is stored."""
    counted: list[int] = []
    run = packed_triton.launch
    try:
        packed_triton.launch = lambda *given: (counted.append(given[3]), run(*given))[1]
        attention(codec, codec, spans=3, gone=2)
    finally:
        packed_triton.launch = run
    assert len(counted) == launches, counted


def a_number_that_is_not_finite(place: str) -> None:
    """NaN in a query stays in its row; in an exact key it reaches every row of its head, and no other."""
    a = arguments(PerToken(4, 16), PerToken(4, 16))
    if place == "query":
        a.q[1, 2, 1, 3] = torch.nan
    else:
        a.k[0][1, 2, 1, 3] = torch.nan
    got, want = packed_triton.attend(a), attention_packed.compute(a)
    assert torch.equal(got.isnan(), want.isnan()) and bool(got.isnan().any()) and not bool(got.isnan().all())


def no_key_at_all() -> None:
    """Zeros, as in the reference."""
    a = arguments(Exact("float32"), Exact("float32"), exact=(0,))
    none = [t[:, :0] for t in a.packed_k]
    a = a._replace(packed_k=none, packed_v=none, cos=a.cos[:0], sin=a.sin[:0])
    assert torch.equal(packed_triton.attend(a), torch.zeros(B, 5, HEADS * 32))


def model_planes() -> None:
    """A basis that lies with the model has no batch."""
    codec = Klt(2.0, rank=9, fit="model")
    x = noise(B, 23, HEADS, 32, seed=3)
    record, _ = codec.encode(x, "keys", codec.learned(x[0]))
    form = codec.form(record.shape, "keys")
    got = triton_planes.dense(form, record.tensors, 0, tuple(x.shape), x)
    want = codec.decode(record, "keys")
    assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())


def packed(codec: PerToken, shape: tuple[int, ...]) -> None:
    """Codes of blocks, bit for bit those of torch, on ties and beyond what the scale holds as well."""
    grid, x = codec.grid, noise(*shape, seed=4) * 3
    scale, zero = grid.measured(x.unflatten(-1, (-1, codec.block)))
    steps = torch.arange(x.numel()).view(shape) % 11 - 5.5
    ties = steps * scale.float().repeat_interleave(codec.block, -1)
    for tried in (x, x * 4, ties if zero is None else ties + zero.float().repeat_interleave(codec.block, -1)):
        codes = tried.unflatten(-1, (-1, codec.block))
        codes = (codes if zero is None else codes - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        low, high = (-grid.offset, grid.offset) if zero is None else (0, 2**grid.bits - 1)
        want = pack((codes.round().clamp(low, high) + grid.offset).to(torch.uint8).flatten(-2), grid.bits)
        got = triton_pack.pack_blocks(tried, scale, zero, grid.bits)
        assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} bytes differ"


def clusters(groups: int, tokens: int, count: int, width: int) -> None:
    """Names and means of clusters that lie apart, one of them empty, two centroids the same."""
    centroids = noise(groups, count, width, seed=1) * 4
    centroids[:, -1] = centroids[:, 0]
    x = centroids[:, torch.arange(tokens) % max(1, count - 2)] + noise(groups, tokens, width, seed=2) * 0.1
    centroids += noise(groups, count, width, seed=3) * 0.05 * (torch.arange(count) % (count - 1) > 0).view(-1, 1)
    names = cluster_triton.nearest(x, centroids)
    assert names.dtype == torch.int64 and torch.equal(names, kmeans.nearest(x, centroids))
    flat = (names + torch.arange(groups).unsqueeze(1) * count).flatten()
    order, sizes = flat.argsort(stable=True), flat.bincount(minlength=groups * count)
    got, want = cluster_triton.means(x, order, sizes, centroids), kmeans.means(x, names, centroids)
    assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())
    empty = (sizes == 0).view(groups, count)
    assert bool(empty[:, -1].all()) and torch.equal(got[empty], centroids[empty])


def clusters_alone() -> None:
    """A group has the same names and means, bit for bit, beside others and in another order of groups."""
    x, centroids = noise(3, 45, 20, seed=1), noise(3, 7, 20, seed=2)

    def run(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        names = cluster_triton.nearest(x, c)
        flat = (names + torch.arange(len(x)).unsqueeze(1) * 7).flatten()
        sizes = flat.bincount(minlength=7 * len(x))
        return names, cluster_triton.means(x, flat.argsort(stable=True), sizes, c)

    turned = [t.flip(0) for t in run(x.flip(0), centroids.flip(0))]
    for got, want in zip(run(x[1:2], centroids[1:2]), turned, strict=True):
        assert torch.equal(got[0], want[1])


@jit
def _float8_kernel(x_ptr: Pointer, y_ptr: Pointer, BLOCK: constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, as_float32(tl.load(x_ptr + at)))


def every_float8() -> None:
    """All 256 bytes are the numbers that torch takes them for."""
    x, y = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    _float8_kernel[(1,)](x, y, BLOCK=256)
    want = x.view(torch.float8_e4m3fn).float()
    assert torch.equal(y.nan_to_num(1e9), want.nan_to_num(1e9)) and int(y.isnan().sum()) == 2


F16 = torch.float16
CASES: dict[str, Callable[[], None]] = {
    "packed-attention-exact": lambda: attention(Exact("float32"), Exact("bfloat16"), gone=3),
    "packed-attention-8-bits": lambda: attention(PerToken(8, 32, scale_dtype="bfloat16"), PerToken(8, 16)),
    "packed-attention-4-bits-evicted": lambda: attention(PerToken(4, 16), PerToken(4, 8), gone=5),
    "packed-attention-2-bits-zeros": lambda: attention(PerToken(2, 16, True), PerToken(2, 4, True), gone=22),
    "packed-attention-odd-size": lambda: attention(PerToken(2, 6), PerToken(4, 3, True), size=6, gone=1),
    "packed-attention-wide-odd-blocks": lambda: attention(PerToken(2, 10), Float8(), size=70, rows=41),
    "packed-attention-channels": lambda: attention(PerChannel(4), PerChannel(2, 8, False), span=24, gone=9),
    "packed-attention-channels-8-bits": lambda: attention(PerChannel(8), PerToken(8, 4), dtype=F16, allowed=2**-9),
    "packed-attention-kivi": lambda: attention(Kivi(2, 0, 16), Kivi(4, 0, 16), spans=3, gone=7),
    "packed-attention-float8": lambda: attention(Float8(), Float8(), gone=2),
    "packed-attention-prq": lambda: attention(Prq(1, 16, block=16), Prq(1, 5, block=16), spans=3, gone=4),
    "packed-attention-prq-stages": lambda: attention(Prq(3, 9, 4, 8, True), Prq(2, 2, block=32), gone=1),
    "packed-attention-decoded-keys": lambda: attention(QuaRot(4, 16), Prq(1, 4, block=16), gone=5),
    "packed-attention-decoded-values": lambda: attention(Kivi(4, 0, 16), Klt(2.0), spans=3, gone=5),
    "packed-attention-planes": lambda: attention(Klt(1.0), Klt(1.0), gone=5),
    "packed-attention-planes-joint": lambda: attention(Klt(2.5, joint=True, rank=70), Kivi(2, 0, 16), span=37),
    "packed-attention-planes-shared": model_planes,
    "packed-attention-rotated-keys": lambda: attention(None, PerToken(4, 16), gone=5),
    "packed-attention-dense-values": lambda: attention(Prq(1, 4, block=16), None, gone=5),
    "packed-attention-no-exact-piece": lambda: attention(PerToken(4, 16), PerToken(4, 16), exact=(0,)),
    "packed-attention-many-rows": lambda: attention(Prq(1, 8), Prq(1, 8), size=64, rows=150, dtype=F16, allowed=2**-9),
    "packed-attention-f16": lambda: attention(PerToken(8, 32), Float8(), dtype=F16, allowed=2**-9),
    "packed-attention-one-launch": lambda: one_launch_reads_all_spans(Prq(1, 4, block=16), 3),
    "packed-attention-a-launch-a-span": lambda: one_launch_reads_all_spans(QuaRot(4, 16), 5),
    "packed-attention-nan-query": lambda: a_number_that_is_not_finite("query"),
    "packed-attention-nan-key": lambda: a_number_that_is_not_finite("key"),
    "packed-attention-no-key": no_key_at_all,
    "packed-attention-float8-bytes": every_float8,
    "pack-2-bits": lambda: packed(PerToken(2, 16), (3, 11, 48)),
    "pack-2-bits-zeros-odd": lambda: packed(PerToken(2, 3, True, "bfloat16"), (2, 5, 3, 6)),
    "pack-4-bits-zeros": lambda: packed(PerToken(4, 10, True), (7, 70)),
    "pack-8-bits": lambda: packed(PerToken(8, 32, scale_dtype="bfloat16"), (33, 96)),
    "pack-nothing": lambda: packed(PerToken(4, 8, scale_dtype="bfloat16"), (0, 16)),
    "cluster-many": lambda: clusters(2, 131, 70, 33),
    "cluster-few": lambda: clusters(3, 17, 3, 6),
    "cluster-wide": lambda: clusters(1, 70, 16, 130),
    "cluster-alone": clusters_alone,
}
