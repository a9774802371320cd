"""Cases of attention in 8 bits, and to stored integers, as :mod:`tests.kernels.interpreted_cache`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fxq.cache.codecs import Int8Attention
from fxq.kernels import float8
from fxq.kernels.arguments import Attention, AttentionPacked
from fxq.kernels.attention.eight_bits import int8, int8_fp8, triton_int8, triton_int8_fp8
from fxq.kernels.attention.encoded import triton_stored
from fxq.kernels.attention.encoded.packed import attention_packed
from fxq.kernels.jit import Pointer, constexpr, jit, tl
from tests.kernels.interpreted_cache import F16, HEADS, B, arguments, noise


def integers(size: int, lengths: tuple[int, ...], rows: int, dtype: torch.dtype, allowed: float) -> None:
    """Attention in 8-bit integers, as near to exact attention as the reference, and to it; strides of a slice."""
    q, new = noise(B, rows, HEADS, size, seed=1), noise(B, sum(lengths), HEADS, 2 * size, seed=2) + 1
    k, v = (list(x.to(dtype).split(lengths, 1)) for x in (new[..., :size], new[..., size:]))
    a = Attention(q.to(dtype), k, v)
    got, want = triton_int8.attend(a, torch.stack([int8.key_mean(x) for x in k])), int8.attention_int8.compute(a)
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert error <= allowed, f"{error}, all written: {bool(got.isfinite().all())}"
    exact = (torch.cat(x, 1).double().transpose(1, 2) for x in (k, v))
    true = F.scaled_dot_product_attention(a.q.double().transpose(1, 2), *exact).transpose(1, 2).flatten(2)
    near = [float((x.double() - true).norm() / true.norm()) for x in (got, want)]
    assert near[0] <= near[1] + 1e-3, near


def codes_of_tokens() -> None:
    """Codes and scales are those of the reference, bit for bit; strides of a slice, and rows that are not finite."""
    x = noise(B, 41, 2 * HEADS, 18, seed=1)[:, :, ::2] * torch.logspace(-40, 30, 41).view(1, -1, 1, 1)
    x[0, 3, 1, 2], x[1, 40, 0, 17], x[1, 5] = torch.nan, torch.inf, 0.0
    for mean in (None, noise(B, HEADS, 18, seed=2)):
        got, scale = triton_int8.quantized(x, mean)
        want, scales = int8.quantized_rows(x if mean is None else x - mean.unsqueeze(1))
        assert torch.equal(scale.nan_to_num(-1.0), scales.squeeze(-1).transpose(1, 2).nan_to_num(-1.0))
        finite = scale.isfinite()
        assert torch.equal(got.float()[finite], want.transpose(1, 2)[finite]) and int((~finite).sum()) == 2


def integers_that_are_not_finite(place: str) -> None:
    """NaN in a query stays in its row; in a key it reaches every row of its head."""
    q, k, v = (noise(1, n, 2, 32, seed=n) for n in (5, 9, 10))
    (q if place == "query" else k)[0, 3, 1, 7] = torch.nan
    a = Attention(q, [k[:, :2], k[:, 2:]], [v[:, :2], v[:, 2:9]])
    got = triton_int8.attend(a, torch.stack([int8.key_mean(x) for x in a.k]))
    want = int8.attention_int8.compute(a)
    assert torch.equal(got.isnan(), want.isnan()) and bool(got.isnan().any()) and not bool(got.isnan().all())


def stored_integers(size: int, rows: int, span: int, spans: int, dtype: torch.dtype, **form: object) -> None:
    """Attention to stored integers as in the reference."""
    codec = Int8Attention()
    a = arguments(codec, codec, size=size, span=span, spans=spans, rows=rows, dtype=dtype, integers=True, **form)
    want = attention_packed.compute(a)
    for arch in (90, 100)[: 1 if dtype == torch.float32 else 2]:
        got = triton_stored.attend(a, arch)
        assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
        error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
        # The values of exact pieces are read as they are, those of integers differ by the rounding of weights.
        allowed = 2**-6 if form.get("exact", True) else 2**-10
        assert error <= allowed, f"{error}, all written: {bool(got.isfinite().all())}"


def samples_of_stored_integers() -> None:
    """The operator's own samples are within its bound."""
    found = [AttentionPacked(*s) for s in attention_packed.samples() if "int8_attention" in str(s)]
    assert len(found) == 2
    for a in found:
        a = AttentionPacked(a.q.float(), [k.float() for k in a.k], [v.float() for v in a.v], *a[3:])
        got, want = triton_stored.attend(a, 90), attention_packed.compute(a)
        assert float((got - want).abs().max() / want.abs().max()) <= attention_packed.max_error


def units_of_channels() -> None:
    """Scales of blocks that lie far apart, one of them 0, another NaN: what sums count in does not show."""
    codec = Int8Attention()
    a = arguments(codec, codec, span=260, spans=2, integers=True, exact=(3,))
    scale = a.packed_v[1]
    scale[:, 0, 0, :, 0], scale[:, 0, 1, :, 0], scale[:, 1, 0, :, 0] = 1e-30, 1e4, 0.0
    scale[:, 1, :, :, 1] = 1e-20
    got, want = triton_stored.attend(a, 90), attention_packed.compute(a)
    assert bool((got - want).isfinite().all())
    error = (got - want).abs().unflatten(2, (HEADS, -1)).amax((0, 1, 2))
    assert bool((error <= 2e-2 * want.abs().unflatten(2, (HEADS, -1)).amax((0, 1, 2))).all()), error
    scale[1, 0, 1, 2, 5] = torch.nan
    got, want = triton_stored.attend(a, 90), attention_packed.compute(a)
    assert torch.equal(got.isnan(), want.isnan()) and int(got.isnan().sum()) == 5


def stored_that_are_not_finite(place: str) -> None:
    """NaN in a query stays in its row; in a stored key it reaches every row of its head."""
    codec = Int8Attention()
    a = arguments(codec, codec, integers=True, gone=4)
    if place == "query":
        a.q[1, 2, 1, 3] = torch.nan
    elif place == "key":
        a.packed_k[1][1, 30, 1] = torch.nan
    else:
        a.packed_k[2][1, 1, 1, 3] = torch.nan
    got, want = triton_stored.attend(a, 90), attention_packed.compute(a)
    assert torch.equal(got.isnan(), want.isnan()) and bool(got.isnan().any()) and not bool(got.isnan().all())


def stored_nothing() -> None:
    """No span and no piece: zeros; only pieces: attention in 8 bits."""
    codec = Int8Attention()
    a = arguments(codec, codec, integers=True, exact=(6,))
    none = [[t[:, :0] for t in tensors] for tensors in (a.packed_k, a.packed_v)]
    a = a._replace(packed_k=none[0], packed_v=none[1], cos=a.cos[:0], sin=a.sin[:0])
    pieces = Attention(a.q, a.k, a.v)
    assert torch.equal(triton_stored.attend(a, 90), triton_int8.attend(pieces, int8.key_mean(a.k[0]).unsqueeze(0)))
    a = a._replace(k=[a.k[0][:, :0]], v=[a.v[0][:, :0]])
    assert torch.equal(triton_stored.attend(a, 90), torch.zeros(B, 5, HEADS * 32))


def float8_values(size: int, lengths: tuple[int, ...], rows: int, dtype: torch.dtype, arch: int = 90) -> None:
    """Attention with float8 weights and values as in the reference, but for weights that lie between two numbers."""
    q, new = noise(B, rows, HEADS, size, seed=1), noise(B, sum(lengths), HEADS, 2 * size, seed=2) + 1
    k, v = (list(x.to(dtype).split(lengths, 1)) for x in (new[..., :size], new[..., size:]))
    a = Attention(q.to(dtype), k, v)
    got = triton_int8_fp8.attend(a, torch.stack([int8.key_mean(x) for x in k]), arch)
    want = int8_fp8.attention_int8_fp8.compute(a)
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
    error = (got.float() - want.float()).abs() / want.float().abs().max()
    assert float(error.max()) <= 2**-6 and float(error.mean()) <= 2e-4, (error.max(), error.mean())


def codes_of_values() -> None:
    """Codes and scales are those of the reference, bit for bit, side by side by token, with zeros behind the last."""
    v = noise(B, 70, 2 * HEADS, 18, seed=1)[:, :, ::2] * torch.logspace(-40, 30, 18)
    v[0, 3, 1, 2], v[1, 40, 0, 17], v[1, :, 2, 5] = torch.nan, torch.inf, 0.0
    scale = triton_int8_fp8.value_scale(v)
    got = triton_int8_fp8.quantized_values(v, scale)
    want, scales = int8_fp8.quantized_values(v)
    assert torch.equal(scale.nan_to_num(-1.0), scales.squeeze(2).nan_to_num(-1.0)) and int(scale.isnan().sum()) == 2
    assert got.shape == (B, HEADS, 18, 128) and not got[..., 70:].float().any()
    assert torch.equal(got[..., :70].float(), want.transpose(2, 3).float())


def every_rounding() -> None:
    """Numbers between two of float8, ties too, go where torch rounds them."""
    held = torch.arange(127, dtype=torch.uint8).view(float8.E4M3).float()
    near = torch.cat([held[:-1] + part * held.diff() for part in (0.0, 0.49, 0.5, 0.51)])
    x = torch.cat([near, -near]).contiguous()
    y = torch.zeros(1024, dtype=float8.E4M3)
    _float8_kernel[(1,)](torch.cat([x, x.new_zeros(1024 - len(x))]), y, BLOCK=1024)
    assert torch.equal(y[: len(x)].float(), float8.round_to(x).float())


@jit
def _float8_kernel(x_ptr: Pointer, y_ptr: Pointer, BLOCK: constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, triton_int8_fp8.to_float8(tl.load(x_ptr + at), False))


def float8_that_is_not_finite(place: str) -> None:
    """NaN in a query stays in its row, in a value in its channel; in a key it reaches every row of its head."""
    q, k, v = (noise(1, n, 2, 32, seed=n) for n in (5, 9, 10))
    {"query": q, "key": k, "value": v}[place][0, 3, 1, 7] = torch.nan
    a = Attention(q, [k[:, :2], k[:, 2:]], [v[:, :2], v[:, 2:9]])
    got = triton_int8_fp8.attend(a, torch.stack([int8.key_mean(x) for x in a.k]), 90)
    want = int8_fp8.attention_int8_fp8.compute(a)
    assert torch.equal(got.isnan(), want.isnan()) and bool(got.isnan().any()) and not bool(got.isnan().all())


CASES: dict[str, Callable[[], None]] = {
    "int8-attention-codes": codes_of_tokens,
    "int8-attention": lambda: integers(32, (9, 0, 5), 7, torch.float32, 2**-6),
    "int8-attention-odd-size": lambda: integers(18, (41,), 5, torch.float32, 2**-6),
    "int8-attention-wide": lambda: integers(70, (30, 3), 67, F16, 2**-6),
    "int8-attention-nan-query": lambda: integers_that_are_not_finite("query"),
    "int8-attention-nan-key": lambda: integers_that_are_not_finite("key"),
    "stored-integers": lambda: stored_integers(32, 7, 23, 3, torch.float32),
    "stored-integers-alone": lambda: stored_integers(80, 5, 23, 3, torch.float32, exact=()),
    "stored-integers-evicted": lambda: stored_integers(64, 70, 270, 2, torch.float32, gone=233, exact=()),
    "stored-integers-evicted-block": lambda: stored_integers(18, 5, 530, 1, torch.float32, gone=259),
    "stored-integers-wide": lambda: stored_integers(128, 131, 70, 2, F16, gone=69),
    "stored-integers-one-token": lambda: stored_integers(32, 3, 1, 3, torch.float32),
    "stored-integers-samples": samples_of_stored_integers,
    "stored-integers-units": units_of_channels,
    "stored-integers-nan-query": lambda: stored_that_are_not_finite("query"),
    "stored-integers-nan-key": lambda: stored_that_are_not_finite("key"),
    "stored-integers-nan-mean": lambda: stored_that_are_not_finite("mean"),
    "stored-integers-nothing": stored_nothing,
    "float8-values": lambda: float8_values(32, (9, 0, 70), 7, torch.float32),
    "float8-values-odd-size": lambda: float8_values(18, (41,), 5, torch.float32),
    "float8-values-wide": lambda: float8_values(70, (130, 3), 67, F16, 120),
    "float8-values-codes": codes_of_values,
    "float8-values-rounding": every_rounding,
    "float8-values-nan-query": lambda: float8_that_is_not_finite("query"),
    "float8-values-nan-key": lambda: float8_that_is_not_finite("key"),
    "float8-values-nan-value": lambda: float8_that_is_not_finite("value"),
}
